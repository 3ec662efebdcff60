"""edgemed-demo's logits, F16 in the engine against transformers in float32, after real images.

    python -m bench.demo_logits --dataset slake=PATH [--positions 4096]

The reference is transformers' modules filled with the very weights that the converter reads (base, adapter and tower). Text
positions only, of conversations of many questions about one image. Prints relative L2, top-1 agreement with the margin of each miss
(the reference's gap between its first and the engine's choice, in logits), and the image rows' relative L2.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from converters.calibration.reference import Reference, build_reference
from converters.readers import open_checkpoint
from edgemed.core.conversation import Turn, render
from edgemed.core.images import load_image, normalise, prepare
from edgemed.core.manifest import load_artifact
from edgemed.core.paths import artifacts_dir
from edgemed.core.probe import relative_l2
from edgemed.core.registry import load_registry, locate_sources
from edgemed.data import Sample, load_samples
from runtimes.engine import Engine
from runtimes.messages import EngineSettings, PreparedImage
from runtimes.prompt import IMAGE_TOKEN

F32 = NDArray[np.float32]
CONTEXT_TOKENS = 1024


def conversations(samples: list[Sample]) -> list[tuple[Path, list[Turn]]]:
    """Every image's questions and answers as one conversation, in the set's order."""
    grouped: dict[Path, list[Turn]] = {}
    for sample in samples:
        if sample.image is not None:
            turns = grouped.setdefault(sample.image, [])
            turns += [Turn("user", sample.question, images=0 if turns else 1), Turn("assistant", sample.answer)]
    return list(grouped.items())


def compare(engine: Engine, model: Reference, image: Path, turns: list[Turn]) -> tuple[F32, F32, float]:
    """(engine's logits, reference's logits [text positions, vocab], relative L2 of the image's rows)."""
    manifest = engine.artifact.manifest
    pixels = prepare(load_image(image), manifest.image)
    picture = PreparedImage(pixels.tobytes(), manifest.image.size_px)
    segments = render(manifest.template, turns)
    ids = engine.tokenize(segments)
    ours = engine.evaluate(segments, [picture], all_positions=True)
    rows = engine.embed(picture)
    at = ids.index(IMAGE_TOKEN)
    with torch.no_grad():
        features = model.image_rows(torch.from_numpy(normalise(pixels, manifest.image)[None]))[0]
        before, after = (model.embed(torch.tensor(part, dtype=torch.long)) for part in (ids[:at], ids[at + 1 :]))
        embeds = torch.cat([before, features, after])
        theirs = model.logits(embeds[None], torch.arange(len(embeds)))[0].numpy()
    text = np.r_[0:at, at + len(features) : len(embeds)]
    return ours[text], theirs[text], relative_l2(rows, features.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=artifacts_dir() / "edgemed-demo-16bit")
    parser.add_argument("--dataset", required=True, help="NAME=PATH")
    parser.add_argument("--split", default="validate")
    parser.add_argument("--positions", type=int, default=4096)
    args = parser.parse_args()
    artifact = load_artifact(args.folder)
    entry = load_registry().find("edgemed-demo")
    parts = locate_sources(entry)
    model = build_reference(open_checkpoint(parts.model, adapter=parts.adapter, mmproj=parts.mmproj, template=entry.template))
    name, _, path = args.dataset.partition("=")
    error = norm = 0.0
    agree = positions = 0
    misses: list[float] = []
    row_distances: list[float] = []
    with Engine.open(artifact, EngineSettings(context_tokens=CONTEXT_TOKENS)) as engine:
        for image, turns in conversations(load_samples(name, Path(path), args.split)):
            ours, theirs, distance = compare(engine, model, image, turns)
            take = min(len(ours), args.positions - positions)
            ours, theirs = ours[:take].astype(np.float64), theirs[:take].astype(np.float64)
            error += float(((ours - theirs) ** 2).sum())
            norm += float((theirs**2).sum())
            chosen, best = ours.argmax(1), theirs.argmax(1)
            agree += int((chosen == best).sum())
            misses += [float(row[b] - row[c]) for row, c, b in zip(theirs, chosen, best, strict=True) if c != b]
            row_distances.append(distance)
            positions += take
            if positions >= args.positions:
                break
    result = {
        "artifact": artifact.folder.name,
        "positions": positions,
        "images": len(row_distances),
        "relative_l2": (error / norm) ** 0.5,
        "top1_agreement": agree / positions,
        "miss_margins": sorted(round(m, 4) for m in misses),
        "image_rows_relative_l2_max": max(row_distances),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
