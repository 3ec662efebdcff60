"""The last gate before the terminal: whatever a widget draws, no control character of a text reaches it.

Texts from outside are made safe where they are shown (core.text). What a person pastes or completes stands in an input or an editor as it
is, and those draw it as it is. A name's bytes that are no Unicode would stop the thread that writes to the terminal: they become "?".
Sixels and Kitty's images are drawn past this or as controls, and are ours.
"""

from __future__ import annotations

import re

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

# As core.text has them (none of them takes a cell), and lone surrogates, which do.
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def drawable(text: str) -> str:
    """`text` as a terminal may be given it, of the same width."""
    return _SURROGATES.sub("?", _CONTROLS.sub("", text))


class ControlFilter(LineFilter):
    """Takes control characters out of finished lines."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        if all(segment.control or segment.text.isprintable() for segment in segments):
            return segments
        return [s if s.control else Segment(drawable(s.text), s.style) for s in segments]
