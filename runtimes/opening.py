"""From an artifact to a loaded engine by way of a plan: what fits is chosen, and where loading still fails, the next smaller plan is tried.

    target = find_target("gpu")                                        # or "cpu", or None: the GPU if there is one
    with open_planned(artifact, target, Wish(context_tokens=4096), note=print) as engine: ...

The engine's process may find less memory than was free a moment ago; that is told by EngineMemoryError.
"""

from __future__ import annotations

from collections.abc import Callable

from edgemed.core.errors import ArtifactError, EngineLoadError, EngineMemoryError, ResourceError
from edgemed.core.manifest import Artifact
from edgemed.core.units import format_bytes
from runtimes import dense, libllama
from runtimes.devices import Profile, find_device, gpu_budget, host_budget, require_gpu, swapping
from runtimes.engine import Engine
from runtimes.estimate import Host
from runtimes.memory import read_gpu
from runtimes.planner import Plan, Target, Wish, list_plans, make_plan
from runtimes.shape import PairShape, read_shape
from runtimes.system import physical_cores

_CUDA_HINT = "Choose --device cpu, or install it with: CMAKE_ARGS=-DGGML_CUDA=ON pip install --no-binary llama-cpp-python llama-cpp-python"


def plan_target(name: str, index: int = 0) -> Target:
    """A device to plan for. "cpu" and "gpu" are this machine's; a named one need not be there. Raises InputError, ResourceError."""
    profile = find_device(name)
    if profile.gpu:
        context = int(profile.context_bytes.value) if profile.context_bytes is not None else 0
        features = libllama.cpu_features() if profile.local else frozenset(profile.cpu_features)
        state = dense.state(index) if profile.local and libllama.has_gpu_library() else "no"
        host = Host(True, features, context, physical_cores(), state)
        return Target(profile, host, gpu_budget(profile, index), host_budget() if profile.local else None)
    return Target(profile, Host(False, libllama.cpu_features(), 0, physical_cores()), None, host_budget())


def load_target(name: str | None, index: int = 0) -> Target:
    """A device to load on: it must be here, and able. None: the GPU if there is one. Raises InputError, ResourceError."""
    if name is None:
        name = "gpu" if libllama.has_gpu_library() and read_gpu(index) is not None else "cpu"
    target = plan_target(name, index)
    if target.profile.gpu:
        gpu = require_gpu(index)
        if not libllama.has_gpu_library():
            raise ResourceError("Expected a llama-cpp-python that was built for GPUs, found one for the CPU alone.", _CUDA_HINT)
        budget = min(gpu.free_bytes, target.gpu_bytes or gpu.free_bytes)
        target = Target(target.profile, target.host, budget, host_budget())
    if swapping():
        raise ResourceError(
            f"Expected free memory to load a model, found this machine swapping with {format_bytes(host_budget())} left.",
            "Close other programs, or wait until they have ended.",
        )
    return target


def plan_artifact(artifact: Artifact, target: Target, wish: Wish) -> Plan:
    """The best plan. Raises ArtifactError, InputError, ResourceError."""
    return make_plan(_shape_of(artifact), target, wish, libllama.tensor_bytes)


def _shape_of(artifact: Artifact) -> PairShape:
    if artifact.manifest.certificate is None:
        raise ArtifactError(
            f"Expected a parity certificate in the manifest of {artifact.folder}, found none, so that its tower cannot be checked.",
            "Convert the model again.",
        )
    return read_shape(artifact, libllama.tensor_bytes)


def open_planned(artifact: Artifact, target: Target, wish: Wish, note: Callable[[str], None]) -> tuple[Engine, Plan]:
    """Load by the best plan, or by the next where memory could not be had, saying so to `note`. Raises what Engine.open raises."""
    failed: EngineLoadError | None = None
    for plan in list_plans(_shape_of(artifact), target, wish, libllama.tensor_bytes):
        if isinstance(failed, EngineMemoryError):
            note(f"Loading failed for lack of memory; trying a smaller plan: {plan.step}.")
        elif failed is not None:
            note(f"Loading with dense prompts failed; trying without. {failed.message} {failed.hint}")
        try:
            return Engine.open(artifact, plan.settings), plan
        except EngineLoadError as error:
            if not isinstance(error, EngineMemoryError) and not plan.settings.dense_prompts:
                raise
            failed = error
    assert failed is not None  # list_plans yields one, or raises
    raise failed


def describe_profile(profile: Profile) -> list[str]:
    """Its figures with their sources, a line each; what is not borne out says so."""
    figures = {
        "memory": profile.memory_bytes,
        "usable": profile.usable_bytes,
        "bandwidth a second": profile.bandwidth_bytes_per_s,
        "CUDA's own": profile.context_bytes,
    }
    return [
        f"{name}: {format_bytes(figure.value)} ({'' if figure.verified else 'not verified; '}{figure.source})"
        for name, figure in figures.items()
        if figure is not None
    ]
