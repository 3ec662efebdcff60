"""What llama.cpp may use of this machine's processor, as options for a build that stays on this machine.

    python3 runtimes/native.py      # -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_AVX512=ON ... (what `make CPU=native` builds with)

GGML_NATIVE=ON asks the processor itself, and that names what the system does not let programs use: AMX in many virtual machines, where
the first product of a quantised model then ends the process. The kernel's list has what works; AMX is left out all the same. A processor
without AVX2 gets a build without it, where the portable build would not run. What the compiler does not know yet is left out. Imports
nothing but the standard library: nothing is installed yet.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# ggml's name of a feature, and the kernel's names of all that it compiles for (ggml/src/ggml-cpu/CMakeLists.txt).
_X86 = {
    "sse42": ("sse4_2",),
    "avx": ("avx",),
    "f16c": ("f16c",),
    "fma": ("fma",),
    "bmi2": ("bmi2",),
    "avx2": ("avx2",),
    "avx_vnni": ("avx_vnni",),
    "avx512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "avx512_vbmi": ("avx512vbmi",),
    "avx512_vnni": ("avx512_vnni",),
    "avx512_bf16": ("avx512_bf16",),
}
_ARM = {"dotprod": "asimddp", "fp16": "asimdhp", "i8mm": "i8mm"}
# Younger than the compilers of some systems that are still in use (GCC 10 and 11), and how the compiler is asked for them.
_YOUNG = {"avx_vnni": "-mavxvnni", "avx512_bf16": "-mavx512bf16", "i8mm": "-march=armv8.2-a+i8mm"}
# Where ggml's own question is called otherwise.
_ASKED = {"fp16": "fp16_va", "i8mm": "matmul_int8"}


def features(cpuinfo: str) -> tuple[str, ...]:
    """ggml's names for what a processor can do, from the text of /proc/cpuinfo."""
    key, flags = _flags(cpuinfo)
    if key == "flags":
        found = {name for name, needs in _X86.items() if flags.issuperset(needs)}
        if "avx512" not in found:
            found = {name for name in found if not name.startswith("avx512_")}
        return tuple(name for name in _X86 if name in found)
    return tuple(name for name, flag in _ARM.items() if {flag, "asimd"} <= flags)


def _flags(cpuinfo: str) -> tuple[str, set[str]]:
    for line in cpuinfo.splitlines():
        key, _, values = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86 and ARM
            return key.strip(), set(values.split())
    return "", set()


def build_options(cpuinfo: str, known: Callable[[str], bool] = lambda flag: True) -> list[str]:
    """CMAKE_ARGS for a build for this processor. `known`: whether the compiler knows a flag."""
    found = [name for name in features(cpuinfo) if name not in _YOUNG or known(_YOUNG[name])]
    if _flags(cpuinfo)[0] == "flags":  # all of them, as ggml switches on what a build without GGML_NATIVE is not told of
        return ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name.upper()}={'ON' if name in found else 'OFF'}" for name in _X86)]
    arm = "".join(f"+{name}" for name in found)
    return ["-DGGML_NATIVE=OFF", *([f"-DGGML_CPU_ARM_ARCH=armv8.2-a{arm}"] if arm else [])]


def compiler_knows(flag: str) -> bool:
    """Whether the C++ compiler takes a flag; yes where none is found, as CMake will say so better."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), flag, "-E", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return True


def unused(built: Iterable[str]) -> tuple[str, ...]:
    """What this machine's processor can do that a build with `built` (see libllama.cpu_features) leaves unused; () where unknown."""
    used = set(built)
    if not used or not CPUINFO.is_file():
        return ()
    # ggml has no question about SSE 4.2; whoever lacks it lacks AVX too.
    return tuple(name for name in features(CPUINFO.read_text()) if name != "sse42" and _ASKED.get(name, name) not in used)


if __name__ == "__main__":
    if not CPUINFO.is_file():
        sys.exit("CPU=native expects Linux's /proc/cpuinfo; leave it out for a portable build, or set CMAKE_ARGS.")
    print(*build_options(CPUINFO.read_text(), compiler_knows))
