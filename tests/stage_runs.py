"""Stages run in processes of their own, which may be killed: one interpreter imports torch once and forks for each run.

    python tests/stage_runs.py PLAN.json RESULTS.json

PLAN is a list of lanes that go side by side, a lane a list of steps, a step a list of runs that go at the same time: {"stage",
"config", "env", "kill_step", "kill_all", "kill_save", "interrupt_step", "memory_rows", "hold", "wait"}. A run that holds stays in its
first step until one that waits for that step has ended. RESULTS are the exit codes of each lane, −9 where a run was killed. Not a test.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from edgemed.core.errors import EdgemedError
from edgemed.finetune import StageInterrupted, run_stage, stage, trainer
from edgemed.finetune.workspace import Workspace

INTERRUPTED, REFUSED, CRASHED = 130, 1, 3


def run(spec: dict[str, Any]) -> int:
    """One stage in this process; its exit code."""
    os.environ.update(spec.get("env", {}))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    patch(spec)
    begun, ended = (Path(spec["config"]).with_suffix(suffix) for suffix in (".begun", ".ended"))
    if spec.get("wait"):
        wait_for(begun)

    def report(progress: Any) -> None:
        if spec.get("hold") and progress.step == 1:
            begun.touch()
            wait_for(ended)
        if progress.step == spec.get("kill_step") and not spec.get("kill_all"):
            os.kill(os.getpid(), signal.SIGKILL)
        if progress.step == spec.get("interrupt_step"):
            os.kill(os.getpid(), signal.SIGINT)

    try:
        run_stage(spec["stage"], Path(spec["config"]), report)
    except StageInterrupted:
        return INTERRUPTED
    except EdgemedError as error:
        print(f"{type(error).__name__}: {error.message}", file=sys.stderr)
        return REFUSED
    finally:
        if spec.get("wait"):
            ended.touch()
    return 0


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def patch(spec: dict[str, Any]) -> None:
    """Make this process die while it saves (before or after the files are complete), or run out of memory."""
    if spec.get("kill_all"):  # the first process alone reports; here each dies by itself
        clip, step = trainer.StageTrainer._clip_grad_norm, spec["kill_step"]

        def dying_step(self: Any, model: Any) -> Any:
            if self.state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return clip(self, model)

        trainer.StageTrainer._clip_grad_norm = dying_step  # type: ignore[method-assign]
    if "kill_save" in spec:
        commit, when = Workspace.commit, spec["kill_save"]

        def dying(self: Workspace, name: str) -> None:
            if name == f"checkpoint-{when['step']}":
                if when["after"]:
                    commit(self, name)
                os.kill(os.getpid(), signal.SIGKILL)
            commit(self, name)

        Workspace.commit = dying  # type: ignore[method-assign]
    if "memory_rows" in spec:
        loss, rows = trainer.StageTrainer.compute_loss, spec["memory_rows"]

        def short(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if inputs["input_ids"].shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory (made up)")
            return loss(self, model, inputs, *args, **kwargs)

        trainer.StageTrainer.compute_loss = short  # type: ignore[method-assign]


def fork(spec: dict[str, Any]) -> int:
    """The id of a child that runs `spec`."""
    pid = os.fork()
    if pid:
        return pid
    code = CRASHED
    try:
        code = run(spec)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# What a stage imports on its way: each child would do it again.
WAY = (
    "accelerate",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.checkpoint",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.siglip.modeling_siglip",
)


def main() -> None:
    for name in WAY:
        if find_spec(name.split(".")[0]):
            importlib.import_module(name)
    plan, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    lanes = [results.with_suffix(f".{number}") for number in range(len(plan))]
    children = []
    for steps, path in zip(plan, lanes, strict=True):
        pid = os.fork()
        if pid == 0:
            run_lane(steps, path)
        children.append(pid)
    if any(os.waitpid(pid, 0)[1] for pid in children):
        sys.exit("A lane did not come to its end.")
    results.write_text(json.dumps([json.loads(path.read_text()) for path in lanes]))


def run_lane(steps: list[list[dict[str, Any]]], results: Path) -> NoReturn:
    """One step after the other, in this process's children."""
    codes = []
    for step in steps:
        children = [fork(spec) for spec in step]
        codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
    results.write_text(json.dumps(codes))
    os._exit(0)


if __name__ == "__main__":
    assert stage  # imported before forking
    main()
