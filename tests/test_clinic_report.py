"""The case report's words: the draft's prompt and its reading, what consent decides, cleaning, Markdown, and files whole or not there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench import report_sample as sample
from bench.report_validators import check_markdown, identifiers_in
from edgemed.clinic import report
from edgemed.clinic.records import ImageFacts, Message, PatientIdentity
from edgemed.clinic.report import (
    HEADINGS,
    KINDS,
    Export,
    build_contents,
    build_exports,
    conversation_findings,
    draft_question,
    export_markdown,
    heading,
    parse_draft,
    save_export,
    status_of,
)
from edgemed.clinic.report.clean import Hider, clean_line, clean_text
from edgemed.core.errors import InputError, ResourceError

OPEN = HEADINGS["incomplete"]
MESSAGES = sample.sample_messages()


@pytest.mark.parametrize(
    "answer",
    [
        "Findings: A.\nImpression: B.\nRecommendation: C.",
        "FINDINGS\nA.\n\nIMPRESSION\nB.\n\nRECOMMENDATIONS\nC.",
        "## Findings\n\nA.\n\n## Impression\n\nB.\n\n## Recommendation\n\nC.",
        "**Findings:** A.\n**Impression:** B.\n**Recommendation:** C.",
        "1. **Findings**: A.\n2. **Conclusion**: B.\n3. **Plan**: C.",
        "Here is the report:\n\n- Findings: A.\n- Impression: B.\n- Recommendation: C.",
        "Findings: A. Impression: B. Recommendation: C.",
        "Constatations : A.\nCONCLUSION : B.\nConduite à tenir : C.",
        "RESULTATS : A.\nSynthese : B.\nRecommandations : C.",
        "Matokeo: A.\nHitimisho: B.\nMapendekezo: C.",
        "Achados: A.\nImpressão: B.\nRecomendações: C.",
        "النتائج: A.\nالانطباع: B.\nالتوصية: C.",
        '{"findings": "A.", "impression": "B.", "recommendation": "C."}',
        'Sure:\n```json\n{"Findings": ["A."], "Conclusion": "B.", "Plan": "C."}\n```',
        "Findings (CT): A.\nImpression – B.\nRecommendation: C.\n```",
        "Findings: A.\nFindings: A.\nImpression: B.\nRecommendation: C.\x1b[2J",
    ],
)
def test_a_draft_with_headings_is_read_whatever_their_form(answer: str) -> None:
    found = tuple(part.replace("[2J", "") for part in parse_draft(answer, MESSAGES))
    assert found == ("A.", "B.", "C.")


def test_a_draft_without_sections_takes_the_conversation_and_says_so() -> None:
    findings, impression, recommendation = parse_draft("the wrist looks broken", MESSAGES)
    assert findings.startswith(HEADINGS["from_conversation"])
    assert "Is there a fracture of the wrist?" in findings and "Yes, a fracture of the distal radius." in findings
    assert f"No focal consolidation is {HEADINGS['stopped']}" in findings
    assert f"I am not sure. {HEADINGS['refer']}" in findings
    assert (impression, recommendation) == ("the wrist looks broken", OPEN)


def test_nothing_is_invented() -> None:
    assert parse_draft("", []) == (OPEN, OPEN, OPEN)
    assert parse_draft("Impression: B.", []) == (OPEN, "B.", OPEN)
    assert parse_draft("Findings: A.\nImpression: <what it most likely means, and how sure that is>", []) == ("A.", OPEN, OPEN)
    allowed = "\n".join([*HEADINGS.values(), *(message.text for message in MESSAGES), "words of the model -:"])
    for part in parse_draft("words of the model", MESSAGES):
        assert set(part.split()) <= set(allowed.split()) | {"-", "Question:", "Answer:"}


def test_words_before_the_first_heading_are_kept() -> None:
    assert parse_draft("The bone is broken.\nImpression: B.", [])[0] == "The bone is broken."
    assert parse_draft("Here you are:\nImpression: B.", [])[0] == OPEN


def test_a_model_that_repeats_the_prompt_says_nothing() -> None:
    question = draft_question(MESSAGES, [], "pt")
    assert parse_draft(question, []) == (OPEN, OPEN, OPEN)
    assert parse_draft(f"{question}\nAchados: A.", [])[0] == "A."


@pytest.mark.parametrize("filler", ["\n", " ", "*", "#", ". ", "Findings", "1.", "{", "Findings (", "Findings:\n"])
def test_a_long_odd_answer_is_read(filler: str) -> None:
    assert all(parse_draft(filler * 5000 + "\nImpression: B.", []))


def test_the_prompt_holds_the_conversation_and_no_identity() -> None:
    facts = [replace(image.facts, description="OKONKWO ADAEZE") for image in sample.sample_images()]
    question = draft_question(MESSAGES, facts, "fr")
    assert "Is there a fracture of the wrist?" in question and "Write in French." in question
    assert [line.split(":")[0] for line in question.split("\n")[-3:]] == ["Constatations", "Impression", "Recommandation"]
    assert "DX WRIST PA L; CT CHEST (10 frames)" in question
    assert "ADAEZE" not in question


def test_the_prompt_of_a_long_conversation_keeps_the_newest_turns() -> None:
    turns = [replace(message, text=f"{message.text} {n} " + "x" * 500) for n in range(40) for message in MESSAGES[:2]]
    question = draft_question(turns, [ImageFacts("plain", 1, 1)])
    assert len(question) < 3500
    assert "radius. 39" in question and "radius. 3 " not in question


def test_a_question_asked_again_counts_once() -> None:
    first, answer = MESSAGES[:2]
    failed = replace(answer, text="half", state="failed")
    again = replace(answer, text="second answer")
    text = conversation_findings([first, failed, answer, again])
    assert "half" not in text and answer.text not in text and text.count("second answer") == 1


def test_headings_are_translated_or_fall_back() -> None:
    assert heading("findings") == "Findings"
    assert heading("findings", "fr_FR") == "Constatations"
    assert heading("findings", "fr", {"Findings": "Observé"}.get) == "Observé"  # type: ignore[arg-type]
    assert heading("draft", "xx") == HEADINGS["draft"]


def test_text_from_outside_is_cleaned() -> None:
    assert clean_text("a\r\nb\rc\u2028d\x85e") == "a\nb\nc\nd\ne"
    assert clean_text("\x1b[2Ja\x00\x9b\ufffe\uffff\ufeff\u202ex") == "[2Jax"
    assert clean_text("e\u0301") == "é"
    clean_text("\ud800 lone").encode()
    assert clean_line("a\n b\tc") == "a b c"
    assert clean_line("x" * 300) == "x" * 199 + "…"


def test_a_hider_finds_the_usual_spellings() -> None:
    hide = Hider(PatientIdentity("Nuñez^Ana Lú", "X-12", "1958-01-03"), ("Ana_scan 1.dcm", "wrist.png"), "#")
    text = "NUÑEZ, Ana came; nunez (x-12) 03.01.1958 3/1/1958 19580103 born 1958-01-03; Ana_scan 1 wrist wrist.png banana"
    assert hide(text) == "# came; # (#) # born #; # wrist # banana"
    assert Hider(None)("Nuñez") == "Nuñez"


def test_a_hider_leaves_short_common_words_alone() -> None:
    hide = Hider(PatientIdentity("No^Wu", "7", "", "", "12"), (), "#")
    assert hide("No fracture, no cough, 7 days, 12 mm; No Wu came, WU, NO left") == "No fracture, no cough, 7 days, 12 mm; # came, # left"


def test_consent_is_one_argument() -> None:
    export = sample.sample_export()
    parts = (export.case, export.report, export.images, export.messages, sample.IDENTITY)
    assert Export.of(*parts, with_identity=True).identity == sample.IDENTITY
    without = Export.of(*parts, with_identity=False, institution="Clinic", language="fr")
    assert (without.identity, without.withheld, without.institution, without.language) == (None, sample.IDENTITY, "Clinic", "fr")
    assert identifiers_in(export_markdown(without).encode(), sample.PLANTED) == []


def test_status_needs_name_and_time() -> None:
    assert [status_of(sample.sample_report(signed, version)) for signed, version in [(False, 1), (True, 1), (True, 2), (False, 2)]] == [
        "draft",
        "signed",
        "amended",
        "draft",
    ]
    assert status_of(replace(sample.sample_report(), signed_at=None)) == "draft"
    assert status_of(replace(sample.sample_report(), signed_by=" ")) == "draft"


def test_contents_tell_models_views_and_advice() -> None:
    contents = build_contents(sample.sample_export())
    assert contents.models == (sample.DRAFTER, sample.OTHER)
    assert contents.turns[3].seen[0].view == "frame 5/10, window centre 40, width 400 (linear, MEDIASTINUM)"
    assert contents.turns[1].seen[0].view == "the file's own window, inverted, masked areas: 1"
    text = "\n".join(contents.ai_lines)
    assert HEADINGS["advice"] in text and all(model.sha256 in text and model.quant in text for model in contents.models)


def test_a_name_of_a_window_needs_consent() -> None:
    assert build_contents(sample.sample_export(None)).turns[3].seen[0].view == "frame 5/10, window centre 40, width 400 (linear)"


def test_parts_of_another_case_are_refused() -> None:
    export = sample.sample_export()
    with pytest.raises(InputError, match="one case"):
        build_contents(replace(export, report=replace(export.report, case_id="0" * 32)))
    stranger: Message = replace(export.messages[0], case_id="0" * 32)
    with pytest.raises(InputError, match="one case"):
        build_contents(replace(export, messages=(*export.messages, stranger)))


def test_a_section_beyond_the_limit_is_refused_and_a_long_turn_is_cut_visibly() -> None:
    export = sample.sample_export()
    with pytest.raises(InputError, match="findings of at most 60000 characters, found 60001"):
        build_contents(replace(export, report=replace(export.report, findings="x" * 60_001)))
    turn = build_contents(replace(export, messages=(replace(export.messages[0], text="y" * 20_005),))).turns[0]
    assert turn.text.endswith("y [5 characters left out here]")


def test_markdown_says_what_it_is() -> None:
    draft, signed = (export_markdown(sample.sample_export(signed=signed)) for signed in (False, True))
    assert draft.count("**DRAFT – not signed**") == 2 and "Dr. Amélie" not in draft
    assert "DRAFT" not in signed and "Signed by: Dr. Amélie Nkemelu" in signed and "2026-03-04 10:30 UTC" in signed
    assert "AI-assisted report." in draft and "a" * 64 in draft and HEADINGS["advice"] in draft


def test_markdown_keeps_no_markup_from_outside() -> None:
    text = export_markdown(sample.hostile_export())
    assert check_markdown(text.encode()) == []
    assert "\x1b" not in text and "\x00" not in text


def test_markdown_shows_exactly_the_text() -> None:
    from html import unescape

    from markdown_it import MarkdownIt

    lines = ["# not", "  1. <b>&amp;</b>", "*a* _b_ `c` ~~d~~ | e | [f](g) $h$", "http://x.y www.x.y", "+ p", "=== q", "a\\"]
    export = sample.sample_export()
    text = export_markdown(replace(export, report=replace(export.report, findings="\n".join(lines))))
    block = text.split("## Findings\n\n")[1].split("\n\n## ")[0]
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(block)
    assert unescape(shown.replace("<br />\n", "\n")).replace("\u00a0", " ") == f"<p>{chr(10).join(lines)}</p>\n"


@pytest.mark.parametrize("signed", [True, False])
def test_without_consent_nothing_identifying_is_in_any_byte(signed: bool) -> None:
    export = sample.sample_export(None, signed)
    made = build_exports(export, tuple(KINDS), sample.sample_pictures(), sample.sample_reference())
    assert {kind: identifiers_in(data, sample.PLANTED) for kind, data in made.items()} == dict.fromkeys(KINDS, [])


def test_with_consent_the_identity_is_there() -> None:
    reference = sample.sample_reference()
    made = build_exports(sample.joined_export(reference), tuple(KINDS), sample.sample_pictures(), reference)
    for kind, data in made.items():
        found = identifiers_in(data, sample.PLANTED)
        assert {"OKONKWO", "ADAEZE", "PID-7741-XQ", "ACC90417733", "77411958112300417733"} <= set(found), kind


def test_a_search_for_identifiers_finds_them_in_every_packing() -> None:
    import zlib

    packed = b"x stream\n" + zlib.compress(b"Adaeze bed 14") + b"\nendstream"
    assert identifiers_in(packed, ["ADAEZE", "none"]) == ["ADAEZE"]
    assert identifiers_in("Adaeze".encode("utf-16-be"), ["adaeze"]) == ["adaeze"]


def test_files_are_named_without_identity_and_written_whole(tmp_path: Path) -> None:
    kinds = ("pdf", "md", "fhir", "dicom", "sr")
    paths = save_export(tmp_path / "stick", sample.sample_export(signed=False), kinds, sample.sample_pictures())
    names = [path.name for path in paths]
    stem = names[0].removesuffix(".pdf")
    assert names == [stem + ending for ending in (".pdf", ".md", ".fhir.json", ".pdf.dcm", ".sr.dcm")]
    assert stem.endswith("-v1-draft") and identifiers_in(" ".join(names).encode(), sample.PLANTED) == []
    assert sorted(path.name for path in (tmp_path / "stick").iterdir()) == sorted(names)
    assert all(path.stat().st_size > 500 for path in paths)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "fhir" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match="disk is full"):
        save_export(tmp_path, sample.sample_export(), ("md", "fhir"))
    assert list(tmp_path.iterdir()) == []


def test_a_stick_that_knows_no_owners_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.chmod

    def fat(self: Path, mode: int) -> None:
        if mode & 0o077 == 0:
            raise PermissionError(1, "Operation not permitted")
        real(self, mode)

    monkeypatch.setattr(Path, "chmod", fat)
    (path,) = save_export(tmp_path, sample.sample_export(), ("md",))
    assert path.read_text(encoding="utf-8") == export_markdown(sample.sample_export())


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_exports_are_their_owners(tmp_path: Path) -> None:
    (path,) = save_export(tmp_path, sample.sample_export(), ("md",))
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_heading_is_used() -> None:
    folder = Path(report.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name != "headings.py")
    # The states of a message and of a report, and the identity's fields, are looked up by their values.
    named = {"failed", "stopped", "draft", "signed", "amended", "patient_id", "birth_date", "sex", "accession", "study_uid"}
    assert [key for key in HEADINGS if key not in named and f'"{key}"' not in text and f"'{key}'" not in text] == []


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"among pdf, md, fhir, dicom, sr, found 'docx'"):
        build_exports(sample.sample_export(), ("md", "docx"))
    with pytest.raises(InputError, match="found none"):
        build_exports(sample.sample_export(), ())
