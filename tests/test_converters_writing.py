"""GGUF files as they are written: kernels, pieces, types, layout, and the same bytes as llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, dequantize
from tiny_checkpoint import random_tensor, tiny_checkpoint, tiny_llm

from converters import ggml, quantise
from converters.convert import plan_llm
from converters.metadata import text
from converters.quantise import Planned, quantise_piece, quantised_pieces
from converters.recipes import PLAIN, Recipe
from converters.tensors import ArrayTensor, DeltaTensor, LoraTensor
from converters.writer import ALIGNMENT, data_bytes, write_gguf
from edgemed.core.errors import CheckpointError, EngineLoadError, RecipeError
from edgemed.core.files import sha256_file

# Relative error of Gaussian values, as measured on 2 M of them; bounds, not goals.
ERRORS = {
    "F32": 1e-9, "F16": 5e-4, "BF16": 3e-3, "Q8_0": 7e-3, "Q6_K": 0.022, "Q5_K": 0.045, "Q5_1": 0.045, "Q5_0": 0.05, "Q4_K": 0.08,
    "Q4_1": 0.09, "Q4_0": 0.1, "IQ4_NL": 0.09, "IQ4_XS": 0.09, "Q3_K": 0.16, "Q2_K": 0.32,
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN, ids=lambda t: t.name)
def test_every_type_comes_back(kind):
    rows = random_tensor("rows", (8, 512)).array
    data = ggml.quantise_rows(kind, rows)
    assert data.shape == (8, ggml.row_bytes(kind, 512))
    back = dequantize(data, kind)
    assert np.linalg.norm(back - rows) <= ERRORS[kind.name] * np.linalg.norm(rows)
    assert not ggml.needs_importance(kind)


def test_importance_shifts_the_error():
    rows = random_tensor("rows", (64, 64)).array
    importance = np.where(np.arange(64) < 8, 100, 0.01).astype(np.float32)
    plain, weighted = (dequantize(ggml.quantise_rows(Type.Q4_0, rows, w), Type.Q4_0) for w in (None, importance))
    assert np.abs(weighted - rows)[:, :8].mean() < np.abs(plain - rows)[:, :8].mean()
    with pytest.raises(RecipeError, match="importance vector of 64"):
        ggml.quantise_rows(Type.Q4_0, rows, importance[:32])


def test_rows_must_fill_blocks():
    with pytest.raises(RecipeError, match="multiple of 256 values for Q4_K, found 576"):
        ggml.row_bytes(Type.Q4_K, 576)


def test_missing_library_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(EngineLoadError, match="Expected the library"):
        ggml.find_library()


def test_pieces_equal_the_whole(monkeypatch):
    source = random_tensor("w", (37, 256))
    whole = ggml.quantise_rows(Type.Q4_K, source.array)
    monkeypatch.setattr(quantise, "PIECE_VALUES", 1000)
    with ThreadPoolExecutor(3) as pool:
        parts = [data for _, data in quantised_pieces([Planned("w", source, Type.Q4_K)], pool, 4)]
    assert len(parts) == 13
    assert np.array_equal(np.concatenate(parts), whole)


def test_bad_values_name_their_tensor():
    values = random_tensor("w", (4, 64)).array
    values[2, 3] = np.nan
    with pytest.raises(CheckpointError, match="finite weights.*'layer.w'"):
        quantise_piece(Planned("w", ArrayTensor("layer.w", values), Type.Q8_0), 0, 4)
    values[2, 3] = 1e5
    with pytest.raises(CheckpointError, match="65504 for F16, found 1e.05 in 'layer.w'"):
        quantise_piece(Planned("w", ArrayTensor("layer.w", values), Type.F16), 0, 4)
    assert quantise_piece(Planned("w", ArrayTensor("layer.w", values), Type.BF16), 0, 4).nbytes == 512


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.F16])
def test_what_a_type_cannot_hold_is_refused(kind):
    values = random_tensor("w", (4, 256)).array
    values[2, 3] = -1e38
    with pytest.raises(CheckpointError, match=f"65504 for {kind.name}, found 1e.38 in 'layer.w'") as caught:
        quantise_piece(Planned("w", ArrayTensor("layer.w", values), kind), 0, 4)
    assert "BF16" in caught.value.hint


def test_sums_that_overflow_name_their_tensors():
    large, ones = np.full((4, 64), 3e38, np.float32), np.ones((4, 64), np.float32)
    adapter = LoraTensor(ArrayTensor("layer.w", large), np.full((1, 64), 3e38, np.float32), ones[:, :1], 2.0, "adapter")
    delta = DeltaTensor(ArrayTensor("base.w", large), ArrayTensor("layer.w", ones))
    for tensor in (adapter, delta):
        with pytest.raises(CheckpointError, match=r"finite weights.*'(layer|base)\.w \+ "):
            quantise_piece(Planned("w", tensor, Type.F32), 0, 4)


def test_file_reads_back(tmp_path):
    tensors = [
        Planned("a.bias", random_tensor("a.bias", (33,)), Type.F32),
        Planned("a.weight", random_tensor("a.weight", (33, 64)), Type.Q8_0),
        Planned("conv.weight", random_tensor("conv.weight", (5, 3, 7, 7)), Type.F16),
    ]
    path = tmp_path / "x.gguf"
    seen = []
    record = write_gguf(path, "llama", {"general.name": text("x")}, tensors, threads=2, advance=seen.append)
    assert record.size_bytes == path.stat().st_size
    assert record.sha256 == sha256_file(path)
    assert sum(seen) == sum(t.size_bytes for t in tensors)
    reader = GGUFReader(path)
    assert reader.get_field("general.name").contents() == "x"
    assert [t.name for t in reader.tensors] == [t.name for t in tensors]
    for planned, read in zip(tensors, reader.tensors, strict=True):
        assert int(read.data_offset) % ALIGNMENT == 0
        assert tuple(reversed([int(n) for n in read.shape])) == planned.shape
        back = dequantize(np.asarray(read.data), read.tensor_type).reshape(planned.shape)
        np.testing.assert_allclose(back, planned.source.array, atol=0.01)
    header = record.size_bytes - data_bytes(tensors)
    assert 0 < header < 1000


def test_a_name_twice_is_refused(tmp_path):
    twice = [Planned("a", random_tensor("a", (4,)), Type.F32)] * 2
    with pytest.raises(CheckpointError, match="'a' twice"):
        write_gguf(tmp_path / "x.gguf", "llama", {}, twice, threads=1)


QUANTISE = """
import ctypes, sys, llama_cpp
quiet = llama_cpp.llama_log_callback(lambda *a: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
params.nthread = 1
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


@pytest.mark.parametrize(
    ("quant", "ftype", "tied", "layers"),
    [("Q4_K_M", 15, False, 17), ("Q4_K_M", 15, True, 4), ("Q5_K_M", 17, False, 9), ("Q8_0", 7, True, 2), ("Q6_K", 18, False, 2)],
)
def test_same_bytes_as_llama_cpp(tmp_path, quant, ftype, tied, layers):
    """From F16 weights, every tensor's type and bytes are those of llama.cpp's quantiser."""
    checkpoint = tiny_checkpoint(llm=tiny_llm(layers=layers, hidden=256, ffn=256, tied=tied))
    paths = {}
    for recipe in (Recipe.of(bits=16), Recipe.of(quant=quant)):
        plan = plan_llm(checkpoint, recipe)
        paths[recipe.llm] = tmp_path / plan.name
        write_gguf(paths[recipe.llm], plan.arch, plan.metadata, plan.tensors, threads=2)
    peer = tmp_path / "peer.gguf"
    subprocess.run([sys.executable, "-c", QUANTISE, str(paths["F16"]), str(peer), str(ftype)], check=True, capture_output=True)
    ours, theirs = ({t.name: t for t in GGUFReader(p).tensors} for p in (paths[quant], peer))
    assert {n: t.tensor_type.name for n, t in ours.items()} == {n: t.tensor_type.name for n, t in theirs.items()}
    for name, tensor in theirs.items():
        assert np.array_equal(ours[name].data, tensor.data), name


def test_narrow_rows_stay_at_four_bits():
    """SmolLM2's rows of 576: IQ4_NL instead of Q5_0, more bits where it hurts most, K-quants where rows allow them."""
    shapes = {"token_embd.weight": (49152, 576), "output_norm.weight": (576,)}
    for i in range(30):
        shapes |= {f"blk.{i}.attn_{p}.weight": (n, 576) for p, n in (("q", 576), ("k", 192), ("v", 192), ("output", 576))}
        shapes |= {f"blk.{i}.ffn_{p}.weight": (1536, 576) for p in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down.weight": (576, 1536), f"blk.{i}.attn_norm.weight": (576,)}
    types = Recipe.of(bits=4).llm_types(shapes.items())
    assert types["blk.5.attn_q.weight"] == types["blk.3.ffn_up.weight"] == types["blk.0.ffn_gate.weight"] == Type.IQ4_NL
    assert types["blk.0.attn_v.weight"] == types["blk.29.attn_v.weight"] == types["blk.2.ffn_up.weight"] == Type.Q8_0
    assert types["token_embd.weight"] == Type.Q5_0
    assert (types["blk.0.ffn_down.weight"], types["blk.4.ffn_down.weight"]) == (Type.Q6_K, Type.Q4_K)
    assert types["blk.0.attn_norm.weight"] == Type.F32
    # What learnt with the rounding of IQ4_NL gets IQ4_NL, and nothing else changes; nor does anything at other widths.
    rounded = Recipe.of(bits=4).llm_types(shapes.items(), rounded=True)
    assert {name for name in types if rounded[name] != types[name]} == {f"blk.{i}.ffn_down.weight" for i in range(30)}
    assert {rounded[f"blk.{i}.ffn_down.weight"] for i in range(30)} == {Type.IQ4_NL}
    for bits in (8, 16):
        assert Recipe.of(bits=bits).llm_types(shapes.items(), rounded=True) == Recipe.of(bits=bits).llm_types(shapes.items())


def test_recipes_from_options():
    assert Recipe.of() == Recipe.of(bits=4) == Recipe(bits=4, llm="Q4_K_M", vision="Q4_K")
    assert Recipe.of(bits=8, vision_quant="f16") == Recipe(bits=8, llm="Q8_0", vision="F16")
    assert Recipe.of(quant="q5_k_m") == Recipe(bits=5, llm="Q5_K_M", vision="Q5_K")
    for wrong in ({"bits": 5}, {"quant": "Q9"}, {"vision_quant": "Q4_K_M"}):
        with pytest.raises(RecipeError, match="^Expected"):
            Recipe.of(**wrong)


def test_feed_forward_padding():
    assert Recipe.of(bits=4).padded_ffn(4304) == 4352
    assert Recipe.of(bits=8).padded_ffn(4304) == 4320
    assert Recipe.of(bits=16).padded_ffn(4304) == 4304
    assert Recipe.of(bits=4).padded_ffn(4096) == 4096
    assert Recipe.of(bits=4).padded_ffn(60) == 64


def test_ctypes_agrees_with_gguf_about_sizes():
    library = ctypes.CDLL(str(ggml.find_library()))
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    for kind in PLAIN:
        ggml.prepare(kind)
        assert library.ggml_row_size(int(kind), 1024) == ggml.row_bytes(kind, 1024)


def test_library_is_found_where_llama_cpp_is_installed():
    assert Path(ggml.find_library()).is_file()
