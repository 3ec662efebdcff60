"""Stages in processes of their own: killed and resumed, interrupted, several at once, short of memory. All in one interpreter's forks."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from tests.finetune_fixture import read_losses, save_data, save_model, write_recipe  # noqa: E402

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and signals")
ROOT = Path(__file__).resolve().parents[1]
STEPS = 10
# Adapters with dropout, a tower that learns, images that are moved: everything that draws random numbers.
LORA = "lora = { rank = 4, alpha = 8, dropout = 0.1 }"
MOVED = "llm_rate = 1e-2\ntower_rate = 1e-3\nrotate_deg = 5.0\nsave_steps = 2"
PLAIN = "llm_rate = 1e-2\nsave_steps = 3"
KILL_STEPS = sorted(random.Random(5).sample(range(1, STEPS), 5))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def pair(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """`spec` in two processes, as torchrun starts them."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [spec | {"env": {**env, "RANK": str(i), "LOCAL_RANK": str(i)}} for i in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]], str]:
    """The folder of all runs, their exit codes, and what they said."""
    root = tmp_path_factory.mktemp("runs")
    model, data, other = save_model(root / "model"), save_data(root / "data"), save_data(root / "other", seed=1)

    def recipe(name: str, stage: str, extra: str = "", optim: str = PLAIN, data: Path = data, **more: Any) -> dict[str, Any]:
        path = write_recipe(root / f"{name}.toml", model, data, steps=STEPS, extra=extra, optim=optim)
        return {"stage": stage, "config": str(path), **more}

    killed = recipe("killed", "vqa", LORA, MOVED)
    sharded = recipe("sharded", "instruct", optim=f"{PLAIN}\nsharding = true")
    changed = root / "changed"
    changed.mkdir()
    again = Path(write_recipe(changed / "killed.toml", model, data, steps=STEPS, extra=LORA, optim=f"{MOVED}\nweight_decay = 0.1"))
    again.write_text(again.read_text().replace('output = "killed"', 'output = "../killed"'))
    moved = Path(write_recipe(changed / "data.toml", model, other, steps=STEPS, extra=LORA, optim=MOVED))
    moved.write_text(moved.read_text().replace('output = "data"', 'output = "../killed"'))
    plan: dict[str, list[dict[str, Any]]] = {"whole": [recipe("whole", "vqa", LORA, MOVED)]}
    plan |= {f"kill-{step}": [killed | {"kill_step": step}] for step in KILL_STEPS}
    plan["other recipe"] = [{"stage": "vqa", "config": str(again)}]
    plan["other data"] = [{"stage": "vqa", "config": str(moved)}]
    plan["kill-before"] = [killed | {"kill_save": {"step": STEPS, "after": False}}]
    plan["kill-after"] = [killed | {"kill_save": {"step": STEPS, "after": True}}]
    plan["resumed"] = [killed]
    plan["finished"] = [killed | {"kill_step": 1}]
    chain = len(plan)  # one after the other; what follows goes beside it
    interrupted = recipe("interrupted", "vqa", LORA, MOVED)
    plan["interrupt"] = [interrupted | {"interrupt_step": 5}]
    plan["go on"] = [interrupted]
    plan["one"] = [recipe("one", "instruct")]
    plan["two"] = pair(recipe("two", "instruct"))
    plan["compiled"] = pair(recipe("compiled", "instruct", optim=f"{PLAIN}\ncompile = true"))
    plan["sharded"] = pair(sharded | {"kill_step": 5, "kill_all": True})
    plan["sharded again"] = pair(sharded)
    plan["short"] = [recipe("short", "instruct", memory_rows=1)]
    plan["none"] = [recipe("none", "instruct", memory_rows=0)]
    plan["race"] = [recipe("race", "instruct", hold=True), recipe("race", "instruct", wait=True)]
    (root / "plan.json").write_text(json.dumps([list(plan.values())[:chain], list(plan.values())[chain:]]))
    command = [sys.executable, str(ROOT / "tests" / "stage_runs.py"), str(root / "plan.json"), str(root / "codes.json")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    codes = [code for lane in json.loads((root / "codes.json").read_text()) for code in lane]
    return root, dict(zip(plan, codes, strict=True)), done.stderr


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_killed_at_five_steps_and_twice_while_saving_the_weights_are_the_uninterrupted_runs(runs: Any) -> None:
    root, codes, _ = runs
    assert [codes[f"kill-{step}"] for step in KILL_STEPS] == [[-9]] * 5
    assert (codes["kill-before"], codes["kill-after"], codes["resumed"], codes["whole"]) == ([-9], [-9], [0], [0])
    assert_same_weights(root / "whole", root / "killed")
    assert read_losses(root / "whole") == read_losses(root / "killed")
    assert not (root / "killed" / "trainer").exists()


def test_a_finished_run_is_not_begun_again(runs: Any) -> None:
    _, codes, _ = runs
    assert codes["finished"] == [0]  # it would have been killed at its first step


def test_another_recipe_and_other_data_are_refused(runs: Any) -> None:
    _, codes, said = runs
    assert (codes["other recipe"], codes["other data"]) == ([1], [1])
    assert "differs in recipe.optim.weight_decay" in said
    assert "differs in data.0.images" in said


def test_ctrl_c_saves_and_the_same_command_goes_on(runs: Any) -> None:
    root, codes, _ = runs
    assert (codes["interrupt"], codes["go on"]) == ([130], [0])
    assert_same_weights(root / "whole", root / "interrupted")


def test_two_processes_and_sharded_ones_have_one_processs_losses(runs: Any) -> None:
    root, codes, _ = runs
    assert (codes["one"], codes["two"], codes["sharded"], codes["sharded again"]) == ([0], [0, 0], [-9, -9], [0, 0])
    assert codes["compiled"] == [0, 0]
    one = read_losses(root / "one")
    assert len(one) == STEPS and one[-1] < one[0]
    assert read_losses(root / "two") == pytest.approx(one, abs=1e-4)
    assert read_losses(root / "compiled") == pytest.approx(one, abs=1e-4)
    assert read_losses(root / "sharded") == pytest.approx(one, abs=1e-4)
    assert json.loads((root / "two" / "run.json").read_text())["processes"] == 2


def test_a_step_that_does_not_fit_is_cut_into_pieces(runs: Any) -> None:
    root, codes, said = runs
    assert (codes["short"], codes["none"]) == ([0], [1])
    assert read_losses(root / "short") == pytest.approx(read_losses(root / "one"), abs=1e-4)
    assert json.loads((root / "short" / "run.json").read_text())["pieces"] == 2
    assert "Expected memory for one row" in said


def test_one_folder_is_trained_by_one_run(runs: Any) -> None:
    root, codes, said = runs
    assert codes["race"] == [0, 1]
    assert "found another one training in it" in said
    assert (root / "race" / "run.json").is_file()
