"""Window and level as keys and drags change them, and what the line under an image says. Values only, no screen."""

from __future__ import annotations

from dataclasses import replace

from edgemed.clinic.records import Window
from edgemed.core.text import one_line
from edgemed.tui.i18n import _

# One key press: a tenth of the width. Coarse enough for a terminal over SSH, fine enough to see the step.
STEP = 0.1


def adjusted(window: Window, centre_steps: float, width_steps: float) -> Window:
    """Moved by `centre_steps` tenths of its width, and widened by `width_steps` tenths; never narrower than one grey value.

    An 8-bit window is as wide as 255, so its step is 25; a lung window's is 150. It is no preset any more: the name goes.
    """
    width = max(window.width * (1 + STEP) ** width_steps, 1.0)
    return replace(window, centre=window.centre + centre_steps * STEP * window.width, width=width, name="")


def describe_window(window: Window | None, chosen: bool) -> str:
    """`Window: lung, C -600, W 1500`. `chosen`: by the person, not the file."""
    if window is None:
        return _("Window: colour, none")
    numbers = _("C {centre}, W {width}").format(centre=_number(window.centre), width=_number(window.width))
    # Tags are text from outside.
    name = one_line(window.name) or (_("own") if chosen else _("from the file"))
    return _("Window: {name}, {numbers}").format(name=name, numbers=numbers)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"
