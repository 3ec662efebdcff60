"""A two-layer LLaVA, a tiny data set and recipes for them: what fine-tuning is tested with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from tests.checkpoints import IMAGE_PX, make_checkpoint

# Models this small only lose by several threads, the more so beside other work.
torch.set_num_threads(1)
QUESTIONS = (("Is it normal?", "yes"), ("Which organ?", "lung"), ("Where is the liver in this image?", "on the left"))


def save_model(folder: Path) -> Path:
    """A random LlavaForConditionalGeneration."""
    return Path(make_checkpoint(folder, "hf", "smollm", "siglip").source)


def save_data(folder: Path, images: int = 6, split: str = "train", seed: int = 0) -> Path:
    """LLaVA conversations over images of noise, three questions each."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{split}-{i}.png")
        for question, answer in QUESTIONS:
            rounds = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"id": f"{split}-{i}-{answer}", "image": f"{split}-{i}.png", "conversations": rounds})
    (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def write_recipe(path: Path, model: Path, data: Path, *, steps: int = 20, extra: str = "", optim: str = "") -> Path:
    """PATH, whose run goes to the folder of its name."""
    text = f"""
output = "{path.stem}"
model = {json.dumps(str(model))}
template = "chatml"
save_dtype = "float32"
{extra}
[image]
size_px = {IMAGE_PX}
mode = "pad"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[[data]]
name = "llava"
path = {json.dumps(str(data))}
[optim]
max_steps = {steps}
batch_size = 2
accumulation = 2
projector_rate = 1e-3
{optim}
"""
    path.write_text(text)
    return path


def read_losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder / "run.json").read_text())["loss"]]
