"""Aligning with a tower's features computed once, against computing them at every step: samples a second, in one run.

    python -m bench.feature_cache --tower ../shared/models/dinov2-small-siglip-224 --data slake=../shared/data/slake [--device cuda]

The model is the tower, a fresh two-layer projector and a Llama of random weights with the width and layers given (the tower's cost does
not depend on weights, and neither do the others'); the rows are a set's first images and questions. Both ways take the same optimizer
steps on the same batches, alternately, after a warm-up of each; filling the cache is timed apart, since it is paid once. Prints a table
and, as the last line, JSON. On a GPU: bf16 autocast, and `--llm-width 2048 --llm-layers 22` for TinyLlama's own shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.full_width import MODELS, vision_config
from edgemed.core.images import ImagePreparation
from edgemed.core.units import format_bytes, format_duration
from edgemed.data import load_samples
from edgemed.finetune.augment import normalise_pixels
from edgemed.finetune.examples import IGNORE, Collator, Item, Row
from edgemed.finetune.features import FeatureCache, accept_features, tower_compute, tower_input, tower_of
from edgemed.finetune.pictures import Pictures
from edgemed.report.tables import print_table

VOCABULARY = 32_000
IMAGE_ID = 3
# Of bench/full_width.py's models: TinyLLaVA's SigLIP and LLaVA-Med's CLIP, with random weights.
SHAPES = ("siglip", "clip336")
ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    """What one measurement needs."""

    model: Any
    image: ImagePreparation
    device: torch.device

    @property
    def autocast(self) -> torch.dtype | None:
        """The trainer's own: bfloat16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else None


def build_model(tower: str, width: int, layers: int) -> Any:
    """Tower, fresh projector and a random Llama; the projector alone learns, as in the align stage."""
    if tower in SHAPES:
        config = vision_config(MODELS[tower].tower)
        vision = AutoConfig.for_model(config.pop("model_type"), **config)
    else:
        vision = AutoConfig.from_pretrained(tower)
        vision = getattr(vision, "vision_config", vision)
    heads = max(1, width // 64)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        vocab_size=VOCABULARY,
    )
    tokens = (vision.image_size // vision.patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if "siglip" in vision.model_type else "default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float()
    if tower not in SHAPES:
        state = AutoModel.from_pretrained(tower, dtype=torch.float32).state_dict()
        model.model.vision_tower.load_state_dict({k.removeprefix("vision_model."): v for k, v in state.items()}, strict=False)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def build_rows(samples: list[Any], tokens: int, text_tokens: int) -> list[Row]:
    """A row a sample: its image, and as many ids as a short caption has; the last half is learned."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for sample in samples:
        text = torch.randint(10, VOCABULARY, (text_tokens,), generator=draw).tolist()
        learned = [IGNORE] * (text_tokens // 2) + text[text_tokens // 2 :]
        rows.append(Row([1, *[IMAGE_ID] * tokens, *text], [IGNORE] * (tokens + 1) + learned, sample.image))
    return rows


def step(setting: Setting, optimizer: torch.optim.Optimizer, items: list[Item], collate: Collator) -> float:
    """One optimizer step as the trainer takes it; the loss."""
    batch = {k: v.to(setting.device, non_blocking=True) for k, v in collate(items).items()}
    labels = batch.pop("labels")
    shown = tower_input(batch, lambda pixels: normalise_pixels(pixels, setting.image, None))
    first = int((labels != IGNORE).any(0).int().argmax())
    keep = torch.arange(first - 1, labels.shape[1] - 1, device=setting.device)
    with torch.autocast(setting.device.type, setting.autocast, enabled=setting.autocast is not None):
        logits = setting.model(**batch, pixel_values=shown, logits_to_keep=keep).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, first:].flatten(), ignore_index=IGNORE)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def measure(setting: Setting, rows: list[Row], pictures: Pictures, batch: int) -> tuple[float, list[float]]:
    """(samples a second, losses) over all rows once, with a fresh optimizer."""
    learning = [p for p in setting.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, fused=setting.device.type == "cuda")
    collate, losses = Collator(0), []
    begin = time.perf_counter()
    for start in range(0, len(rows) - batch + 1, batch):
        items: list[Item] = [(row, pictures[row.image] if row.image else None) for row in rows[start : start + batch]]
        losses.append(step(setting, optimizer, items, collate))
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return len(losses) * batch / (time.perf_counter() - begin), losses


def compare(setting: Setting, rows: list[Row], folder: Path, batch: int) -> dict[str, Any]:
    """Both ways in turn; every round begins from the same projector."""
    paths = [row.image for row in rows if row.image]
    live, cached = Pictures(paths, setting.image, 1 << 40), Pictures(paths, setting.image, 0)
    compute = tower_compute(setting.model, setting.image, setting.autocast)
    begin = time.perf_counter()
    cache = FeatureCache.open(folder, setting.model, setting.image, 1 << 40, setting.autocast)
    left_out = cached.use_features(cache, compute, batch)
    fill_s = time.perf_counter() - begin
    accept_features(setting.model)
    projector = setting.model.model.multi_modal_projector
    first = {k: v.clone() for k, v in projector.state_dict().items()}
    rates: dict[str, list[float]] = {"without": [], "with": []}
    losses: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        for name, pictures in (("without", live), ("with", cached)):
            projector.load_state_dict(first)
            rate, losses[name] = measure(setting, rows, pictures, batch)
            if number:  # the first round is the warm-up
                rates[name].append(rate)
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses["without"], losses["with"], strict=True))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "samples_per_s": middle,
        "ratio": middle["with"] / middle["without"],
        "rounds": rates,
        "loss_relative_difference": apart,
        "fill_s": fill_s,
        "images": len(cached.paths),
        "left_out": left_out,
        "cache_bytes": (cache.folder / "features.bin").stat().st_size,
    }


def main() -> int:
    """Run it; the exit code is 1 where the losses of both ways differ."""
    parser = argparse.ArgumentParser(prog="python -m bench.feature_cache", description="Cached tower features against none.")
    parser.add_argument(
        "--tower", required=True, help=f"an HF SigLIP or CLIP vision model, or a full-width one's shape: {', '.join(SHAPES)}"
    )
    parser.add_argument("--data", required=True, metavar="NAME=PATH")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=32)
    parser.add_argument("--llm-width", type=int, default=576)
    parser.add_argument("--llm-layers", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, help="where to keep the cache; by default a folder that is removed")
    a = parser.parse_args()
    device = torch.device(a.device)
    model = build_model(a.tower, a.llm_width, a.llm_layers).to(device).train()
    size = model.config.vision_config.image_size
    image = ImagePreparation(size_px=size, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    name, _, path = a.data.partition("=")
    one_each = {s.image: s for s in load_samples(name, Path(path), a.split)}
    rows = build_rows(list(one_each.values())[: a.images], model.config.image_seq_length, a.text_tokens)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Setting(model, image, device), rows, a.cache or Path(folder), a.batch_size)
    parts = {"tower": tower_of(model), "projector": model.model.multi_modal_projector, "language model": model.model.language_model}
    card = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = [(f"{part}, parameters", f"{count / 1e6:.1f} M") for part, count in card.items()]
    table += [(f"samples a second {way} the cache", f"{rate:.2f}") for way, rate in found["samples_per_s"].items()]
    table += [("ratio", f"{found['ratio']:.2f}"), ("largest relative difference of a loss", f"{found['loss_relative_difference']:.1e}")]
    table += [("filling the cache", f"{format_duration(found['fill_s'])} for {found['images']} images")]
    table += [("on disk", format_bytes(found["cache_bytes"]))]
    print_table(f"Align stage on {device_name}, batch {a.batch_size}", ("what", "value"), table)
    print(json.dumps({"device": device_name, "batch_size": a.batch_size, "parameters": card} | found))
    return int(found["loss_relative_difference"] > (0.05 if device.type == "cuda" else 1e-4))


if __name__ == "__main__":
    sys.exit(main())
