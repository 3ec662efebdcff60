"""Parts of the terminal program without a screen: paths, the watched folder, attaching, the guard, the engine's holder, sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgemed.clinic.records import PatientIdentity
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EdgemedError, EngineError, EngineMemoryError, ImageError, InputError
from edgemed.tui.attaching import attach_file, differs
from edgemed.tui.engines import EngineHolder
from edgemed.tui.guard import CallGuard, ScreenBlockedError
from edgemed.tui.paths import FolderWatch, complete, parse_pasted
from edgemed.tui.texts import say_error, say_image
from edgemed.tui.themes import THEMES, all_themes, textual_name
from runtimes.fake import FakeEngine
from tests.dicom_fixture import make_dicom
from tests.tui_fixture import RADIOGRAPH, cheap_store

# -- paths ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/media/stick/a.png", "/media/stick/a.png"),
        ("/media/stick/a.png\n", "/media/stick/a.png"),
        ("'/media/my stick/a b.png'", "/media/my stick/a b.png"),
        (r"/media/my\ stick/a\ b.png", "/media/my stick/a b.png"),
        ("/media/my stick/a b.png", "/media/my stick/a b.png"),
        ("file:///media/my%20stick/a.png", "/media/my stick/a.png"),
        ("./a.png", "a.png"),
        ("/it's.png", "/it's.png"),
    ],
)
def test_a_dropped_file_is_a_path(text: str, path: str) -> None:
    assert parse_pasted(text) == Path(path)


@pytest.mark.parametrize("text", ["", "   ", "Is there a fracture?", "/a\n/b", "1/2 of the lung"])
def test_other_text_is_none(text: str) -> None:
    assert parse_pasted(text) is None


def test_a_path_is_completed(tmp_path: Path) -> None:
    (tmp_path / "wrist").mkdir()
    (tmp_path / "wave.png").touch()
    (tmp_path / ".hidden").touch()
    assert complete(f"{tmp_path}/wr") == f"{tmp_path}/wrist/"
    assert complete(f"{tmp_path}/w") == f"{tmp_path}/wave.png"
    assert complete(f"{tmp_path}/") == f"{tmp_path}/wave.png"
    assert complete(f"{tmp_path}/none") is None and complete(f"{tmp_path}/no/such") is None and complete("") is None


def test_a_watched_folder_offers_what_is_new_and_whole(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"old")
    watch = FolderWatch(tmp_path)
    assert watch.poll() == []
    new = tmp_path / "new.dcm"
    new.write_bytes(b"h")
    (tmp_path / "text.txt").write_bytes(b"no image")
    (tmp_path / ".part.png").write_bytes(b"hidden")
    (tmp_path / "folder.png").mkdir()
    assert watch.poll() == []
    new.write_bytes(b"half of it")
    assert watch.poll() == []
    assert watch.poll() == [new] and watch.poll() == []
    new.unlink()
    watch.poll()
    new.write_bytes(b"another one")
    assert watch.poll() == [] and watch.poll() == [new]


def test_a_watched_folder_may_vanish(tmp_path: Path) -> None:
    folder = tmp_path / "stick"
    folder.mkdir()
    watch = FolderWatch(folder)
    watch.poll()
    folder.rmdir()
    assert watch.poll() == []
    with pytest.raises(InputError, match="folder to watch"):
        FolderWatch(folder)


# -- the guard and the holder -----------------------------------------------------------------------------------------------


class Slow:
    value = 7

    def work(self, factor: int) -> int:
        return self.value * factor


def test_the_guard_counts_and_raises_on_the_screens_thread() -> None:
    guard = CallGuard(strict=True)
    slow = guard.watch(Slow())
    assert slow.value == 7 and slow.work(2) == 14  # not bound yet: any thread is free
    guard.bind()
    with pytest.raises(ScreenBlockedError, match="Slow.work"):
        slow.work(1)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(slow.work(3)))
    thread.start()
    thread.join()
    assert found == [21] and (guard.calls, guard.screen_calls) == (3, 1)


def test_a_guard_that_is_not_strict_only_counts() -> None:
    guard = CallGuard()
    guard.bind()
    assert guard.watch(Slow()).work(1) == 7 and guard.screen_calls == 1


def test_the_holder_opens_once_and_closes() -> None:
    opened: list[FakeEngine] = []

    def open_engine(note: Callable[[str], None]) -> FakeEngine:
        note("a smaller plan")
        opened.append(FakeEngine())
        return opened[-1]

    holder = EngineHolder(open_engine)
    assert holder.stats() is None
    holder.start()
    assert holder.get() is holder.get() is opened[0] and len(opened) == 1
    assert holder.state == "ready" and holder.note == "a smaller plan" and holder.stats() is not None
    holder.close()
    assert opened[0].closed
    with pytest.raises(EngineError, match="closed"):
        holder.get()


def test_the_holder_tells_why_and_tries_anew() -> None:
    errors: list[BaseException | None] = [EngineMemoryError("too large"), MemoryError(), None]

    def open_engine(note: Callable[[str], None]) -> FakeEngine:
        if (error := errors.pop(0)) is not None:
            raise error
        return FakeEngine()

    holder = EngineHolder(open_engine)
    with pytest.raises(EngineMemoryError, match="too large"):
        holder.get()
    assert holder.state == "failed"
    with pytest.raises(EngineError, match="too little memory"):
        holder.get()
    assert isinstance(holder.get(), FakeEngine)


def test_an_engine_that_comes_after_the_end_is_closed() -> None:
    may_open, engine = threading.Event(), FakeEngine()

    def open_engine(note: Callable[[str], None]) -> FakeEngine:
        may_open.wait(30)
        return engine

    holder = EngineHolder(open_engine)
    holder.start()
    holder.close()
    may_open.set()
    for thread in threading.enumerate():
        if thread.name == "edgemed-load":
            thread.join(30)
    assert engine.closed


# -- attaching --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    return cheap_store(tmp_path)


def test_a_file_becomes_an_image_and_its_patient_the_cases(store: CaseStore, tmp_path: Path) -> None:
    case = store.create_case("chest")
    path = tmp_path / "a.dcm"
    path.write_bytes(make_dicom())
    attached = attach_file(store, case.id, path)
    assert attached.image.name == "a.dcm" and store.list_images(case.id) == [attached.image]
    assert "Qwyzzel" in store.load_identity(case.id).name and not attached.other_patient
    assert store.read_image(attached.image.id) == path.read_bytes()
    store.save_identity(case.id, PatientIdentity(name="Somebody Else", patient_id="other"))
    path.write_bytes(make_dicom())  # another one: the same bytes again are not attached
    assert attach_file(store, case.id, path).other_patient
    assert store.load_identity(case.id).patient_id == "other"


def test_what_is_no_image_is_refused_before_it_is_stored(store: CaseStore, tmp_path: Path) -> None:
    case = store.create_case("chest")
    text = tmp_path / "a\x1b[31m.png"
    text.write_text("no image")
    for path, says in ((text, "image"), (tmp_path, "a folder"), (tmp_path / "none.png", "none")):
        with pytest.raises(EdgemedError, match=says) as raised:
            attach_file(store, case.id, path)
        assert isinstance(raised.value, ImageError) and "\x1b" not in say_error(raised.value)
    assert store.list_images(case.id) == []


@pytest.mark.parametrize(
    ("known", "found", "expected"),
    [
        (PatientIdentity(), PatientIdentity(name="A"), False),
        (PatientIdentity(name="Roe^Ann"), PatientIdentity(name="roe  ann"), False),
        (PatientIdentity(name="Roe^Ann"), PatientIdentity(name="Roe^Bob"), True),
        (PatientIdentity(name="Roe^Ann", patient_id="1"), PatientIdentity(name="Roe A", patient_id="1"), False),
        (PatientIdentity(name="Roe", patient_id="1"), PatientIdentity(name="Roe", patient_id="2"), True),
        (PatientIdentity(birth_date="1951-04-17"), PatientIdentity(birth_date="1951-04-18"), True),
    ],
)
def test_two_identities_differ(known: PatientIdentity, found: PatientIdentity, expected: bool) -> None:
    assert differs(known, found) is expected


def test_an_images_line_is_safe(store: CaseStore) -> None:
    case = store.create_case("x")
    path_name = "w\x1b]0;title\x07rist\n.png"
    image = replace(attach_file(store, case.id, RADIOGRAPH).image, name=path_name)
    assert say_image(image) == "w]0;titlerist .png · 512×512"


# -- looks ------------------------------------------------------------------------------------------------------------------


def test_every_look_has_a_theme_with_our_own_colours() -> None:
    names = {theme.name for theme in all_themes()}
    assert names == {textual_name(name) for name in THEMES}
    assert textual_name("no such") == "edgemed-dark"
    assert all({"quiet", "cover", "selected"} <= set(theme.variables) for theme in all_themes())
