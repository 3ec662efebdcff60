"""Fine-tuning at full width on one GPU: speed against the seed's recipe and without cached features, and a LoRA in 6 GB.

    python -m bench.finetune_gpu align OUT          # samples/s of the align stage with cached features and without
    python -m bench.finetune_gpu instruct OUT       # samples/s and model FLOPs utilisation, ours and HF's Trainer as the seed uses it
    python -m bench.finetune_gpu lora OUT           # a LoRA while ballast leaves 6 GB of the GPU's memory
    python -m bench.finetune_gpu sharded OUT        # losses of all GPUs with FSDP beside one's: tiny shapes, float32, torchrun
    python -m bench.finetune_gpu instruct OUT --toy # a dry run on any machine

The model is TinyLLaVA-1.5B's shape with random weights (bench/full_width.py), the data are made: conversations of one to five rounds of
words about images of noise, since speed does not depend on what they say. Ours are the stages of `edgemed finetune` themselves, run in
this process. The seed's recipe: HF's Trainer, random batches padded to their longest row, gradient checkpointing, the tower computed
at each step, logits of every position. The first steps of each run are not measured. Utilisation: 6 FLOPs a weight and token of the
language model, 6·layers·width·length a token for causal attention (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, halved), the
head where logits are needed, 2 a weight for a tower that is computed; nothing for what gradient checkpointing computes again. Against
the dense bf16 peak of the device, where it is known. Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.full_width import MODELS, Llm, Model, Tower, save_hf, save_tokenizer
from edgemed.core.conversation import find_template
from edgemed.core.units import format_bytes
from edgemed.data import load_samples
from edgemed.finetune import stage
from edgemed.finetune.augment import normalise_pixels
from edgemed.finetune.examples import IGNORE, Collator, Examples
from edgemed.finetune.model import load_model
from edgemed.finetune.progress import Progress
from edgemed.finetune.recipe import Recipe
from edgemed.report.tables import print_table

TOY = Model(Llm("llama", 2, 64, 128, 4, 2, 2048), Tower("siglip", 2, 32, 64, 2, 56), -1)
# Dense bf16, from NVIDIA's data sheets (H100 SXM and H200 SXM: 1979 TFLOP/s with sparsity, half of that without).
PEAK_FLOPS = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12}
WORDS = ("the", "left", "lung", "is", "clear", "there", "no", "effusion", "heart", "size", "normal", "and", "a", "small", "nodule", "seen")
LORA_CAP_BYTES = 6_000_000_000


@dataclass(frozen=True)
class Size:
    """How much is run. `rows` a step, of which `at_once` in one micro-batch."""

    model: Model
    images: int
    rows: int
    at_once: int
    steps: int
    skipped: int


FULL = Size(MODELS["tiny"], 256, 64, 16, 16, 4)
SMALL = Size(TOY, 8, 4, 2, 4, 1)


@dataclass(frozen=True)
class Speed:
    """One run. `tokens` a row on average; memory at its highest."""

    what: str
    samples_per_s: float
    tokens: float
    mfu: float | None
    memory_bytes: int
    loss: float


def make_material(out: Path, size: Size) -> None:
    """Model and data in OUT, once."""
    model, data = out / "model", out / "data"
    if not (model / "tokenizer.json").is_file():
        model.mkdir(parents=True, exist_ok=True)
        save_hf(model, size.model)
        save_tokenizer(model, size.model.llm.vocab)
    if not (data / "train.json").is_file():
        data.mkdir(parents=True, exist_ok=True)
        draw, side = random.Random(0), size.model.tower.image
        rows = [_row(i, data, draw, side) for i in range(size.images)]
        (data / "train.json").write_text(json.dumps(rows))


def _row(number: int, data: Path, draw: random.Random, side: int) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(data / f"{number}.jpg")
    rounds = []
    for k in range(draw.randint(1, 5)):
        question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(*limits))) for limits in ((6, 16), (10, 60)))
        rounds += [{"from": "human", "value": f"<image>\n{question}" if k == 0 else question}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number}.jpg", "conversations": rounds}


def make_recipe(out: Path, size: Size, name: str, stage_name: str, optim: dict[str, Any], **more: Any) -> Recipe:
    """A recipe on OUT's material."""
    gpu = torch.cuda.is_available()
    image = {"size_px": size.model.tower.image, "mode": "pad", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    settings = {
        "batch_size": size.at_once,
        "accumulation": size.rows // size.at_once,
        "max_steps": size.steps,
        "save_steps": 0,
        "bf16": gpu,
        "projector_rate": 1e-5,
        "llm_rate": 1e-5,
    }
    return Recipe.model_validate(
        {
            "stage": stage_name,
            "output": out / name,
            "model": out / "model",
            "template": "v1",
            "image": image,
            "data": [{"name": "llava", "path": out / "data"}],
            "optim": settings | optim,
            **more,
        }
    )


class Watch:
    """Times the steps after the skipped ones."""

    def __init__(self, size: Size) -> None:
        self.size, self.begin, self.end, self.loss = size, 0.0, 0.0, float("nan")

    def __call__(self, progress: Progress) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if progress.step == self.size.skipped:
            self.begin = time.monotonic()
        self.end, self.loss = time.monotonic(), progress.loss

    @property
    def samples_per_s(self) -> float:
        return (self.size.steps - self.size.skipped) * self.size.rows / (self.end - self.begin)


def run_ours(out: Path, size: Size, what: str, recipe: Recipe, tower_runs: bool) -> Speed:
    """A stage of edgemed's own, without its export."""
    watch = Watch(size)
    reset_memory()
    stage.train(recipe, watch, save=lambda *result: None)
    return describe(what, size, recipe, watch.samples_per_s, watch.loss, tower_runs)


def run_seed(out: Path, size: Size, recipe: Recipe) -> Speed:
    """HF's Trainer as the seed's commands use it, on the same rows."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    watch = Watch(size)
    reset_memory()
    model, tokenizer = load_model(recipe)
    examples, collate = rows_of(recipe, model, tokenizer), Collator(0)

    def batch(rows: Any) -> dict[str, Any]:
        made = collate(rows)
        made["pixel_values"] = normalise_pixels(made.pop("pixels"), recipe.image, None)
        return made

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch(Progress(state.global_step, size.steps, float("nan"), 0.0, 0.0, 0))

    arguments = TrainingArguments(
        output_dir=str(out / "seed"),
        max_steps=size.steps,
        per_device_train_batch_size=size.at_once,
        gradient_accumulation_steps=size.rows // size.at_once,
        learning_rate=1e-5,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=8 if torch.cuda.is_available() else 0,
        disable_tqdm=True,
        **stage.computing_again(),
    )
    result = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=batch, callbacks=[Told()]).train()
    return describe("HF Trainer, the seed's recipe", size, recipe, watch.samples_per_s, result.training_loss, True)


def rows_of(recipe: Recipe, model: Any, tokenizer: Any) -> Examples:
    """The recipe's rows with pixels."""
    return stage.build_examples(recipe, [("llava", 1, load_samples("llava", recipe.data[0].path, "train"))], model, tokenizer)


def reset_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def describe(what: str, size: Size, recipe: Recipe, samples_per_s: float, loss: float, tower_runs: bool) -> Speed:
    """With tokens a row and utilisation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    tower, patches = size.model.tower, (size.model.tower.image // 14) ** 2
    samples = load_samples("llava", recipe.data[0].path, "train")
    limits = recipe.image, size.model.llm.vocab - 1, patches, recipe.max_tokens
    rows = Examples([(samples, 1)], tokenizer, find_template(recipe.template), *limits, preload_bytes=0)
    unfolded = [rows.rows[i].unfold() for i in range(len(rows))]
    lengths = [len(row.ids) for row in unfolded]
    logits = [len(row.ids) - next(i for i, label in enumerate(row.labels) if label != IGNORE) for row in unfolded]
    flops = sum(map(lambda t, n: llm_flops(size.model.llm, t, n), lengths, logits)) / len(lengths)
    if tower_runs:
        flops += 2 * patches * tower.layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.ffn)
    peak = next((p for name, p in PEAK_FLOPS.items() if torch.cuda.is_available() and name in torch.cuda.get_device_name()), None)
    memory = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    mfu = flops * samples_per_s / peak if peak and recipe.stage == "instruct" and not recipe.lora else None
    return Speed(what, samples_per_s, sum(lengths) / len(lengths), mfu, memory, loss)


def llm_flops(llm: Llm, tokens: int, logits: int) -> float:
    """Forward and backward of one row: see the module."""
    head_dim = llm.hidden // llm.heads
    attention = llm.hidden * head_dim * (2 * llm.heads + 2 * llm.kv_heads)
    weights = llm.layers * (attention + 3 * llm.hidden * llm.ffn)
    return 6.0 * (weights * tokens + llm.layers * llm.hidden * tokens**2 + llm.vocab * llm.hidden * logits)


def bench_align(out: Path, size: Size) -> list[Speed]:
    """Without cached features, then with them."""
    optim = {"compile": torch.cuda.is_available()}
    plain = make_recipe(out, size, "align-plain", "align", optim)
    cached = make_recipe(out, size, "align-cached", "align", optim, features={"folder": out / "features"})
    return [
        run_ours(out, size, "align, tower at each step", plain, True),
        run_ours(out, size, "align, cached features", cached, False),
    ]


def bench_instruct(out: Path, size: Size) -> list[Speed]:
    """The seed's recipe, then ours."""
    seed = make_recipe(out, size, "seed", "instruct", {})
    cached = {"features": {"folder": out / "features"}}
    ours = make_recipe(out, size, "instruct", "instruct", {"group_by_length": True, "compile": torch.cuda.is_available()}, **cached)
    return [run_seed(out, size, seed), run_ours(out, size, "edgemed finetune instruct", ours, False)]


def bench_lora(out: Path, size: Size) -> list[Speed]:
    """A LoRA beside ballast. The memory that the CUDA context takes counts as ours."""
    optim = {"gradient_checkpointing": True}
    recipe = make_recipe(out, size, "lora", "instruct", optim, lora={"rank": 16, "alpha": 32})
    with Ballast(LORA_CAP_BYTES):
        return [run_ours(out, size, "LoRA in 6 GB", recipe, True)]


class Ballast:
    """A process that takes all of the GPU's memory but `left_bytes`. Without a GPU: nothing."""

    CODE = (
        "import sys, torch\n"
        "torch.zeros(1, device='cuda')\n"
        "free = torch.cuda.mem_get_info()[0] - int(sys.argv[1])\n"
        "held = torch.empty(max(0, free), dtype=torch.uint8, device='cuda')\n"
        "print(torch.cuda.mem_get_info()[0], flush=True)\n"
        "sys.stdin.read()\n"
    )

    def __init__(self, left_bytes: int) -> None:
        self.left_bytes = left_bytes
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Ballast:
        if torch.cuda.is_available():
            command = [sys.executable, "-c", self.CODE, str(self.left_bytes)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.process.stdout is not None
            print(f"ballast leaves {format_bytes(int(self.process.stdout.readline()))}", file=sys.stderr)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def bench_sharded(out: Path, processes: int) -> int:
    """The same 20 steps in one process and, sharded, in `processes`; the exit code is 1 where a loss differs by more than 1e-4."""
    losses = {}
    for count in (1, processes):
        name = f"sharded-{count}"
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "bench.finetune_gpu", name, str(out)]
        subprocess.run([sys.executable, *command], check=True)
        losses[count] = [e["loss"] for e in json.loads((out / name / "run.json").read_text())["loss"]]
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses[1], losses[processes], strict=True))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print_table(device, ("processes", "first loss", "last loss"), [(str(n), f"{x[0]:.6f}", f"{x[-1]:.6f}") for n, x in losses.items()])
    print(json.dumps({"what": "sharded", "device": device, "processes": processes, "losses": losses, "largest_relative_difference": apart}))
    return int(apart > 1e-4)


def run_sharded(out: Path, name: str) -> None:
    """What torchrun starts: `name` ends in the number of processes."""
    optim = {"bf16": False, "sharding": not name.endswith("-1"), "projector_rate": 1e-3, "llm_rate": 1e-3}
    stage.train(make_recipe(out, replace(SMALL, steps=20), name, "instruct", optim, save_dtype="float32"))


BENCHES: dict[str, Callable[[Path, Size], list[Speed]]] = {"align": bench_align, "instruct": bench_instruct, "lora": bench_lora}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help=", ".join([*BENCHES, "sharded"]))
    parser.add_argument("out", type=Path, help="model, data and features are made here, and found again")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: a dry run")
    parser.add_argument("--rows-at-once", type=int, help="rows of one micro-batch")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny", help="TinyLLaVA-1.5B, or SmolLM2-135M under its tower")
    args = parser.parse_args()
    sharded = re.fullmatch(r"sharded(-\d+)?", args.what) is not None
    if args.what not in BENCHES and not sharded:
        parser.error(f"expected one of {', '.join(BENCHES)} and sharded, found {args.what}")
    size = SMALL if args.toy or sharded else FULL
    own = {"at_once": args.rows_at_once, "steps": args.steps, "model": None if size is SMALL else MODELS[args.model]}
    size = Size(**{**size.__dict__, **{k: v for k, v in own.items() if v}})
    out = args.out.resolve()
    if args.what.startswith("sharded-"):
        return run_sharded(out, args.what)
    make_material(out, size)
    if sharded:
        sys.exit(bench_sharded(out, max(2, torch.cuda.device_count())))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    speeds = BENCHES[args.what](out, size)
    rows = [
        (s.what, f"{s.samples_per_s:.1f}", f"{s.tokens:.0f}", "" if s.mfu is None else f"{s.mfu:.1%}", format_bytes(s.memory_bytes))
        for s in speeds
    ]
    print_table(device, ("run", "samples/s", "tokens a row", "MFU", "GPU memory"), rows)
    ratio = speeds[-1].samples_per_s / speeds[0].samples_per_s
    print(json.dumps({"what": args.what, "device": device, "runs": [asdict(s) for s in speeds], "ratio": ratio}))


if __name__ == "__main__":
    main()
