"""The engine's process: what its death, its silence and unreadable replies mean to those who wait (runtimes/process.py)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest
from runtimes_pair import make_artifact
from test_runtimes_engine import SETTINGS, image, question, tokens_of

from edgemed.core.errors import ArtifactError, EngineDiedError, EngineError
from edgemed.core.manifest import Artifact
from runtimes.engine import Engine
from runtimes.messages import Failed, Finished
from runtimes.process import WorkerProcess
from runtimes.wire import Stats, Tokenize


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("process")
        patch.setenv("EDGEMED_HOME", str(folder / "home"))
        yield make_artifact(folder / "pair")


@dataclass(frozen=True)
class Unknown:
    """A command of a module that the worker cannot import."""


@pytest.mark.parametrize("command", [Unknown(), Tokenize(None)])  # in the thread that reads, and in the one that computes
def test_what_nobody_expected_in_the_worker_is_a_death(artifact: Artifact, command: Any) -> None:
    with Engine.open(artifact, SETTINGS) as engine:
        with pytest.raises(EngineDiedError, match="ended with code 1.*Error"):
            engine._process.call(command)
        assert engine.ask("Hello", max_tokens=2).usage.new_tokens == 2


def test_a_reply_that_cannot_be_read_is_a_death(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(stream: BinaryIO) -> None:
        stream.read(1)
        raise ValueError("no pickle")

    monkeypatch.setattr("runtimes.process.read_frame", unreadable)
    with pytest.raises(EngineDiedError, match="cannot be read .*no pickle"):
        Engine.open(artifact, SETTINGS)


def test_the_current_folders_code_is_not_run(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psutil", "llama_cpp", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep + os.environ.get("PYTHONPATH", ""))
    with Engine.open(artifact, SETTINGS) as engine:
        assert engine.ask("Hello", max_tokens=2).usage.new_tokens == 2


def test_killed_worker_is_told_and_started_anew(artifact: Artifact) -> None:
    with Engine.open(artifact, SETTINGS) as engine:
        before = engine.ask("Hello", [image(1)], max_tokens=8).text
        stream = engine.submit(question("Talk", max_tokens=450))
        next(stream)
        os.kill(engine.pid, signal.SIGSTOP)  # so that it is surely in the middle of the answer
        os.kill(engine.pid, signal.SIGKILL)
        last = list(stream)[-1]
        assert isinstance(last, Failed) and isinstance(last.error, EngineDiedError)
        assert "SIGKILL" in last.error.message and last.error.hint
        assert engine.ask("Hello", [image(1)], max_tokens=8).text == before
        assert engine.stats().restarts == 1


def test_aborting_worker_tells_its_last_words(artifact: Artifact) -> None:
    with Engine.open(artifact, SETTINGS) as engine:
        os.kill(engine.pid, signal.SIGABRT)
        psutil.wait_procs([psutil.Process(engine.pid)], timeout=20)
        assert engine.ask("Hello", max_tokens=2).usage.new_tokens == 2


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.process.LOOK_S", 0.1)


def play_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a script in the worker's place."""
    monkeypatch.setattr("runtimes.process.own_command", lambda module: [sys.executable, "-c", code])


def test_a_worker_that_stands_still_is_ended_and_started_anew(artifact: Artifact, looks: None) -> None:
    with Engine.open(artifact, replace(SETTINGS, silence_limit_s=2.0)) as engine:
        stream = engine.submit(question("Talk", max_tokens=450))
        next(stream)
        os.kill(engine.pid, signal.SIGSTOP)
        last = list(stream)[-1]
        assert isinstance(last, Failed) and isinstance(last.error, EngineDiedError)
        assert "no sign of life for 2 seconds" in last.error.message and "restart the computer" in last.error.hint
        assert engine.ask("Hello", max_tokens=2).usage.new_tokens == 2
        assert engine.stats().restarts == 1


def test_what_was_answered_is_not_waited_for(artifact: Artifact) -> None:
    with Engine.open(artifact, SETTINGS) as engine:
        stream = engine.submit(question("Short", max_tokens=3))
        end = time.monotonic() + 60
        while engine._process._pending and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine._process._pending, "a worker with nothing to do may be silent, however late an answer is read"
        assert len(tokens_of(stream)) == 3


def test_a_worker_that_stands_still_while_loading_is_ended(artifact: Artifact, looks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    play_worker(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr("runtimes.engine.LOAD_SILENCE_S", 0.5)
    with pytest.raises(EngineDiedError, match="no sign of life"):
        Engine.open(artifact, SETTINGS)


SEND = """
import pickle, struct, sys, time


def send(*reply):
    frame = pickle.dumps([reply])
    sys.stdout.buffer.write(struct.pack('<Q', len(frame)) + frame), sys.stdout.flush()
"""


@pytest.mark.parametrize("id", [0, 7])  # of a sign of life, and of a reply to something else
def test_signs_of_life_are_enough(looks: None, monkeypatch: pytest.MonkeyPatch, id: int) -> None:
    play_worker(monkeypatch, f"{SEND}\nfor _ in range({10 if id == 0 else 300}): send({id}, None), time.sleep(0.2)\nsend(1, 'done')")
    worker = WorkerProcess(silence_limit_s=1.5)
    try:
        with pytest.raises(EngineDiedError) if id else nullcontext():
            assert worker.call(Stats()) == "done"
    finally:
        worker.close()


def test_time_is_counted_for_each_command(looks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four answers of 0.6 s each, the next command sent before anybody looks: each is silent for less than the limit.
    play_worker(monkeypatch, f"{SEND}\nfor id in range(1, 5): time.sleep(0.6), send(id, id)\ntime.sleep(60)")
    worker = WorkerProcess(silence_limit_s=1.5)
    try:
        assert [worker.call(Stats()) for _ in range(4)] == [1, 2, 3, 4]
        hung, end = worker.begin(Stats()), time.monotonic() + 60
        with suppress(EngineDiedError):  # of `begin`, once it has ended
            while worker.alive and time.monotonic() < end:  # beside others that come and go
                worker.forget(worker.begin(Stats()).id)
                time.sleep(0.01)
        assert "no sign of life" in str(hung.get())
    finally:
        worker.close()


def test_a_worker_that_cannot_be_killed_is_left_alone(looks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    play_worker(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr("runtimes.process.CLOSE_S", 0.1)
    worker = WorkerProcess(silence_limit_s=0.5)
    kill = worker._process.kill
    monkeypatch.setattr(worker._process, "kill", lambda: None)  # as one that waits for a driver
    try:
        with pytest.raises(EngineDiedError, match="no sign of life"):
            worker.call(Stats())
        assert not worker.alive
        worker.close()
        with pytest.raises(EngineDiedError, match="no sign of life"):
            worker.begin(Stats())
    finally:
        kill()
        worker.close()


def test_worker_ends_with_its_parent(artifact: Artifact) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgemed.core.manifest import load_artifact; from runtimes.engine import Engine;"
        "e = Engine.open(load_artifact(Path(sys.argv[1]))); print(e.pid, flush=True); time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, "-c", code, str(artifact.folder)], stdout=subprocess.PIPE, env=env)
    assert parent.stdout is not None
    with parent.stdout:
        worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([worker], timeout=20)
    # A container without an init keeps it as a zombie.
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_closed_engine_says_so(artifact: Artifact) -> None:
    engine = Engine.open(artifact, SETTINGS)
    stream = engine.submit(question("Talk", max_tokens=450))
    next(stream)
    engine.close()
    last = list(stream)[-1]
    assert isinstance(last, Failed | Finished)
    with pytest.raises(EngineError, match="closed"):
        engine.ask("Hello")


def test_a_worker_that_died_is_not_started_with_other_files(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "a", "siglip")
    with Engine.open(artifact, SETTINGS) as engine:
        other = make_artifact(tmp_path / "b", "siglip", seed=5)
        shutil.copy(other.llm_path, artifact.llm_path)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises((ArtifactError, EngineDiedError)):
            engine.ask("Hello", max_tokens=1)
        with pytest.raises(ArtifactError, match="SHA-256"):
            engine.ask("Hello", max_tokens=1)
