"""What a report says, the same in every format: consent applied, text cleaned, words translated. The formats only lay it out.

    contents = build_contents(export)
    contents.status, contents.sections, contents.images, contents.turns, contents.models

Consent is decided here and nowhere else. `Export.identity` None means none was given: then no identity, case label, file name, file
hash, name of a window or description reaches any format, and `Export.withheld` (who the patient is, known but not to be told) is
searched for in every text and replaced. Times of the conversation are never exported; the time of signing, or of the last change of a
draft, is. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal

from edgemed.clinic.records import CaseImage, Message, ModelIdentity, PatientIdentity, Report, SeenImage, View
from edgemed.clinic.report.clean import Hider, clean_line, clean_text
from edgemed.clinic.report.export import Export, Status, case_reference, status_of
from edgemed.clinic.report.headings import SECTION_KEYS, SectionKey, Translate, base_language, heading, same
from edgemed.core.errors import InputError

Say = Callable[[str], str]

# A section longer than this is no report; a turn of the conversation longer than this is cut, and says so.
MOST_SECTION_CHARS = 60_000
MOST_TURN_CHARS = 20_000


@dataclass(frozen=True)
class Section:
    """Findings, impression or recommendation. `written` is False where the text only says that it is to be completed."""

    key: SectionKey
    title: str
    text: str
    written: bool


@dataclass(frozen=True)
class ImageLine:
    """One image of the case, as the export may name it. `suspect`: its picture may show text that identifies, and consent is lacking."""

    image_id: str
    title: str
    facts: str
    view: str
    file_sha256: str
    suspect: bool


@dataclass(frozen=True)
class SeenLine:
    """An image as one answer saw it: index into `Contents.images` (None: no longer in the case), how, and the hash of those pixels."""

    image: int | None
    title: str
    view: str
    frame: int
    pixels_sha256: str


@dataclass(frozen=True)
class Turn:
    """One question or answer. `notes` say that it was stopped, failed or referred, and how sure it is."""

    role: Literal["user", "assistant"]
    text: str
    model: ModelIdentity | None
    seen: tuple[SeenLine, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """The report, ready to be laid out. Every string is clean; nothing in it needs consent that was not given."""

    language: str
    title: str
    status: Status
    status_text: str
    version: int
    reference: str
    as_of: datetime
    signed_by: str
    signed_at: datetime | None
    institution: str
    identity: PatientIdentity | None
    patient_rows: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    images: tuple[ImageLine, ...]
    turns: tuple[Turn, ...]
    drafted_by: ModelIdentity | None
    models: tuple[ModelIdentity, ...]
    ai_lines: tuple[str, ...]
    advice: str


def seen_text(seen: SeenLine, say: Say) -> str:
    """Which image an answer saw, how, and the hash of those pixels, on one line."""
    return f"{seen.title}: {seen.view}; {say('pixels')}: {seen.pixels_sha256}"


def utc_text(moment: datetime) -> str:
    """A time as a person reads it, in UTC."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def say_in(export: Export, translate: Translate = same) -> Say:
    """The report's own words in the export's language, by their keys in HEADINGS."""
    return lambda key: clean_line(heading(key, export.language, translate), 400)


def build_contents(export: Export, translate: Translate = same) -> Contents:
    """The export's contents. InputError where a section is too long or parts of other cases were handed in."""
    _check(export)
    say = say_in(export, translate)
    hide = _hider(export, say)
    images = tuple(_image_line(image, number, export, hide, say) for number, image in enumerate(export.images, 1))
    turns = tuple(_turn(message, images, export, hide, say) for message in export.messages)
    report = export.report
    status = status_of(report)
    models = _models(export)
    drafted_by = _clean_model(report.drafted_by)
    return Contents(
        language=base_language(export.language),
        title=say("title"),
        status=status,
        status_text=say(status),
        version=report.version,
        reference=case_reference(export.case.id),
        as_of=export.case.changed if status == "draft" or report.signed_at is None else report.signed_at,
        signed_by="" if status == "draft" else clean_line(report.signed_by),
        signed_at=None if status == "draft" else report.signed_at,
        institution=clean_line(export.institution),
        identity=_clean_identity(export.identity),
        patient_rows=_patient_rows(export, say),
        sections=tuple(_section(key, export, hide, say) for key in SECTION_KEYS),
        images=images,
        turns=turns,
        drafted_by=drafted_by,
        models=models,
        ai_lines=_ai_lines(report, drafted_by, turns, say),
        advice=say("advice"),
    )


def _check(export: Export) -> None:
    cases = {export.report.case_id, *(image.case_id for image in export.images), *(message.case_id for message in export.messages)}
    if cases != {export.case.id}:
        raise InputError("Expected a report, images and messages of one case, found parts of another case.", "Export one case at a time.")
    for key in SECTION_KEYS:
        found = len(getattr(export.report, key))
        if found > MOST_SECTION_CHARS:
            raise InputError(f"Expected {key} of at most {MOST_SECTION_CHARS} characters, found {found}.", "Shorten the report.")


def _hider(export: Export, say: Say) -> Hider:
    if export.identity is not None:
        return Hider()
    return Hider(export.withheld, [image.name for image in export.images], say("hidden"))


def _clean_identity(identity: PatientIdentity | None) -> PatientIdentity | None:
    if identity is None:
        return None
    return PatientIdentity(
        clean_line(identity.name, 400),
        clean_line(identity.patient_id, 400),
        clean_line(identity.birth_date),
        clean_line(identity.sex),
        clean_line(identity.accession, 400),
        clean_line(identity.study_uid, 400),
    )


def _patient_rows(export: Export, say: Say) -> tuple[tuple[str, str], ...]:
    identity = _clean_identity(export.identity)
    if identity is None:
        return ()
    rows = [("label", clean_line(export.case.label)), ("name", " ".join(identity.name.replace("^", " ").split()))]
    rows += [(key, getattr(identity, key)) for key in ("patient_id", "birth_date", "sex", "accession", "study_uid")]
    return tuple((say(key), value) for key, value in rows if value)


def _section(key: SectionKey, export: Export, hide: Hider, say: Say) -> Section:
    text = hide(clean_text(getattr(export.report, key)))
    return Section(key, say(key), text if text.strip() else say("incomplete"), bool(text.strip()))


def _clean_model(model: ModelIdentity | None) -> ModelIdentity | None:
    return None if model is None else ModelIdentity(clean_line(model.name), clean_line(model.quant), clean_line(model.sha256))


def _models(export: Export) -> tuple[ModelIdentity, ...]:
    """The model that drafted and those that answered, each once, in the order in which they are met."""
    found = [export.report.drafted_by, *(message.model for message in export.messages)]
    return tuple(dict.fromkeys(model for model in map(_clean_model, found) if model is not None))


def model_text(model: ModelIdentity, say: Say) -> str:
    """`edgemed-demo, quantisation Q4_K_M, manifest SHA-256 0123…` on one line."""
    return f"{model.name}, {say('quant')} {model.quant}, {say('hash')} {model.sha256}"


def _ai_lines(report: Report, drafted_by: ModelIdentity | None, turns: tuple[Turn, ...], say: Say) -> tuple[str, ...]:
    lines = [say("ai")]
    if drafted_by is None:
        lines.append(say("by_hand"))
    else:
        lines += [f"{say('drafted_by')}: {model_text(drafted_by, say)}", say("edited" if report.edited else "not_edited")]
    answered = dict.fromkeys(turn.model for turn in turns if turn.role == "assistant")
    lines += [f"{say('answered_by')}: {model_text(model, say) if model else say('no_model')}" for model in answered]
    return (*lines, say("advice"))


def view_text(view: View, frames: int, named: bool, say: Say) -> str:
    """How an image was looked at, in words; the window's name comes from the file and is told only where `named`."""
    parts = [f"{say('frame')} {view.frame + 1}/{frames}"] if frames > 1 or view.frame else []
    if view.window is None:
        parts.append(say("own_window"))
    else:
        text = say("window").format(centre=f"{view.window.centre:g}", width=f"{view.window.width:g}")
        name = clean_line(view.window.name, 60) if named else ""
        parts.append(f"{text} ({', '.join(filter(None, (view.window.function, name)))})")
    if view.invert:
        parts.append(say("inverted"))
    if view.masks:
        parts.append(say("masked").format(count=len(view.masks)))
    return ", ".join(parts)


def _image_line(image: CaseImage, number: int, export: Export, hide: Hider, say: Say) -> ImageLine:
    named = export.identity is not None
    facts = image.facts
    words = [facts.modality, facts.body_part, facts.view_position, facts.laterality, facts.description if named else ""]
    size = f"{facts.width_px} × {facts.height_px}" + (f" × {facts.frames}" if facts.frames > 1 else "")
    series = facts.series
    place = [say("series").format(place=series.place, length=series.length)] if series is not None and series.length > 1 else []
    return ImageLine(
        image_id=image.id,
        title=f"{say('image')} {number}" + (f": {clean_line(image.name)}" if named and image.name else ""),
        facts=", ".join([hide(clean_line(word, 64)) for word in words if word.strip()] + [size, *place]),
        view=view_text(image.view, facts.frames, named, say),
        file_sha256=clean_line(image.sha256) if named else "",
        suspect=not named and bool(facts.warnings) and not image.view.masks,
    )


def _seen(seen: SeenImage, images: tuple[ImageLine, ...], export: Export, say: Say) -> SeenLine:
    index = next((i for i, image in enumerate(images) if image.image_id == seen.image_id), None)
    frames = 1 if index is None else export.images[index].facts.frames
    title = say("not_listed") if index is None else images[index].title
    view = view_text(seen.view, frames, export.identity is not None, say)
    return SeenLine(index, title, view, seen.view.frame + 1, clean_line(seen.pixels_sha256))


def _turn(message: Message, images: tuple[ImageLine, ...], export: Export, hide: Hider, say: Say) -> Turn:
    notes = [say(message.state)] if message.state != "complete" else []
    notes += [say("refer")] if message.verdict == "refer" else []
    if message.confidence is not None:
        percent = f"{100 * message.confidence.probability:.0f}"
        notes.append(say("confidence").format(percent=percent, calibration=clean_line(message.confidence.calibrated_on)))
    seen = tuple(_seen(one, images, export, say) for one in message.images)
    return Turn(message.role, _cut(hide(clean_text(message.text)), say), _clean_model(message.model), seen, tuple(notes))


def _cut(text: str, say: Say) -> str:
    if len(text) <= MOST_TURN_CHARS:
        return text
    return f"{text[:MOST_TURN_CHARS]} {say('cut').format(count=len(text) - MOST_TURN_CHARS)}"
