"""Series from the folder to the export: order, copies, all or nothing in the store, and what a report lists of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clinic_store import FACTS, make_store, open_store, tamper
from dicom_fixture import PLANTED_WORDS, ct_series, make_dicom

from edgemed.clinic.exporting import ExportWish, export_case
from edgemed.clinic.grouping import group_images, images_to_tell, middle_of
from edgemed.clinic.imaging import list_series, open_picture
from edgemed.clinic.records import CaseImage, Report, SeenImage, SeriesPlace, View
from edgemed.clinic.store import CaseStore, SeriesFile
from edgemed.core.errors import InputError, StoreError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CaseStore]:
    with make_store(tmp_path / "store" / "cases.db") as store:
        yield store


def series_file(data: bytes, name: str = "x") -> SeriesFile:
    return SeriesFile(name, FACTS, hashlib.sha256(data).hexdigest(), lambda: data)


def add_ct(store: CaseStore, case_id: str, folder: Path, slices: int = 5) -> list[CaseImage]:
    files = []
    for path in ct_series(folder, slices):
        data = path.read_bytes()
        files.append(SeriesFile(path.name, open_picture(data, path.name).facts, hashlib.sha256(data).hexdigest(), path.read_bytes))
    return store.add_series(case_id, files, 7)


# -- folders ----------------------------------------------------------------------------------------------------------------


def test_what_a_series_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(make_dicom(SeriesNumber=4))
    (series,) = list_series(tmp_path)
    assert (series.number, series.description, series.study_description) == (4, "Qwyzzel PA follow-up", "Wrist of Marguerita Qwyzzel")
    assert (series.study_date, series.size_bytes, series.copies) == ("2024-02-29", path.stat().st_size, 0)


def test_a_file_that_is_there_twice_is_taken_once_and_the_order_stays(tmp_path: Path) -> None:
    made = ct_series(tmp_path, 3)
    (tmp_path / "copy").mkdir()
    for path in made:
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    (series,) = list_series(tmp_path)
    assert series.copies == 3 and series.size_bytes == sum(path.stat().st_size for path in made)
    # IM003 is slice 1: by name the order would be the other way round.
    assert [path.name for path in series.files] == ["IM003", "IM002", "IM001"]


def test_different_images_of_one_number_are_all_kept(tmp_path: Path) -> None:
    for name, place in (("a", [0, 0, 1]), ("b", [0, 0, 2])):
        data = make_dicom(SOPInstanceUID="1.2.3", ImagePositionPatient=place, ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        (tmp_path / name).write_bytes(data)
    (series,) = list_series(tmp_path)
    assert len(series.files) == 2 and series.copies == 0


def test_a_listing_that_is_no_longer_wanted_ends(tmp_path: Path) -> None:
    ct_series(tmp_path, 5)
    asked: list[int] = []

    def wanted(looked_at: int) -> bool:
        asked.append(looked_at)
        return looked_at < 2

    (series,) = list_series(tmp_path, wanted)
    assert asked == [0, 1, 2] and len(series.files) == 2


# -- the store --------------------------------------------------------------------------------------------------------------


def test_a_series_is_kept_in_order_and_survives(store: CaseStore, tmp_path: Path) -> None:
    case = store.create_case("head")
    added = add_ct(store, case.id, tmp_path)
    found = store.list_images(case.id)
    assert found == added and [image.name for image in found] == ["IM005", "IM004", "IM003", "IM002", "IM001"]
    places = [image.facts.series for image in found]
    assert places == [SeriesPlace(places[0].id, n, 5, 7) for n in range(1, 6)]  # type: ignore[union-attr]
    assert store.read_image(found[2].id) == (tmp_path / "IM003").read_bytes()
    assert store.load_case(case.id).images == 5
    store.audit.verify()


@pytest.mark.parametrize("fault", ["changed", "gone", "stopped"])
def test_of_a_series_that_fails_nothing_is_kept(store: CaseStore, fault: str) -> None:
    case = store.create_case("head")

    def fail() -> bytes:
        if fault == "changed":
            return b"other bytes"
        raise InputError(fault)

    last = SeriesFile("b", FACTS, hashlib.sha256(b"b").hexdigest(), fail)
    with pytest.raises(InputError):
        store.add_series(case.id, [series_file(b"a"), last])
    assert store.list_images(case.id) == []
    assert "image.added" not in {entry.action for entry in store.audit.entries()}
    store.audit.verify()


def test_a_series_that_is_being_read_while_the_store_is_locked_is_not_kept(store: CaseStore) -> None:
    case = store.create_case("head")
    store.lock()
    with pytest.raises(StoreError, match="locked"):
        store.add_series(case.id, [series_file(b"a")])


def test_a_store_from_before_series_opens(tmp_path: Path) -> None:
    path = tmp_path / "store" / "cases.db"
    with make_store(path) as store:
        case = store.create_case("old")
        image = store.add_image(case.id, "x.png", b"data", FACTS)
        assert image.facts.series is None

    def as_it_was(db: object) -> None:
        facts = json.loads(db.row("SELECT facts FROM image")[0])  # type: ignore[attr-defined]
        del facts["series"]
        db.run("UPDATE image SET facts = ?", (json.dumps(facts),))  # type: ignore[attr-defined]

    tamper(path, as_it_was)
    with open_store(path) as store:
        assert store.list_images(case.id) == [image]


# -- groups and exports -----------------------------------------------------------------------------------------------------


def test_groups_are_series_in_their_order_and_single_images(store: CaseStore, tmp_path: Path) -> None:
    case = store.create_case("head")
    before = store.add_image(case.id, "before.png", b"1", FACTS)
    series = add_ct(store, case.id, tmp_path, 4)
    after = store.add_image(case.id, "after.png", b"2", FACTS)
    again = add_ct(store, case.id, tmp_path, 2)
    groups = group_images(list(reversed(store.list_images(case.id))))
    assert sorted(groups, key=len) == [(after,), (before,), tuple(again), tuple(series)]
    assert middle_of(tuple(series)) == series[1] and middle_of((before,)) == before
    seen = store.add_message(case.id, "user", "?", images=[SeenImage(series[n].id, View(), "0" * 64) for n in (3, 0)])
    assert images_to_tell(store.list_images(case.id), [seen]) == [before, series[0], series[3], after, again[0]]


def test_an_export_lists_and_shows_the_slices_that_were_asked_about(store: CaseStore, tmp_path: Path) -> None:
    import pypdf

    case = store.create_case("head")
    series = add_ct(store, case.id, tmp_path, 5)
    store.add_message(case.id, "user", "A bleed?", images=[SeenImage(series[3].id, View(), "ab" * 32)])
    store.save_report(Report(case.id, findings="None.", edited=True))
    pdf, text = export_case(store, case.id, ExportWish(tmp_path, ("pdf", "md")))
    assert "image 4 of 5 in its series" in text.read_text().replace("\\", "")
    assert text.read_text().count("in its series") == 1
    assert sum(len(page.images) for page in pypdf.PdfReader(pdf).pages) == 1
    said = pdf.read_bytes() + text.read_bytes()
    assert not [word for word in PLANTED_WORDS if word.encode() in said]
