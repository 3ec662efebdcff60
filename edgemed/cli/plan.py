"""`edgemed plan`: what fits on a device, with which settings and why, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgemed.cli.compose import require_artifact
from edgemed.cli.options import Context, Device, Folder, GpuLayers, Json, Kv, MicroBatch, Quiet, Tower, Users
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from runtimes.planner import Plan, Wish


def plan(
    folder: Folder = None,
    device: Device = "cpu",
    context: Context = None,
    users: Users = 1,
    kv: Kv = None,
    micro_batch: MicroBatch = None,
    gpu_layers: GpuLayers = None,
    tower: Tower = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what fits on a device before loading: memory, settings and the reasons. The device need not be there."""
    from runtimes.opening import describe_profile, plan_artifact, plan_target

    out = Output(json=json, quiet=quiet)
    target = plan_target(device)
    wish = make_wish(users=users, context=context, kv=kv, micro_batch=micro_batch, gpu_layers=gpu_layers, tower=tower)
    if not target.host.gpu and (gpu_layers or tower == "gpu"):
        out.warn(f"{target.profile.title} has no GPU: --gpu-layers and --tower change nothing.")
    artifact = require_artifact(folder, out)
    found = plan_artifact(artifact, target, wish)
    out.table(
        f"{artifact.manifest.name}, {artifact.manifest.llm.quant}, for {target.profile.title}", ("what", "where", "size"), rows_of(found)
    )
    for reason in found.reasons:
        out.text(reason)
    for line in describe_profile(target.profile):
        out.note(f"  {line}")
    out.result(describe_plan(found) | {"artifact": artifact.folder})


def make_wish(
    users: int = 1,
    context: int | None = None,
    kv: str | None = None,
    micro_batch: int | None = None,
    gpu_layers: int | None = None,
    tower: str | None = None,
    least_context: int = 0,
) -> Wish:
    """Options as a wish. Raises InputError for a word that is none."""
    from edgemed.core.errors import InputError
    from runtimes.planner import Wish

    if kv not in (None, "f16", "q8_0"):
        raise InputError(f"Expected --kv f16 or q8_0, found '{kv}'.", "Pass one of them.")
    if tower not in (None, "gpu", "cpu"):
        raise InputError(f"Expected --tower gpu or cpu, found '{tower}'.", "Pass one of them.")
    return Wish(users, context, kv, micro_batch, gpu_layers, tower, least_context)  # type: ignore[arg-type]


def rows_of(plan: Plan) -> list[tuple[str, str, str]]:
    """A plan's parts as a table's rows, sums last."""
    from edgemed.core.units import format_bytes

    where = {"CPU": "main memory", "GPU": "GPU"}
    rows = [
        (f"{item.what}{' (mapped from the file)' if item.mapped else ''}", where[item.place], format_bytes(item.size_bytes))
        for item in plan.estimate.items
    ]
    for place in ("GPU", "CPU"):
        if plan.estimate.dynamic_bytes(place):
            rows.append(("static: held all the time", where[place], format_bytes(plan.estimate.static_bytes(place))))
            rows.append(("dynamic: at the peak", where[place], format_bytes(plan.estimate.dynamic_bytes(place))))
    return rows


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan in a result."""
    estimate, target = plan.estimate, plan.target
    return {
        "device": target.profile.name,
        "settings": asdict(plan.settings),
        "static_bytes": {place.lower(): estimate.static_bytes(place) for place in ("GPU", "CPU")},
        "dynamic_bytes": {place.lower(): estimate.dynamic_bytes(place) for place in ("GPU", "CPU")},
        "budget_bytes": {"gpu": target.gpu_bytes, "cpu": target.cpu_bytes},
        "mapped_bytes": estimate.mapped_bytes,
        "items": [asdict(item) for item in estimate.items],
        "reasons": list(plan.reasons),
    }
