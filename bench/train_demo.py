"""Trains edgemed-demo: SmolLM2-135M-Instruct + a DINOv2 tower in SigLIP form + a two-layer projector, through `edgemed finetune`.

    python -m bench.train_demo --base SmolLM2.Q4_1.gguf --tower DIR --data DIR --out DIR

Needs the `train` extra; meant for one data-centre GPU (dated results in docs/LOG.md). Afterwards the checkpoint is scored on SLAKE
validate with transformers, also with blank images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def build_base(gguf: Path, out: Path) -> None:
    """The GGUF as an HF checkpoint (dequantised), with SmolLM2's own pre-tokenizer, which transformers leaves out of it."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # model.save_pretrained refuses what was read from a GGUF, so the parts are saved one by one
    out.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    """A recipe as TOML; only what recipes hold: scalars, lists, tables and arrays of tables."""
    lines = [
        f"{k} = {json.dumps(v)}"
        for k, v in values.items()
        if not isinstance(v, (dict, list)) or (isinstance(v, list) and not isinstance(v[0], dict))
    ]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{k} = {json.dumps(v)}" for k, v in value.items())]
        elif isinstance(value, list) and isinstance(value[0], dict):
            for row in value:
                lines += [f"[[{key}]]", *(f"{k} = {json.dumps(v)}" for k, v in row.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def run_stage(stage: str, recipe: Path) -> float:
    """Seconds of one stage, run through the command line."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "edgemed", "finetune", stage, "--config", str(recipe)], check=True)
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with slake/, vqa-rad/, pathvqa/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--align-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--minutes", type=float, help="end the vqa stage after so many, its schedule with it")
    parser.add_argument("--eval-limit", type=int, help="score so many questions only")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--llm-rate", type=float, default=8e-4)
    parser.add_argument("--tower-rate", type=float, default=5e-5)
    parser.add_argument("--rounds", type=int, default=6, help="questions about one image in one conversation, in the vqa stage")
    parser.add_argument("--slake-repeat", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--cpu", action="store_true", help="no bf16: a dry run")
    args = parser.parse_args()
    out, data = args.out.resolve(), args.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "base" / "config.json").is_file():
        build_base(args.base.resolve(), out / "base")
    common: dict[str, Any] = {
        "template": "chatml",
        "capitalise": True,
        "image": {
            "size_px": 224,
            "mode": "pad",
            "pad_colour": [0, 0, 0],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "data": [
            {"name": "slake", "path": str(data / "slake"), "repeat": args.slake_repeat},
            {"name": "vqa-rad", "path": str(data / "vqa-rad"), "split": "all", "repeat": 2},
            {"name": "pathvqa", "path": str(data / "pathvqa")},
        ],
        "max_tokens": 1024,
        "seed": 1,
    }
    optim = {"batch_size": args.batch_size, "bf16": not args.cpu, "workers": 0 if args.cpu else 8, "warmup_ratio": 0.05}
    augment = {"rotate_deg": 8.0, "scale": 0.08, "shift": 0.04}
    join = {
        "llm": str(out / "base"),
        "tower": str(args.tower.resolve()),
        "image_token": "<filename>",
        "feature_layer": -2,
        "tower_activation": "gelu_pytorch_tanh",
    }
    align = {**common, "join": join, "optim": {**optim, "projector_rate": 2e-3}}
    path = write_toml(
        out / "align.toml", {**align, "output": str(out / "align"), "optim": {**align["optim"], "max_steps": args.align_steps}}
    )
    print(f"align: {args.align_steps} steps, {run_stage('align', path):.0f} s", flush=True)
    rates = {"projector_rate": 3e-4, "llm_rate": args.llm_rate, "tower_rate": args.tower_rate, "weight_decay": 0.01}
    vqa = {
        **common,
        "model": str(out / "align"),
        "rounds": args.rounds,
        "lora": {"rank": args.rank, "alpha": args.rank, "dropout": args.dropout},
        "optim": {**optim, **rates, **augment},
    }
    limits = {"max_steps": args.steps, **({"max_minutes": args.minutes} if args.minutes else {})}
    path = write_toml(out / "vqa.toml", {**vqa, "output": str(out / "vqa"), "optim": {**vqa["optim"], **limits}})
    print(f"vqa: {args.steps} steps, {run_stage('vqa', path):.0f} s", flush=True)
    for extra in ([], ["--blank"]):
        command = [sys.executable, "-m", "edgemed.evaluation.reference", str(out / "vqa"), "--dataset", f"slake={data / 'slake'}", *extra]
        limit = ["--limit", str(args.eval_limit)] if args.eval_limit else []
        subprocess.run([*command, "--split", "validate", *limit], check=True)


if __name__ == "__main__":
    main()
