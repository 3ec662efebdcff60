"""The machines that a model is planned for: one TOML file each in `profiles/`, every number with where it comes from.

    profile = find_device("rtx3050")                 # raises InputError for a name that is none
    profile.usable_bytes, profile.bandwidth_bytes_per_s

A number is `{ value = …, source = "…", verified = true }`; `verified = false` marks one that no data sheet or measurement at hand
bears out. "cpu" and "gpu" (or "cuda") stand for this machine: their sizes are asked of it. Knows no model and no engine.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgemed.core.errors import InputError, ResourceError
from runtimes.memory import GpuMemory, read_gpu

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent / "profiles"
_ALIASES = {"cuda": "gpu"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Frozen):
    """A number and where it is from."""

    value: float = Field(ge=0)
    source: str = Field(min_length=1)
    verified: bool


class Suited(_Frozen):
    """Settings to begin with on a device; a plan departs from them where they do not fit."""

    context_tokens: int = Field(default=2048, ge=256)
    micro_batch: int = Field(default=512, ge=32)
    kv_type: Literal["f16", "q8_0"] = "f16"
    vision_flash_attention: Literal["auto", "on", "off"] = "auto"


class Profile(_Frozen):
    """A device. None for a size or a speed means: ask the machine at hand, or unknown."""

    name: str
    title: str
    kind: Literal["cpu", "gpu"]
    # CPU and GPU share one memory, as on a Jetson.
    unified: bool = False
    memory_bytes: Figure | None = None
    # What is left for one program after the system, the driver and a screen.
    usable_bytes: Figure | None = None
    bandwidth_bytes_per_s: Figure | None = None
    compute_capability: Figure | None = None
    # CUDA's context and libraries' own memory on the card, beside every buffer that llama.cpp reports.
    context_bytes: Figure | None = None
    # As NVML spells the device itself, so that it is known where it is here; not verified on the devices.
    nvml_names: tuple[str, ...] = ()
    # Of its CPU, what a portable build of llama.cpp uses to repack weights.
    cpu_features: tuple[str, ...] = ()
    settings: Suited = Suited()

    @property
    def gpu(self) -> bool:
        return self.kind == "gpu"

    @property
    def local(self) -> bool:
        """Whether it stands for whatever machine this is."""
        return self.memory_bytes is None


def device_names() -> list[str]:
    """All names that --device takes."""
    return sorted({path.stem for path in _FOLDER.glob("*.toml")} | set(_ALIASES))


@cache
def find_device(name: str) -> Profile:
    """The profile called `name`. Raises InputError."""
    path = _FOLDER / f"{_ALIASES.get(name, name)}.toml"
    if not name.isidentifier() or not path.is_file():
        raise InputError(f"Expected a device out of {', '.join(device_names())}, found '{name}'.", "Pass one of them with --device.")
    return load_profile(path)


def load_profile(path: Path) -> Profile:
    """One file. Raises InputError that names it and its first fault."""
    hint = f"Correct {path}, or install edgemed again."
    try:
        profile = Profile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"Expected TOML in the profile {path.name}, found a fault: {error}.", hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        unknown = first["type"] == "extra_forbidden"
        found = "a key that is unknown" if unknown else f"{first.get('input')!r} ({first['msg']})"
        raise InputError(f"Expected a valid profile in {path.name}, found at '{where}': {found}.", hint) from error
    if profile.name != path.stem:
        raise InputError(f"Expected the name '{path.stem}' in the profile {path.name}, found '{profile.name}'.", hint)
    return profile


def gpu_budget(profile: Profile, device: int = 0) -> int:
    """Bytes that a program may take on the profile's GPU. Raises ResourceError where this machine was to be asked and has none."""
    if profile.usable_bytes is not None:
        return int(profile.usable_bytes.value)
    gpu = require_gpu(device)
    return gpu.free_bytes


def require_gpu(device: int = 0) -> GpuMemory:
    """This machine's GPU by NVML. Raises ResourceError."""
    gpu = read_gpu(device)
    if gpu is None:
        raise ResourceError(
            "Expected an NVIDIA GPU that NVML can see, found none.",
            "Install NVIDIA's driver, choose --device cpu, or plan for a named device, as --device rtx3050.",
        )
    return gpu


def host_budget() -> int:
    """Bytes of main memory that can be had now without swapping."""
    return int(psutil.virtual_memory().available)


def swapping() -> bool:
    """Whether this machine lives on its swap: more of it in use than main memory is free."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return bool(swap.used > max(memory.available, memory.total // 20))
