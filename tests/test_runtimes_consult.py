"""What ask and chat share: the history's place in a request, the context's limit, answers, the fake engine, calibration, identity."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgemed.core.calibration import CALIBRATION_NAME, load_calibration, score_of
from edgemed.core.conversation import Turn
from edgemed.core.errors import ArtifactError, ContextOverflowError, EngineDiedError, EngineError, EngineMemoryError, InputError
from edgemed.core.identity import identify_model
from runtimes.consult import Answer, Consultation, Exchange, count_tokens, follow, lay_out, pack_pixels, plan_request
from runtimes.fake import FakeEngine, Script, fake_artifact
from runtimes.messages import EngineSettings, Finished, PreparedImage, Request

FAST = Script(("one two three", "four"), tokens_per_s=1e6)
A, B = (PreparedImage(bytes([value]) * 32 * 32 * 3, 32) for value in (1, 2))


def answer(engine: FakeEngine, request: Request) -> Answer:
    return follow(engine.submit(request), engine.artifact.manifest.template, lambda text: None)


def test_an_image_stands_in_the_first_turn_that_speaks_of_it() -> None:
    history = (Exchange("first?", "yes", (A,)), Exchange("second?", "no", (A, B)))
    turns, images = lay_out(Consultation("third?", (B,), history))
    assert [(turn.role, turn.images) for turn in turns] == [("user", 1), ("assistant", 0), ("user", 1), ("assistant", 0), ("user", 0)]
    assert images == (A, B)


def test_images_of_dropped_exchanges_move_up_where_the_question_is_about_them() -> None:
    history = (Exchange("first?", "yes", (A,)), Exchange("second?", "no", (A,)))
    turns, images = lay_out(Consultation("third?", (A,), history), dropped=1)
    assert [turn.images for turn in turns] == [1, 0, 0] and images == (A,)
    turns, images = lay_out(Consultation("third?", (B,), history), dropped=2)
    assert turns == (Turn("user", "third?", 1),) and images == (B,)


def test_an_image_handed_over_twice_with_one_question_is_seen_twice() -> None:
    turns, images = lay_out(Consultation("what?", (A, A)))
    assert turns[0].images == 2 and images == (A, A)


@pytest.mark.parametrize("context", [100, 200, 400, 4000])
def test_the_oldest_exchanges_go_and_no_more_than_needed(context: int) -> None:
    engine = FakeEngine(FAST, fake_artifact(context_length=context))
    history = tuple(Exchange(f"question {n} " * 10, "answer " * 30, (A,)) for n in range(9))
    consultation = Consultation("and now?", (A,), history)
    planned = plan_request(engine, consultation, max_tokens=50)
    room = context - min(50, context // 4)
    assert count_tokens(engine, planned.request.turns) <= room
    if planned.dropped:
        assert count_tokens(engine, lay_out(consultation, planned.dropped - 1)[0]) > room
    assert planned.request.turns[-1].text == "and now?" and A in planned.request.images
    assert isinstance(answer(engine, planned.request).finished, Finished)


def test_counting_counts_images_in_full() -> None:
    engine = FakeEngine(FAST)
    turns = (Turn("user", "a b c", images=2),)
    without = count_tokens(engine, (Turn("user", "a b c"),))
    assert count_tokens(engine, turns) == without + 2 * engine.artifact.manifest.vision.image_tokens


def test_a_question_too_long_by_itself_is_the_engines_to_refuse() -> None:
    engine = FakeEngine(FAST, fake_artifact(context_length=30))
    planned = plan_request(engine, Consultation("word " * 50, history=(Exchange("q", "a"),)))
    assert planned.dropped == 1
    found = answer(engine, planned.request)
    assert isinstance(found.error, ContextOverflowError) and found.finished is None


def test_follow_shows_pieces_without_leading_blanks_and_cleans_the_answer() -> None:
    engine = FakeEngine(Script((" one two</s> three",), tokens_per_s=1e6))
    shown: list[str] = []
    found = follow(engine.submit(Request((Turn("user", "?"),), logprobs=True)), engine.artifact.manifest.template, shown.append)
    assert shown[0] == "one" and found.text == "one two"
    assert found.score == pytest.approx(0.9)


def test_pixels_are_packed_as_they_are() -> None:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    assert pack_pixels(pixels) == PreparedImage(pixels.tobytes(), 8)


# -- the fake engine ------------------------------------------------------------------------------------------------------


def test_the_fake_engine_answers_in_turn_and_counts() -> None:
    engine = FakeEngine(FAST)
    request = Request((Turn("user", "?", images=1),), (A,))
    assert [answer(engine, request).text for _ in range(3)] == ["one two three", "four", "one two three"]
    stats = engine.stats()
    assert (stats.total_tokens, stats.images_encoded, stats.busy, stats.restarts) == (7, 1, 0, 0)
    assert len(engine.requests) == 3


def test_the_fake_engine_sleeps_as_long_as_its_speed_says() -> None:
    slept: list[float] = []
    engine = FakeEngine(Script(("a b c d",), tokens_per_s=50), sleep=slept.append)
    answer(engine, Request((Turn("user", "?"),)))
    assert slept == [0.02] * 4


def test_the_fake_engine_is_cancelled_between_tokens() -> None:
    engine = FakeEngine(Script(("a b c d",), tokens_per_s=1e6, hold=threading.Semaphore(1)))
    stream = engine.submit(Request((Turn("user", "?"),)))
    first, second = next(stream), next(stream)
    stream.cancel()
    last = next(stream)
    assert isinstance(last, Finished) and (last.reason, last.text) == ("cancelled", "a b")
    assert (first.index, second.index) == (0, 1)  # type: ignore[union-attr]
    assert list(stream) == []


def test_a_closed_stream_says_no_more() -> None:
    stream = FakeEngine(FAST).submit(Request((Turn("user", "?"),)))
    next(stream)
    stream.close()
    assert list(stream) == []


def test_max_tokens_ends_an_answer() -> None:
    found = answer(FakeEngine(FAST), Request((Turn("user", "?"),), max_tokens=2))
    assert found.finished is not None and (found.finished.reason, found.text) == ("length", "one two")


def test_the_fake_engine_dies_once_and_comes_back() -> None:
    engine = FakeEngine(replace(FAST, die_after=2))
    request = Request((Turn("user", "?"),))
    dead = answer(engine, request)
    assert isinstance(dead.error, EngineDiedError) and dead.text == "one two" and dead.finished is None
    assert answer(engine, request).text == "four"
    assert engine.stats().restarts == 1 and engine.stats().busy == 0


def test_the_fake_engine_lacks_memory_and_refuses_what_the_engine_refuses() -> None:
    assert isinstance(answer(FakeEngine(replace(FAST, lacks_memory=True)), Request((Turn("user", "?"),))).error, EngineMemoryError)
    engine = FakeEngine(FAST)
    with pytest.raises(InputError, match="32 × 32"):
        engine.submit(Request((Turn("user", "?", images=1),), (PreparedImage(b"x", 1),)))
    with pytest.raises(InputError, match="as the turns count"):
        engine.submit(Request((Turn("user", "?", images=2),), (A,)))
    with pytest.raises(InputError, match="end with the user"):
        engine.submit(Request((Turn("assistant", "!"),)))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(Request((Turn("user", "?"),)))


def test_settings_and_report_are_there() -> None:
    engine = FakeEngine(FAST, settings=EngineSettings(context_tokens=77))
    assert engine.report.kv_tokens == 77 and engine.pid == 0


def test_what_a_screen_needs_imports_no_llama_cpp() -> None:
    code = "import sys, runtimes.fake, runtimes.consult; print([m for m in ('llama_cpp', 'torch', 'psutil', 'gguf') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert found.stdout.strip() == "[]"


# -- identity and calibration -----------------------------------------------------------------------------------------------


def test_a_models_identity_is_its_manifests_hash(tmp_path: Path) -> None:
    fake = fake_artifact()
    assert identify_model(fake) == identify_model(fake_artifact())
    assert identify_model(fake) != identify_model(fake_artifact(size_px=64))
    (tmp_path / "manifest.json").write_text("{}")
    manifest = fake.manifest.model_copy(update={"files": {"none.gguf": {}}})
    found = identify_model(replace(fake, folder=tmp_path, manifest=manifest))
    assert found.sha256 == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def write_calibration(folder: Path, **changes: object) -> None:
    points = [[0.2, 0.3], [0.6, 0.5], [0.9, 0.9]]
    data = {"calibrated_on": "slake test", "refer_below": 0.6, "points": points} | changes
    (folder / CALIBRATION_NAME).write_text(json.dumps(data))


def test_no_calibration_is_none(tmp_path: Path) -> None:
    assert load_calibration(tmp_path) is None


@pytest.mark.parametrize(("score", "expected"), [(0.0, 0.3), (0.2, 0.3), (0.4, 0.4), (0.75, 0.7), (0.9, 0.9), (1.0, 0.9)])
def test_a_calibration_joins_its_points(tmp_path: Path, score: float, expected: float) -> None:
    write_calibration(tmp_path)
    calibration = load_calibration(tmp_path)
    assert calibration is not None
    assert calibration.probability(score) == pytest.approx(expected)
    assert calibration.refers(calibration.probability(score)) == (expected < 0.6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"points": [[0.5, 0.5], [0.4, 0.6]]}, "rise"),
        ({"points": []}, "points"),
        ({"points": [[0.5, 1.5]]}, "points"),
        ({"schema_version": 2}, "schema_version"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_wrong_calibration_is_refused(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    write_calibration(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=says):
        load_calibration(tmp_path)


def test_a_calibration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for data in (b"{", b"\xff\xfe\x00", b"[1]"):
        (tmp_path / CALIBRATION_NAME).write_bytes(data)
        with pytest.raises(ArtifactError):
            load_calibration(tmp_path)


def test_a_score_is_the_geometric_mean() -> None:
    assert score_of([]) is None
    assert score_of([-1.0, -3.0]) == pytest.approx(np.exp(-2.0))
