"""The report's formats, read back by somebody else's code: PDF by pypdf, FHIR by fhir.resources, DICOM by pydicom and highdicom.

Programs (poppler, qpdf, dcmtk, dicom3tools) take part where they are installed; `python -m bench.report_check` names those that are not.
"""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from bench import report_check
from bench import report_sample as sample
from bench.report_validators import VALIDATORS, Validator, sr_texts
from edgemed.clinic.records import PatientIdentity
from edgemed.clinic.report import (
    HEADINGS,
    KINDS,
    Export,
    build_exports,
    export_dicom_pdf,
    export_dicom_sr,
    export_fhir,
    export_pdf,
)
from edgemed.clinic.report.pdf import bare_picture
from edgemed.core.errors import DicomError, InputError, MissingExtraError

pydicom = pytest.importorskip("pydicom")
PDF = b"%PDF-1.4\n%%EOF"


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, bytes]]:
    """All kinds of the sample cases."""
    return {
        name: build_exports(export, tuple(KINDS), sample.sample_pictures()[: len(export.images)], reference)
        for name, (export, reference) in report_check.sample_exports().items()
    }


@pytest.mark.parametrize("validator", VALIDATORS, ids=lambda one: f"{one.kind}-{one.name}")
def test_exports_are_valid(validator: Validator, made: dict[str, dict[str, bytes]]) -> None:
    if lack := validator.lacks():
        pytest.skip(f"not installed: {lack}")
    assert {name: validator.problems(kinds[validator.kind]) for name, kinds in made.items()} == dict.fromkeys(made, [])


def test_a_validator_finds_what_is_wrong(made: dict[str, dict[str, bytes]]) -> None:
    good = made["signed with consent"]
    broken = {
        "pdf": good["pdf"].replace(b"/FontFile2", b"/FontFileX"),
        "md": good["md"] + b"\n<b>x</b>",
        "fhir": good["fhir"].replace(b'"status"', b'"statis"', 1),
        "sr": good["sr"].replace(b"121071", b"121079").replace(b"Finding ", b"Fanding "),
        "dicom": good["dicom"].replace(b"19581123", b"1958112x"),
    }
    found = {one.kind for one in VALIDATORS if not one.lacks() and one.name in _LIBRARIES and _finds(one, broken[one.kind])}
    assert found == set(broken)


_LIBRARIES = ("pypdf", "markdown-it-py", "fhir.resources R4B", "pydicom, strict", "highdicom")


def _finds(validator: Validator, data: bytes) -> bool:
    try:
        return bool(validator.problems(data))
    except ValueError:
        return True


def pdf_pages(data: bytes) -> list[str]:
    pypdf = pytest.importorskip("pypdf")
    return [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]


def test_a_draft_says_so_on_every_page_and_a_signed_report_nowhere() -> None:
    pictures = sample.sample_pictures()
    draft, signed = (pdf_pages(export_pdf(sample.sample_export(signed=signed), pictures)) for signed in (False, True))
    assert len(draft) > 1 and all(HEADINGS["draft"] in page for page in draft)
    assert not any("DRAFT" in page for page in signed) and "Dr. Amélie Nkemelu" in signed[0]
    for page in (*draft, *signed):
        assert HEADINGS["advice"] in page and "AI-assisted" in page


def test_a_pdf_is_the_same_each_time() -> None:
    pictures = sample.sample_pictures()
    code = (
        "import sys; from bench.report_sample import *; from edgemed.clinic.report import *;"
        "sys.stdout.buffer.write(export_pdf(sample_export(), sample_pictures()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=report_check.__file__.rsplit("/bench/", 1)[0])
    assert export_pdf(sample.sample_export(), pictures) == other.stdout


def test_a_pdf_spells_what_its_font_lacks_and_keeps_the_rest() -> None:
    export = sample.sample_export()
    words = "Œdème ≥ 3 mm, mão, Ukaguzi, Ελλάδα, Жук, 中, fi {nb}"
    text = "\n".join(pdf_pages(export_pdf(replace(export, report=replace(export.report, findings=words)))))
    assert "Œdème ≥ 3 mm, mão, Ukaguzi, Ελλάδα, Жук, [U+4E2D], fi {nb}" in text
    assert HEADINGS["spelled"] in text


def test_arabic_is_shaped_and_reads_in_its_order() -> None:
    text = "\n".join(pdf_pages(export_pdf(sample.arabic_export())))
    assert "لا يوجد خلع. الأنسجة الرخوة متورمة." in text
    assert "كسر في الكعبرة اليسرى." in text


def test_pictures_are_pixels_alone() -> None:
    picture = Image.new("RGBA", (3000, 20), (1, 2, 3, 255))
    picture.info["comment"] = "OKONKWO"
    bare = bare_picture(picture)
    assert (bare.mode, bare.size, bare.info) == ("RGB", (1200, 8), {})
    assert bare_picture(Image.new("1", (5, 5), 1)).tobytes() == b"\xff" * 25


def pdf_images(data: bytes) -> int:
    pypdf = pytest.importorskip("pypdf")
    return sum(len(page.images) for page in pypdf.PdfReader(io.BytesIO(data)).pages)


def test_a_suspect_picture_needs_consent_or_a_mask() -> None:
    export, pictures = sample.sample_export(None), sample.sample_pictures()
    unmasked = replace(export.images[0], view=replace(export.images[0].view, masks=()))
    suspect = replace(export, images=(unmasked, export.images[1]))
    assert pdf_images(export_pdf(export, pictures)) == 2
    assert pdf_images(export_pdf(suspect, pictures)) == 1
    assert HEADINGS["no_picture"] in "\n".join(pdf_pages(export_pdf(suspect, pictures))).replace("\n", " ")
    assert pdf_images(export_pdf(replace(suspect, identity=sample.IDENTITY), pictures)) == 2
    assert pdf_images(export_pdf(export, [None, pictures[1]])) == 1


def test_more_pictures_than_images_are_refused() -> None:
    with pytest.raises(InputError, match="at most 2 pictures"):
        export_pdf(sample.sample_export(), sample.sample_pictures() * 2)


def contained(resource: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [one for one in resource["contained"] if one["resourceType"] == kind]


def test_fhir_says_who_what_and_how_final() -> None:
    resource = export_fhir(sample.sample_export())
    assert [export_fhir(sample.sample_export(signed=s, version=v))["status"] for s, v in ((False, 1), (True, 1), (True, 3))] == [
        "preliminary",
        "final",
        "amended",
    ]
    patient = contained(resource, "Patient")[0]
    assert patient["name"][0]["family"] == "OKONKWO" and patient["name"][0]["given"] == ["ADAEZE", "M"]
    assert (patient["gender"], patient["birthDate"], patient["identifier"][0]["value"]) == ("female", "1958-11-23", "PID-7741-XQ")
    assert resource["imagingStudy"][0]["identifier"]["value"] == f"urn:oid:{sample.STUDY_UID}"
    assert contained(resource, "Practitioner")[0]["name"] == [{"text": "Dr. Amélie Nkemelu"}]
    versions = [[version["value"] for version in device["version"]] for device in contained(resource, "Device")]
    assert versions == [["Q4_K_M", "a" * 64], ["Q8_0", "b" * 64]]
    assert resource["meta"]["security"][0]["code"] == "AIAST" and resource["conclusion"].startswith("Fracture")


def test_fhir_observations_name_their_device_and_answers_stay_preliminary() -> None:
    observations = {one["id"]: one for one in contained(export_fhir(sample.sample_export()), "Observation")}
    assert {key: one["status"] for key, one in observations.items()} == {
        **dict.fromkeys(("findings", "impression", "recommendation"), "final"),
        **dict.fromkeys(("answer-1", "answer-2", "answer-3"), "preliminary"),
    }
    assert observations["answer-2"]["device"] == {"reference": "#device-2"}
    notes = " ".join(note["text"] for note in observations["answer-3"]["note"])
    assert "window centre 40, width 400" in notes and "f" * 64 in notes and HEADINGS["refer"] in notes


def test_fhir_without_consent_has_no_patient() -> None:
    resource = export_fhir(sample.sample_export(None))
    assert not {"subject", "basedOn", "imagingStudy"} & set(resource) and not contained(resource, "Patient")


def test_what_is_contained_in_fhir_is_referred_to() -> None:
    text = str(export_fhir(sample.sample_export()))
    for one in export_fhir(sample.sample_export())["contained"]:
        assert f"'#{one['id']}'" in text


def test_a_partial_birth_date_goes_where_it_can() -> None:
    identity = replace(sample.IDENTITY, birth_date="about 1958")
    export = sample.sample_export(identity)
    assert "birthDate" not in contained(export_fhir(export), "Patient")[0]
    assert read(export_dicom_sr(export)).PatientBirthDate == ""
    assert "about 1958" in "\n".join(pdf_pages(export_pdf(export)))


def read(data: bytes) -> Any:
    return pydicom.dcmread(io.BytesIO(data))


def test_dicom_joins_the_study_only_with_consent() -> None:
    reference = sample.sample_reference()
    export = sample.joined_export(reference)
    joined, alone = read(export_dicom_pdf(export, PDF, reference)), read(export_dicom_pdf(replace(export, identity=None), PDF, reference))
    assert (joined.StudyInstanceUID, joined.PatientID, joined.AccessionNumber) == (sample.STUDY_UID, "PID-7741-XQ", "ACC90417733")
    assert joined.ReferringPhysicianName == "MÜLLER^JÖRG" and joined.SpecificCharacterSet == "ISO_IR 192"
    assert joined.SourceInstanceSequence[0].ReferencedSOPInstanceUID == f"{sample.STUDY_UID}.1.1"
    assert (joined.TimezoneOffsetFromUTC, joined.ContentTime) == ("+0100", "113000")
    assert alone.StudyInstanceUID.startswith("2.25.") and alone.PatientName == "Withheld^" and alone.PatientIdentityRemoved == "YES"
    assert "SourceInstanceSequence" not in alone


def test_without_consent_the_reference_is_not_even_read() -> None:
    assert read(export_dicom_sr(sample.sample_export(None), b"no DICOM at all")).PatientName == "Withheld^"


def test_both_dicom_exports_of_a_case_lie_in_one_study_and_are_their_own_series() -> None:
    export = sample.sample_export(None)
    one, two = read(export_dicom_pdf(export, PDF)), read(export_dicom_sr(export))
    assert one.StudyInstanceUID == two.StudyInstanceUID
    assert len({one.SeriesInstanceUID, two.SeriesInstanceUID, one.SOPInstanceUID, two.SOPInstanceUID}) == 4


def test_the_same_dicom_export_is_the_same_file_and_another_text_another_instance() -> None:
    export = sample.sample_export()
    changed = replace(export, report=replace(export.report, impression="Other."))
    assert export_dicom_sr(export) == export_dicom_sr(export)
    assert read(export_dicom_sr(export)).SOPInstanceUID != read(export_dicom_sr(changed)).SOPInstanceUID


@pytest.mark.parametrize(
    ("signed", "flags"),
    [(False, ("PARTIAL", "PRELIMINARY", "UNVERIFIED")), (True, ("COMPLETE", "FINAL", "VERIFIED"))],
)
def test_dicom_is_final_only_with_a_signature(signed: bool, flags: tuple[str, str, str]) -> None:
    export = sample.sample_export(signed=signed)
    report, document = read(export_dicom_sr(export)), read(export_dicom_pdf(export, PDF))
    assert (report.CompletionFlag, report.PreliminaryFlag, report.VerificationFlag) == flags
    assert document.VerificationFlag == flags[2] and ("DRAFT" in document.DocumentTitle) is not signed
    if signed:
        observer = report.VerifyingObserverSequence[0]
        assert (str(observer.VerifyingObserverName), observer.VerificationDateTime) == ("Dr. Amélie Nkemelu^", "20260304103000+0000")


def test_dicom_names_the_models() -> None:
    for data in (export_dicom_sr(sample.sample_export(None)), export_dicom_pdf(sample.sample_export(None), PDF)):
        equipment = read(data).ContributingEquipmentSequence
        names = [(one.ManufacturerModelName, one.SoftwareVersions) for one in equipment]
        assert names == [("edgemed-demo", "Q4_K_M"), ("llava-med-v1.5", "Q8_0")]
        assert "b" * 64 in equipment[1].ContributionDescription and "AI-assisted" in equipment[1].ContributionDescription


def test_the_structured_report_says_what_the_report_says() -> None:
    export = sample.sample_export()
    texts = sr_texts(export_dicom_sr(export))
    assert ("Finding", export.report.findings.replace("\n", "\r\n")) in texts
    assert ("Impression", export.report.impression) in texts and ("Recommendation", export.report.recommendation) in texts
    views = [text for name, text in texts if name == "View that produced the answer"]
    assert len(views) == 3 and "frame 5/10, window centre 40, width 400" in views[1]
    assert HEADINGS["advice"] in [text for name, text in texts if name == "AI assistance"]


def test_a_model_without_a_quant_leaves_no_empty_text() -> None:
    export = sample.sample_export()
    bare = replace(sample.DRAFTER, quant="", sha256="")
    data = export_dicom_sr(replace(export, report=replace(export.report, drafted_by=bare)))
    assert all(text.strip() for _, text in sr_texts(data))


def test_the_structured_report_refers_to_the_original_that_is_in_the_case() -> None:
    reference = sample.sample_reference()
    report = read(export_dicom_sr(sample.joined_export(reference), reference))
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == f"{sample.STUDY_UID}.1.1"
    assert "CurrentRequestedProcedureEvidenceSequence" not in read(export_dicom_sr(sample.sample_export(), reference))


@pytest.mark.parametrize(
    "other",
    [
        replace(sample.IDENTITY, patient_id="PID-1"),
        replace(sample.IDENTITY, birth_date="1958-11-24"),
        replace(sample.IDENTITY, study_uid="1.2.3"),
        replace(sample.IDENTITY, name="SMITH^JOHN"),
    ],
)
def test_another_patients_original_is_refused_without_naming_anybody(other: PatientIdentity) -> None:
    with pytest.raises(InputError, match="same patient and study") as caught:
        export_dicom_pdf(sample.sample_export(other), PDF, sample.sample_reference())
    assert not any(word in f"{caught.value} {caught.value.hint}" for word in ("OKONKWO", "SMITH", "PID", "1958", "1.2"))


def _cut_reference(size: int) -> bytes:
    return sample.sample_reference()[:size]


@pytest.mark.parametrize(
    "data",
    [b"", b"DICM" * 40, _cut_reference(200), _cut_reference(400), b"\xff" * 500, b"\0" * 128 + b"DICM" + b"\xff\xfe\x00\xe0" * 300],
    ids=["empty", "noise", "cut at 200", "cut at 400", "ones", "items"],
)
def test_an_original_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(DicomError, match="Expected"):
        export_dicom_sr(sample.sample_export(), data)


def test_a_deflated_original_is_refused_before_it_is_inflated() -> None:
    data = sample.sample_reference().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    with pytest.raises(DicomError, match="not deflated"):
        export_dicom_sr(sample.sample_export(), data)


@pytest.mark.parametrize(
    ("identity", "what"),
    [
        (replace(sample.IDENTITY, accession="A" * 17), "accession number for DICOM with at most 16"),
        (replace(sample.IDENTITY, patient_id="a\\b"), "patient ID for DICOM with no backslash"),
        (replace(sample.IDENTITY, name="N" * 65), "name for DICOM with at most 64"),
        (replace(sample.IDENTITY, name="A=B=C=D"), "name for DICOM with at most 3 groups"),
    ],
)
def test_an_identifier_is_never_cut(identity: PatientIdentity, what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        export_dicom_sr(sample.sample_export(identity))
    assert identity.accession not in str(caught.value) and identity.name not in str(caught.value)


def test_only_a_pdf_is_encapsulated() -> None:
    with pytest.raises(InputError, match="Expected a PDF"):
        export_dicom_pdf(sample.sample_export(), b"<html>")


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("fpdf", lambda export: export_pdf(export)),
        ("uharfbuzz", lambda export: export_pdf(export)),
        ("pydicom.dataset", lambda export: export_dicom_pdf(export, PDF)),
        ("highdicom.sr", lambda export: export_dicom_sr(export)),
    ],
)
def test_a_missing_package_names_the_extra(module: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    export: Export = sample.sample_export(None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match="needs packages") as caught:
        make(export)
    assert "edgemed[clinic]" in caught.value.hint


def test_importing_the_report_costs_nothing() -> None:
    code = "import sys, edgemed.clinic.report; print([m for m in ('fpdf', 'pydicom', 'highdicom', 'uharfbuzz') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
