"""Every text on every screen stands out from its ground: 7:1 in high contrast, 4.5:1 in the other looks (WCAG)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from textual.color import Color
from textual.widgets import DataTable

from edgemed.tui.widgets.strip import ImageStrip
from runtimes.fake import Script
from tests.tui_fixture import (
    RADIOGRAPH,
    answered,
    ask,
    begin,
    build,
    on_screen,
    open_case,
    said,
    settle,
)

SIZE = (80, 24)
LONG = " ".join(f"word{n}" for n in range(400))

# -- high contrast ----------------------------------------------------------------------------------------------------------


def contrast(first: Color, second: Color) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour: Color) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour.rgb)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def faint_texts(app: Any, least: float) -> set[str]:
    """Letters and digits on the screen that stand out by less."""
    found = set()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            style = segment.style
            if style is None or style.color is None or style.bgcolor is None or not re.search(r"\w", segment.text):
                continue
            if style.color.triplet is None or style.bgcolor.triplet is None:
                continue
            ratio = contrast(Color(*style.color.triplet), Color(*style.bgcolor.triplet))
            if 1 < ratio < least:  # 1: hidden on purpose, as the mark of an empty box
                found.add(f"{segment.text.strip()} {ratio:.1f}")
    return found


@pytest.mark.parametrize(("theme", "least"), [("contrast", 7.0), ("dark", 4.5), ("light", 4.5)])
async def test_every_text_stands_out(tmp_path: Path, theme: str, least: float) -> None:
    app = build(tmp_path, Script(("A chest.",), tokens_per_s=1e6), theme=theme)
    found: dict[str, set[str]] = {}
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
        await settle(pilot, lambda: "fake" in said(pilot, "#found"), "the model")
        found["welcome"] = faint_texts(app, least)
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        found["case"] = faint_texts(app, least)
        app.screen.query_one(ImageStrip).focus()
        await pilot.pause()
        found["strip"] = faint_texts(app, least)
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press("f5")
        await settle(pilot, lambda: "drafted" in said(pilot, "#stand"), "the draft")
        found["report"] = faint_texts(app, least)
        if theme == "contrast":  # what lies under a box is dimmed in the other looks
            await pilot.press("f8")
            await settle(pilot, on_screen(pilot, "ExportScreen"), "the box")
            found["export"] = faint_texts(app, least)
            await pilot.press("escape", "f1")
            await settle(pilot, on_screen(pilot, "HelpScreen"), "help")
            found["help"] = faint_texts(app, least)
            await pilot.press("escape")
        await pilot.press("escape", "escape", "escape")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        await settle(pilot, lambda: app.screen.query_one(DataTable).row_count == 1, "the case")
        found["list"] = faint_texts(app, least)
        await pilot.press("ctrl+l")
        await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
        found["unlock"] = faint_texts(app, least)
    assert not any(found.values()), found
