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
from runtimes import dense, libllama, opening, worker
from runtimes.devices import find_device
from runtimes.direct import NOT_TAKEN, ModelRows
from runtimes.engine import Engine
from runtimes.estimate import Host, estimate_memory
from runtimes.graph import GPU
from runtimes.messages import EngineSettings
from runtimes.planner import Target, Wish, list_plans, make_plan
from runtimes.probes import check_vision
from runtimes.process import WorkerProcess
from runtimes.wire import Load

GB = 10**9
CUDA = Path(dense.__file__).parent / "cuda"
ROWS = tuple(f"edgemed_{name}" for name in ("rows_begin", "rows_end", "fetch_begin", "fetch_end", "pin"))
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
@needs_compiler
def test_rows_are_written_behind_the_copy_of_what_was_looked_up(tmp_path: Path) -> None:
    # A tensor is its name here, and memory of 12 rows of 4 values is the GPU.
    source, library = tmp_path / "rows.cpp", tmp_path / "rows.so"
    source.write_text(
        f"""#include "{CUDA / "rows.h"}"
        static float gpu[48];
        static void put(ggml_tensor *, const void *data, size_t offset, size_t size) {{ memcpy((char *) gpu + offset, data, size); }}
        static const char *name(const ggml_tensor *tensor) {{ return (const char *) tensor; }}
        extern "C" float *copy(const char *tensor, const float *data, int rows) {{
            own_tensor_set = put, own_get_name = name;
            set_tensor((ggml_tensor *) tensor, data, 0, 16 * rows);
            return gpu;
        }}"""
    )
    subprocess.run(["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    copy = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).copy
    copy.restype = ctypes.POINTER(ctypes.c_float)
    text, rows, direct = np.zeros((12, 4), np.float32), np.arange(1, 25, dtype=np.float32).reshape(6, 4), ModelRows()
    wanted = text.copy()
    wanted[2:7], wanted[10] = rows[:5], rows[5]

    def run(*micro_batches: int, tensor: bytes = b"CUDA0#embd#0", code: int = 0) -> tuple[int, np.ndarray[Any, Any]]:
        seen: list[np.ndarray[Any, Any]] = []

        def decode() -> int:
            for count in micro_batches:
                copy(b"inp_tokens", text.ctypes.data_as(ctypes.c_void_p), 1)  # which is not looked at
                gpu = copy(tensor, text.ctypes.data_as(ctypes.c_void_p), count)
                seen.append(np.ctypeslib.as_array(gpu, (12, 4))[:count].copy())
            return code

        taken = direct.run([(2, rows[:5]), (10, rows[5:])], 12, 4, decode)
        return taken, np.concatenate(seen)

    for sizes in ((12,), (5, 5, 2), (2, 1, 9), (1,) * 12):
        code, found = run(*sizes)
        assert code == 0 and np.array_equal(found, wanted)
    assert run(12, code=1)[0] == 1
    assert run(6)[0] == run(12, tensor=b"CUDA0#embd_norm#0")[0] == NOT_TAKEN, "another llama.cpp"
    gpu = copy(b"CUDA0#embd#0", text.ctypes.data_as(ctypes.c_void_p), 12)  # a batch without images
    assert not np.ctypeslib.as_array(gpu, (12, 4)).any()


@linux
@needs_compiler
def test_a_towers_rows_are_fetched_to_where_they_stay(artifact: Artifact, tmp_path: Path) -> None:
    # The real tower on a CPU; memory is "pinned" by counting it, and the fourth is refused.
    source, library = tmp_path / "fetch.cpp", tmp_path / "fetch.so"
    source.write_text(
        f"""#include "{CUDA / "rows.h"}"
        #include <dlfcn.h>
        static int pinned = 0;
        extern "C" void use(const char *path) {{
            own_tensor_get = (tensor_get_t) dlsym(dlopen(path, RTLD_NOLOAD | RTLD_LAZY), "ggml_backend_tensor_get");
        }}
        extern "C" void ggml_backend_tensor_get(const ggml_tensor *tensor, void *data, size_t offset, size_t size) {{
            get_tensor(tensor, data, offset, size);
        }}
        extern "C" int edgemed_pin(void *, size_t) {{ return ++pinned > 3; }}
        extern "C" int count() {{ return pinned; }}"""
    )
    subprocess.run(["g++", "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    script = tmp_path / "script.py"
    script.write_text(
        """
import ctypes, gc, os, sys
from pathlib import Path
from edgemed.core.manifest import load_artifact
from edgemed.core.errors import EngineLoadError
from runtimes import libllama
from runtimes.direct import TowerRows
from runtimes.libmtmd import VisionTower
from runtimes.messages import EngineSettings
import numpy as np

preloaded = ctypes.CDLL(None)
preloaded.use(os.fsencode(libllama._base._name))
artifact = load_artifact(Path(sys.argv[1]))
size = artifact.manifest.image.size_px
llm = libllama.LanguageModel(artifact.llm_path, EngineSettings(context_tokens=256, gpu_layers=0), 1, no_space_prefix=False)
rows = artifact.manifest.vision.image_tokens
source = TowerRows(5 * 4 * rows * llm.width)  # five and two more are asked for, three are had
usual, direct = (VisionTower(artifact.mmproj_path, size, llm, 1, None, rewritable=True, direct=d) for d in (None, source))
for _ in range(2):
    direct.prepare(rows)
assert preloaded.count() == 4 and len(source._free) == 3
rng = np.random.default_rng(3)
images = [rng.integers(0, 256, (size, size, 3), np.uint8).tobytes() for _ in range(5)]
kept = [direct.encode(image) for image in images]
for image, found in zip(images, kept):
    assert np.array_equal(found, usual.encode(image)), "what was encoded later has not changed it"
assert not source._free
first, view = kept[0].ctypes.data, kept[0][1:]
kept[1:] = []
assert len(source._free) == 2
kept.clear()
gc.collect()
assert len(source._free) == 2, "a view holds its image's memory"
del view
gc.collect()
assert len(source._free) == 3
again = direct.encode(images[4])
assert again.ctypes.data == first and np.array_equal(again, usual.encode(images[4])), "it is used again"
assert direct.encode(images[0]).shape == (rows, llm.width) and source.memory(rows + 1, llm.width).shape == (rows + 1, llm.width)
assert TowerRows(0).run(np.zeros((2, 2), np.float32), lambda: 7) == (7, False), "nothing was fetched"
try:
    llm.take_rows()
except EngineLoadError as error:  # a CPU takes looked-up rows as they are, without a copy
    assert "did not take" in error.message and not llm.takes_rows, error
else:
    raise AssertionError("rows were taken")
assert llm.decode_tokens([1, 2], range(2), [[0]] * 2, [1]) == 0, "nothing is left in its cache"
print("right")
"""
    )
    done = subprocess.run(
        [sys.executable, script, artifact.folder],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "right\n", done.stderr


@linux
def test_the_library_is_built_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    assert dense.built_library((9, 0)) is None
    nvcc = tmp_path / "nvcc"
    fails, works = "echo 'error: no such architecture' >&2; exit 2", 'while [ "$1" != -o ]; do shift; done; echo lib > "$2"'
    for words, exits in ((fails, False), (works, True)):
        nvcc.write_text(f"#!/bin/sh\n{words}\n")
        nvcc.chmod(0o755)
        if exits:
            assert dense.build(str(nvcc), (9, 0)) == dense.built_library((9, 0))
        else:
            with pytest.raises(EdgemedError, match=r"prompts\.cu, found exit code 2: error: no such architecture"):
                dense.build(str(nvcc), (9, 0))
            assert dense.built_library((9, 0)) is None
        assert len(list((tmp_path / "home" / "cuda").iterdir())) == int(exits), "nothing half-built is left"
    with pytest.raises(ResourceError, match="found no nvcc"):
        dense.build(None, (9, 0))
    for capability, said in (((8, 6), "9.0, found one of 8.6"), (None, "none that NVML can see")):
        with pytest.raises(ResourceError, match=said):
            dense.build(str(nvcc), capability)
    monkeypatch.setattr(dense, "package_version", lambda name: "another")
    assert dense.built_library((9, 0)) is None, "built for another llama.cpp"
    monkeypatch.setattr(dense, "CAPABILITIES", {(9, 0), (10, 0)})
    assert dense.library_path((9, 0)) != dense.library_path((10, 0))
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "a home"))  # LD_PRELOAD would take it for two
    with pytest.raises(ResourceError, match="without blanks and colons"):
        dense.build(str(nvcc), (9, 0))
    path = dense.library_path((9, 0))
    path.parent.mkdir(parents=True)
    path.write_text("lib")
    assert dense.built_library((9, 0)) is None


@linux
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_it_compiles_and_has_the_names_that_llama_cpp_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))
    built = dense.build(shutil.which("nvcc"), (9, 0))
    names = subprocess.run(["nm", "-D", str(built)], capture_output=True, text=True, check=True).stdout
    # As `nm -D libggml-cuda.so` has them, at the pinned version.
    for name in (
        "_Z24ggml_cuda_should_use_mmq9ggml_typeill",
        "_Z21ggml_get_to_bf16_cuda9ggml_type",
        "edgemed_dense_prompts",
        "ggml_backend_tensor_set",
        "ggml_backend_tensor_get",
        *ROWS,
    ):
        assert f" T {name}" in names
    needed = subprocess.run(["readelf", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" not in needed and "libcudart" not in needed


def test_without_library_or_gpu_it_is_refused(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))
    settings = EngineSettings(context_tokens=256, gpu_layers=0, dense_prompts=True)
    with pytest.raises(EngineLoadError, match="not built"):
        Engine.open(artifact, settings)
    monkeypatch.setattr(dense, "built_library", lambda capability: tmp_path / "none.so")
    with pytest.raises(EngineLoadError, match="found them on the CPU"):
        Engine.open(artifact, settings)


def test_the_worker_refuses_what_it_cannot_be_used_for(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[int] = []
    monkeypatch.setattr(dense, "enable", lambda libraries, device: enabled.append(device))
    settings = EngineSettings(dense_prompts=True, device=1)
    for change, gpu, said in (({}, False, "on the CPU"), ({"flash_attention": "off"}, True, "found it off"), ({}, True, "other types")):
        with pytest.raises(EngineLoadError, match=said):
            worker._enable_dense(Load(artifact, replace(settings, **change)), gpu)  # type: ignore[arg-type]
    assert not enabled
    monkeypatch.setattr(worker, "read_shape", lambda artifact, tensor_bytes: small_tower("Q4_K"))
    worker._enable_dense(Load(artifact, settings), True)
    assert enabled == [1]


def test_the_tower_is_probed_each_time(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder:
        mode = "plain"

        def check(self, certificate: object) -> float:
            return 0.25

    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))

    def check(settings: EngineSettings) -> Any:
        return check_vision(Encoder(), artifact.manifest, "runtime", "GPU", True, settings)  # type: ignore[arg-type]

    usual, settings = EngineSettings(), EngineSettings(dense_prompts=True)
    assert [check(s) for s in (settings, usual, usual, settings)] == [("probed", 0.25)] * 2 + [("remembered", None), ("probed", 0.25)]


def test_where_it_does_not_load_the_next_plan_does(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    opened: list[bool] = []
    monkeypatch.setattr(opening, "read_shape", lambda artifact, tensor_bytes: small_tower("Q4_K"))

    def open_engine(artifact: Artifact, settings: EngineSettings) -> str:
        opened.append(settings.dense_prompts)
        if settings.dense_prompts:
            raise EngineLoadError("Expected a library, found none preloaded.", "Build it again.")
        if len(opened) == 4:
            raise EngineLoadError("The file is damaged.")
        return "engine"

    monkeypatch.setattr(opening.Engine, "open", open_engine)
    engine, plan = opening.open_planned(artifact, place("built", 140 * GB), Wish(), said.append)
    assert engine == "engine" and opened == [True, False] and not plan.settings.dense_prompts
    assert said == ["Loading with dense prompts failed; trying without. Expected a library, found none preloaded. Build it again."]
    with pytest.raises(EngineLoadError, match="damaged"):
        opening.open_planned(artifact, place("built", 140 * GB), Wish(), said.append)


@linux
@needs_compiler
def test_a_library_that_does_not_match_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {}
    for code in (0, 1, 2, 3):  # the last: a build without CUDA's library
        source, library = tmp_path / f"s{code}.c", tmp_path / f"s{code}.so"
        body = f'return rows != 96 || device != 3 ? 7 : strcmp(path + strlen(path) - 5, ".so.0") ? 1 : {code};'
        source.write_text(f"#include <string.h>\nint edgemed_dense_prompts(const char *path, int device, int rows) {{ {body} }}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        words = "from pathlib import Path; from runtimes import dense\n"
        words += f"names = ['libggml-cuda.so', 'libggml-cuda.so.0'][:{2 * (code < 3)}]\n"
        words += "try: dense.enable([Path('/x', name) for name in names], 3)\n"
        words += "except Exception as e: print(type(e).__name__, e.message)"
        process = subprocess.run(
            [sys.executable, "-c", words], env={**os.environ, **dense.environment(library)}, capture_output=True, text=True, check=True
        )
        answers[code] = process.stdout
    assert answers[0] == "" and all(answers[code].startswith("EngineLoadError") for code in (1, 2, 3))
    assert "its functions is not there" in answers[1] and "the GPU cannot run it" in answers[2]
    assert answers[3] == answers[1]
    with pytest.raises(EngineLoadError, match="none preloaded"):
        dense.enable([Path("libggml-cuda.so")], 0)


def test_a_worker_gets_its_environment() -> None:
    process = WorkerProcess(60, {"GGML_CUDA_CUBLAS_COMPUTE_TYPE": "bf16"})
    try:
        if sys.platform.startswith("linux"):
            assert b"GGML_CUDA_CUBLAS_COMPUTE_TYPE=bf16" in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    finally:
        process.close()


def small_tower(quant: str) -> Any:
    """The pair of 7 B with its tower in such a type."""
    return replace(big_pair(), tower_quant=quant)


def place(state: Any, gpu_bytes: int) -> Target:
    return Target(find_device("gpu"), Host(True, frozenset({"avx2"}), 400_000_000, 4, state), gpu_bytes, 90 * GB)


def test_a_plan_takes_it_where_it_was_built_and_fits() -> None:
    pair = small_tower("Q4_K")
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
    # So many answers at once that the output layer, 32000 x 4096, is dense for them too: larger than any of a layer with its rows.
    many = [replace(s, slots=128, kv_tokens=4096, micro_batch=128) for s in (first.settings, bare)]
    sizes = [estimate_memory(pair, s, Host(True), libllama.tensor_bytes).sum(GPU, "dense prompts") for s in many]
    assert sizes[0] > 2 * 32000 * 4096 and sizes[1] == 0
    assert make_plan(pair, place("built", 140 * GB), Wish(micro_batch=256), libllama.tensor_bytes).settings.micro_batch == 256


def test_a_plan_leaves_it_where_it_cannot_be() -> None:
    other = small_tower("Q4_K")
    tensors = {name: replace(t, type=2) if name == "blk.3.attn_q.weight" else t for name, t in other.llm.tensors.items()}
    other = replace(other, llm=replace(other.llm, tensors=tensors))
    for pair, state, wish, room, advised in (
        (small_tower("Q4_K"), "no", Wish(), 140, False),
        (small_tower("Q4_K"), "not built", Wish(), 140, True),
        (small_tower("Q4_K"), "not built", Wish(gpu_layers=4), 140, False),
        (small_tower("Q4_K"), "not built", Wish(), 5.6, False),  # it would not fit
        (small_tower("F16"), "built", Wish(), 140, False),  # computed more exactly as it is
        (small_tower("F16"), "not built", Wish(), 140, False),
        (other, "built", Wish(), 140, False),  # a matrix in Q4_0
        (small_tower("Q4_K"), "built", Wish(gpu_layers=4), 140, False),
    ):
        plan = make_plan(pair, place(state, int(room * GB)), wish, libllama.tensor_bytes)
        assert not plan.settings.dense_prompts and plan.settings.micro_batch == 512
        assert any("runtimes.dense" in reason for reason in plan.reasons) == advised


def test_what_was_preloaded_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("LD_PRELOAD", "/a.so")
    found = dense.environment(Path("/b.so"))
    assert found["LD_PRELOAD"] == "/b.so:/a.so" and found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
