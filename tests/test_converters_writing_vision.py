"""The mmproj: what is stored, rewritings that change nothing, and a certificate that a wrong graph fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFReader
from tiny_checkpoint import random_tensor, tiny_checkpoint, tiny_projector, tiny_tower

from converters.certificate import BLOCK_TOLERANCE, build_certificate, read_back
from converters.convert import plan_vision
from converters.forward import image_rows
from converters.recipes import Recipe
from converters.tensors import read_all
from converters.vision import DifferenceTensor, MirroredTensor, PaddedTensor, vision_metadata, vision_tensors
from converters.writer import write_gguf
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.probe import probe_pixels, relative_l2, summarise


def write(tmp_path, checkpoint, recipe):
    plan = plan_vision(checkpoint, recipe)
    write_gguf(tmp_path / plan.name, plan.arch, plan.metadata, plan.tensors, threads=2)
    return plan, tmp_path / plan.name


def rows_of(checkpoint, tower=None, projector=None):
    pixels = probe_pixels(checkpoint.tower.image_size_px)
    return image_rows(tower or checkpoint.tower, projector or checkpoint.projector, pixels, checkpoint.image)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("quant", ["F32", "F16", "Q8_0"])
def test_the_file_computes_what_the_source_does(tmp_path, tower, projector, quant):
    checkpoint = tiny_checkpoint(tower, projector)
    _, path = write(tmp_path, checkpoint, Recipe.of(bits=16, vision_quant=quant))
    distance = relative_l2(rows_of(checkpoint, *read_back(checkpoint.tower, path)), rows_of(checkpoint))
    # The projector's GELU is exact in the source and tanh in llama.cpp; a linear one has none.
    assert distance < {"F32": 5e-6 if projector == "linear" else 2e-3, "F16": 2e-3, "Q8_0": 3e-2}[quant]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_only_what_the_feature_needs_is_stored(tmp_path, tower):
    _, path = write(tmp_path, tiny_checkpoint(tower), Recipe.of(bits=16))
    reader = GGUFReader(path)
    names = {t.name for t in reader.tensors}
    assert not any(n.startswith(("v.post_ln", "v.blk.2.")) for n in names)
    assert len(names) == {"clip": 5, "siglip": 3}[tower] + 2 * 16 + 4
    assert ("v.class_embd" in names) == ("v.pre_ln.weight" in names) == (tower == "clip")
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["clip.vision.block_count"] == 2
    assert value["clip.vision.feature_layer"] == [2]
    assert value["clip.vision.projection_dim"] == 64
    assert value["general.architecture"] == "clip"
    assert value["clip.projector_type"] == "mlp"
    assert value.get("clip.use_gelu") == (None if tower == "clip" else True)


def test_small_tensors_keep_their_types(tmp_path):
    plan, _ = write(tmp_path, tiny_checkpoint("clip"), Recipe.of(bits=4))
    types = {t.name: t.type.name for t in plan.tensors}
    assert {types[n] for n in types if n.endswith("bias") or ".ln" in n or n.startswith(("v.pre_ln", "v.class"))} == {"F32"}
    assert types["v.patch_embd.weight"] == types["v.position_embd.weight"] == "F16"
    assert {types[n] for n in types if n.startswith("v.blk") and n.endswith("weight") and ".ln" not in n} == {"IQ4_NL"}
    assert types["mm.0.weight"] == types["mm.2.weight"] == "Q8_0"
    assert plan.quant == "IQ4_NL"
    assert plan.parameters == plan_vision(tiny_checkpoint("clip"), Recipe.of(bits=16)).parameters


def test_rewritten_tensors_read_in_any_pieces():
    base = random_tensor("w", (5, 3))
    for tensor, whole in (
        (PaddedTensor(base, (8, 4)), np.pad(base.array, ((0, 3), (0, 1)))),
        (MirroredTensor(base), np.concatenate([base.array, -base.array])),
        (DifferenceTensor(4), np.concatenate([np.eye(4), -np.eye(4)], axis=1)),
    ):
        assert tensor.shape == whole.shape
        for start in range(whole.shape[0]):
            for stop in range(start + 1, whole.shape[0] + 1):
                assert np.array_equal(tensor.read(start, stop), whole[start:stop])


def test_missing_and_misshapen_tensors():
    tower, projector = tiny_tower(), tiny_projector()
    lacking = replace(tower, tensors={k: v for k, v in tower.tensors.items() if k != "encoder.layers.1.mlp.fc2.weight"})
    with pytest.raises(CheckpointError, match="'encoder.layers.1.mlp.fc2.weight' of shape .32, 60., found none"):
        vision_tensors(lacking, projector, width=64, stored_ffn=60)
    with pytest.raises(CheckpointError, match=r"Expected shape \(96, 32\) for 'linear_1.weight', found \(64, 32\)"):
        vision_tensors(tower, projector, width=96, stored_ffn=60)
    with pytest.raises(UnsupportedError, match="at least one layer"):
        vision_tensors(replace(tower, layers=0), projector, width=64, stored_ffn=60)
    image = tiny_checkpoint().image.model_copy(update={"size_px": 50})
    with pytest.raises(CheckpointError, match="48 px, found 50 px"):
        vision_metadata(tower, image, width=64, stored_ffn=60)


def test_biases_of_a_projector_may_be_missing(tmp_path):
    projector = tiny_projector()
    projector = replace(projector, tensors={k: v for k, v in projector.tensors.items() if not k.endswith("bias")})
    stored = dict(vision_tensors(tiny_tower(), projector, width=64, stored_ffn=60))
    assert not read_all(stored["mm.0.bias"]).any() and not read_all(stored["mm.2.bias"]).any()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_certificate_tells_a_misplaced_cls(tmp_path, bits):
    """What libmtmd's CLIP graph computes (CLS behind the patches, all one position late) fails at every number of bits."""
    checkpoint = tiny_checkpoint("clip")
    plan, path = write(tmp_path, checkpoint, Recipe.of(bits=bits))
    certificate, notes = build_certificate(checkpoint, plan.tensors, path)
    right, stored = certificate.vision, certificate.vision_stored
    assert (stored is None) == (bits == 16)
    assert len(notes) == (bits != 16)
    tower, projector = read_back(checkpoint.tower, path)
    rows = rows_of(checkpoint, tower, projector)
    reference = np.array((stored or right).rows, np.float32)
    assert relative_l2(summarise(rows), reference) < (stored or right).tolerance
    assert relative_l2(summarise(rows), np.array(right.rows, np.float32)) < right.tolerance
    positions = read_all(tower.tensors["embeddings.position_embedding.weight"])
    late = dict(tower.tensors) | {"embeddings.position_embedding.weight": random_tensor("x", positions.shape)}
    late["embeddings.position_embedding.weight"].array[:] = np.roll(positions, 1, axis=0)
    wrong = rows_of(checkpoint, replace(tower, tensors=late), projector)
    assert relative_l2(summarise(wrong), reference) > 2 * (stored or right).tolerance


def test_exact_gelu_is_measured(tmp_path):
    checkpoint = tiny_checkpoint("siglip", activation="gelu")
    plan, path = write(tmp_path, checkpoint, Recipe.of(bits=8))
    certificate, notes = build_certificate(checkpoint, plan.tensors, path)
    assert "tanh form" in notes[0]
    assert certificate.vision.tolerance > certificate.vision_stored.tolerance == BLOCK_TOLERANCE
