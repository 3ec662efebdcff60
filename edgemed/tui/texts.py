"""Values as the screens say them: times, models, images, how sure an answer is. Everything from outside is made safe here.

Strings go through `_`; names and texts of people and files go through core.text and are never read as markup.
"""

from __future__ import annotations

from datetime import datetime

from edgemed.clinic.imaging import Series
from edgemed.clinic.records import Case, CaseImage, Message, Report
from edgemed.core.advice import ADVICE, NOT_CALIBRATED, REFER
from edgemed.core.errors import EdgemedError
from edgemed.core.identity import ModelIdentity
from edgemed.core.text import one_line, printable
from edgemed.tui.attaching import Attached
from edgemed.tui.i18n import N_, _, ngettext

# Said by core, which knows no catalogues: marked here, so that they are translated.
_CORE_STRINGS = (
    N_("This answer advises and never replaces a clinician's judgement."),
    N_("The model is not sure enough of this answer. Refer the case to a specialist."),
    N_("How sure the model is was not measured (not calibrated)."),
)


def advice() -> str:
    """The sentence under every answer."""
    return _(ADVICE)


def purpose() -> str:
    """What the program is for, and what not."""
    return _("edgemed advises and never replaces a clinician's judgement. It is not approved for clinical use.")


def refer() -> str:
    """What stands above an answer that the model is too unsure of."""
    return _(REFER)


def say_time(at: datetime) -> str:
    """This machine's local time."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M")


def say_model(model: ModelIdentity | None) -> str:
    """Name, quant and the beginning of the hash."""
    return _("unknown model") if model is None else f"{one_line(model.name)} · {one_line(model.quant)} · {model.sha256[:8]}"


def say_sureness(message: Message) -> str:
    """How sure an answer is, or that this was not measured."""
    if message.confidence is None:
        return _(NOT_CALIBRATED)
    return _("Right in {percent} of answers like this one (measured on {dataset}).").format(
        percent=f"{message.confidence.probability:.0%}", dataset=one_line(message.confidence.calibrated_on)
    )


def say_state(message: Message) -> str:
    """What a person must know of an answer that is not whole."""
    said = {"complete": "", "stopped": _("Stopped: this answer is not whole."), "failed": _("Failed: this answer is not whole.")}
    return said[message.state]


def say_text(message: Message) -> str:
    """A message's text, safe for a terminal."""
    return printable(message.text)


def say_title(image: CaseImage) -> str:
    """An image's file name; of one of a series which series it is: that stays while it is leafed through."""
    series = image.facts.series
    return one_line(image.name) if series is None or series.length == 1 else say_number(series.number)


def say_number(number: int) -> str:
    """Which series, where the files say."""
    return _("Series {number}").format(number=number) if number else _("Series")


def say_image(image: CaseImage) -> str:
    """An image on one line; one of a series says which series and where in it."""
    facts, series = image.facts, image.facts.series
    name = say_title(image)
    if series is not None and series.length > 1:
        name = f"{name}, {series.place}/{series.length}"
    what = " ".join(part for part in (facts.modality, facts.body_part, facts.laterality, facts.view_position) if part)
    size = f"{facts.width_px}×{facts.height_px}" + (f"×{facts.frames}" if facts.frames > 1 else "")
    return " · ".join(one_line(part) for part in (name, what, size) if part)


def say_size(size_bytes: int) -> str:
    """A size as a person reads it."""
    megabytes = size_bytes / 1e6
    if megabytes < 1:
        return f"{size_bytes / 1e3:.0f} kB"
    return f"{megabytes:.0f} MB" if megabytes >= 10 else f"{megabytes:.1f} MB"


def say_count(series: Series) -> str:
    """How many images a series has."""
    return ngettext("{count} image", "{count} images", len(series.files)).format(count=len(series.files))


def say_series(series: Series) -> str:
    """A series to choose, on one line. The descriptions are the files' own words and may name the patient."""
    # What is translated comes first and together: between words of another script a right-to-left line's numbers would change places.
    told = (say_number(series.number), say_count(series), series.modality, series.description, say_size(series.size_bytes))
    return " · ".join(one_line(word) for word in (*told, series.study_description, series.study_date) if word)


def say_left_out(attached: Attached) -> str:
    """What was not stored, and why; empty where all was."""
    if not attached.files:
        return _("This is in the case already; it was not attached again.")
    parts = []
    if attached.again:
        text = ngettext(
            "{count} file was there twice or in the case already.", "{count} files were there twice or in the case already.", attached.again
        )
        parts.append(text.format(count=attached.again))
    if attached.refused:
        text = ngettext(
            "{count} file cannot be shown and was left out.", "{count} files cannot be shown and were left out.", attached.refused
        )
        parts.append(text.format(count=attached.refused))
    return " ".join(parts)


def say_case(case: Case) -> str:
    """A case's title line."""
    counts = (
        ngettext("{count} image", "{count} images", case.images).format(count=case.images),
        ngettext("{count} message", "{count} messages", case.messages).format(count=case.messages),
    )
    return " · ".join((one_line(case.label), *counts, *((_("signed"),) if case.signed else ())))


def say_report(report: Report | None) -> str:
    """Where a report stands."""
    if report is None:
        return _("No report yet.")
    if report.signed_by:
        at = say_time(report.signed_at) if report.signed_at else ""
        return _("Version {number}, signed by {name} on {time}.").format(number=report.version, name=one_line(report.signed_by), time=at)
    by = _("drafted by {model}").format(model=say_model(report.drafted_by)) if report.drafted_by else _("written by hand")
    edited = ", " + _("edited") if report.edited else ""
    return _("Draft {number}, {origin}.").format(number=report.version, origin=by + edited)


def say_error(error: EdgemedError) -> str:
    """One sentence and a hint. The sentences of the layers below are English."""
    return one_line(f"{error.message} {error.hint}")
