"""Trains edgemed-demo on one data-centre GPU: SmolLM2-135M-Instruct + a DINOv2 tower in SigLIP form + a two-layer projector.

    python -m bench.train_demo --base BASE --tower DIR --data DIR --out DIR --image-size 336 --develop --variant a:140 --variant b:300

BASE is the LLM as an HF checkpoint, or a folder that holds its config and tokenizer with `--gguf FILE` for the weights. All three
stages are `edgemed finetune`'s own, run in this process (or these, under torchrun), since importing torch three times costs a lent
machine half a minute: align on descriptions that bench/demo_sets.py makes from the sets' answers, instruct on conversations made of
them (a LoRA begins), vqa on the sets themselves (the LoRA goes on). A variant is a name, seconds and recipe keys
(`b:300,optim.llm_rate=4e-4`) of the last stage; all start from one instruct stage.

A fifth of the images of VQA-RAD and of PathVQA, and SLAKE's validation split, are for reporting and never trained on. `--develop`
keeps more images back and scores on those instead, so that choices need not be made on what is reported. A score is the share of
questions whose every answer token is the model's first choice given those before it, which for closed questions is the accuracy of
greedy decoding; with the weights rounded to 4 bits too, and blank. OUT/NAME gets adapter, tower and projector in fp16 and run.json;
`--assemble OUT/NAME` makes the stage's checkpoint from them, `--assemble edgemed/demo` from what ships. `--instructed DIR` begins with
the first two stages that an earlier run left there, `--continued DIR` with a checkpoint that `--assemble` made: its last stage goes on,
with a schedule of its own. bench/demo_rounds.py runs variants side by side and then the best of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.demo_chinese import translated
from bench.demo_parts import BLOCK, load_parts, save_parts
from bench.demo_sets import build_sets
from edgemed.core.contract import count_image_tokens
from edgemed.core.conversation import find_template
from edgemed.data import load_named, parse_dataset
from edgemed.finetune import stage
from edgemed.finetune.augment import normalise_pixels
from edgemed.finetune.examples import IGNORE, Collator, Examples
from edgemed.finetune.export import save_checkpoint
from edgemed.finetune.model import load_model
from edgemed.finetune.progress import Progress
from edgemed.finetune.recipe import DataRecipe, Recipe
from edgemed.finetune.rounding import LoraRounding
from edgemed.finetune.stage import load_set

BEGIN = time.monotonic()
MAIN = os.environ.get("RANK", "0") == "0"
IMAGE = {"mode": "pad", "pad_colour": [0, 0, 0], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Set, split and share: what is reported, and what choices are made by.
REPORTED = ("slake:validate", "vqa-rad:all@1/5", "pathvqa:train@1/5")
DEVELOP = ("slake:train@1/12", "vqa-rad:all@2/20", "pathvqa:train@2/20")
SETS: tuple[dict[str, Any], ...] = (
    {"name": "slake", "repeat": 3},
    {"name": "vqa-rad", "split": "all", "repeat": 3},
    {"name": "pathvqa", "split": "train", "merge_answers": True},
)
HELD = {"vqa-rad": ["1/5"], "pathvqa": ["1/5"]}
HELD_TO_DEVELOP = {"slake": ["1/12"], "vqa-rad": ["1/5", "2/20"], "pathvqa": ["1/5", "2/20"]}


def log(*what: object) -> None:
    if MAIN:
        print(f"[{time.monotonic() - BEGIN:6.1f}]", *what, flush=True)


def write_base(gguf_path: Path, out: Path) -> None:
    """The Llama-family GGUF's weights as OUT/model.safetensors in fp16, beside the config and the tokenizer that are there."""
    import gguf

    config = json.loads((out / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    state = {}
    for tensor in gguf.GGUFReader(gguf_path).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in ("token_embd.weight", "output_norm.weight"):
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{BLOCK[kind]}.weight"
            if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of each head's rotary pairs
                weight = weight.reshape(-1, head // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        state[name] = torch.from_numpy(np.ascontiguousarray(weight)).half()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


class Probe:
    """Teacher-forced scores on sets named as `edgemed eval --dataset` names them; up to eight questions share an image."""

    def __init__(self, data: Path, names: Sequence[str], recipe: Recipe, tokenizer: Any, config: Any, limit: int | None) -> None:
        tower = config.vision_config
        tokens = count_image_tokens(tower.image_size, tower.patch_size, tower.model_type, config.vision_feature_select_strategy)
        template = find_template(recipe.template)
        self.sets: dict[str, tuple[dict[str, str], Examples]] = {}
        for name in names:
            found = load_named(parse_dataset(f"{name}={data / name.split(':')[0]}", "train"))
            samples = [s for s in found if s.answer_type in ("closed", "open")][:limit]
            limits = recipe.image, config.image_token_id, tokens, recipe.max_tokens, recipe.capitalise, 8
            self.sets[name] = {s.id: s.answer_type for s in samples}, Examples([(samples, 1)], tokenizer, template, *limits)
        self.collate = Collator(tokenizer.pad_token_id or 0)
        self.recipe = recipe

    def score(self, model: Any, blank: bool = False) -> dict[str, dict[str, float]]:
        """Of each set the percentages of closed and of open questions whose every answer token is the first choice."""
        training = model.training
        model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            out = {name: self._score(model, kinds, examples, blank) for name, (kinds, examples) in self.sets.items()}
        model.train(training)
        return out

    def _score(self, model: Any, kinds: dict[str, str], examples: Examples, blank: bool, batch: int = 24) -> dict[str, float]:
        device = next(model.parameters()).device
        right: dict[str, list[bool]] = {"closed": [], "open": []}
        for start in range(0, len(examples), batch):
            items = [examples[i] for i in range(start, min(start + batch, len(examples)))]
            inputs = {k: v.to(device) for k, v in self.collate(items).items()}
            labels = inputs.pop("labels")
            shown = normalise_pixels(inputs.pop("pixels"), self.recipe.image, None)
            if blank:
                shown = normalise_pixels(torch.zeros_like(shown, dtype=torch.uint8).permute(0, 2, 3, 1), self.recipe.image, None)
            first = max(1, int((labels != IGNORE).any(0).int().argmax()))
            keep = torch.arange(first - 1, labels.shape[1] - 1, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                choice = model(**inputs, pixel_values=shown, logits_to_keep=keep).logits.argmax(-1)
            wanted = labels[:, first:]
            hits = ((choice == wanted) | (wanted == IGNORE)).tolist()
            for (row, _), hit in zip(items, hits, strict=True):
                bounds = [*(row.starts or (first,)), labels.shape[1]]
                for name, begin, end in zip(row.names, bounds, bounds[1:], strict=False):
                    right[kinds[name]].append(all(hit[max(0, begin - first) : end - first]))
        return {k: round(100 * sum(v) / max(1, len(v)), 1) for k, v in right.items()}


def assemble(parts: Path, base: Path, tower: Path, out: Path) -> None:
    """The stage's checkpoint from what `save_parts` wrote, or from edgemed/demo."""
    from peft import set_peft_model_state_dict
    from transformers import AutoTokenizer

    run = json.loads((parts / "run.json").read_text())
    join = {**run["join"], "llm": base, "tower": tower}
    optim = {**run["recipe"]["optim"], "bf16": False}
    lora = {**run["recipe"]["lora"], "adapter": None}  # the whole of it is in PARTS
    own = {"model": None, "join": join, "output": out, "save_dtype": "float32", "optim": optim, "lora": lora}
    recipe = Recipe.model_validate({**run["recipe"], **own})
    model, tokenizer = load_model(recipe)
    adapter, vision = load_parts(parts, model)
    set_peft_model_state_dict(model, adapter)
    rest = model.get_base_model().load_state_dict(vision, strict=False)
    assert not rest.unexpected_keys, rest.unexpected_keys[:3]
    save_checkpoint(recipe, model, AutoTokenizer.from_pretrained(base), run)


def parse_variant(text: str) -> tuple[str, float, dict[str, Any]]:
    """'name:seconds,key=value,…' → (name, seconds, recipe keys)."""
    head, *keys = text.split(",")
    name, seconds = head.split(":")
    return name, float(seconds), {k: json.loads(v) for k, v in (key.split("=") for key in keys)}


def merge_keys(recipe: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """The recipe with 'part.key', 'part.number.key' or 'key' set."""
    merged = json.loads(json.dumps(recipe, default=str))
    for key, value in keys.items():
        *path, last = key.split(".")
        place = merged
        for part in path:
            place = place[int(part) if isinstance(place, list) else part]
        place[last] = value
    return dict(merged)


def stages(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The recipes of align, instruct and vqa, as tables."""
    data, out = args.data.resolve(), args.out.resolve()
    held = HELD_TO_DEVELOP if args.develop else HELD
    sets = [{**entry, "path": data / entry["name"], "hold_out": held.get(entry["name"], [])} for entry in SETS]
    loaded = {entry["name"]: load_set(DataRecipe.model_validate(entry | {"merge_answers": False})) for entry in sets}
    images = {sample.image for sample in loaded["slake"] if sample.image}
    more = build_sets(loaded, out / "made", translated=translated(data / "slake", images) if args.translated else ())
    log("rows", {name: len(samples) for name, samples in loaded.items()}, more)
    made = {kind: {"name": "llava", "path": out / "made" / f"{kind}.json"} for kind in more}
    captions, conversations = made["captions"], made["conversations"]
    # minutes of a hired machine are for training, not for checkpoints
    optim: dict[str, Any] = {
        "workers": 0 if args.cpu else args.workers,
        "bf16": not args.cpu,
        "save_steps": 0,
        "batch_size": args.batch_size,
        "warmup_ratio": 0.12 if args.compile else 0.05,  # by time, of which compiling takes half a minute
        "max_steps": args.max_steps,
        "compile": args.compile,
    }
    common: dict[str, Any] = {
        "template": "chatml",
        "capitalise": True,
        "save_dtype": "float32",
        "image": IMAGE | {"size_px": args.image_size},
        "max_tokens": 2048,
        "pack": args.pack,
        "seed": args.seed,
    }
    join = {
        "llm": args.base,
        "tower": args.tower,
        "image_token": "<filename>",
        "feature_layer": -2,
        "tower_activation": "gelu_pytorch_tanh",
        "image_size_px": args.image_size,
    }
    moved = {"rotate_deg": 8.0, "scale": 0.08, "shift": 0.04}
    lora = {"rank": args.rank, "alpha": args.rank, "dropout": 0.05}
    learning = {"projector_rate": 3e-4, "llm_rate": 8e-4, "tower_rate": 5e-5, "weight_decay": 0.01}
    # too short to be worth compiling
    brief = {"projector_rate": 2e-3, "max_minutes": args.align_seconds / 60, "compile": False, "warmup_ratio": 0.05}
    align = {"optim": optim | brief, "data": [captions], "join": join}
    brief = {"compile": False, "warmup_ratio": 0.05, "max_minutes": args.instruct_seconds / 60}
    instruct = {
        "optim": optim | moved | {"projector_rate": 3e-4, "llm_rate": 8e-4} | brief,
        "data": [conversations, captions],
        "model": out / "align",
        "lora": lora,
    }
    model = (args.continued or (args.instructed or out) / "instruct").resolve()
    vqa = {
        "optim": optim | moved | learning,
        "data": [*sets, captions, *(made[kind] for kind in ("facts", "translated") if getattr(args, kind))],
        "model": model,
        "lora": lora | {"rounding": 1.0, "adapter": model / "adapter"},
    }
    tables = {"align": align, "instruct": instruct, "vqa": vqa}
    return {name: {**common, **table, "stage": name, "output": out / name} for name, table in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="write BASE/model.safetensors from this file first")
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with slake/, vqa-rad/, pathvqa/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--assemble", type=Path, metavar="PARTS", help="make the checkpoint OUT from a variant's parts, and stop")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--align-seconds", type=float, default=20)
    parser.add_argument("--instruct-seconds", type=float, default=40)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--instructed", type=Path, metavar="DIR", help="an earlier run's OUT, whose first two stages are taken")
    start.add_argument("--continued", type=Path, metavar="DIR", help="a checkpoint made by --assemble, whose training goes on")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--variant", action="append", default=[], help="name:seconds[,key=value…]")
    parser.add_argument("--develop", action="store_true", help="keep more images back, to choose by")
    parser.add_argument("--facts", action="store_true", help="more questions on SLAKE's images, which follow from the given ones")
    parser.add_argument("--translated", action="store_true", help="SLAKE's Chinese questions on its training images, in English")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pack", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=20_000)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    parser.add_argument("--eval-limit", type=int)
    parser.add_argument("--unscored", action="store_true", help="save the parts and stop; files are scored elsewhere")
    parser.add_argument("--cpu", action="store_true", help="no bf16: a dry run")
    args = parser.parse_args()
    if args.continued and args.develop:
        parser.error("expected --develop without --continued: what goes on has learnt from the images that would be kept back")
    if args.gguf:
        if "RANK" in os.environ:
            parser.error("expected --gguf in one process: write the base first")
        write_base(args.gguf, args.base)
        log("base written")
    if args.assemble:
        assemble(args.assemble, args.base, args.tower, args.out)
        return
    recipes = stages(args)
    for name in () if args.instructed or args.continued else ("align", "instruct"):
        stage.train(Recipe.model_validate(recipes[name]), Told(name))
        log(name, "done")
    for text in args.variant:
        train_variant(args, recipes, text)


class Told:
    """Prints how a stage goes at its first step and every 20 seconds: what a machine that is taken away leaves behind."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, float("-inf")

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self.last >= 20:
            self.last = time.monotonic()
            p = progress
            log(self.name, f"step {p.step}, loss {p.loss:.3f}, {p.samples_per_s:.0f} rows/s, {p.memory_bytes / 1e9:.1f} GB")


def earlier_stages(args: argparse.Namespace) -> dict[str, Any]:
    """What run.json says of the stages before; of one that goes on, its first part with those before it."""
    if args.continued:
        return {"vqa": json.loads((args.continued / "run.json").read_text())}
    start = args.instructed or args.out
    return {stage: json.loads((start / stage / "run.json").read_text()) for stage in ("align", "instruct")}


def train_variant(args: argparse.Namespace, recipes: dict[str, dict[str, Any]], text: str) -> None:
    """The last stage with a variant's keys, scored and saved in parts."""
    name, seconds, keys = parse_variant(text)
    out = args.out.resolve() / name
    recipe = Recipe.model_validate(merge_keys({**recipes["vqa"], "output": out}, {**keys, "optim.max_minutes": seconds / 60}))

    earlier = earlier_stages(args)  # read before minutes are spent

    def save(recipe: Recipe, model: Any, tokenizer: Any, run: dict[str, Any]) -> None:
        losses = [round(e["loss"], 3) for e in run["loss"]]
        log(name, run["steps"], "steps in", seconds, "s; loss", losses[:: max(1, len(losses) // 12)])
        run["join"] = json.loads(json.dumps(recipes["align"]["join"], default=str))
        run["stages"] = earlier
        save_parts(out, model, run)  # before anything else can go wrong, or the machine be taken away
        if args.unscored:
            return
        probe = Probe(args.data, DEVELOP if args.develop else REPORTED, recipe, tokenizer, model.get_base_model().config, args.eval_limit)
        rounding = LoraRounding(model)
        rounding.apply(True)
        run["probe"] = {"rounded": probe.score(model)}
        log(name, "rounded", run["probe"]["rounded"])
        rounding.apply(False)
        run["probe"] |= {"exact": probe.score(model), "blank": probe.score(model, blank=True)}
        log(name, run["probe"])
        (out / "run.json").write_text(json.dumps(run))

    stage.train(recipe, Told(name), save=save)
    shutil.rmtree(out / "trainer", ignore_errors=True)
    log(name, "done")


if __name__ == "__main__":
    main()
