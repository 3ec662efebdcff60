"""Long prompts as dense BF16 products: on a large GPU its first token comes sooner, for some memory more.

    python -m runtimes.dense             # compiles the library for this machine's GPU; needs CUDA's nvcc, once
    built_library()                      # where it is, if it was built from these sources for the installed llama-cpp-python

llama.cpp multiplies 4-bit weights as they are, in integers, which suits cards for which a model's size is what counts. On an H200 the
dense product is quicker from some hundred rows on, unpacking included; cuda/prompts.cu is what llama.cpp is told so by. Plans use it
where it was built and there is room (planner.py); settings can ask for it. Linux, NVIDIA GPUs of compute capability 9.0 and more.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgemed.core.errors import EdgemedError, EngineLoadError, ResourceError
from edgemed.core.files import os_errors
from edgemed.core.manifest import Manifest
from edgemed.core.paths import data_dir
from edgemed.core.versions import package_version
from runtimes.memory import read_capability
from runtimes.messages import DenseState

LEAST_CAPABILITY = (9, 0)
# From so many rows on, a 7 B model on an H200 was quicker this way (docs/LOG.md, 2026-11-29).
LEAST_ROWS = 96
# Prompts go in whole, so that weights are unpacked once for each.
BATCH_TOKENS, MICRO_BATCH = 2048, 1024
_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = ("prompts.cu", "blocks.h")
_LAST_LINES = 3
# An image's rows are copied several times on their way, through memory of megabytes: 2 ms sooner (as above).
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_DENSE_QUANTS = ("F16", "BF16", "F32")


def environment(library: Path) -> dict[str, str]:
    """What an engine's process is started with; `enable` does the rest there."""
    own = {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": _HUGE_PAGES}
    joined = {name: ":".join(filter(None, (value, os.environ.get(name)))) for name, value in own.items()}
    return {**joined, "GGML_CUDA_CUBLAS_COMPUTE_TYPE": "bf16"}


def enable(cuda_libraries: Sequence[Path]) -> None:
    """In a process with that environment, before the first product. `cuda_libraries`: one of them is loaded. Raises EngineLoadError."""
    switch = getattr(ctypes.CDLL(None), "edgemed_dense_prompts", None)
    if switch is None or all(switch(os.fsencode(path), LEAST_ROWS) for path in cuda_libraries):
        found = "none preloaded" if switch is None else "that its functions are not there"
        raise EngineLoadError(
            f"Expected the library for dense prompts to work with llama.cpp's, found {found}.", "Build it again: python -m runtimes.dense"
        )


def suits(manifest: Manifest) -> bool:
    """Whether a pair gains by it, and loses nothing: a tower of 16 bits is computed more exactly than in BF16."""
    return manifest.llm.quant not in _DENSE_QUANTS and manifest.vision.quant not in _DENSE_QUANTS


def library_path() -> Path:
    """Where the library for these sources, this llama.cpp and this kind of processor belongs."""
    digest = hashlib.sha256(f"{package_version('llama-cpp-python')} {platform.machine()}".encode())
    for name in _SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    return data_dir() / "cuda" / f"prompts-{digest.hexdigest()[:12]}.so"


def built_library() -> Path | None:
    """The library, None where it was not built."""
    if not sys.platform.startswith("linux"):
        return None
    path = library_path()
    return path if path.is_file() else None


def state(device: int) -> DenseState:
    """Whether the GPU that CUDA calls `device` is one for it, and whether it was built."""
    found = read_capability(device)
    if found is None or found < LEAST_CAPABILITY:
        return "no"
    return "not built" if built_library() is None else "built"


def build(compiler: str | None, capability: tuple[int, int] | None) -> Path:
    """Compile it, whole or not at all. Raises ResourceError, EdgemedError."""
    if compiler is None:
        raise ResourceError("Expected CUDA's compiler, found no nvcc.", "Install the CUDA toolkit, or put its bin folder into PATH.")
    if capability is None or capability < LEAST_CAPABILITY:
        wanted = ".".join(map(str, LEAST_CAPABILITY))
        found = "none that NVML can see" if capability is None else "one of {}.{}".format(*capability)
        raise ResourceError(f"Expected a GPU of compute capability {wanted} or more, found {found}.", "Prompts work as they are without.")
    path = library_path()
    with os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-")
    with folder as name:
        target = Path(name) / path.name
        options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static", "-arch=sm_{}{}".format(*capability)]
        _run([compiler, *options, "-o", str(target), str(_FOLDER / _SOURCES[0]), "-ldl"])
        with os_errors(path):
            target.replace(path)
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-_LAST_LINES:])
        raise EdgemedError(f"Expected nvcc to compile {command[-2]}, found exit code {done.returncode}: {said}", "Check the CUDA toolkit.")


def main(environ: Mapping[str, str] = os.environ) -> int:
    """Build, say where. The exit code."""
    try:
        print(build(shutil.which("nvcc", path=environ.get("PATH")), read_capability(0)))
    except EdgemedError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
