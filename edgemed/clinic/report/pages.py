"""An empty A4 document for the report: fonts embedded, text shaped, and what is drawn under the text of a draft.

    pdf = new_pdf(header, footer)               # both are called with the document, on every page
    covered(pdf)                                # the characters that its fonts have

The only place that knows fpdf2's set-up; what stands on the pages is pdf.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.core.errors import MissingExtraError

if TYPE_CHECKING:
    from fpdf import FPDF

FONTS = Path(__file__).parent / "fonts"
FAMILY = "report"
# Millimetres.
MARGIN = 18.0
# Stands for the number of pages, as wide as four digits; its first character is a private one that no text here keeps (fonts lack it).
PAGES_ALIAS = "\ue0009999"
_PALE = (236, 236, 236)
# DRAFT across a draft's page, in strokes on a grid of 6 by 10 for each letter: drawn, so that the text of the page stays as it is.
_DRAFT_STROKES: tuple[tuple[tuple[tuple[float, float], ...], ...], ...] = (
    (((0, 0), (0, 10), (4, 10), (6, 8), (6, 2), (4, 0), (0, 0)),),
    (((0, 10), (0, 0), (5, 0), (6, 1), (6, 4), (5, 5), (0, 5)), ((3, 5), (6, 10))),
    (((0, 10), (3, 0), (6, 10)), ((1.2, 6), (4.8, 6))),
    (((6, 0), (0, 0), (0, 10)), ((0, 5), (4.5, 5))),
    (((0, 0), (6, 0)), ((3, 0), (3, 10))),
)


def new_pdf(header: Callable[[FPDF], None], footer: Callable[[FPDF], None]) -> FPDF:
    """The document without a page. MissingExtraError without fpdf2 or uharfbuzz."""
    try:
        import uharfbuzz as _shaper  # noqa: F401 (fpdf2 shapes with it, and says so only when it is used)
        from fpdf import FPDF
    except ImportError as error:
        raise MissingExtraError.of("Writing a PDF", "clinic") from error

    class Pages(FPDF):
        def header(self) -> None:
            header(self)

        def footer(self) -> None:
            footer(self)

    pdf = Pages(format="A4")
    pdf.set_margins(MARGIN, MARGIN, MARGIN)
    pdf.set_auto_page_break(True, MARGIN + 6)
    pdf.c_margin = 0
    pdf.add_font(FAMILY, "", FONTS / "DejaVuSans.ttf")
    pdf.add_font(FAMILY, "B", FONTS / "DejaVuSans-Bold.ttf")
    # Ornamental ligatures off, so that "fi" is found by a search; those that Arabic requires are another feature and stay.
    pdf.set_text_shaping(True, features={"liga": False, "dlig": False})
    pdf.alias_nb_pages(PAGES_ALIAS)
    return pdf


def covered(pdf: FPDF) -> frozenset[int]:
    """The characters that every face has."""
    from fpdf.fonts import TTFFont

    return frozenset.intersection(*(frozenset(font.cmap) for font in pdf.fonts.values() if isinstance(font, TTFFont)))


def draw_draft(pdf: FPDF) -> None:
    """DRAFT, large and pale, from corner to corner."""
    size = 4.2  # mm for a step of the strokes' grid
    left, top = pdf.w / 2 - 19 * size, pdf.h / 2 - 5 * size
    with pdf.rotation(52, pdf.w / 2, pdf.h / 2), pdf.local_context(draw_color=_PALE, line_width=7):
        for number, strokes in enumerate(_DRAFT_STROKES):
            for stroke in strokes:
                pdf.polyline([(left + (8 * number + x) * size, top + y * size) for x, y in stroke])
