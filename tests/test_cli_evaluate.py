"""`edgemed eval` on a real two-layer model and the real engine: tables, calibration, resumption after SIGKILL, files, servers, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from PIL import Image

from edgemed.cli import run
from edgemed.core.calibration import CALIBRATION_NAME, load_calibration
from edgemed.core.identity import identify_model
from edgemed.core.manifest import load_artifact
from edgemed.data import load_samples
from edgemed.evaluation.runner import run as run_questions
from edgemed.evaluation.targets import EngineTarget

ROOT = Path(__file__).resolve().parents[1]
IMAGES, EACH = 12, 3
# One thread: with more, a model this small does nothing but wait for them on a machine that is busy.
ALONE = ("--threads", "1")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_checkpoint(tmp_path_factory.mktemp("source"), "hf", "llama", "siglip").source
    out = tmp_path_factory.mktemp("converted") / "model"
    assert run(["convert", str(source), "--bits", "16", "--out", str(out), "--no-verify", "--quiet"]) == 0
    return out


def make_slake(folder: Path, images: int) -> Path:
    rng = np.random.default_rng(0)
    for k in range(images):
        (folder / "imgs" / f"x{k}").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "imgs" / f"x{k}" / "source.png")
    rows = [
        {
            "qid": EACH * k + n,
            "img_name": f"x{k}/source.png",
            "question": f"Is part {n} normal?",
            "answer": ("Yes", "No", "Lung")[n],
            "answer_type": ("CLOSED", "CLOSED", "OPEN")[n],
            "q_lang": "en",
            "modality": ("CT", "MRI")[k % 2],
        }
        for k in range(images)
        for n in range(EACH)
    ]
    (folder / "validate.json").write_text(json.dumps(rows))
    (folder / "train.json").write_text(json.dumps(rows[:EACH]))
    return folder


@pytest.fixture(scope="module")
def slake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_slake(tmp_path_factory.mktemp("slake"), IMAGES)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run a command with --json; (exit code, its document, stderr)."""

    def call(*arguments: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out.strip() else None, said.err

    yield call


def test_every_protocol_look_and_leak_is_told(artifact: Path, slake: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("eval", artifact, "--dataset", f"slake={slake}", "--limit", 9, "--looks", "--trained-on", f"slake={slake}", *ALONE)
    code, document, err = say(*arguments)
    (found,) = document["results"]
    assert code == 0 and document["schema_version"] == 2 and (found["dataset"], found["split"]) == ("slake", "validate")
    assert set(found["protocols"]) == {"medmoe", "llavamed-v1", "strict"}
    assert found["protocols"]["strict"]["closed accuracy"]["n"] == 6 and set(found["by_modality"]) == {"CT", "MRI"}
    assert set(found["looks"]) == {"blank", "mirrored", "swapped"} and found["looks"]["blank"]["same"]["n"] == 9
    assert found["leak"]["images"] == 1 and found["leak"]["questions"] == 3 and "1 of 3 images" in err
    assert all(0 < a["score"] <= 1 for a in found["answers"]) and len(found["samples_sha256"]) == 64
    assert run([*map(str, arguments), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("medmoe", "llavamed-v1", "strict", "Does it look?", "mirrored", "How sure it may be"))


def test_calibration_is_left_beside_the_manifest(artifact: Path, slake: Path, say: Any) -> None:
    code, document, _ = say("eval", artifact, "--dataset", f"slake={slake}", "--calibrate", *ALONE)
    calibration = load_calibration(artifact)
    assert code == 0 and calibration is not None
    assert calibration.model_sha256 == identify_model(load_artifact(artifact)).sha256
    assert calibration.split_sha256 == document["results"][0]["samples_sha256"] and calibration.questions == IMAGES * EACH
    assert calibration.method in ("score", "platt", "isotonic") and calibration.risk == 0.1
    (artifact / CALIBRATION_NAME).unlink()


def test_engines_side_by_side_answer_as_one_does(artifact: Path, slake: Path) -> None:
    samples, loaded = load_samples("slake", slake, "validate"), load_artifact(artifact)
    replies = []
    for workers in (1, 2):
        with EngineTarget(loaded, threads=1, workers=workers) as target:
            assert target.parallel == len(set(target.pids)) == workers
            replies.append([(r.text, r.tokens, r.score) for r in run_questions(target, samples)])
    assert replies[0] == replies[1] and len({score for _, _, score in replies[0]}) > 1


def predictions(folder: Path) -> Path:
    return next(folder.rglob("predictions.jsonl"), folder / "none")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_run_ends_with_the_same_bytes(artifact: Path, tmp_path: Path) -> None:
    data = make_slake(tmp_path / "slake", 60)
    command = [sys.executable, "-m", "edgemed", "eval", str(artifact), "--dataset", f"slake={data}", *ALONE, "--quiet", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(p.stat().st_size for p in (tmp_path / "killed").rglob("journal.jsonl")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not predictions(tmp_path / "killed").is_file()
    for name in ("killed", "whole"):
        subprocess.run([*command, str(tmp_path / name)], env=environment, stdout=subprocess.DEVNULL, check=True)
    whole = predictions(tmp_path / "whole").read_bytes()
    assert predictions(tmp_path / "killed").read_bytes() == whole and whole.count(b"\n") == 180


def test_a_prediction_file_is_scored_and_anothers_refused(artifact: Path, slake: Path, tmp_path: Path, say: Any) -> None:
    _, asked, _ = say("eval", artifact, "--dataset", f"slake={slake}", "--out", tmp_path, *ALONE)
    file = predictions(tmp_path)
    code, scored, _ = say("eval", "--predictions", file, "--dataset", f"slake={slake}")
    assert code == 0
    for key in ("protocols", "scores", "answers", "confidence"):
        assert scored["results"][0][key] == asked["results"][0][key]
    code, _, err = say("eval", "--predictions", file, "--dataset", f"slake:train={slake}")
    assert code == 1 and "33 for other questions" in err
    file.write_text("The answers were mostly right.\n")
    code, _, err = say("eval", "--predictions", file, "--dataset", f"slake={slake}")
    assert code == 1 and "JSON object in line 1" in err


def test_the_seeds_test_file_is_read(artifact: Path, slake: Path, tmp_path: Path, say: Any) -> None:
    rounds = [{"from": "human", "value": "Normal?\n<image>"}, {"from": "gpt", "value": "yes"}]
    kinds = ("close", "OPEN", "CLOSED", "ESSAY", "ESSAY")
    rows = [{"id": k, "image": "imgs/x0/source.png", "answer_type": kind, "conversatons": rounds} for k, kind in enumerate(kinds)]
    path = slake / "test.json"
    path.write_text(json.dumps(rows))
    code, document, err = say("eval", artifact, "--dataset", f"llava={path}", *ALONE)
    found = document["results"][0]
    assert code == 0 and (found["scores"]["closed_n"], found["scores"]["open_n"]) == (2, 1)
    assert found["unknown"] == {"ESSAY": ["3", "4"]} and "2 question(s) of the answer type 'ESSAY'" in err
    path.write_text(json.dumps(rows + rows[:1]))
    code, _, err = say("eval", artifact, "--dataset", f"llava={path}")
    assert code == 1 and "found 0 more than once" in err


class Server(BaseHTTPRequestHandler):
    """Answers "Yes" to every question that comes with an image; refuses one about part 1."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        refuse = "part 1" in text["text"]
        good = image["image_url"]["url"].startswith("data:image/png;base64,") and body["temperature"] == 0
        message = {"role": "assistant", "content": "Yes" if good else "?"}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        data = json.dumps({"error": {"message": "too long"}} if refuse else reply).encode()
        self.send_response(400 if refuse else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_is_asked(slake: Path, say: Any) -> None:
    pytest.importorskip("openai", reason="needs the judge extra")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        code, document, err = say("eval", "--endpoint", url, "--endpoint-model", "m", "--dataset", f"slake={slake}", "--limit", 6)
    finally:
        server.shutdown()
        server.server_close()
    found = document["results"][0]
    assert code == 0 and found["model_id"] == "m" and found["artifact"] is None
    assert [a["prediction"] for a in found["answers"]] == ["Yes", "", "Yes"] * 2
    assert "2 question(s) were not answered and count as wrong" in err and found["scores"]["closed"] == 50.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--predictions", "x", "--endpoint", "http://127.0.0.1:1"), "found --predictions and --endpoint"),
        (("DIR", "--endpoint", "http://127.0.0.1:1"), "found --endpoint and DIR"),
        (("--predictions", "x", "--dataset", "SET"), "found 2"),
        (("DIR", "--calibrate", "--blank"), "Expected --calibrate"),
        (("DIR", "--split", "nonsense"), "nonsense"),
        (("--predictions", "/no/such"), "Expected a file"),
    ],
)
def test_what_makes_no_sense_is_refused(artifact: Path, slake: Path, say: Any, arguments: tuple[str, ...], message: str) -> None:
    given = [str(artifact) if a == "DIR" else f"slake={slake}" if a == "SET" else a for a in arguments]
    code, _, err = say("eval", *given, "--dataset", f"slake={slake}")
    assert code == 1 and message in err and err.count("Error:") == 1
