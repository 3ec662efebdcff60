"""What lies under the image widget: the choice of a protocol, the arithmetic of zoom and masks, and pixels as cells."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from edgemed.clinic.records import Box, Window
from edgemed.core.errors import InputError
from edgemed.tui.cells import block_lines, shade_lines
from edgemed.tui.masks import MaskTool
from edgemed.tui.terminal import SETTINGS, Graphics, Kind, detect_graphics
from edgemed.tui.viewport import Viewport
from edgemed.tui.windowing import adjusted, describe_window
from tests.tui_pictures import ramp


@pytest.mark.parametrize(
    ("environ", "answer", "kind"),
    [
        ({"TERM": "xterm-256color"}, "sixel", "sixel"),
        ({"TERM": "xterm-256color"}, "kitty", "kitty"),
        ({"TERM": "xterm-256color"}, None, "halfblock"),
        ({"TERM": "xterm-kitty"}, "unasked", "kitty"),
        ({"TERM": "linux"}, "unasked", "unicode"),
        ({"TERM": "dumb"}, "unasked", "unicode"),
        ({"TERM": "tmux-256color", "TMUX": "/tmp/tmux-0/default,1,0"}, "unasked", "halfblock"),
        ({"TERM": "xterm-kitty", "COLORTERM": "truecolor", "TMUX": "/tmp/tmux-0/default,1,0"}, "unasked", "halfblock"),
        ({"TERM": "screen.xterm-256color", "STY": "1.pts-0"}, "unasked", "halfblock"),
        ({"TERM": "screen", "TMUX": "x"}, "unasked", "unicode"),  # sixteen colours
        ({"TERM": "screen", "TMUX": "x", "COLORTERM": "truecolor"}, "unasked", "halfblock"),
        ({"TERM": "xterm", "SSH_TTY": "/dev/pts/3"}, "unasked", "unicode"),
        ({"TERM": "screen-256color"}, "unasked", "halfblock"),  # tmux on this side of an SSH connection
        ({"TERM": "xterm-256color", "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"}, "unasked", "halfblock"),
        ({"TERM": "xterm-kitty", "SSH_TTY": "/dev/pts/3"}, "unasked", "kitty"),
    ],
)
def test_a_terminal_is_asked_only_where_an_answer_comes_back_whole(environ: dict[str, str], answer: Kind | None, kind: Kind) -> None:
    def query() -> Kind | None:
        assert answer != "unasked", "asked where the answer would be typed into the program"
        return answer

    assert detect_graphics("auto", environ, is_tty=True, query=query).kind == kind


def test_a_setting_is_obeyed_and_an_unknown_one_refused() -> None:
    for setting in SETTINGS[1:]:
        assert detect_graphics(setting, {"TMUX": "x"}, is_tty=False).kind == setting
    assert detect_graphics("auto", {}, is_tty=False).kind == "unicode"
    with pytest.raises(InputError, match="'iterm'"):
        detect_graphics("iterm")


def test_nothing_is_asked_of_the_terminal_by_importing_and_building() -> None:
    # In a process of its own with a terminal as stdout: what it writes there would be a question.
    code = """
import os, pty, subprocess, sys
leader, follower = pty.openpty()
program = '''
from edgemed.tui.terminal import Graphics, build_surface, detect_graphics
import edgemed.tui.viewer, edgemed.tui.viewgrid, sys
assert sys.__stdout__.isatty()
detect_graphics()
for kind in ("halfblock", "unicode", "sixel", "kitty"): build_surface(Graphics(kind))
'''
environ = {**os.environ, "TERM": "tmux-256color", "TMUX": "x"}
subprocess.run([sys.executable, "-c", program], stdout=follower, stdin=follower, check=True, env=environ)
os.close(follower)
try: print(repr(os.read(leader, 1000)))
except OSError: print("b''")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "b''"


@pytest.mark.parametrize(
    ("kind", "pixels", "aspect"), [("halfblock", (1, 2), 1.0), ("unicode", (1, 1), 0.5), ("kitty", (10, 20), 1.0), ("sixel", (10, 20), 1.0)]
)
def test_the_pixels_of_a_cell(kind: Kind, pixels: tuple[int, int], aspect: float) -> None:
    graphics = Graphics(kind)
    assert graphics.pixels_per_cell == pixels
    assert graphics.pixel_aspect == aspect


def test_the_whole_image_is_shown_centred_in_its_proportions() -> None:
    port = Viewport((100, 50), (40, 40))
    assert port.visible == (100, 100)
    assert port.origin == (0, -25)
    drawn = np.asarray(port.draw(Image.new("RGB", (100, 50), (200, 0, 0))))
    assert drawn.shape == (40, 40, 3)
    assert (drawn[10:30, :, 0] == 200).all() and not drawn[:10].any() and not drawn[30:].any()


def test_tall_pixels_keep_the_proportions() -> None:
    drawn = np.asarray(Viewport((60, 60), (40, 20), pixel_aspect=0.5).draw(Image.new("RGB", (60, 60), (9, 9, 9))))
    assert (drawn == 9).all()


def test_zoom_keeps_the_point_under_the_pointer() -> None:
    port = Viewport((1000, 800), (100, 80)).zoomed(3, at=(20, 60))
    assert port.zoom == 3
    assert port.to_image(20, 60) == pytest.approx((200, 600))
    assert port.to_canvas(*port.to_image(33, 44)) == pytest.approx((33, 44))
    assert port.zoomed(0.001) == Viewport((1000, 800), (100, 80))
    assert port.zoomed(1e9).zoom == port.max_zoom


def test_panning_stops_at_the_edge() -> None:
    port = Viewport((1000, 800), (100, 80)).zoomed(4).panned(99, 99)
    assert port.to_image(100, 80) == pytest.approx((1000, 800))
    assert Viewport((1000, 800), (100, 80)).panned(1, -1) == Viewport((1000, 800), (100, 80))


@pytest.mark.parametrize("image", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("canvas", [(1, 1), (200, 3), (7, 90)])
def test_odd_sizes_draw(image: tuple[int, int], canvas: tuple[int, int]) -> None:
    for port in (Viewport(image, canvas, 0.7), Viewport(image, canvas, 0.7).zoomed(1e9).panned(5, 5)):
        assert port.draw(Image.new("RGB", image, (50, 50, 50))).size == canvas


def test_magnified_pixels_are_squares() -> None:
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("RGB")
    assert set(np.unique(np.asarray(Viewport((2, 2), (40, 40)).draw(image)))) == {0, 255}
    assert set(np.unique(np.asarray(Viewport((2, 2), (6, 6)).draw(image, squares=True)))) == {0, 255}


def test_a_mask_stays_within_the_image() -> None:
    tool = MaskTool.at((100, 80), 90, 70, 400, -5)
    assert tool.box == Box(90, 0, 100, 70)
    assert tool.moved(50, 50).box == Box(90, 10, 100, 80)
    assert tool.moved(-500, -500).box == Box(0, 0, 10, 70)
    assert tool.sized(-500, -500).box == Box(90, 0, 91, 1)
    assert MaskTool.at((100, 80), 500, 500, 500, 500).box == Box(99, 79, 100, 80)


def test_masks_are_added_once_replaced_and_removed() -> None:
    tool = MaskTool((10, 10), Box(0, 0, 2, 2))
    masks = tool.fixed(tool.fixed(()))
    assert masks == (Box(0, 0, 2, 2),)
    second = tool.moved(3, 3).fixed(masks)
    chosen = tool.next(second).next(second)
    assert chosen.index == 1 and chosen.next(second).index == 0
    assert chosen.moved(1, 0).fixed(second) == (Box(0, 0, 2, 2), Box(4, 3, 6, 5))
    assert chosen.removed(second) == masks
    assert tool.removed(second) == second and tool.next(()) is tool


def test_a_window_keeps_its_function_and_loses_its_name() -> None:
    window = Window(40, 400, "sigmoid", "soft")
    assert adjusted(window, 1, 0) == Window(80, 400, "sigmoid")
    assert adjusted(window, 0, -1000).width == 1
    assert describe_window(Window(0.5, 1.0), chosen=True) == "Window: own, C 0.5, W 1"
    assert describe_window(Window(-600, 1500, name="lung\nline"), chosen=False) == "Window: lung line, C -600, W 1500"


def test_half_blocks_hold_two_rows_each() -> None:
    image = Image.fromarray(ramp(6, 4, 0, 255).astype(np.uint8)).convert("RGB")
    image.putpixel((0, 1), (1, 2, 3))
    lines = block_lines(image)
    assert [line.text for line in lines] == ["▀" * 6] * 2
    first = lines[0]._segments[0].style
    assert first is not None and first.color is not None and first.bgcolor is not None
    assert tuple(first.color.triplet) == (0, 0, 0) and tuple(first.bgcolor.triplet) == (1, 2, 3)
    assert len(block_lines(Image.new("RGB", (80, 2)))[0]._segments) == 1  # a black line is one piece


def test_shades_are_plain_ascii_from_dark_to_bright() -> None:
    (line,) = shade_lines(Image.fromarray(ramp(10, 1, 0, 255).astype(np.uint8)))
    assert line.text == " .:-=+*#%@"


def test_the_cell_size_is_the_drivers_or_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "__stdout__", io.TextIOWrapper(io.BytesIO()))
    graphics = detect_graphics("sixel", {}, is_tty=False)
    assert (graphics.cell_width_px, graphics.cell_height_px) == (10, 20)
