"""Long prompts as dense BF16 products: on a large GPU a first token comes sooner, for some memory more.

    python -m runtimes.dense [--device 0]        # compiles the library for this machine's GPU; needs CUDA's nvcc, once
    built_library((9, 0))                        # where it is, if it was built from these sources for the installed llama-cpp-python

llama.cpp multiplies 4-bit weights as they are, in integers, which suits cards for which a model's size is what counts. On an H200 the
dense product is quicker from some hundred rows on, unpacking included; cuda/prompts.cu is what llama.cpp is told so by. The library also
brings an image's rows from the tower to the model without detours (direct.py). Plans use it where it was built and there is room
(planner.py); settings can ask for it. Every other product that goes through cuBLAS is then one in BF16 too, such as attention without
flash attention in a tower; the tower's self-check, made at each load then, judges that. Linux, and kinds of GPU that it was measured on.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgemed.core.errors import EdgemedError, EngineLoadError, ResourceError
from edgemed.core.files import os_errors
from edgemed.core.paths import data_dir
from edgemed.core.versions import package_version
from runtimes.memory import read_capability
from runtimes.messages import DenseState

# H100, H200. Others have faster integers beside their BF16, and were not measured.
CAPABILITIES = frozenset({(9, 0)})
# From so many rows on, a 7 B model on an H200 was quicker this way (docs/LOG.md, 2026-11-29).
LEAST_ROWS = 96
# Prompts go in whole, so that weights are unpacked once for each.
BATCH_TOKENS, MICRO_BATCH = 2048, 1024
_FOLDER = Path(__file__).parent / "cuda"
_SOURCES = ("prompts.cu", "blocks.h", "rows.h")
_LAST_LINES = 3
_WITHOUT = "Prompts work without it, as they are."
# An image's rows were copied through memory of megabytes: 2 ms sooner (as above; not measured again since direct.py).
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# LD_PRELOAD is divided at these.
_DIVIDERS = frozenset(": \t\n")
# By the library's own codes (cuda/prompts.cu).
_REFUSALS = {1: "that llama.cpp's CUDA library with its functions is not there", 2: "that the GPU cannot run it"}


def environment(library: Path) -> dict[str, str]:
    """What an engine's process is started with; `enable` does the rest there."""
    own = {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": _HUGE_PAGES}
    joined = {name: ":".join(filter(None, (value, os.environ.get(name)))) for name, value in own.items()}
    return {**joined, "GGML_CUDA_CUBLAS_COMPUTE_TYPE": "bf16"}


def enable(cuda_libraries: Sequence[Path], device: int) -> None:
    """In a process with that environment, before the first product. `cuda_libraries`: one of them is loaded. Raises EngineLoadError."""
    switch = getattr(ctypes.CDLL(None), "edgemed_dense_prompts", None)
    codes = [switch(os.fsencode(path), device, LEAST_ROWS) for path in cuda_libraries] if switch else []
    if 0 not in codes:
        found = _REFUSALS[max(codes, default=1)] if switch else "none preloaded"
        raise EngineLoadError(
            f"Expected the library for dense prompts to work with llama.cpp's, found {found}.", "Build it again: python -m runtimes.dense"
        )


def library_path(capability: tuple[int, int]) -> Path:
    """Where the library for these sources, this llama.cpp and this kind of GPU and processor belongs."""
    digest = hashlib.sha256(f"{package_version('llama-cpp-python')} {platform.machine()}".encode())
    for name in _SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    return data_dir() / "cuda" / "prompts-sm{}{}-{}.so".format(*capability, digest.hexdigest()[:12])


def built_library(capability: tuple[int, int] | None) -> Path | None:
    """The library for such a GPU, None where it was not built."""
    if capability not in CAPABILITIES or not sys.platform.startswith("linux"):
        return None
    path = library_path(capability)
    return path if path.is_file() and not _DIVIDERS & set(str(path)) else None


def state(device: int) -> DenseState:
    """Whether the GPU that CUDA calls `device` is one for it, and whether it was built."""
    capability = read_capability(device)
    if capability not in CAPABILITIES:
        return "no"
    return "not built" if built_library(capability) is None else "built"


def build(compiler: str | None, capability: tuple[int, int] | None) -> Path:
    """Compile it, whole or not at all. Raises ResourceError, EdgemedError."""
    if not sys.platform.startswith("linux"):
        raise ResourceError(f"Expected Linux for dense prompts, found {sys.platform}.", _WITHOUT)
    if compiler is None:
        raise ResourceError("Expected CUDA's compiler, found no nvcc.", "Install the CUDA toolkit, or put its bin folder into PATH.")
    if capability not in CAPABILITIES:
        wanted = " or ".join("{}.{}".format(*each) for each in sorted(CAPABILITIES))
        found = "none that NVML can see" if capability is None else "one of {}.{}".format(*capability)
        raise ResourceError(f"Expected a GPU of compute capability {wanted}, found {found}.", _WITHOUT)
    path = library_path(capability)
    if _DIVIDERS & set(str(path)):
        raise ResourceError(f"Expected a place without blanks and colons for a library to preload, found {path}.", "Set EDGEMED_HOME.")
    with os_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-")
    with folder as name:
        target = Path(name) / path.name
        # Preloaded in front of everything: it must not bring the system's C++ library along.
        host = "-fPIC,-fno-exceptions,-fno-threadsafe-statics"
        options = ["-std=c++17", "-O3", "-shared", "-Xcompiler", host, "-cudart", "static", "-arch=sm_{}{}".format(*capability)]
        _run([compiler, *options, "-o", str(target), str(_FOLDER / _SOURCES[0]), "-ldl"])
        with os_errors(path):
            target.replace(path)
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-_LAST_LINES:])
        raise EdgemedError(f"Expected nvcc to compile {command[-2]}, found exit code {done.returncode}: {said}", "Check the CUDA toolkit.")


def main() -> int:
    """Build, say where. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m runtimes.dense", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=int, default=0, help="CUDA's number of the GPU")
    device = parser.parse_args().device
    try:
        print(build(shutil.which("nvcc"), read_capability(device)))
    except EdgemedError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
