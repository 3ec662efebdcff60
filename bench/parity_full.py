"""Tower + projector at full width, F16 in llama.cpp against float32 in transformers: relative L2 over all rows of two images.

    python -m bench.parity_full siglip clip336 clip224 --work DIR               # models of bench.full_width, made if not in DIR
    python -m bench.parity_full CHECKPOINT --device cuda                        # a folder in HF's layout

Also tells whether the CLIP fault of the runtime was found by the probe and corrected. Exit code 1 where a distance is above 2e-3.
Needs the `train` extra. Says nothing about the language model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.full_width import MODELS, build
from converters.convert import convert
from converters.readers import open_checkpoint
from converters.recipes import Recipe
from edgemed.core.images import ImagePreparation, normalise
from edgemed.core.manifest import Artifact
from edgemed.core.probe import probe_pixels, relative_l2
from edgemed.report.tables import print_table
from runtimes.engine import Engine
from runtimes.messages import EngineSettings, PreparedImage

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Flash = Literal["auto", "on", "off"]
GATE = 2e-3
_PROMPT_TOKENS = 64


def reference_rows(folder: Path, images: Sequence[U8], preparation: ImagePreparation) -> list[F32]:
    """What transformers makes of each image, float32 [image_tokens, width]; HF's layout or the original one with a linear projector."""
    import torch

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = _hf(folder) if "text_config" in config else _llava(folder, config)
    with torch.no_grad():
        return [run(torch.from_numpy(normalise(pixels, preparation)[None])).numpy().astype(np.float32) for pixels in images]


def _hf(folder: Path) -> Any:
    import torch
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def run(values: Any) -> Any:
        features = model.get_image_features(pixel_values=values)
        return getattr(features, "pooler_output", features)[0]

    return run


def _llava(folder: Path, config: dict[str, Any]) -> Any:
    import torch
    from safetensors import safe_open
    from transformers import CLIPVisionModel

    tower: Any = CLIPVisionModel.from_pretrained(folder / config["mm_vision_tower"], dtype=torch.float32).eval()
    with safe_open(folder / "model.safetensors", "pt") as f:
        weight, bias = (f.get_tensor(f"model.mm_projector.{part}").float() for part in ("weight", "bias"))

    def run(values: Any) -> Any:
        states = tower(pixel_values=values, output_hidden_states=True).hidden_states
        return torch.nn.functional.linear(states[config["mm_vision_select_layer"]][0, 1:], weight, bias)

    return run


def compare(folder: Path, out: Path, gpu_layers: int, flash: Flash) -> tuple[list[float], list[str]]:
    """(distance of the probe and of a random image, cells that describe the model and the runtime)."""
    artifact: Artifact = convert(open_checkpoint(folder), out, Recipe.of(bits=16))
    size_px = artifact.manifest.image.size_px
    images = [probe_pixels(size_px), np.random.default_rng(0).integers(0, 256, (size_px, size_px, 3)).astype(np.uint8)]
    context = artifact.manifest.vision.image_tokens + _PROMPT_TOKENS
    settings = EngineSettings(context_tokens=context, gpu_layers=gpu_layers, vision_flash_attention=flash)
    with Engine.open(artifact, settings) as engine:
        rows = [engine.embed(PreparedImage(pixels.tobytes(), size_px)) for pixels in images]
        report = engine.report
    right = reference_rows(folder, images, artifact.manifest.image)
    distances = [relative_l2(a, b) for a, b in zip(rows, right, strict=True)]
    fault = "found and corrected" if report.vision_mode == "rewrite" else "none"
    return distances, [f"{rows[0].shape[0]} × {rows[0].shape[1]}", f"{fault} ({report.vision_check})", ", ".join(report.devices)]


def main() -> int:
    """Run the comparisons, print a table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity_full", description="F16 tower and projector against transformers.")
    parser.add_argument("models", nargs="+", help=f"{', '.join(MODELS)}, or a checkpoint's folder in HF's layout")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints; a temporary one where left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--flash-attention", choices=("auto", "on", "off"), default="auto", help="in the tower")
    arguments = parser.parse_args()
    table: list[list[str]] = []
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGEMED_HOME"] = scratch  # so that every tower is probed, not remembered
        for name in arguments.models:
            folder = Path(name)
            if name in MODELS:
                folder = (arguments.work or Path(scratch)) / name
                if not (folder / "config.json").is_file():
                    build(name, folder)
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                distances, cells = compare(folder, Path(out) / "model", 0 if arguments.device == "cpu" else -1, arguments.flash_attention)
            worst = max(worst, *distances)
            table.append([name, *(f"{d:.2e}" for d in distances), *cells])
    columns = ("model", "probe", "random image", "rows", "CLIP fault", "device")
    print_table(f"Relative L2 to transformers in float32, at most {GATE:.0e} allowed", columns, table)
    return int(not worst <= GATE)


if __name__ == "__main__":
    sys.exit(main())
