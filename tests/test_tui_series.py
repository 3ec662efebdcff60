"""Folders and series on the screen: chosen, attached whole, leafed through, asked about, reopened, exported, and stopped."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_fixture import ct_series, make_dicom
from PIL import Image
from textual.pilot import Pilot
from textual.widgets import DirectoryTree, Input, OptionList
from tui_fixture import (
    RADIOGRAPH,
    answered,
    ask,
    begin,
    build,
    chat,
    cheap_store,
    drawn,
    messages,
    on_screen,
    open_case,
    paste,
    settle,
    text_of,
    told,
    unlock,
)

from edgemed.clinic.imaging import Series, list_series
from edgemed.clinic.records import Box, CaseImage
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import ImageError, InputError
from edgemed.tui import folders
from edgemed.tui.attaching import attach_file, attach_series
from edgemed.tui.folders import list_folder
from edgemed.tui.texts import say_image, say_series
from edgemed.tui.viewer import ImageView
from edgemed.tui.widgets.strip import ImageStrip
from runtimes.fake import Script

YES = Script(("Yes.",), tokens_per_s=1e6)


def store_of(pilot: Pilot[Any]) -> CaseStore:
    return chat(pilot).store._target  # type: ignore[attr-defined,no-any-return]


def strip_of(pilot: Pilot[Any]) -> ImageStrip:
    return pilot.app.screen.query_one(ImageStrip)


def images_in(pilot: Pilot[Any]) -> list[CaseImage]:
    store = store_of(pilot)
    return store.list_images(store.list_cases()[0].id)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A CT of five slices, a radiograph that names its patient, and a plain image."""
    folder = tmp_path / "study"
    (folder / "ct").mkdir(parents=True)
    ct_series(folder / "ct", 5)
    (folder / "cr").write_bytes(make_dicom(PatientID="PID-1", SeriesNumber=2, SeriesDescription="Qw\x1b[31myzzel PA"))
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "photo.png")
    (folder / "notes.txt").write_text("none")
    return folder


async def look_through(pilot: Pilot[Any], folder: Path) -> OptionList:
    """Drop a folder onto the terminal."""
    paste(pilot, str(folder))
    return await listed(pilot)


async def listed(pilot: Pilot[Any]) -> OptionList:
    """Until it is shown what the folder holds."""
    await settle(pilot, on_screen(pilot, "FolderScreen"), "the folder")
    screen = pilot.app.screen
    await settle(pilot, lambda: any(choices.option_count and choices.has_focus for choices in screen.query(OptionList)), "what it holds")
    return screen.query_one(OptionList)


async def attach_ct(pilot: Pilot[Any], study: Path) -> None:
    await look_through(pilot, study / "ct")
    await pilot.press("enter")
    await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
    await settle(pilot, lambda: strip_of(pilot).option_count > 0, "the series")
    await drawn(pilot)


def viewer(pilot: Pilot[Any]) -> ImageView:
    return next(view for view in pilot.app.screen.query(ImageView) if view.display)


async def leaf(pilot: Pilot[Any], *keys: str) -> None:
    await pilot.press(*keys)
    await drawn(pilot)


# -- choosing ---------------------------------------------------------------------------------------------------------------


async def test_a_dropped_folder_lists_its_series_and_images_safely(tmp_path: Path, study: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        choices = await look_through(pilot, study)
        lines = [str(choices.get_option_at_index(index).prompt) for index in range(choices.option_count)]
        assert sorted(lines, key=len) == ["photo.png", *sorted(lines, key=len)[1:]] and len(lines) == 3
        assert any(line.startswith("Series · 5 images · CT · Qwyzzel PA follow-up · ") for line in lines)
        assert any(line.startswith("Series 2 · 1 image · CR · Qw[31myzzel PA · ") for line in lines)
        await settle(pilot, lambda: "may hold the" in text_of(app), "the note")
        assert "\x1b" not in text_of(app)
        choices.highlighted = lines.index("photo.png")
        await pilot.press("enter")
        await settle(pilot, lambda: on_screen(pilot, "CaseScreen")() and len(strip_of(pilot).images) == 1, "the image")
        assert strip_of(pilot).images[0].name == "photo.png" and strip_of(pilot).images[0].facts.series is None
    assert app.guard.screen_calls == 0


async def test_a_folder_is_typed_or_chosen_in_the_tree(tmp_path: Path, study: Path) -> None:
    app = build(tmp_path, watch=study)
    async with app.run_test(size=(80, 24)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        await pilot.press("ctrl+o")
        await settle(pilot, on_screen(pilot, "AttachScreen"), "the box")
        app.screen.query_one("#path", Input).value = str(study / "ct")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "FolderScreen"), "the folder")
        await pilot.press("escape")
        await settle(pilot, on_screen(pilot, "AttachScreen"), "the box again")
        tree = app.screen.query_one(DirectoryTree)
        tree.focus()
        await settle(pilot, lambda: bool(tree.root.children), "the tree")
        await pilot.press("down", "s")
        assert (await listed(pilot)).option_count == 1
        await pilot.press("enter")
        await settle(pilot, lambda: on_screen(pilot, "CaseScreen")() and len(strip_of(pilot).images) == 5, "the series")


async def test_an_empty_folder_and_one_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    app = build(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        paste(pilot, str(empty))
        await settle(pilot, lambda: "There is no DICOM series" in text_of(app), "nothing")
        await pilot.press("escape")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        from edgemed.tui.screens.folder import FolderScreen

        app.push_screen(FolderScreen(tmp_path / "none"))
        await settle(pilot, lambda: "Expected a folder" in text_of(app), "the reason")


async def test_a_large_series_asks_first(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MANY_FILES", 4)
    app = build(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        await look_through(pilot, study / "ct")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "the question")
        assert "Attach 5 images, 49 kB?" in text_of(app)
        await pilot.press("enter")  # no is what Enter says first
        await settle(pilot, on_screen(pilot, "FolderScreen"), "the folder again")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "the question again")
        await pilot.press("tab", "enter")
        await settle(pilot, lambda: on_screen(pilot, "CaseScreen")() and len(strip_of(pilot).images) == 5, "the series")


def test_how_large_is_large() -> None:
    paths = tuple(Path(str(n)) for n in range(201))
    assert folders.is_large(Series("CT", "", paths)) and not folders.is_large(Series("CT", "", paths[:200]))
    assert folders.is_large(Series("CT", "", paths[:1], size_bytes=512_000_001))


# -- in the case ------------------------------------------------------------------------------------------------------------


async def test_a_series_is_one_line_and_the_slice_in_sight_is_asked_about(tmp_path: Path, study: Path) -> None:
    app = build(tmp_path, YES)
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        await attach_ct(pilot, study)
        strip = strip_of(pilot)
        assert (strip.option_count, len(strip.images)) == (1, 5)
        assert "Series, 3/5 · CT WRIST L PA · 64×" in text_of(app) and "Image 3/5" in viewer(pilot).description
        await pilot.press("ctrl+g")
        await leaf(pilot, "right_square_bracket", "shift+up")
        await settle(pilot, lambda: strip.images[3].view.window is not None, "the window")
        assert "Series, 4/5" in text_of(app)
        await leaf(pilot, "ctrl+g")
        await ask(pilot, "A bleed?")
        await answered(pilot, 1)
        (seen,) = messages(pilot)[1].images
        shown = images_in(pilot)[3]
        assert seen.image_id == shown.id and shown.name == "IM002" and seen.view == shown.view == strip.images[3].view
        pixels = app.session.picture(shown).render(seen.view)  # type: ignore[union-attr]
        assert np.asarray(pixels).any()
        await pilot.press("escape")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case again")
        await settle(pilot, lambda: "Series, 4/5" in text_of(app), "the slice that was asked about")
    assert app.guard.screen_calls == 0


async def test_masks_belong_to_their_slice_and_come_back(tmp_path: Path, study: Path) -> None:
    app = build(tmp_path, YES)
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        await attach_ct(pilot, study)
        await leaf(pilot, "ctrl+g", "m", "enter", "escape")
        await settle(pilot, lambda: bool(images_in(pilot)[2].view.masks), "the mask")
        masks = images_in(pilot)[2].view.masks
        await leaf(pilot, "right_square_bracket")
        assert viewer(pilot).view.masks == ()
        await leaf(pilot, "left_square_bracket")
        assert viewer(pilot).view.masks == masks
        await pilot.press("home")
        await pilot.press("ctrl+l")
        await unlock(pilot)
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case again")
        await drawn(pilot)
        assert [bool(image.view.masks) for image in images_in(pilot)] == [False, False, True, False, False]
        assert viewer(pilot).position == 2 and viewer(pilot).view.masks == masks


async def test_two_series_side_by_side_are_leafed_through_together(tmp_path: Path, study: Path) -> None:
    prior = tmp_path / "prior"
    prior.mkdir()
    ct_series(prior, 3)
    app = build(tmp_path, YES)
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        await attach_ct(pilot, study)
        await look_through(pilot, prior)
        await pilot.press("enter")
        await settle(pilot, lambda: on_screen(pilot, "CaseScreen")() and len(strip_of(pilot).images) == 8, "the prior")
        await pilot.press("f4")
        await settle(pilot, lambda: sum(view.display for view in app.screen.query(ImageView)) == 2, "both")
        await drawn(pilot)
        await pilot.press("ctrl+g")
        await leaf(pilot, "l", "home")
        views = [view for view in app.screen.query(ImageView) if view.display]
        assert [view.position for view in views] == [0, 0]
        await leaf(pilot, "end")
        assert [view.position for view in views] == [4, 2]
        await settle(pilot, lambda: [image.name for image in strip_of(pilot).asked] == ["IM001", "IM001"], "both slices")
        assert [str(view.border_title) for view in views] == ["1 Series", "2 Series"]
        assert [image.facts.series.place for image in strip_of(pilot).asked if image.facts.series] == [5, 3]


async def test_a_file_that_is_there_already_is_told(tmp_path: Path, study: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head", RADIOGRAPH)
        paste(pilot, str(RADIOGRAPH))
        await settle(pilot, lambda: "in the case already" in told(pilot), "the note")
        assert len(images_in(pilot)) == 1
        await look_through(pilot, study / "ct")
        await pilot.press("enter")
        await settle(pilot, lambda: on_screen(pilot, "CaseScreen")() and len(strip_of(pilot).images) == 6, "the series")
        app.clear_notifications()
        paste(pilot, str(study / "ct" / "IM005"))  # a slice by itself
        await settle(pilot, lambda: "in the case already" in told(pilot), "the note")
        await settle(pilot, lambda: "Series, 1/5" in text_of(app), "the slice is shown")
        assert len(images_in(pilot)) == 6


# -- stopping ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["escape", "ctrl+l"])
async def test_a_series_that_is_stopped_or_locked_away_is_not_kept(
    tmp_path: Path, study: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.tui import attaching

    gate, reached, read = threading.Event(), threading.Event(), attaching.read_file

    def slow(path: Path) -> bytes:
        reached.set()
        assert gate.wait(20)
        return read(path)

    monkeypatch.setattr(attaching, "read_file", slow)
    app = build(tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head")
        await look_through(pilot, study / "ct")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "AttachingScreen"), "the progress")
        await settle(pilot, reached.is_set, "the first file")
        await pilot.press(how)
        if how == "ctrl+l":
            await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
        gate.set()
        if how == "ctrl+l":
            await unlock(pilot)
            await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        else:
            await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
            assert "nothing of it was kept" in told(pilot)
        assert images_in(pilot) == []
        store_of(pilot).audit.verify()


# -- attaching without a screen ---------------------------------------------------------------------------------------------


def test_files_that_cannot_be_shown_are_left_out_and_counted(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, 4)
    paths[1].write_bytes(paths[1].read_bytes()[:-3000])
    (series,) = list_series(tmp_path)
    store = cheap_store(tmp_path / "s")
    case = store.create_case("head")
    steps: list[tuple[int, int]] = []

    def step(done: int, total: int) -> bool:
        steps.append((done, total))
        return True

    attached = attach_series(store, case.id, series, step)
    assert (attached.files, attached.refused, attached.again) == (3, 1, 0)
    assert [image.facts.series.length for image in store.list_images(case.id) if image.facts.series] == [3, 3, 3]
    assert steps == sorted(steps) and steps[-1][0] < steps[-1][1] == 8
    for path in paths:
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ImageError):
        attach_series(store, case.id, series)


def test_a_series_fills_in_the_patient_and_another_is_noticed(tmp_path: Path) -> None:
    ct_series(tmp_path, 3)
    (series,) = list_series(tmp_path)
    store = cheap_store(tmp_path / "s")
    case = store.create_case("head")
    first = attach_series(store, case.id, series)
    assert not first.other_patient and "Qwyzzel" in store.load_identity(case.id).name
    assert first.image.facts.series is not None and first.image.facts.series.place == 2
    same = attach_series(store, case.id, series)
    assert (same.files, same.again, same.image) == (0, 3, first.image) and len(store.list_images(case.id)) == 3
    other = store.create_case("other", type(store.load_identity(case.id))(patient_id="else"))
    assert attach_series(store, other.id, series).other_patient


def test_a_series_of_which_a_slice_is_there_is_kept_whole(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, 3)
    (series,) = list_series(tmp_path)
    store = cheap_store(tmp_path / "s")
    case = store.create_case("head")
    attach_file(store, case.id, paths[0])
    attached = attach_series(store, case.id, series)
    assert (attached.files, attached.again) == (3, 1)


def test_a_file_that_changes_between_the_two_readings_is_refused(tmp_path: Path) -> None:
    paths = ct_series(tmp_path, 2)
    (series,) = list_series(tmp_path)
    store = cheap_store(tmp_path / "s")
    case = store.create_case("head")

    def step(done: int, total: int) -> bool:
        if done == 3:
            paths[1].write_bytes(make_dicom())
        return True

    with pytest.raises(InputError, match="found other bytes"):
        attach_series(store, case.id, series, step)
    assert store.list_images(case.id) == []


def test_plain_images_are_told_by_name_and_lie_in_the_folder_itself(study: Path) -> None:
    (study / ".hidden.png").write_bytes(b"")
    (study / "dicom.jpg").write_bytes(make_dicom())
    (study / "ct" / "below.png").write_bytes((study / "photo.png").read_bytes())
    contents = list_folder(study)
    assert [path.name for path in contents.files] == ["photo.png"]
    # A DICOM file is one whatever its name: of the same series as "cr", which make_dicom gives every file.
    names = sorted(sorted(path.name for path in one.files) for one in contents.series)
    assert names == [[f"IM00{n}" for n in range(1, 6)], ["cr", "dicom.jpg"]]


def test_what_is_said_of_a_series_is_safe() -> None:
    series = Series("CT", "a\x1b[2J\nb", (Path("x"),), study_description="\x9bc", size_bytes=12_000_000)
    assert say_series(series) == "Series · 1 image · CT · a[2J b · 12 MB · c"
    image = cheap_image()
    assert say_image(image) == "Series 3, 2/4 · CT · 4×3"


def cheap_image() -> CaseImage:
    from tui_fixture import START

    from edgemed.clinic.records import ImageFacts, SeriesPlace, View

    facts = ImageFacts("dicom", 4, 3, modality="CT", series=SeriesPlace("s", 2, 4, 3))
    return CaseImage("i", "c", "IM2", START, "0" * 64, 1, facts, View(masks=(Box(0, 0, 1, 1),)))


def test_views_are_saved_once_each_and_what_is_left_at_the_lock() -> None:
    from edgemed.clinic.records import View
    from edgemed.core.errors import StoreError
    from edgemed.tui.keeping import ViewKeeper

    saved: list[tuple[str, View]] = []

    def save(image_id: str, view: View) -> None:
        if image_id == "bad":
            raise StoreError("locked")
        saved.append((image_id, view))

    keeper = ViewKeeper(save)
    inverted = View(invert=True)
    assert keeper.rest() is None and keeper.put("a", View()) and not keeper.put("b", View()) and not keeper.put("a", inverted)
    assert keeper.save_next() and saved == [("a", inverted)]
    rest = keeper.rest()
    assert rest is not None
    rest()
    assert saved == [("a", inverted), ("b", View())] and not keeper.save_next()
    assert keeper.put("bad", View())
    with pytest.raises(StoreError):
        keeper.save_next()
    assert keeper.put("a", View())  # after a failure somebody has to be told again
