"""From the store to files for others: what consent and its absence mean for every byte, and what the audit log says."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pypdf
import pytest
from clinic_store import AMINA, FACTS, make_store
from dicom_fixture import PLANTED_WORDS, STUDY_UID, make_dicom
from PIL import Image, ImageDraw

from edgemed.clinic.exporting import ExportWish, export_case
from edgemed.clinic.imaging import open_picture
from edgemed.clinic.records import Box, PatientIdentity, Report, View
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import InputError, StoreError

ALL = ("pdf", "md", "fhir", "dicom", "sr")
HEADING = "ACCIDENT AND EMERGENCY 4711 8899"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CaseStore]:
    with make_store(tmp_path / "store" / "cases.db") as store:
        yield store


def make_case(store: CaseStore, identity: PatientIdentity = AMINA, text: str = "Amina Touré fell.") -> str:
    case = store.create_case("wrist of Amina", identity)
    store.add_message(case.id, "user", f"{text} P-4711, born 3.2.1990. A fracture?")
    store.save_report(Report(case.id, findings=f"{text} No fracture.", impression="Normal.", edited=True))
    return case.id


def picture_with_text() -> bytes:
    """A grey image with a line of letters at its upper border."""
    image = Image.new("L", (640, 480), 40)
    ImageDraw.Draw(image).text((20, 12), HEADING, fill=255, font_size=24)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def pictures_in(pdf: Path) -> int:
    return sum(len(page.images) for page in pypdf.PdfReader(pdf).pages)


def test_without_consent_names_in_texts_are_taken_out(store: CaseStore, tmp_path: Path) -> None:
    written = export_case(store, make_case(store), ExportWish(tmp_path, ALL))
    assert len(written) == len(ALL)
    said = b"".join(path.read_bytes() for path in written) + _pdf_text(written[0]).encode()
    for word in ("Amina", "Touré", "P-4711", "3.2.1990", "wrist of"):
        assert word.encode() not in said
    assert "[withheld] fell" in written[1].read_text().replace("\\", "")
    named = export_case(store, store.list_cases()[0].id, ExportWish(tmp_path, ALL, with_identity=True))
    assert all(b"Amina" in path.read_bytes() for path in named[1:3])
    details = [entry.detail for entry in store.audit.entries() if entry.action == "export"]
    assert [detail["identity"] for detail in details] == ["no", "yes"]


def _pdf_text(path: Path) -> str:
    return "".join(page.extract_text() for page in pypdf.PdfReader(path).pages)


def test_without_consent_a_picture_with_text_in_it_stays_here(store: CaseStore, tmp_path: Path) -> None:
    case_id, data = make_case(store), picture_with_text()
    image = store.add_image(case_id, "a.png", data, open_picture(data, "a.png").facts)
    store.add_image(case_id, "plain.png", _plain(), FACTS)
    assert pictures_in(export_case(store, case_id, ExportWish(tmp_path, ("pdf",)))[0]) == 1
    assert pictures_in(export_case(store, case_id, ExportWish(tmp_path, ("pdf",), with_identity=True))[0]) == 2
    store.save_view(image.id, View(masks=(Box(0, 0, 640, 60),)))
    assert pictures_in(export_case(store, case_id, ExportWish(tmp_path, ("pdf",)))[0]) == 2


def _plain() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((90, 120), 90, np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_an_image_that_cannot_be_shown_does_not_keep_the_report(store: CaseStore, tmp_path: Path) -> None:
    case_id = make_case(store)
    store.add_image(case_id, "a.png", b"no image any more", FACTS)
    assert pictures_in(export_case(store, case_id, ExportWish(tmp_path, ("pdf",)))[0]) == 0


def test_the_study_is_joined_with_consent_alone(store: CaseStore, tmp_path: Path) -> None:
    data = make_dicom(None, "explicit")
    found = open_picture(data, "x.dcm")
    case_id = make_case(store, found.identity, "She fell.")
    store.add_image(case_id, "x.dcm", data, found.facts)
    for kind in ("dicom", "sr"):
        named = pydicom.dcmread(export_case(store, case_id, ExportWish(tmp_path, (kind,), with_identity=True))[0])
        assert named.StudyInstanceUID == STUDY_UID and named.PatientID == found.identity.patient_id
    written = export_case(store, case_id, ExportWish(tmp_path, ALL))
    assert not [word for word in PLANTED_WORDS for path in written if word.encode() in path.read_bytes()]


def test_another_patients_file_is_not_joined(store: CaseStore, tmp_path: Path) -> None:
    data = make_dicom(None, "explicit")
    case_id = make_case(store)
    store.add_image(case_id, "x.dcm", data, open_picture(data, "x.dcm").facts)
    named = pydicom.dcmread(export_case(store, case_id, ExportWish(tmp_path, ("sr",), with_identity=True))[0])
    assert named.StudyInstanceUID == AMINA.study_uid and named.PatientID == AMINA.patient_id


def test_what_is_not_noted_is_not_exported(store: CaseStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case_id, folder = make_case(store), tmp_path / "out"
    folder.mkdir()

    def fails(*_: object) -> None:
        raise StoreError("The case store is locked.", "Unlock it.")

    monkeypatch.setattr(store.audit, "append", fails)
    with pytest.raises(StoreError):
        export_case(store, case_id, ExportWish(folder, ("md", "fhir")))
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("folder", "kinds"), [("gone", ("pdf",)), ("", ("docx",)), ("", ())])
def test_what_cannot_be_is_told_first(store: CaseStore, tmp_path: Path, folder: str, kinds: tuple[str, ...]) -> None:
    with pytest.raises(InputError):
        export_case(store, make_case(store), ExportWish(tmp_path / folder, kinds))
    assert not (tmp_path / "gone").exists()


def test_a_case_without_a_report(store: CaseStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Expected a report"):
        export_case(store, store.create_case("x").id, ExportWish(tmp_path, ("pdf",)))
