"""Trains edgemed-demo on one data-centre GPU: SmolLM2-135M-Instruct + a DINOv2 tower in SigLIP form + a two-layer projector.

    python -m bench.train_demo --base BASE --tower DIR --data DIR --out DIR --variant a:140 --variant b:300

BASE is the LLM as an HF checkpoint, or a folder that holds its config and tokenizer with `--gguf FILE` for the weights. Both stages are
`edgemed finetune`'s own, run in this process, since importing torch three times costs a lent machine half a minute. A variant is a
name, seconds and recipe keys (`b:300,optim.llm_rate=4e-4`); all start from one alignment. Each is scored on SLAKE validate: share
of questions whose every answer token is the model's first choice given those before it, which for closed questions is the accuracy
of greedy decoding; with the weights rounded to 4 bits too, and blank. OUT/NAME gets adapter, tower and
projector in fp16 and run.json; `--assemble OUT/NAME` makes the stage's checkpoint from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from edgemed.core.contract import count_image_tokens
from edgemed.core.conversation import find_template
from edgemed.data import load_samples
from edgemed.finetune import stage
from edgemed.finetune.examples import IGNORE, Collator, Examples
from edgemed.finetune.export import save_checkpoint
from edgemed.finetune.model import load_model
from edgemed.finetune.recipe import Recipe
from edgemed.finetune.rounding import LoraRounding

BEGIN = time.monotonic()
IMAGE = {"size_px": 224, "mode": "pad", "pad_colour": [0, 0, 0], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def log(*what: object) -> None:
    print(f"[{time.monotonic() - BEGIN:6.1f}]", *what, flush=True)


def write_base(gguf_path: Path, out: Path) -> None:
    """The Llama-family GGUF's weights as OUT/model.safetensors in fp16, beside the config and the tokenizer that are there."""
    import gguf

    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    config = json.loads((out / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    state = {}
    for tensor in gguf.GGUFReader(gguf_path).tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in ("token_embd.weight", "output_norm.weight"):
            name = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor.name]
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{names[kind]}.weight"
            if kind in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of each head's rotary pairs
                weight = weight.reshape(-1, head // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        state[name] = torch.from_numpy(np.ascontiguousarray(weight)).half()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


class Probe:
    """Teacher-forced scores on a split, as one batch after another of single questions."""

    def __init__(self, data: Path, recipe: Recipe, tokenizer: Any, config: Any, limit: int | None) -> None:
        self.samples = [s for s in load_samples("slake", data / "slake", "validate") if s.answer_type in ("closed", "open")][:limit]
        tower = config.vision_config
        tokens = count_image_tokens(tower.image_size, tower.patch_size, tower.model_type, config.vision_feature_select_strategy)
        template = find_template(recipe.template)
        self.examples = Examples([(self.samples, 1)], tokenizer, template, recipe.image, config.image_token_id, tokens, 2048, True)
        self.collate = Collator(tokenizer.pad_token_id or 0)
        self.recipe = recipe

    def score(self, model: Any, blank: bool = False, batch: int = 96) -> dict[str, float]:
        """Percent of closed and of open questions whose every answer token is the first choice."""
        device, training = next(model.parameters()).device, model.training
        model.eval()
        mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (self.recipe.image.mean, self.recipe.image.std))
        right: dict[str, list[bool]] = {"closed": [], "open": []}
        for start in range(0, len(self.samples), batch):
            inputs = self.collate([self.examples[i] for i in range(start, min(start + batch, len(self.samples)))])
            inputs = {k: v.to(device) for k, v in inputs.items()}
            labels, pixels = inputs.pop("labels"), inputs.pop("pixels").permute(0, 3, 1, 2).float() / 255
            first = max(1, int((labels != IGNORE).any(0).int().argmax()))
            keep = torch.arange(first - 1, labels.shape[1] - 1, device=device)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                shown = ((pixels * 0 if blank else pixels) - mean) / std
                choice = model(**inputs, pixel_values=shown, logits_to_keep=keep).logits.argmax(-1)
            wanted = labels[:, first:]
            exact = ((choice == wanted) | (wanted == IGNORE)).all(1).tolist()
            for sample, hit in zip(self.samples[start : start + batch], exact, strict=True):
                right[sample.answer_type].append(hit)
        model.train(training)
        return {k: round(100 * sum(v) / max(1, len(v)), 1) for k, v in right.items()}


def save_parts(out: Path, recipe: Recipe, model: Any, run: dict[str, Any]) -> None:
    """Adapter, tower and projector in fp16; layers of the tower that no feature passes through stay behind."""
    from peft import get_peft_model_state_dict

    out.mkdir(parents=True, exist_ok=True)
    adapter = {k: v.detach().half().cpu().contiguous() for k, v in get_peft_model_state_dict(model).items()}
    base = model.get_base_model()
    vision = base.config.vision_config.num_hidden_layers
    unused = [f"layers.{i}." for i in range(base.config.vision_feature_layer % (vision + 1), vision)]
    parts = {
        k: v.detach().half().cpu().contiguous()
        for k, v in base.state_dict().items()
        if ("vision_tower" in k or "multi_modal" in k) and not any(layer in k for layer in unused)
    }
    save_file(adapter, out / "adapter_model.safetensors")
    save_file(parts, out / "vision.safetensors")
    (out / "run.json").write_text(json.dumps(run))


def assemble(parts: Path, base: Path, tower: Path, out: Path) -> None:
    """The stage's checkpoint from what `save_parts` wrote."""
    from peft import set_peft_model_state_dict
    from transformers import AutoTokenizer

    run = json.loads((parts / "run.json").read_text())
    join = {**run["join"], "llm": base, "tower": tower}
    optim = {**run["recipe"]["optim"], "bf16": False}
    recipe = Recipe.model_validate({**run["recipe"], "model": None, "join": join, "output": out, "save_dtype": "float32", "optim": optim})
    model, tokenizer = load_model(recipe)
    set_peft_model_state_dict(model, {k: v.float() for k, v in load_file(parts / "adapter_model.safetensors").items()})
    vision = {k: v.float() for k, v in load_file(parts / "vision.safetensors").items()}
    rest = model.get_base_model().load_state_dict(vision, strict=False)
    assert not rest.unexpected_keys, rest.unexpected_keys[:3]
    save_checkpoint(recipe, model, AutoTokenizer.from_pretrained(base), run)


def parse_variant(text: str) -> tuple[str, float, dict[str, Any]]:
    """'name:seconds,key=value,…' → (name, seconds, recipe keys)."""
    head, *keys = text.split(",")
    name, seconds = head.split(":")
    return name, float(seconds), {k: json.loads(v) for k, v in (key.split("=") for key in keys)}


def merge_keys(recipe: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """The recipe with 'part.key' or 'key' set."""
    merged = json.loads(json.dumps(recipe, default=str))
    for key, value in keys.items():
        *path, last = key.split(".")
        place = merged
        for part in path:
            place = place[part]
        place[last] = value
    return dict(merged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, help="write BASE/model.safetensors from this file first")
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder with slake/, vqa-rad/, pathvqa/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--assemble", type=Path, metavar="PARTS", help="make the checkpoint OUT from a variant's parts, and stop")
    parser.add_argument("--align-steps", type=int, default=100)
    parser.add_argument("--variant", action="append", default=[], help="name:seconds[,key=value…]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pack", type=int, default=8)
    parser.add_argument("--eval-limit", type=int)
    parser.add_argument("--cpu", action="store_true", help="no bf16: a dry run")
    args = parser.parse_args()
    if args.gguf:
        write_base(args.gguf, args.base)
        log("base written")
    if args.assemble:
        assemble(args.assemble, args.base, args.tower, args.out)
        return
    out, data = args.out.resolve(), args.data.resolve()
    # minutes of a hired machine are for training, not for checkpoints
    workers = {"workers": 0 if args.cpu else 4, "bf16": not args.cpu, "save_steps": 0}
    common: dict[str, Any] = {
        "template": "chatml",
        "capitalise": True,
        "save_dtype": "float16",
        "image": IMAGE,
        "max_tokens": 1024,
        "pack": args.pack,
        "seed": 1,
        "data": [
            {"name": "slake", "path": str(data / "slake"), "repeat": 3},
            {"name": "vqa-rad", "path": str(data / "vqa-rad"), "split": "all", "repeat": 2},
            {"name": "pathvqa", "path": str(data / "pathvqa")},
        ],
    }
    join = {
        "llm": str(args.base),
        "tower": str(args.tower),
        "image_token": "<filename>",
        "feature_layer": -2,
        "tower_activation": "gelu_pytorch_tanh",
    }
    schedule = {"max_steps": args.align_steps, "warmup_ratio": 0.05, "projector_rate": 2e-3}
    align = Recipe.model_validate(
        {**common, "stage": "align", "output": out / "align", "join": join, "optim": {"batch_size": args.batch_size, **workers, **schedule}}
    )
    stage.train(align)
    log("aligned")
    vqa = {
        **common,
        "stage": "vqa",
        "model": str(out / "align"),
        "lora": {"rank": 32, "alpha": 32, "dropout": 0.05, "rounding": 0.5},
        "optim": {
            **workers,
            "batch_size": args.batch_size,
            "projector_rate": 3e-4,
            "llm_rate": 8e-4,
            "tower_rate": 5e-5,
            "weight_decay": 0.01,
            "warmup_ratio": 0.05,
            "rotate_deg": 8.0,
            "scale": 0.08,
            "shift": 0.04,
            "max_steps": 6000,
        },
    }
    for text in args.variant:
        name, seconds, keys = parse_variant(text)
        recipe = Recipe.model_validate(merge_keys({**vqa, "output": str(out / name)}, {**keys, "optim.max_minutes": seconds / 60}))

        def save(recipe: Recipe, model: Any, tokenizer: Any, run: dict[str, Any], name: str = name) -> None:
            losses = [round(e["loss"], 3) for e in run["loss"]]
            log(name, run["steps"], "steps", run["steps_per_s"], "a second; loss", losses[:: max(1, len(losses) // 12)])
            probe = Probe(data, recipe, tokenizer, model.get_base_model().config, args.eval_limit)
            run["join"], run["probe"] = join, {"exact": probe.score(model), "blank": probe.score(model, blank=True)}
            rounding = LoraRounding(model)
            rounding.apply(True)
            run["probe"]["rounded"] = probe.score(model)
            rounding.apply(False)
            log(name, run["probe"])
            save_parts(out / name, recipe, model, run)

        stage.train(recipe, save=save)
        shutil.rmtree(out / name / "trainer", ignore_errors=True)
        log(name, "done")


if __name__ == "__main__":
    main()
