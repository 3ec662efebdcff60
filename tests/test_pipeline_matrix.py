"""From every published layout to logits in the real llama.cpp: each reader × language model family × tower, against transformers.

Random two-layer models, converted at F16 and loaded as a user's would be, self-check and all. The prompt is the checkpoint's own
template, tokenised by the engine; transformers gets the same ids and computes in float32 from the weights as they were saved.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import FAMILIES, IMAGE_PX, READERS, TOWERS, make_checkpoint

from bench.parity import verify_artifact
from converters.convert import convert
from converters.readers import open_checkpoint
from converters.recipes import Recipe
from edgemed.core.conversation import Turn, render
from edgemed.core.probe import relative_l2
from runtimes.engine import Engine
from runtimes.messages import EngineSettings, PreparedImage
from runtimes.prompt import IMAGE_TOKEN

SETTINGS = EngineSettings(context_tokens=1024, threads=1)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reader", READERS)
def test_rows_and_logits_are_transformers_own(tmp_path: Path, reader: str, family: str, tower: str) -> None:
    reference = make_checkpoint(tmp_path / "source", reader, family, tower)
    checkpoint = open_checkpoint(reference.source, **reference.options)
    artifact = convert(checkpoint, tmp_path / "model", Recipe.of(bits=16))
    pixels = np.random.default_rng(3).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), np.uint8)
    image = PreparedImage(pixels.tobytes(), IMAGE_PX)
    segments = render(artifact.manifest.template, [Turn("user", "Is there a fracture of the left femur?", images=1)])
    with Engine.open(artifact, SETTINGS) as engine:
        assert engine.report.vision_mode == ("rewrite" if tower == "clip" else "plain")
        ids = engine.tokenize(segments)
        rows = engine.embed(image)
        logits = engine.evaluate(segments, [image])
    right_rows = reference.vision_embeds(pixels)
    assert relative_l2(rows, right_rows) <= 2e-3
    cut = ids.index(IMAGE_TOKEN)
    right = reference.logits(ids[:cut], right_rows, ids[cut + 1 :])
    assert relative_l2(logits, right) <= 5e-3


@pytest.mark.parametrize("bits", [8, 4])
def test_clips_fault_is_seen_in_quantised_towers(tmp_path: Path, bits: int) -> None:
    reference = make_checkpoint(tmp_path / "source", "hf", "llama", "clip")
    artifact = convert(open_checkpoint(reference.source), tmp_path / "model", Recipe.of(bits=bits))
    certificate = artifact.manifest.certificate
    assert certificate is not None and certificate.vision_stored is not None
    with Engine.open(artifact, SETTINGS) as engine:
        assert (engine.report.vision_mode, engine.report.vision_check) == ("rewrite", "probed")
    parity = verify_artifact(artifact)
    # Close to the written weights, whatever their types lose to the source's; and both are told.
    assert parity.written_distance is not None and parity.written_distance <= certificate.vision_stored.tolerance
    assert parity.written_distance < parity.vision_distance <= certificate.vision.tolerance
    assert len(parity.rows()) == 4
