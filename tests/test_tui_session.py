"""A case's session without a screen: what is asked, recorded, stopped, retried, left out, and how sure an answer is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgemed.clinic.records import CaseImage, View
from edgemed.clinic.store import CaseStore
from edgemed.core.calibration import CALIBRATION_NAME
from edgemed.core.errors import ArtifactError, EngineDiedError, EngineMemoryError, InputError
from edgemed.core.identity import ModelIdentity, identify_model
from edgemed.core.images import hash_pixels, load_image, prepare
from edgemed.core.manifest import Artifact
from edgemed.tui.attaching import attach_file
from edgemed.tui.engines import EngineHolder
from edgemed.tui.reporting import draft_report
from edgemed.tui.session import Answered, CaseSession, Left, Piece, Said, SessionEvent
from runtimes.fake import FakeEngine, Script, fake_artifact
from tests.tui_fixture import RADIOGRAPH, cheap_store, write_calibration


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    return cheap_store(tmp_path)


def _image(store: CaseStore, case_id: str) -> CaseImage:
    return attach_file(store, case_id, RADIOGRAPH).image


class Desk:
    """A case with a session, and what it said."""

    def __init__(self, store: CaseStore, engine: FakeEngine) -> None:
        self.store, self.engine = store, engine
        self.case = store.create_case("chest")
        self.image = _image(store, self.case.id)
        self.engines = EngineHolder(lambda note: engine)
        self.session = CaseSession(store, self.engines, self.case.id)
        self.events: list[SessionEvent] = []

    def ask(self, question: str = "What is shown?", images: tuple[CaseImage, ...] | None = None) -> Answered:
        return self.session.ask(question, (self.image,) if images is None else images, self.events.append)

    def retry(self) -> Answered:
        return self.session.retry((self.image,), self.events.append)


@pytest.fixture
def desk(store: CaseStore) -> Desk:
    return Desk(store, FakeEngine(Script(("A chest.", "No."), tokens_per_s=1e6)))


def test_an_answer_is_recorded_with_what_was_seen(desk: Desk) -> None:
    view = View(invert=True)
    desk.image = replace(desk.image, view=view)
    answered = desk.ask()
    question, answer = desk.store.list_messages(desk.case.id)
    assert [type(event) for event in desk.events] == [Said, Piece, Piece, Answered]
    assert (question.role, question.text) == ("user", "What is shown?") and answer == answered.message
    assert (answer.text, answer.state, answer.verdict, answer.confidence) == ("A chest.", "complete", "answer", None)
    assert answer.model is not None and (answer.model.name, len(answer.model.sha256)) == ("fake", 64)
    picture = desk.session.picture(desk.image)
    assert answer.images == question.images and answer.images[0].view == picture.resolve(view)
    pixels = prepare(picture.render(view), desk.engine.artifact.manifest.image)
    assert answer.images[0].pixels_sha256 == hash_pixels(pixels)
    assert desk.engine.requests[0].images[0].pixels == pixels.tobytes()


def test_a_plain_image_is_seen_as_ask_sees_it(desk: Desk) -> None:
    desk.ask()
    pixels = prepare(load_image(RADIOGRAPH), desk.engine.artifact.manifest.image)
    assert desk.engine.requests[0].images[0].pixels == pixels.tobytes()


def test_a_follow_up_has_the_history_and_the_same_beginning(desk: Desk) -> None:
    desk.ask("First?")
    desk.ask("Second?")
    first, second = desk.engine.requests
    assert [turn.text for turn in second.turns] == ["First?", "A chest.", "Second?"]
    assert second.turns[0] == first.turns[0] and second.images == first.images


def test_the_history_is_the_stores_also_after_reopening(desk: Desk) -> None:
    desk.ask("First?")
    again = CaseSession(desk.store, desk.engines, desk.case.id)
    again.ask("Second?", (desk.image,), desk.events.append)
    assert desk.engine.requests[1].images == desk.engine.requests[0].images
    assert [turn.text for turn in desk.engine.requests[1].turns] == ["First?", "A chest.", "Second?"]


def test_stopping_keeps_what_came(store: CaseStore) -> None:
    hold = threading.Semaphore(2)
    desk = Desk(store, FakeEngine(Script(("one two three four five",), tokens_per_s=1e6, hold=hold)))
    arrived = threading.Semaphore(0)
    results: list[Answered] = []

    def sink(event: SessionEvent) -> None:
        if isinstance(event, Piece):
            arrived.release()

    thread = threading.Thread(target=lambda: results.append(desk.session.ask("?", (), sink)))
    thread.start()
    for _ in range(3):
        arrived.acquire(timeout=30)
    with pytest.raises(InputError, match="still coming"):
        desk.ask()
    assert desk.session.busy
    desk.session.stop()
    thread.join(30)
    assert (results[0].message.text, results[0].message.state) == ("one two three", "stopped")
    assert desk.session.wait(1) and not desk.session.busy


def test_a_death_is_recorded_and_retry_answers(store: CaseStore) -> None:
    desk = Desk(store, FakeEngine(Script(("one two three",), tokens_per_s=1e6, die_after=2)))
    failed = desk.ask("Why?")
    assert isinstance(failed.error, EngineDiedError)
    assert (failed.message.text, failed.message.state) == ("one two", "failed")
    answered = desk.retry()
    assert (answered.message.text, answered.message.state, answered.error) == ("one two three", "complete", None)
    assert [(m.role, m.state) for m in store.list_messages(desk.case.id)] == [
        ("user", "complete"),
        ("assistant", "failed"),
        ("assistant", "complete"),
    ]
    assert [turn.text for turn in desk.engine.requests[1].turns] == ["Why?"]
    desk.ask("And?")
    assert [turn.text for turn in desk.engine.requests[2].turns] == ["Why?", "one two three", "And?"]


def test_an_answer_asked_again_takes_the_place_of_the_one_that_was_stopped(desk: Desk) -> None:
    desk.store.add_message(desk.case.id, "user", "Why?")
    desk.store.add_message(desk.case.id, "assistant", "Because", state="stopped")
    desk.store.add_message(desk.case.id, "assistant", "Because of a fall.")
    desk.ask("And?", ())
    assert [turn.text for turn in desk.engine.requests[0].turns] == ["Why?", "Because of a fall.", "And?"]


def test_a_model_whose_files_go_away_meanwhile_leaves_its_answer(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone_afterwards(artifact: Artifact) -> ModelIdentity:
        if desk.engine.requests:
            raise InputError("Expected a file, found none.", "Plug the stick in.")
        return identify_model(artifact)

    monkeypatch.setattr("edgemed.tui.session.identify_model", gone_afterwards)
    answered = desk.ask()
    assert answered.message.state == "complete" and answered.message.model == identify_model(desk.engine.artifact)


def test_a_damaged_calibration_is_told_before_anything_is_recorded(store: CaseStore, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_NAME).write_text("{}")
    desk = Desk(store, FakeEngine(Script(tokens_per_s=1e6), replace(fake_artifact(), folder=tmp_path)))
    with pytest.raises(ArtifactError):
        desk.ask()
    assert store.list_messages(desk.case.id) == [] and desk.events == []


def test_a_draft_sees_the_image_as_the_last_question_did(desk: Desk) -> None:
    desk.image = replace(desk.image, view=View(invert=True))
    desk.ask()
    draft_report(desk.session, desk.store, "en")
    assert desk.engine.requests[1].images == desk.engine.requests[0].images


def test_lack_of_memory_is_an_answer_that_failed(store: CaseStore) -> None:
    desk = Desk(store, FakeEngine(Script(lacks_memory=True)))
    answered = desk.ask()
    assert isinstance(answered.error, EngineMemoryError) and answered.message.state == "failed" and answered.message.text == ""


def test_a_model_that_does_not_load_records_nothing(store: CaseStore) -> None:
    desk = Desk(store, FakeEngine())

    def fail(note: Callable[[str], None]) -> FakeEngine:
        raise EngineMemoryError("too large")

    desk.session = CaseSession(store, EngineHolder(fail), desk.case.id)
    with pytest.raises(EngineMemoryError):
        desk.ask()
    assert store.list_messages(desk.case.id) == [] and not desk.session.busy


def test_nothing_to_retry_is_told(desk: Desk) -> None:
    with pytest.raises(InputError, match="question to ask again"):
        desk.retry()


def test_a_long_conversation_leaves_the_oldest_out_and_says_so(store: CaseStore) -> None:
    desk = Desk(store, FakeEngine(Script(("word " * 60,), tokens_per_s=1e6), fake_artifact(context_length=300)))
    for number in range(5):
        desk.ask(f"Question {number}?")
    left = [event.exchanges for event in desk.events if isinstance(event, Left)]
    assert left and left == sorted(left)
    last = desk.engine.requests[-1]
    assert last.turns[-1].text == "Question 4?" and "Question 0?" not in [turn.text for turn in last.turns] and len(last.images) == 1
    assert len(store.list_messages(desk.case.id)) == 10


def test_a_calibrated_model_says_how_sure_it_is_and_refers(store: CaseStore, tmp_path: Path) -> None:
    for refer_below, verdict in ((0.5, "answer"), (0.95, "refer")):
        folder = tmp_path / str(refer_below)
        folder.mkdir()
        write_calibration(folder, refer_below)
        artifact = replace(fake_artifact(), folder=folder)
        desk = Desk(store, FakeEngine(Script(("Yes.",), tokens_per_s=1e6), artifact))
        message = desk.ask().message
        assert message.verdict == verdict and message.confidence is not None
        assert message.confidence.probability == pytest.approx(0.8) and message.confidence.calibrated_on == "slake test"
        assert store.list_messages(desk.case.id)[-1] == message


def test_forgetting_lets_go_of_pixels(desk: Desk) -> None:
    desk.ask()
    desk.session.forget()
    assert not desk.session._pictures and not desk.session._prepared
