"""edgemed-demo's logits, F16 in the engine against transformers in float32, after real images.

    python -m bench.demo_logits --dataset slake=PATH [--positions 4096]

The reference is a LlavaForConditionalGeneration filled with the very weights that the converter reads (base, adapter and tower). Text
positions only, of conversations of many questions about one image. Prints relative L2, top-1 agreement with the margin of each miss
(the reference's gap between its first and the engine's choice, in logits), and the image rows' relative L2.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from converters.checkpoint import Checkpoint
from converters.readers import open_checkpoint
from converters.tensors import read_all
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


def build_reference(checkpoint: Checkpoint) -> Any:
    """A float32 LlavaForConditionalGeneration with a Llama and a SigLIP tower, of the checkpoint's own weights."""
    llm, tower = checkpoint.llm, checkpoint.tower
    text = LlamaConfig(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden,
        intermediate_size=llm.ffn,
        num_hidden_layers=llm.layers,
        num_attention_heads=llm.heads,
        num_key_value_heads=llm.kv_heads,
        head_dim=llm.head_dim,
        rms_norm_eps=llm.norm_eps,
        max_position_embeddings=llm.context_length,
        rope_parameters={"rope_theta": llm.rope_theta, "rope_type": "default"},
        tie_word_embeddings="lm_head.weight" not in llm.tensors,
    )
    vision = SiglipVisionConfig(
        hidden_size=tower.hidden,
        intermediate_size=tower.ffn,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_size_px,
        patch_size=tower.patch_size_px,
        layer_norm_eps=tower.norm_eps,
        hidden_act=tower.activation,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=checkpoint.tokenizer.tokens.index("<filename>"),
        projector_hidden_act=checkpoint.projector.activation,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    model: Any = LlavaForConditionalGeneration(config).float().eval()
    fill(model.model.language_model, {k.removeprefix("model."): v for k, v in llm.tensors.items() if k != "lm_head.weight"})
    if "lm_head.weight" in llm.tensors:
        fill(model.lm_head, {"weight": llm.tensors["lm_head.weight"]})
    model.tie_weights()
    fill(model.model.vision_tower, dict(tower.tensors))
    fill(model.model.multi_modal_projector, dict(checkpoint.projector.tensors))
    return model


def fill(module: Any, tensors: dict[str, Any]) -> None:
    """Load every tensor; what the module has beyond them must not be needed (a post-layernorm that no feature passes)."""
    state = {k: torch.from_numpy(read_all(t).copy()) for k, t in tensors.items()}
    result = module.load_state_dict(state, strict=False)
    missing = [k for k in result.missing_keys if "post_layernorm" not in k]
    if missing or result.unexpected_keys:
        raise SystemExit(f"The reference lacks {missing[:3]} and does not know {result.unexpected_keys[:3]}.")


def conversations(samples: list[Sample]) -> list[tuple[Path, list[Turn]]]:
    """Every image's questions and answers as one conversation, in the set's order."""
    grouped: dict[Path, list[Turn]] = {}
    for sample in samples:
        if sample.image is not None:
            turns = grouped.setdefault(sample.image, [])
            turns += [Turn("user", sample.question, images=0 if turns else 1), Turn("assistant", sample.answer)]
    return list(grouped.items())


def compare(engine: Engine, model: Any, image: Path, turns: list[Turn]) -> tuple[F32, F32, float]:
    """(engine's logits, reference's logits [text positions, vocab], relative L2 of the image's rows)."""
    manifest = engine.artifact.manifest
    pixels = prepare(load_image(image), manifest.image)
    picture = PreparedImage(pixels.tobytes(), manifest.image.size_px)
    segments = render(manifest.template, turns)
    ids = engine.tokenize(segments)
    ours = engine.evaluate(segments, [picture], all_positions=True)
    rows = engine.embed(picture)
    marker = model.config.image_token_id
    tokens = [t for i in ids for t in ([marker] * manifest.vision.image_tokens if i == IMAGE_TOKEN else [i])]
    values = torch.from_numpy(normalise(pixels, manifest.image)[None])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=values)
        reference_rows = getattr(features, "pooler_output", features)[0].numpy()
        theirs = model(input_ids=torch.tensor([tokens]), pixel_values=values).logits[0].numpy()
    text = np.array([t != marker for t in tokens])
    return ours[text], theirs[text], relative_l2(rows, reference_rows)


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
