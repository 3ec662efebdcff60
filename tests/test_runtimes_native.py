"""Build options from the kernel's list of a processor's features: never more than it names, AMX never."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes import libllama, native

AVX512 = "avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi avx512_vnni avx512_bf16"
LAPTOP = "fpu sse4_2 avx f16c fma bmi1 bmi2 avx2"
CPUINFO = {
    "server": f"processor\t: 0\nflags\t\t: {LAPTOP} avx_vnni {AVX512} amx_tile amx_int8 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n",
    "laptop": f"processor\t: 0\nflags\t\t: {LAPTOP}\n",
    "oldest": "processor\t: 0\nflags\t\t: fpu sse sse2 ssse3 cx16\n",
    "old": "processor\t: 0\nflags\t\t: fpu ssse3 sse4_1 sse4_2\n",
    "phi": f"flags\t\t: {LAPTOP} avx512f avx512cd avx512er avx512pf avx512_vnni\n",
    "jetson": "processor\t: 0\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n",
    "pi4": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n",
}


def switches(text: str) -> dict[str, str]:
    return dict(option.removeprefix("-DGGML_").split("=", 1) for option in native.build_options(text))


def test_a_processor_gets_all_that_it_has_and_no_amx() -> None:
    found = switches(CPUINFO["server"])
    assert found.pop("NATIVE") == "OFF"
    assert set(found) == {name.upper() for name in native._X86} and set(found.values()) == {"ON"}


@pytest.mark.parametrize(("kind", "on"), [("laptop", 6), ("old", 1), ("oldest", 0), ("phi", 6)])
def test_what_the_kernel_does_not_name_is_off(kind: str, on: int) -> None:
    found = switches(CPUINFO[kind])
    assert list(found.values()).count("ON") == on and found["AVX512"] == found["AVX512_VNNI"] == "OFF"
    assert (found["AVX2"] == "ON") == (not kind.startswith("old")) and set(found) == {"NATIVE", *(name.upper() for name in native._X86)}


def test_what_the_compiler_does_not_know_is_off() -> None:
    found = native.build_options(CPUINFO["server"], lambda flag: flag != "-mavxvnni")
    assert "-DGGML_AVX_VNNI=OFF" in found and "-DGGML_AVX512_BF16=ON" in found
    assert native.build_options(CPUINFO["jetson"].replace("asimddp", "asimddp i8mm"), lambda flag: False)[1].endswith("+dotprod+fp16")
    if shutil.which("c++"):
        assert native.compiler_knows("-O2") and not native.compiler_knows("-mno-such-thing")


def test_arm() -> None:
    assert switches(CPUINFO["jetson"]) == {"NATIVE": "OFF", "CPU_ARM_ARCH": "armv8.2-a+dotprod+fp16"}
    assert switches(CPUINFO["pi4"]) == {"NATIVE": "OFF"}
    assert switches("nothing known") == {"NATIVE": "OFF"}


def test_what_a_build_leaves_unused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "CPUINFO", tmp_path / "cpuinfo")
    assert native.unused([]) == ()
    for kind, built, left in [
        ("server", [], ()),
        ("server", ["avx", "avx2", "f16c", "fma", "bmi2", "avx512"], ("avx_vnni", "avx512_vbmi", "avx512_vnni", "avx512_bf16")),
        ("laptop", ["avx", "avx2", "f16c", "fma", "bmi2"], ()),
        ("jetson", ["neon"], ("dotprod", "fp16")),
        ("jetson", ["neon", "dotprod", "fp16_va"], ()),
    ]:
        (tmp_path / "cpuinfo").write_text(CPUINFO[kind])
        assert native.unused(built) == left


def test_ggml_answers_for_every_name() -> None:
    asked = {native._ASKED.get(name, name) for name in (*native._X86, *native._ARM)} - {"sse42"}
    assert asked <= set(libllama._CPU_FEATURES)
    assert libllama.cpu_features(), "the installed library answers"


@pytest.mark.skipif(not native.CPUINFO.is_file(), reason="no /proc/cpuinfo here")
def test_it_runs_before_anything_is_installed() -> None:
    file = Path(native.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == native.build_options(native.CPUINFO.read_text(), native.compiler_knows)
