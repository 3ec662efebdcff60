"""The report as a PDF (A4): text that can be searched and copied, fonts embedded, Arabic shaped and laid from the right.

    data = export_pdf(export, pictures)          # pictures[i] is image i as it was looked at, or None

Same inputs, same bytes: the only times in the file are the report's own. Pictures are copied pixel by pixel, so that nothing that came
with a file (EXIF, comments, colour profiles) follows. Needs fpdf2 and uharfbuzz; characters that the fonts lack are spelled `[U+4E2D]`.
Knows nothing of consent but one rule: a picture that contents.py calls suspect is left out.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from PIL import Image

from edgemed.clinic.report.contents import Contents, ImageLine, Say, Turn, build_contents, say_in, seen_text, utc_text
from edgemed.clinic.report.export import Export
from edgemed.clinic.report.headings import Translate, is_right_to_left, same
from edgemed.clinic.report.pages import FAMILY, MARGIN, PAGES_ALIAS, covered, draw_draft, new_pdf
from edgemed.core.errors import InputError

if TYPE_CHECKING:
    from fpdf import FPDF

Colour = tuple[int, int, int]
Style = Literal["", "B"]

# Millimetres on A4.
LABEL_WIDTH, COLUMN_GAP, PICTURE_SIZE, LINE = 44.0, 3.0, 78.0, 5.2
MOST_PICTURE_PX = 1200
_BLACK, _GREY, _RED = (0, 0, 0), (90, 90, 90), (170, 20, 20)
# A line is laid out in pieces of this length: the bidirectional algorithm's time grows faster than its text.
_PIECE_CHARS = 1500


def export_pdf(export: Export, pictures: Sequence[Image.Image | None] = (), translate: Translate = same) -> bytes:
    """The PDF's bytes. InputError for more pictures than images; MissingExtraError without fpdf2."""
    if len(pictures) > len(export.images):
        raise InputError(f"Expected at most {len(export.images)} pictures (one for each image), found {len(pictures)}.", "Check the call.")
    contents = build_contents(export, translate)
    sheet = Sheet(contents, say_in(export, translate))
    sheet.front()
    sheet.sections()
    sheet.images(pictures)
    sheet.assistance()
    sheet.conversation()
    return sheet.finish()


def is_rtl(text: str, otherwise: bool = False) -> bool:
    """Whether a line begins at the right: by its first character that has a direction (Unicode's rule P2)."""
    for character in text:
        kind = unicodedata.bidirectional(character)
        if kind in ("R", "AL"):
            return True
        if kind == "L":
            return False
    return otherwise


def bare_picture(picture: Image.Image) -> Image.Image:
    """The picture's pixels alone, 8-bit grey or RGB, at most MOST_PICTURE_PX on a side."""
    mode = "L" if picture.mode in ("1", "L") else "RGB"
    pixels = picture.convert(mode)
    pixels.thumbnail((MOST_PICTURE_PX, MOST_PICTURE_PX))
    return Image.frombytes(mode, pixels.size, pixels.tobytes())


class Sheet:
    """The pages as they fill. Every text goes through `spell`, so that what the fonts lack is seen and not dropped."""

    def __init__(self, contents: Contents, say: Say) -> None:
        self.contents, self.say = contents, say
        self.rtl = is_right_to_left(contents.language)
        self.spelled = False
        self.pdf = new_pdf(self._header, self._footer)
        self._has = covered(self.pdf)
        self._describe()
        self.pdf.add_page()

    def _describe(self) -> None:
        contents, pdf = self.contents, self.pdf
        pdf.set_title(f"{contents.title} – {contents.status_text}")
        pdf.set_subject(" ".join(contents.ai_lines))
        pdf.set_author(contents.signed_by or "edgemed")
        pdf.set_creator("edgemed")
        pdf.set_producer("edgemed")
        pdf.set_lang(contents.language)
        pdf.set_creation_date(contents.as_of)

    def spell(self, text: str) -> str:
        """`text` with what the fonts lack spelled out, but for what shows nothing (variation selectors, joiners, soft hyphens)."""
        out = []
        for character in text:
            if ord(character) in self._has:
                out.append(character)
            elif unicodedata.category(character) != "Cf" and not 0xFE00 <= ord(character) <= 0xFE0F:
                out.append(f"[U+{ord(character):04X}]")
                self.spelled = True
        return "".join(out)

    def _header(self, pdf: FPDF) -> None:
        contents = self.contents
        if contents.status == "draft":
            draw_draft(pdf)
        pdf.set_y(9)
        pdf.set_font(FAMILY, "B", 9)
        pdf.set_text_color(*(_RED if contents.status == "draft" else _GREY))
        pdf.cell(pdf.epw / 2, 5, self.spell(contents.status_text), align="L")
        pdf.set_font(FAMILY, "", 8)
        pdf.set_text_color(*_GREY)
        about = self.spell(f"{contents.reference} · {self.say('version')} {contents.version}")
        pdf.cell(pdf.epw / 2, 5, about, align="R", new_x="LMARGIN", new_y="NEXT")
        pdf.set_text_color(*_BLACK)
        pdf.set_y(MARGIN)

    def _footer(self, pdf: FPDF) -> None:
        pdf.set_y(-MARGIN + 1)
        pdf.set_font(FAMILY, "", 7.5)
        pdf.set_text_color(*_GREY)
        pdf.cell(pdf.epw * 0.78, 4, self.spell(f"{self.contents.ai_lines[0]} {self.contents.advice}"), align="L")
        page = self.say("page").format(page=pdf.page_no(), pages=PAGES_ALIAS)
        pdf.cell(pdf.epw * 0.22, 4, page, align="R")
        pdf.set_text_color(*_BLACK)

    def text(
        self, text: str, size: float = 10, style: Style = "", width: float = 0, colour: Colour = _BLACK, align: Literal["L", "R", ""] = ""
    ) -> None:
        """A paragraph for each line, from the side where its direction begins or that `align` names, at the current x."""
        pdf = self.pdf
        pdf.set_font(FAMILY, style, size)
        pdf.set_text_color(*colour)
        height, left = size * LINE / 10, pdf.x
        for line in self.spell_lines(text):
            pdf.set_x(left)
            if not line.strip():
                pdf.ln(height / 2)
                continue
            side = align or ("R" if is_rtl(line, self.rtl) else "L")
            pdf.multi_cell(width, height, line, align=side, new_x="LMARGIN", new_y="NEXT")
        pdf.set_text_color(*_BLACK)

    def spell_lines(self, text: str) -> list[str]:
        """The text's lines, spelled, none longer than a piece (broken at a space where there is one)."""
        lines: list[str] = []
        for line in text.split("\n"):
            rest = self.spell(line)
            while len(rest) > _PIECE_CHARS:
                cut = rest.rfind(" ", _PIECE_CHARS // 2, _PIECE_CHARS) + 1 or _PIECE_CHARS
                lines.append(rest[:cut])
                rest = rest[cut:]
            lines.append(rest)
        return lines

    def title(self, text: str, size: float = 12) -> None:
        """A heading that stays with at least three lines of what follows."""
        if self.pdf.will_page_break(size * LINE / 10 + 4 * LINE):
            self.pdf.add_page()
        self.pdf.ln(2.5)
        self.text(text, size, "B")
        self.pdf.ln(0.5)

    def row(self, label: str, value: str) -> None:
        """A label and its value in two columns, mirrored where the language runs from the right."""
        pdf, left = self.pdf, self.pdf.l_margin
        if pdf.will_page_break(2 * LINE):
            pdf.add_page()
        top, page, wide = pdf.y, pdf.page, pdf.epw - LABEL_WIDTH - COLUMN_GAP
        pdf.set_x(left + wide + COLUMN_GAP if self.rtl else left)
        side: Literal["L", "R"] = "R" if self.rtl else "L"
        self.text(label, 9, "B", LABEL_WIDTH, align=side)
        bottom = pdf.y
        pdf.set_xy(left if self.rtl else left + LABEL_WIDTH + COLUMN_GAP, top)
        self.text(value, 9, "", wide, align=side)
        if pdf.page == page:
            pdf.set_y(max(pdf.y, bottom))

    def front(self) -> None:
        """Title, status, whose report it is (or that this is withheld), and the advice."""
        contents, say = self.contents, self.say
        self.text(contents.title, 18, "B")
        self.text(contents.status_text, 11, "B", colour=_RED if contents.status == "draft" else _BLACK)
        self.pdf.ln(2)
        for label, value in contents.patient_rows or ((say("patient"), say("withheld")),):
            self.row(label, value)
        if contents.institution:
            self.row(say("institution"), contents.institution)
        self.row(say("version"), f"{contents.version} ({contents.reference})")
        self.row(say("as_of"), utc_text(contents.as_of))
        self.pdf.ln(1)
        self.text(f"{contents.ai_lines[0]} {contents.advice}", 9, "B")

    def sections(self) -> None:
        """Findings, impression, recommendation, and the signature or its absence."""
        for section in self.contents.sections:
            self.title(section.title)
            self.text(section.text, 10, colour=_BLACK if section.written else _RED)
        self.pdf.ln(3)
        if self.contents.signed_at is None:
            self.text(self.contents.status_text, 10, "B", colour=_RED)
            return
        self.row(self.say("signed_by"), self.contents.signed_by)
        self.row(self.say("signed_at"), utc_text(self.contents.signed_at))

    def images(self, pictures: Sequence[Image.Image | None]) -> None:
        """Each image as it was looked at, with how."""
        if not self.contents.images:
            return
        self.title(self.say("images"))
        for number, line in enumerate(self.contents.images):
            picture = pictures[number] if number < len(pictures) else None
            self._picture(line, picture)

    def _picture(self, line: ImageLine, picture: Image.Image | None) -> None:
        pdf, notes = self.pdf, [line.facts, line.view]
        notes += [f"{self.say('file_hash')}: {line.file_sha256}"] if line.file_sha256 else []
        if picture is None or line.suspect:
            notes += [self.say("no_picture")] if picture is not None else []
            self.text("\n".join([line.title, *notes]), 9)
            pdf.ln(2)
            return
        pixels = bare_picture(picture)
        scale = PICTURE_SIZE / max(pixels.size)
        width, height = pixels.width * scale, pixels.height * scale
        if pdf.will_page_break(height + 2):
            pdf.add_page()
        top, left = pdf.y, pdf.l_margin
        pdf.image(pixels, x=left + pdf.epw - width if self.rtl else left, y=top, w=width, h=height, alt_text=self.spell(line.title))
        beside = left if self.rtl else left + PICTURE_SIZE + 4
        pdf.set_x(beside)
        self.text(line.title, 9, "B", pdf.epw - PICTURE_SIZE - 4)
        pdf.set_x(beside)
        self.text("\n".join(notes), 9, "", pdf.epw - PICTURE_SIZE - 4)
        pdf.set_y(max(pdf.y, top + height) + 3)

    def assistance(self) -> None:
        """Which models drafted and answered, by name, quant and hash."""
        self.title(self.say("ai_title"))
        for line in self.contents.ai_lines:
            self.text(line, 9)

    def conversation(self) -> None:
        """Every question and answer with the views that the model was given."""
        if self.contents.turns:
            self.title(self.say("conversation"))
        for turn in self.contents.turns:
            self._turn(turn)
        if self.spelled:
            self.pdf.ln(3)
            self.text(self.say("spelled"), 8, colour=_GREY)

    def _turn(self, turn: Turn) -> None:
        self.title(self.say("question") if turn.role == "user" else self.say("answer"), 9.5)
        self.text(turn.text, 9.5)
        small = [*(seen_text(seen, self.say) for seen in turn.seen), *turn.notes]
        if turn.role == "assistant":
            model = turn.model
            small.append(f"{model.name} ({model.quant}), {model.sha256}" if model else self.say("no_model"))
        if small:
            self.text("\n".join(small), 7.5, colour=_GREY)

    def finish(self) -> bytes:
        """The file's bytes."""
        return bytes(self.pdf.output())
