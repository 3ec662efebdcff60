"""Three looks: dark, light, and high contrast, in which every text stands out from its ground by 7:1 or more (WCAG AAA; tested).

`quiet` is the colour of what is read second (times, hints): an opaque one, since a see-through grey has no contrast of its own.
"""

from __future__ import annotations

from textual.theme import Theme

from edgemed.tui.i18n import N_

DEFAULT_THEME = "dark"
# What a person picks from, in the order of the settings.
THEMES: dict[str, str] = {"dark": N_("Dark"), "light": N_("Light"), "contrast": N_("High contrast")}

_THEMES = (
    Theme(
        name="edgemed-dark",
        primary="#6cb2ff",
        secondary="#8fd3c1",
        warning="#ffc857",
        error="#ff7b72",
        success="#7ee2a8",
        accent="#6cb2ff",
        foreground="#e6e9ee",
        background="#11151c",
        surface="#1a202a",
        panel="#242c39",
        dark=True,
        text_alpha=1.0,
        variables={
            "quiet": "#a9b4c4",
            "cover": "#11151ca0",
            "selected": "#2d4f7a",
            "footer-key-foreground": "#6cb2ff",
            "input-selection-background": "#2d4f7a",
        },
    ),
    Theme(
        name="edgemed-light",
        primary="#0b5cad",
        secondary="#1b6e5c",
        warning="#8a5a00",
        error="#b3261e",
        success="#1d6b3a",
        accent="#0b5cad",
        foreground="#1b2430",
        background="#fbfcfe",
        surface="#f0f3f8",
        panel="#e1e7f0",
        dark=False,
        text_alpha=1.0,
        variables={
            "quiet": "#4d5a6b",
            "cover": "#fbfcfea0",
            "selected": "#bcd7f5",
            "footer-key-foreground": "#0b5cad",
            "input-selection-background": "#bcd7f5",
        },
    ),
    Theme(
        name="edgemed-contrast",
        primary="#ffff00",
        secondary="#00ffff",
        warning="#ffff00",
        error="#ff9d9d",
        success="#7dff7d",
        accent="#00ffff",
        foreground="#ffffff",
        background="#000000",
        surface="#000000",
        panel="#000000",
        dark=True,
        text_alpha=1.0,
        luminosity_spread=0.0,
        variables={
            "quiet": "#ffffff",
            "cover": "#000000",
            "selected": "#00348f",
            "footer-key-foreground": "#ffff00",
            "input-selection-background": "#00348f",
            "border": "#ffffff",
            "border-blurred": "#b0b0b0",
        },
    ),
)


def all_themes() -> tuple[Theme, ...]:
    """The themes to register."""
    return _THEMES


def default_variables() -> dict[str, str]:
    """Our own colours, for the moment before a theme is chosen."""
    return {name: _THEMES[0].variables[name] for name in ("quiet", "cover", "selected")}


def textual_name(name: str) -> str:
    """The registered name of a choice; an unknown one is the default."""
    return f"edgemed-{name if name in THEMES else DEFAULT_THEME}"
