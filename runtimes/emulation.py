"""A device's budget on a machine that is another: less memory, the same processor. What is measured so is labelled.

    with emulate(find_device("jetson")) as stage:
        plan = plan_artifact(artifact, stage.target, Wish())
        Engine.open(artifact, stage.limit(plan)); stage.label        # "" where the device itself is here

On a GPU a ballast takes what the device has not; on a CPU the engine's process may allocate no more than the budget less the model's
mapped file (RLIMIT_DATA). Speeds stay this machine's: nothing here makes it as slow as the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from edgemed.core.units import format_bytes
from runtimes import libllama
from runtimes.ballast import Ballast
from runtimes.devices import Profile, host_budget
from runtimes.estimate import PROGRAM_BYTES, Host
from runtimes.memory import read_gpu
from runtimes.messages import EngineSettings
from runtimes.opening import load_target, plan_target
from runtimes.planner import Plan, Target
from runtimes.system import physical_cores

# What RLIMIT_DATA counts beside memory in use: threads' stacks and what the allocator keeps in reserve.
_RESERVE_BYTES = 512_000_000


@dataclass(frozen=True)
class Stage:
    """Where to load. `label` says what is emulated, on what."""

    target: Target
    label: str
    limited: bool = False

    def limit(self, plan: Plan) -> EngineSettings:
        """The plan's settings, with the budget's end where it is the engine's process that has to keep to it."""
        budget = self.target.cpu_bytes
        if not self.limited or budget is None:
            return plan.settings
        return replace(plan.settings, memory_limit_bytes=max(PROGRAM_BYTES, budget - plan.estimate.mapped_bytes) + _RESERVE_BYTES)


@contextmanager
def emulate(profile: Profile, index: int = 0) -> Iterator[Stage]:
    """The device, or its budget. Raises ResourceError where this machine has less."""
    if profile.local:
        yield Stage(load_target(profile.name, index), "")
        return
    gpu = read_gpu(index) if libllama.has_gpu_library() else None
    budget = int(profile.usable_bytes.value) if profile.usable_bytes is not None else host_budget()
    if gpu is not None and any(gpu.name == name or gpu.name.startswith(f"{name} (") for name in profile.nvml_names):
        yield Stage(load_target(profile.name, index), "")
    elif gpu is not None:
        label = f"emulated: {profile.title}'s budget of {format_bytes(budget)} on {gpu.name}, whose speed this is"
        with Ballast(index, budget):
            yield Stage(plan_target(profile.name, index), label)
    else:
        label = f"emulated: {profile.title}'s budget of {format_bytes(budget)} on this machine's CPU, whose speed this is"
        host = Host(False, libllama.cpu_features(), 0, physical_cores())
        yield Stage(Target(profile, host, None, min(budget, host_budget())), label, limited=True)
