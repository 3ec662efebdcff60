"""How the image widget looks: half blocks forced, so that a screen is the same everywhere. Look at the pictures before updating them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from textual.app import ComposeResult
from textual.pilot import Pilot

from edgemed.clinic.records import Box, View, Window
from edgemed.core.images import ImagePreparation
from edgemed.tui import i18n
from edgemed.tui.bidi import BidiApp
from edgemed.tui.terminal import Graphics
from edgemed.tui.viewer import ImageView
from edgemed.tui.viewgrid import Shown, ViewGrid
from tests.test_tui_viewer import settled
from tests.tui_pictures import FakePicture

PREPARATION = ImagePreparation(size_px=32, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def phantom() -> FakePicture:
    """A chest of few grey levels: no decoder whose releases differ, and equal neighbours keep the stored screens small."""
    y, x = np.mgrid[-1:1:8j, -1:1:8j]
    values = np.where(x**2 + y**2 < 1.3, 150.0, 20.0)
    values[(abs(abs(x) - 0.4) < 0.2) & (abs(y) < 0.6)] = 70.0
    return FakePicture([values], name="chest.dcm", windows=(Window(128, 256, name="chest"), Window(100, 90, name="bone")))


class Screen(BidiApp[None]):
    def __init__(self, shown: list[Shown]) -> None:
        super().__init__()
        self.shown = shown
        self.text_order = "program"

    def compose(self) -> ComposeResult:
        yield ViewGrid(Graphics("halfblock"), preparation=PREPARATION)

    def on_mount(self) -> None:
        i18n.localise_bindings(self)
        self.query_one(ViewGrid).show(self.shown)
        self.query(ImageView).first().focus()


def after(*keys: str) -> Callable[[Pilot[None]], Awaitable[None]]:
    async def run(pilot: Pilot[None]) -> None:
        await settled(pilot)
        for key in keys:
            await pilot.press(key)
            await settled(pilot)

    return run


@pytest.fixture(autouse=True)
def english_again() -> Iterator[None]:
    yield
    i18n.set_language("en")


@pytest.mark.parametrize(
    ("name", "keys"),
    [("whole", ()), ("magnified_bone", ("plus", "plus", "2")), ("masks", ("m", "enter", "m", "m", "up", "up", "up")), ("model", ("v",))],
)
def test_one_image(snap_compare: Any, name: str, keys: tuple[str, ...]) -> None:
    assert snap_compare(Screen([Shown(phantom(), title="Current")]), terminal_size=(80, 24), run_before=after(*keys))


def test_current_beside_prior_in_arabic(snap_compare: Any) -> None:
    i18n.set_language("ar")
    prior = View(invert=True, masks=(Box(0, 0, 3, 1),))
    shown = [Shown(phantom(), title=i18n._("Image")), Shown(phantom(), prior, title=i18n._("Case"))]
    assert snap_compare(Screen(shown), terminal_size=(100, 24), run_before=after())
