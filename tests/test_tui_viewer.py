"""The image widget under a person's hands: what each key and mouse move does to the view, the text and the pixels on the screen."""

from __future__ import annotations

import io
import re
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from textual.app import App, ComposeResult
from textual.geometry import Region
from textual.pilot import Pilot

from edgemed.clinic.imaging import open_picture
from edgemed.clinic.records import Box, View, Window
from edgemed.core.errors import EdgemedError
from edgemed.core.images import ImagePreparation, prepare
from edgemed.tui.drawing import DrawRequest, PictureLike
from edgemed.tui.terminal import Graphics
from edgemed.tui.viewer import ImageView
from edgemed.tui.viewgrid import Shown, ViewGrid
from tests.tui_pictures import LUNG, SOFT, FakePicture, ramp

PREPARATION = ImagePreparation(size_px=16, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Viewer(App[None]):
    """One widget, and what it said."""

    def __init__(self, pictures: list[FakePicture], kind: str = "halfblock", view: View | None = None) -> None:
        super().__init__()
        self.pictures = pictures
        self.kind = kind
        self.first_view = view
        self.views: list[tuple[str, View]] = []
        self.errors: list[EdgemedError] = []

    def compose(self) -> ComposeResult:
        yield ImageView(Graphics(self.kind), title="Current [b]", preparation=PREPARATION)

    def on_mount(self) -> None:
        self.image_view.show_series(self.pictures, [f"id{n}" for n in range(len(self.pictures))], view=self.first_view)
        self.image_view.focus()

    @property
    def image_view(self) -> ImageView:
        return self.query_one(ImageView)

    def on_image_view_view_changed(self, message: ImageView.ViewChanged) -> None:
        self.views.append((message.key, message.view))

    def on_image_view_picture_failed(self, message: ImageView.PictureFailed) -> None:
        self.errors.append(message.error)


async def settled(pilot: Pilot[None]) -> None:
    """Until every drawing has arrived."""
    for _round in range(500):
        await pilot.pause(0.01)
        if not any(view.busy for view in pilot.app.query(ImageView)):
            break
    await pilot.pause()


async def pressed(pilot: Pilot[None], *keys: str) -> None:
    await settled(pilot)
    await pilot.press(*keys)
    await settled(pilot)


def screen_text(app: App[None]) -> str:
    """Every character on the screen."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def pixel(app: Viewer, column: int, row: int) -> tuple[int, int, int]:
    """The upper pixel of a cell of the image."""
    strip = app.image_view._surface.render_line(row).crop(column, column + 1)
    style = next(iter(strip)).style
    assert style is not None and style.color is not None and style.color.triplet is not None
    return tuple(style.color.triplet)


async def test_a_picture_is_shown_with_its_description() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        assert app.image_view.description == "chest.dcm · 64 × 48 · Zoom 100 % · Window: soft[31m tissue, C 40, W 400"
        text = screen_text(app)
        assert "chest.dcm · 64 × 48 · Zoom 100 %" in text
        assert "Current [b]" in text  # a title is text and no markup
        assert "\x1b" not in text
        # 78 × 20 cells are 78 × 40 pixels: the image is 53 wide, with a dozen black columns on either side.
        assert pixel(app, 5, 10) == (0, 0, 0)
        assert pixel(app, 60, 10) == (255, 255, 255)
        assert app.views == []


async def test_a_long_name_leaves_room_and_is_harmless() -> None:
    app = Viewer([FakePicture(name="\x1b]0;x\x07" + "患" * 400 + "\n[red]slice_0042.dcm")])
    async with app.run_test(size=(40, 24)) as pilot:
        await settled(pilot)
        name = app.image_view.description.split(" · ")[0]
        assert cell_len(name) <= 32 and name.startswith("]0;x患") and name.endswith("0042.dcm")
        assert "Window: " in screen_text(app)


async def test_the_image_keeps_its_size_while_the_text_changes() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        size = app.image_view._surface.size
        await pressed(pilot, "i", "m", "enter", "escape", *["shift+right"] * 8)
        assert app.image_view._surface.size == size


async def test_rendering_never_runs_on_the_screens_thread() -> None:
    picture = FakePicture()
    app = Viewer([picture])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "plus", "shift+up", "i", "2")
        assert picture.threads and threading.get_ident() not in picture.threads


async def test_keys_of_the_window() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "shift+up")
        assert app.views[-1] == ("id0", View(window=Window(80, 400)))
        await pressed(pilot, "shift+right")
        assert app.views[-1][1].window == Window(80, 400 * 1.1)
        await pressed(pilot, "2")
        assert app.views[-1][1].window == LUNG
        assert "Window: lung, C -600, W 1500" in app.image_view.description
        await pressed(pilot, "shift+left", "shift+down")
        assert "Window: own" in app.image_view.description
        await pressed(pilot, "i")
        assert app.views[-1][1].invert and "inverted" in app.image_view.description
        await pressed(pilot, "0")
        assert app.views[-1][1] == View(invert=True)
        count = len(app.views)
        await pressed(pilot, "9")  # no such preset
        assert len(app.views) == count
        await pressed(pilot, "r")
        assert app.views[-1][1] == View()


async def test_the_window_reaches_the_pixels() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        before = pixel(app, 39, 10)
        await pressed(pilot, "i")
        assert pixel(app, 39, 10) == tuple(255 - value for value in before)


async def test_colour_has_no_window() -> None:
    app = Viewer([FakePicture([np.full((20, 30, 3), 90.0)], monochrome=False, windows=())])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "shift+up", "shift+left", "1")
        assert app.views == []
        assert "Window" not in app.image_view.description


async def test_zoom_and_pan_change_no_view() -> None:
    picture = FakePicture()
    app = Viewer([picture])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "plus", "plus")
        assert "Zoom 156 %" in app.image_view.description
        middle = app.image_view.viewport.centre
        await pressed(pilot, "right")
        assert app.image_view.viewport.centre[0] > middle[0]
        assert pixel(app, 70, 10) == (255, 255, 255)
        await pressed(pilot, "minus", "f")
        assert app.image_view.viewport.zoom == 1 and app.image_view.viewport.centre == (0.5, 0.5)
        assert app.views == []
        assert len(picture.rendered) == 1  # magnifying and panning render nothing anew


async def test_frames_go_on_from_file_to_file() -> None:
    app = Viewer([FakePicture([ramp(8, 8)] * 2), FakePicture(name="next.dcm")], view=View(masks=(Box(0, 0, 2, 2),), invert=True))
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "right_square_bracket")
        assert app.views[-1] == ("id0", View(frame=1, masks=(Box(0, 0, 2, 2),), invert=True))
        assert "Image 1/2 · Frame 2/2" in app.image_view.description
        await pressed(pilot, "right_square_bracket")
        assert app.views[-1] == ("id1", View(frame=0, invert=True))  # a mask belongs to one file
        await pressed(pilot, "right_square_bracket")
        assert app.image_view.position == 1
        await pressed(pilot, "left_square_bracket")
        assert app.views[-1] == ("id0", View(frame=1, masks=(Box(0, 0, 2, 2),), invert=True))  # and is there again with it
        await pressed(pilot, "home")
        assert (app.image_view.position, app.image_view.view.frame) == (0, 0)
        await pressed(pilot, "end")
        assert "next.dcm" in app.image_view.description


async def test_what_the_model_sees_are_the_prepared_pixels() -> None:
    picture = FakePicture()
    app = Viewer([picture])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "v")
        assert "What the model sees: 16 × 16 pixels" in app.image_view.description
        image = app.image_view
        shown = image._drawer._source
        assert shown is not None
        assert np.array_equal(np.asarray(shown), prepare(picture.render(View()), PREPARATION))
        # 40 rows for 16 pixels: each is a whole square, with no shade that the model does not get.
        colours = {segment.style.color.triplet for y in range(20) for segment in image._surface.render_line(y)}
        assert colours <= {*map(tuple, np.asarray(shown).reshape(-1, 3).tolist()), (0, 0, 0)}
        await pressed(pilot, "v")
        assert "Zoom 100 %" in image.description


async def test_masks_by_keys() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "m")
        assert "Masking" in app.image_view.description and app.views == []
        await pressed(pilot, "left", "up")
        for _step in range(100):  # as if the keys were held: into the corner and no further
            app.image_view.action_move(-1, -1)
        await pressed(pilot, "shift+right", "shift+down")
        tool = app.image_view.mask_tool
        assert tool is not None and (tool.box.left, tool.box.top) == (0, 0)
        await pressed(pilot, "enter")
        assert app.views == [("id0", View(masks=(tool.box,)))]
        assert "1 mask" in app.image_view.description
        await pressed(pilot, "right", "enter")  # the same mask, moved
        assert len(app.views[-1][1].masks) == 1 and app.views[-1][1].masks[0].left > 0
        await pressed(pilot, "m", "m", "enter", "n", "n", "delete")
        assert len(app.views[-1][1].masks) == 1
        await pressed(pilot, "escape")
        assert app.image_view.mask_tool is None and "Masking" not in app.image_view.description


async def test_masks_by_mouse_black_the_pixels_out() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "m")
        await pilot.mouse_down(ImageView, offset=(50, 5))
        await pilot.hover(ImageView, offset=(60, 9))
        await pilot.mouse_up(ImageView, offset=(60, 9))
        await pressed(pilot, "escape")
        (box,) = app.views[-1][1].masks
        assert box.right - box.left == pytest.approx(10 * 48 / 40, abs=1.5)
        assert pixel(app, 55, 6) == (0, 0, 0)
        assert pixel(app, 65, 6) == (255, 255, 255)


async def test_mouse_pans_windows_and_zooms() -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "plus", "plus", "plus")
        await pilot.mouse_down(ImageView, offset=(40, 10))
        await pilot.hover(ImageView, offset=(20, 10))
        await pilot.mouse_up(ImageView, offset=(20, 10))
        assert app.image_view.viewport.centre[0] > 0.6 and app.views == []
        await pilot.mouse_down(ImageView, offset=(40, 10), button=3)
        await pilot.hover(ImageView, offset=(50, 4))
        await pilot.mouse_up(ImageView, offset=(50, 4))
        await settled(pilot)
        window = app.views[-1][1].window
        assert window is not None and window.width > 400 and window.centre > 40


@pytest.mark.parametrize("size", [(80, 24), (30, 6), (8, 4), (1, 1)])
async def test_any_size_of_terminal(size: tuple[int, int]) -> None:
    app = Viewer([FakePicture()])
    async with app.run_test(size=size) as pilot:
        await pressed(pilot, "plus", "m", "enter", "v")
        await pilot.resize_terminal(100, 30)
        await settled(pilot)
        assert app.image_view.viewport.canvas == (98, 2 * (30 - 2 - app.image_view._info.size.height))


async def test_while_one_drawing_runs_only_the_newest_wish_is_kept() -> None:
    gate = threading.Event()
    picture = FakePicture(gate=gate)
    app = Viewer([picture])
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause(0.05)
        app.image_view.own_window = SOFT  # as if drawn before
        await pilot.press(*["shift+up"] * 30)
        gate.set()
        await settled(pilot)
        assert len(picture.rendered) <= 3
        assert picture.rendered[-1] == app.image_view.view == app.views[-1][1]
        assert len(app.views) == 30


async def test_a_drawing_of_a_picture_that_was_taken_away_is_not_shown() -> None:
    gate = threading.Event()
    app = Viewer([FakePicture(gate=gate)])
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause(0.05)
        app.image_view.show(None)
        gate.set()
        await settled(pilot)
        assert app.image_view.description == "No image"
        assert "▀" not in screen_text(app)
        assert app.image_view._drawer._source is None


async def test_a_broken_picture_is_said_under_it() -> None:
    app = Viewer([FakePicture(broken=True), FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        assert "found none" in app.image_view.description and "\x1b" not in app.image_view.description
        assert len(app.errors) == 1 and isinstance(app.errors[0], EdgemedError)
        await pressed(pilot, "shift+up", "right_square_bracket")
        assert "Zoom" in app.image_view.description


async def test_without_an_image_keys_are_left_to_the_screen() -> None:
    app = Viewer([])
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "plus", "m", "i", "enter", "v", "1", "right_square_bracket")
        assert app.views == []
        assert not app.image_view.check_action("mask_end", ())  # so that Escape still stops an answer


async def test_characters_where_there_are_no_colours() -> None:
    app = Viewer([FakePicture()], kind="unicode")
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        line = app.image_view._surface.render_line(10).text
        assert line.strip()[0] in ".:" and line.strip().endswith("@@@@")


class Grid(App[None]):
    def __init__(self, pictures: list[FakePicture]) -> None:
        super().__init__()
        self.pictures = pictures

    def compose(self) -> ComposeResult:
        yield ViewGrid(Graphics("halfblock"), preparation=PREPARATION)

    def on_mount(self) -> None:
        self.query_one(ViewGrid).show([Shown(p, key=str(n), title=f"Picture {n}") for n, p in enumerate(self.pictures)])


@pytest.mark.parametrize(("count", "columns", "rows"), [(0, 1, 1), (1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (6, 2, 2)])
async def test_up_to_four_stand_side_by_side(count: int, columns: int, rows: int) -> None:
    app = Grid([FakePicture() for _n in range(count)])
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        grid = app.query_one(ViewGrid)
        assert len(grid.views) == max(1, min(count, 4))
        assert len({view.region.x for view in grid.views}) == columns
        assert len({view.region.y for view in grid.views}) == rows
        assert all(view.region.width >= 38 for view in grid.views)


async def test_two_stand_one_above_the_other_where_it_is_narrow() -> None:
    app = Grid([FakePicture(), FakePicture()])
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.resize_terminal(50, 24)
        await settled(pilot)
        assert len({view.region.y for view in app.query_one(ViewGrid).views}) == 2


async def test_linked_views_follow() -> None:
    app = Grid([FakePicture([ramp(8, 8)] * 3), FakePicture([ramp(80, 80)] * 2)])
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        grid = app.query_one(ViewGrid)
        first, second = grid.views
        first.focus()
        await pressed(pilot, "plus")
        assert second.viewport.zoom == 1
        await pressed(pilot, "l", "plus", "right_square_bracket", "right_square_bracket")
        assert second.viewport.zoom == first.viewport.zoom > 1
        assert (first.view.frame, second.view.frame) == (2, 1)
        assert grid.active is first


def read_sixels(code: str, size: tuple[int, int]) -> np.ndarray:
    """What a terminal would draw, by the DEC's description of the format: the red of each pixel, 0 to 255; -1 where nothing is."""
    width, height = size
    drawn = np.full((height + 6, width), -1.0)
    colours: dict[int, float] = {}
    x = y = colour = 0
    repeat = 1
    body = code[code.index("q") + 1 :].split("\x1b")[0]
    for token in re.finditer(r'"[\d;]*|#(\d+)(?:;2;(\d+);\d+;\d+)?|!(\d+)|[$-]|([?-~])', body):
        if token[1]:
            colour = int(token[1])
            if token[2]:
                colours[colour] = int(token[2]) * 2.55
        elif token[3]:
            repeat = int(token[3])
        elif token[0] in "$-":
            x, y = 0, y + 6 * (token[0] == "-")
        elif token[4]:
            for bit in range(6):
                if ord(token[4]) - 63 >> bit & 1:
                    drawn[y + bit, x : x + repeat] = colours[colour]
            x, repeat = x + repeat, 1
    return drawn[:height]


async def test_sixels_show_every_grey_level_in_the_place_of_their_cells() -> None:
    app = Viewer([FakePicture([ramp(3000, 2000)])], kind="sixel")
    async with app.run_test(size=(80, 24)) as pilot:
        await settled(pilot)
        image = app.image_view
        strips = image._surface.render_lines(image._surface.size.region)
        assert [strip.cell_length for strip in strips[:-1]] == [0] * (len(strips) - 1) and strips[-1].cell_length == 78
        code = "".join(segment.text for segment in strips[-1] if segment.control)
        size = (image._surface.size.width * 10, image._surface.size.height * 20)
        expected = image._drawer.draw(DrawRequest(image.pictures[0], image.view, image.viewport)).canvas
        assert expected.size == size
        # Sixels say colours in percent: half a percent is 1.3 grey levels.
        assert np.abs(read_sixels(code, size) - np.asarray(expected.convert("L"))).max() <= 1.3
        assert not any(segment.control for strip in image._surface.render_lines(Region(0, 0, 0, 0)) for segment in strip)


async def test_kittys_terminal_forgets_the_image_when_it_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = io.StringIO()
    app = Viewer([FakePicture()], kind="kitty")
    async with app.run_test(size=(80, 24)) as pilot:
        monkeypatch.setattr(sys, "__stdout__", sent)
        await pressed(pilot, "plus")
        assert "\x1b_G" in sent.getvalue() and "f=100" in sent.getvalue()
        app.image_view.show(None)
        await settled(pilot)
        transmitted = set(re.findall(r"\x1b_Gi=(\d+),m", sent.getvalue()))
        deleted = set(re.findall(r"\x1b_Ga=d,I=(\d+)", sent.getvalue()))
        assert transmitted and transmitted <= deleted


async def test_a_real_16_bit_file_is_shown() -> None:
    file = io.BytesIO()
    Image.fromarray((ramp(64, 48, 0, 65535)).astype(np.uint16)).save(file, "PNG")
    picture: PictureLike = open_picture(file.getvalue(), "ramp.png")
    app = Viewer([picture])  # type: ignore[list-item]
    async with app.run_test(size=(80, 24)) as pilot:
        await pressed(pilot, "shift+left", "i", "m", "enter", "escape")
        assert app.errors == []
        assert "ramp.png · 64 × 48 · Zoom 100 % · Window: own" in app.image_view.description
        assert pixel(app, 13, 2)[0] > 200 > 50 > pixel(app, 65, 2)[0]
        assert pixel(app, 39, 10) == (0, 0, 0)  # masked
