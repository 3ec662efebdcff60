"""One open case without its screen: asks, streams, stops, retries, drafts, exports, and records all of it in the store.

    session = CaseSession(store, engines, case)
    session.ask("Is there a fracture?", images, sink)     # blocks to the answer's end; sink gets Said, Left, Piece…, Answered
    session.stop()                                        # from any thread: the answer ends as "stopped"
    session.retry(images, sink)                           # the last question once more

Every method but `stop` may take long: call them from worker threads, never from the screen's. Knows no Textual.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgemed.clinic.imaging import Picture, open_picture
from edgemed.clinic.records import CaseImage, Confidence, Message, MessageState, SeenImage, Verdict, View
from edgemed.clinic.report.draft import pairs_of
from edgemed.clinic.store import CaseStore
from edgemed.core.calibration import Calibration, load_calibration
from edgemed.core.errors import EdgemedError, InputError
from edgemed.core.identity import ModelIdentity, identify_model
from edgemed.core.images import hash_pixels, prepare
from edgemed.tui.engines import EngineHolder
from runtimes.consult import Answer, Answering, AnswerStream, Consultation, Exchange, follow, pack_pixels, plan_request
from runtimes.messages import PreparedImage, Timings

# Opened files kept while a case is open: some, and of small ones (a series' slices) as many as this; and prepared pixels (0.4 MB each).
_PICTURES = 4
_PICTURE_BYTES = 64 << 20
_PREPARED = 16
# A report's draft is longer than an answer.
DRAFT_TOKENS = 512


@dataclass(frozen=True)
class _Prepared:
    """An image as the tower sees it, the view with the window that was really used, and the hash of these pixels."""

    image: PreparedImage
    view: View
    pixels_sha256: str


@dataclass(frozen=True)
class _Asked:
    """Who is asked, found out before anything is recorded: afterwards a model's stick may be gone, and the answer must not go with it."""

    engine: Answering
    model: ModelIdentity
    calibration: Calibration | None

    @classmethod
    def of(cls, engine: Answering) -> _Asked:
        return cls(engine, identify_model(engine.artifact), load_calibration(engine.artifact.folder))


@dataclass(frozen=True)
class Said:
    """The question was recorded."""

    message: Message


@dataclass(frozen=True)
class Left:
    """The context was too short for all that was said: so many of the oldest exchanges were not shown to the model."""

    exchanges: int


@dataclass(frozen=True)
class Piece:
    """More text of the answer."""

    text: str


@dataclass(frozen=True)
class Answered:
    """The answer ended and was recorded; with an `error` it failed on the way. `cut`: it reached the longest length."""

    message: Message
    error: EdgemedError | None = None
    timings: Timings | None = None
    cut: bool = False


SessionEvent = Said | Left | Piece | Answered
Sink = Callable[[SessionEvent], None]


class CaseSession:
    """A case's conversation. One answer at a time."""

    def __init__(self, store: CaseStore, engines: EngineHolder, case_id: str) -> None:
        self._store, self._engines, self.case_id = store, engines, case_id
        self._busy = threading.Lock()
        self._stopping = threading.Event()
        self._stream: AnswerStream | None = None
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._prepared: OrderedDict[tuple[str, View], _Prepared] = OrderedDict()
        self._cache = threading.RLock()

    @property
    def busy(self) -> bool:
        """Whether an answer is on its way."""
        return self._busy.locked()

    # -- answers ------------------------------------------------------------------------------------------------------

    def ask(self, question: str, images: Sequence[CaseImage], sink: Sink) -> Answered:
        """Record a question and its answer. Raises InputError while another answer comes, ImageError, StoreError."""
        return self._exclusively(lambda: self._ask(question, images, sink))

    def retry(self, images: Sequence[CaseImage], sink: Sink) -> Answered:
        """The last question once more, about `images` as they are looked at now; the failed answer stays in the record."""
        return self._exclusively(lambda: self._retry(images, sink))

    def stop(self) -> None:
        """End the answer that is coming; what came so far is kept. From any thread, returns at once."""
        self._stopping.set()
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def wait(self, timeout_s: float) -> bool:
        """Wait until no answer is coming; whether that was so in time."""
        if not self._busy.acquire(timeout=timeout_s):
            return False
        self._busy.release()
        return True

    def _exclusively(self, work: Callable[[], Answered]) -> Answered:
        if not self._busy.acquire(blocking=False):
            raise InputError("Expected the answer before to have ended, found it still coming.", "Wait for it, or stop it with Escape.")
        try:
            self._stopping.clear()
            return work()
        finally:
            self._stream = None
            self._busy.release()

    def _ask(self, question: str, images: Sequence[CaseImage], sink: Sink) -> Answered:
        history = self._history(self._store.list_messages(self.case_id))
        engine = self._engines.get()  # a model that cannot be loaded is told before anything is recorded
        shown = tuple(self._prepare(image, engine) for image in images)
        asked = _Asked.of(engine)
        message = self._store.add_message(self.case_id, "user", question, images=_seen(images, shown))
        sink(Said(message))
        return self._answer(asked, Consultation(question, tuple(p.image for p in shown), history), message.images, sink)

    def _retry(self, images: Sequence[CaseImage], sink: Sink) -> Answered:
        messages = self._store.list_messages(self.case_id)
        last = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
        if last is None:
            raise InputError("Expected a question to ask again, found none.", "Type a question first.")
        engine = self._engines.get()
        shown = tuple(self._prepare(image, engine) for image in images)
        consultation = Consultation(messages[last].text, tuple(p.image for p in shown), self._history(messages[:last]))
        return self._answer(_Asked.of(engine), consultation, _seen(images, shown), sink)

    def _answer(self, asked: _Asked, consultation: Consultation, seen: tuple[SeenImage, ...], sink: Sink) -> Answered:
        engine = asked.engine
        try:
            planned = plan_request(engine, consultation, logprobs=asked.calibration is not None)
            if planned.dropped:
                sink(Left(planned.dropped))
            answer = self._follow(engine, engine.submit(planned.request), sink)
        except EdgemedError as error:
            answer = Answer("", error=error)
        answered = self._record(answer, asked.model, seen, asked.calibration)
        sink(answered)
        return answered

    def _follow(self, engine: Answering, stream: AnswerStream, sink: Sink) -> Answer:
        self._stream = stream
        if self._stopping.is_set():  # asked to stop before there was a stream to stop
            stream.cancel()
        return follow(stream, engine.artifact.manifest.template, lambda text: sink(Piece(text)))

    def _record(self, answer: Answer, model: ModelIdentity, seen: tuple[SeenImage, ...], calibration: Calibration | None) -> Answered:
        state: MessageState = "failed"
        if answer.finished is not None:
            state = "stopped" if answer.finished.reason == "cancelled" else "complete"
        confidence, verdict = judge(answer, calibration)
        message = self._store.add_message(
            self.case_id, "assistant", answer.text, images=seen, model=model, state=state, confidence=confidence, verdict=verdict
        )
        finished = answer.finished
        return Answered(message, answer.error, finished.timings if finished else None, bool(finished and finished.reason == "length"))

    def generate(self, question: str, images: Sequence[CaseImage]) -> tuple[Answer, ModelIdentity]:
        """An answer that goes into no record, as for a report's draft. Raises InputError while another answer comes, ImageError."""
        if not self._busy.acquire(blocking=False):
            raise InputError("Expected the answer before to have ended, found it still coming.", "Wait for it, or stop it with Escape.")
        try:
            self._stopping.clear()
            engine = self._engines.get()
            shown = tuple(self._prepare(image, engine).image for image in images)
            model = identify_model(engine.artifact)
            planned = plan_request(engine, Consultation(question, shown), max_tokens=DRAFT_TOKENS)
            return self._follow(engine, engine.submit(planned.request), lambda event: None), model
        finally:
            self._stream = None
            self._busy.release()

    # -- what was said and seen ---------------------------------------------------------------------------------------

    def _history(self, messages: Sequence[Message]) -> tuple[Exchange, ...]:
        """Questions with their answers, of those asked again the last; those that failed or were stopped before a word are left out."""
        return tuple(Exchange(q.text, a.text, self._prepared_again(a.images)) for q, a in pairs_of(messages))

    def _prepared_again(self, seen: Sequence[SeenImage]) -> tuple[PreparedImage, ...]:
        images = {image.id: image for image in self._store.list_images(self.case_id)}
        engine = self._engines.get()
        return tuple(self._prepare(replace(images[s.image_id], view=s.view), engine).image for s in seen if s.image_id in images)

    def _prepare(self, image: CaseImage, engine: Answering) -> _Prepared:
        """An image in its view as the tower sees it."""
        key = (image.id, image.view)
        with self._cache:
            if key not in self._prepared:
                picture = self.picture(image)
                pixels = prepare(picture.render(image.view), engine.artifact.manifest.image)
                self._prepared[key] = _Prepared(pack_pixels(pixels), picture.resolve(image.view), hash_pixels(pixels))
                while len(self._prepared) > _PREPARED:
                    self._prepared.popitem(last=False)
            self._prepared.move_to_end(key)
            return self._prepared[key]

    def picture(self, image: CaseImage) -> Picture:
        """An image of the case, opened. Raises ImageError, DicomError, StoreError."""
        with self._cache:
            if image.id not in self._pictures:
                self._pictures[image.id] = open_picture(self._store.read_image(image.id), image.name)
                self._sizes[image.id] = image.size_bytes
                while len(self._pictures) > _PICTURES and sum(map(self._sizes.__getitem__, self._pictures)) > _PICTURE_BYTES:
                    self._pictures.popitem(last=False)
            self._pictures.move_to_end(image.id)
            return self._pictures[image.id]

    def forget(self) -> None:
        """Let go of all pixels, for locking."""
        with self._cache:
            self._pictures.clear()
            self._prepared.clear()


def judge(answer: Answer, calibration: Calibration | None) -> tuple[Confidence | None, Verdict]:
    """How sure an answer is, and whether to refer; without a calibration nothing is claimed."""
    if calibration is None or answer.score is None or answer.finished is None:
        return None, "answer"
    probability = calibration.probability(answer.score)
    return Confidence(probability, calibration.calibrated_on), "refer" if calibration.refers(answer.score) else "answer"


def _seen(images: Sequence[CaseImage], shown: Sequence[_Prepared]) -> tuple[SeenImage, ...]:
    return tuple(SeenImage(image.id, p.view, p.pixels_sha256) for image, p in zip(images, shown, strict=True))
