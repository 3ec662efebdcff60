"""Dense prompts without a GPU: the arithmetic of cuda/blocks.h compiled for this processor, the build, the refusals, and the plan."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from runtimes_pair import make_artifact
from test_runtimes_planning import big_pair

from edgemed.core.errors import EdgemedError, EngineLoadError, ResourceError
from edgemed.core.manifest import Artifact
from runtimes import dense, libllama
from runtimes.devices import find_device
from runtimes.engine import Engine
from runtimes.estimate import Host, estimate_memory
from runtimes.graph import GPU
from runtimes.messages import EngineSettings
from runtimes.planner import Target, Wish, list_plans, make_plan
from runtimes.process import WorkerProcess

GB = 10**9
CUDA = Path(dense.__file__).parent / "cuda"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared libraries as on Linux")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("pair") / "pair", "clip")


@linux
@needs_compiler
def test_blocks_are_unpacked_as_gguf_does(tmp_path: Path) -> None:
    source, library = tmp_path / "blocks.cpp", tmp_path / "blocks.so"
    functions = "".join(
        f'extern "C" void {name}(const uint8_t *x, float *y, long n) {{ for (long i = 0; i < n / 8; ++i) '
        f"{name}::unpack(x + i / ({name}::VALUES / 8) * {name}::BYTES, i % ({name}::VALUES / 8), y + 8 * i); }}\n".replace(
            f"void {name}(", f"void run_{name}("
        )
        for name in ("Q4K", "Q6K", "Q80")
    )
    source.write_text(f'#include "{CUDA / "blocks.h"}"\n{functions}')
    subprocess.run(["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    rng = np.random.default_rng(7)
    for name, kind, halves in (("Q4K", "Q4_K", (0, 2)), ("Q6K", "Q6_K", (208,)), ("Q80", "Q8_0", (0,))):
        type_ = gguf.GGMLQuantizationType[kind]
        values, size = gguf.GGML_QUANT_SIZES[type_]
        blocks = rng.integers(0, 256, (500, size), np.uint8)  # every bit pattern means something but for the scales'
        for at in halves:
            scales = np.concatenate([rng.normal(size=400), rng.normal(size=90) * 1e-6, [0.0, -0.0, 65504.0, 1.0, 2**-24, -2.0, 3, 4, 5, 6]])
            blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8).reshape(-1, 2)
        wanted = gguf.quants.dequantize(blocks, type_).reshape(-1)
        found = np.empty(500 * values, np.float32)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (blocks, found)]
        getattr(loaded, f"run_{name}")(*pointers, ctypes.c_long(found.size))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=0, err_msg=kind)


@linux
def test_the_library_is_built_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    assert dense.built_library() is None
    nvcc = tmp_path / "nvcc"
    fails, works = "echo 'error: no such architecture' >&2; exit 2", 'while [ "$1" != -o ]; do shift; done; echo lib > "$2"'
    for words, exits in ((fails, False), (works, True)):
        nvcc.write_text(f"#!/bin/sh\n{words}\n")
        nvcc.chmod(0o755)
        if exits:
            assert dense.build(str(nvcc), (9, 0)) == dense.built_library()
        else:
            with pytest.raises(EdgemedError, match=r"prompts\.cu, found exit code 2: error: no such architecture"):
                dense.build(str(nvcc), (9, 0))
            assert dense.built_library() is None
        assert len(list((tmp_path / "home" / "cuda").iterdir())) == int(exits), "nothing half-built is left"
    with pytest.raises(ResourceError, match="found no nvcc"):
        dense.build(None, (9, 0))
    for capability, said in (((8, 6), "one of 8.6"), (None, "none that NVML can see")):
        with pytest.raises(ResourceError, match=said):
            dense.build(str(nvcc), capability)
    monkeypatch.setattr(dense, "package_version", lambda name: "another")
    assert dense.built_library() is None, "built for another llama.cpp"


@linux
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_it_compiles_and_has_the_names_that_llama_cpp_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))
    built = dense.build(shutil.which("nvcc"), (9, 0))
    names = subprocess.run(["nm", "-D", str(built)], capture_output=True, text=True, check=True).stdout
    # As `nm -D libggml-cuda.so` has them, at the pinned version.
    for name in ("_Z24ggml_cuda_should_use_mmq9ggml_typeill", "_Z21ggml_get_to_bf16_cuda9ggml_type", "edgemed_dense_prompts"):
        assert f" T {name}" in names


def test_without_library_or_gpu_it_is_refused(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))
    settings = EngineSettings(context_tokens=256, gpu_layers=0, dense_prompts=True)
    with pytest.raises(EngineLoadError, match="not built"):
        Engine.open(artifact, settings)
    monkeypatch.setattr(dense, "built_library", lambda: tmp_path / "none.so")
    with pytest.raises(EngineLoadError, match="found them on the CPU"):
        Engine.open(artifact, settings)


@linux
@needs_compiler
def test_a_library_that_does_not_match_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}
    for code in (0, 1):
        source, library = tmp_path / f"s{code}.c", tmp_path / f"s{code}.so"
        body = f"return rows != 96 || strcmp(path + strlen(path) - 5, \".so.0\") || {code};"
        source.write_text(f"#include <string.h>\nint edgemed_dense_prompts(const char *path, int rows) {{ {body} }}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        words = "from pathlib import Path; from runtimes import dense\n"
        words += "try: dense.enable([Path('/x/libggml-cuda.so'), Path('/x/libggml-cuda.so.0')])\n"
        words += "except Exception as e: print(type(e).__name__, e.message)"
        process = subprocess.run(
            [sys.executable, "-c", words], env={**os.environ, **dense.environment(library)}, capture_output=True, text=True, check=True
        )
        answers[code] = process.stdout
    assert answers[0] == "" and answers[1].startswith("EngineLoadError") and "its functions are not there" in answers[1]
    with pytest.raises(EngineLoadError, match="none preloaded"):
        dense.enable([Path("libggml-cuda.so")])


def test_a_worker_gets_its_environment() -> None:
    process = WorkerProcess({"GGML_CUDA_CUBLAS_COMPUTE_TYPE": "bf16"})
    try:
        if sys.platform.startswith("linux"):
            assert b"GGML_CUDA_CUBLAS_COMPUTE_TYPE=bf16" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    finally:
        process.close()


def small_tower(kind: int) -> Any:
    """The pair of 7 B with its tower's matrices in one type."""
    pair = big_pair()
    tensors = {name: replace(t, type=kind) if len(t.shape) == 2 else t for name, t in pair.tower.tensors.items()}
    return replace(pair, tower=replace(pair.tower, tensors=tensors))


def place(state: Any, gpu_bytes: int) -> Target:
    return Target(find_device("gpu"), Host(True, frozenset({"avx2"}), 400_000_000, 4, state), gpu_bytes, 90 * GB)


def test_a_plan_takes_it_where_it_was_built_and_fits() -> None:
    pair = small_tower(12)
    plans = list(list_plans(pair, place("built", 140 * GB), Wish(), libllama.tensor_bytes))
    first, second = plans[:2]
    assert first.settings.dense_prompts and (first.settings.batch_tokens, first.settings.micro_batch) == (2048, 1024)
    assert not second.settings.dense_prompts and second.settings.micro_batch == 512
    assert any("dense BF16" in reason for reason in first.reasons) and not any("dense BF16" in reason for reason in second.reasons)
    # The largest matrix in BF16 and the rows that it is multiplied with: 14336 x 4096 and 1024 rows of 14336.
    bare = replace(first.settings, dense_prompts=False)
    sizes = [estimate_memory(pair, s, Host(True), libllama.tensor_bytes).dynamic_bytes(GPU) for s in (first.settings, bare)]
    assert sizes[0] - sizes[1] > 2 * 14336 * 4096 + 2 * 1024 * 14336
    tight = make_plan(pair, place("built", sizes[0] - 1), Wish(), libllama.tensor_bytes)
    assert not tight.settings.dense_prompts and any("as they are" in reason and "were needed" in reason for reason in tight.reasons)
    assert make_plan(pair, place("built", 140 * GB), Wish(micro_batch=256), libllama.tensor_bytes).settings.micro_batch == 256


def test_a_plan_leaves_it_where_it_cannot_be() -> None:
    for pair, state, wish in (
        (small_tower(12), "no", Wish()),
        (small_tower(12), "not built", Wish()),
        (small_tower(1), "built", Wish()),  # a tower in F16 is computed more exactly as it is
        (small_tower(12), "built", Wish(gpu_layers=4)),
    ):
        plan = make_plan(pair, place(state, 140 * GB), wish, libllama.tensor_bytes)
        assert not plan.settings.dense_prompts and plan.settings.micro_batch == 512
        assert any("runtimes.dense" in reason for reason in plan.reasons) == (state == "not built")


def test_what_was_preloaded_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("LD_PRELOAD", "/a.so")
    found = dense.environment(Path("/b.so"))
    assert found["LD_PRELOAD"] == "/b.so:/a.so" and found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
