"""The part of the image widget that only shows: a picture drawn in a worker thread, and the line of text under it.

ImageView (viewer.py) adds keys and mouse; use that one. One drawing runs at a time, and while it runs only the newest wish is kept, so
that a held key or a drag over a large radiograph never queues up work.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from rich.cells import cell_len, set_cell_size
from textual import events
from textual.app import ComposeResult
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from edgemed.clinic.records import Box, View, Window
from edgemed.core.errors import EdgemedError
from edgemed.core.images import ImagePreparation
from edgemed.core.text import one_line
from edgemed.tui.drawing import Drawer, Drawn, DrawRequest, PictureLike
from edgemed.tui.i18n import _, localise_bindings, ngettext
from edgemed.tui.masks import MaskTool
from edgemed.tui.terminal import Graphics, Surface, build_surface
from edgemed.tui.viewport import Viewport
from edgemed.tui.windowing import describe_window

NARROW_COLUMNS = 60
# Of a longer file name both ends are shown: the last letters tell one image of a study from the next.
NAME_COLUMNS = 32


class PictureCanvas(Widget):
    """A picture, or a stack of them, and what is to be known about how it is shown."""

    DEFAULT_CSS = """
    PictureCanvas { layout: vertical; border: round $foreground 40%; }
    PictureCanvas:focus { border: round $accent; }
    PictureCanvas > .surface { width: 1fr; height: 1fr; background: black; }
    PictureCanvas > .info { width: 1fr; height: 2; }
    PictureCanvas.-narrow > .info { height: 3; }
    PictureCanvas > .info.-failed { color: $text-error; }
    """

    class PictureFailed(Message, namespace="image_view"):
        """The picture could not be rendered; the line of text under the image says why, too."""

        def __init__(self, image_view: PictureCanvas, error: EdgemedError) -> None:
            super().__init__()
            self.image_view = image_view
            self.error = error

    class Drew(Message, bubble=False):
        """From the worker thread: the newest drawing, or why there is none."""

        def __init__(self, request: DrawRequest, outcome: Drawn | EdgemedError, encoded: object = None) -> None:
            super().__init__()
            self.request = request
            self.outcome = outcome
            self.encoded = encoded

    def __init__(
        self,
        graphics: Graphics,
        *,
        title: str = "",
        preparation: ImagePreparation | None = None,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.graphics = graphics
        self.preparation = preparation
        self.pictures: tuple[PictureLike, ...] = ()
        self.keys: tuple[str, ...] = ()
        self.position = 0
        self.view = View()
        # Each file's own, while the stack is shown: a mask covers what is burnt into one file, and is there again when that is.
        self.masks: dict[int, tuple[Box, ...]] = {}
        self.viewport = Viewport((1, 1), (1, 1), graphics.pixel_aspect)
        self.model_view = False
        self.mask_tool: MaskTool | None = None
        self.own_window: Window | None = None
        self.error: EdgemedError | None = None
        self._surface = build_surface(graphics)
        self._info = Static("", classes="info", markup=False)
        self._drawer = Drawer()
        self._lock = threading.Lock()
        self._wanted: DrawRequest | None = None
        self._drawing = False
        self.set_title(title)

    def set_title(self, title: str) -> None:
        """What stands in the border above the image."""
        self.border_title = Content(one_line(title)).markup

    def compose(self) -> ComposeResult:
        yield self._surface
        yield self._info

    def on_mount(self) -> None:
        self.relocalise()

    def on_unmount(self) -> None:
        self._put(None)  # with Kitty's protocol the terminal itself keeps images until it is told
        # A finished worker's context may keep this widget for as long as the program runs: no patient is to be kept with it.
        self.pictures, self.keys, self._drawer = (), (), Drawer()
        with self._lock:
            self._wanted = None

    def relocalise(self) -> None:
        """Call after a change of language."""
        localise_bindings(self)
        self._say()

    @property
    def picture(self) -> PictureLike | None:
        """The picture on the screen."""
        return self.pictures[self.position] if self.pictures else None

    @property
    def key(self) -> str:
        """What the owner called that picture."""
        return self.keys[self.position] if self.keys else ""

    @property
    def window(self) -> Window | None:
        """The window in force: the person's or the file's own. None for colour, and until the picture was first drawn."""
        return self.view.window or self.own_window

    @property
    def busy(self) -> bool:
        """Is a drawing under way or waited for?"""
        with self._lock:
            return self._drawing

    @property
    def description(self) -> str:
        """The text under the image."""
        return describe(self)

    def show(self, picture: PictureLike | None, view: View | None = None, key: str = "") -> None:
        """One picture, looked at as `view` says; None clears. `key` is handed back with ViewChanged."""
        self.show_series((picture,) if picture else (), (key,) if picture else (), view=view)

    def show_series(
        self,
        pictures: Sequence[PictureLike],
        keys: Sequence[str] = (),
        position: int = 0,
        view: View | None = None,
        masks: Sequence[tuple[Box, ...]] = (),
    ) -> None:
        """Several pictures as one stack, beginning with the one at `position`, which `view` is of; `masks` are each picture's."""
        self.pictures = tuple(pictures)
        self.keys = tuple(keys) or ("",) * len(self.pictures)
        self.position = position
        self.view = view or View()
        self.masks = dict(enumerate(masks))
        self.own_window = None
        self.model_view = False
        self.mask_tool = None
        self.viewport = replace(self.viewport, zoom=1.0, centre=(0.5, 0.5))
        self.redraw()

    # Drawing

    def on_resize(self, event: events.Resize) -> None:
        # As many lines as the text may need, always: were they as many as it needs now, a changed window could change the image's size.
        self.set_class(event.size.width < NARROW_COLUMNS, "-narrow")
        self.call_after_refresh(self.redraw)

    def redraw(self) -> None:
        """Wish for the picture as it is to be looked at now; returns at once."""
        self.error = None
        self._say()
        cells = self._surface.content_size
        if self.picture is None:
            self._put(None)
            self._drawer = Drawer()  # nothing of a patient stays behind when the screen is locked
        if self.picture is None or not cells.area:
            return
        across, down = self.graphics.pixels_per_cell
        self.viewport = replace(self.viewport, canvas=(cells.width * across, cells.height * down))
        self._wish(
            DrawRequest(
                self.picture,
                self.view,
                self.viewport,
                self.preparation if self.model_view else None,
                show_masks=self.mask_tool is not None,
                cursor=self.mask_tool.box if self.mask_tool else None,
            )
        )

    def _wish(self, request: DrawRequest) -> None:
        with self._lock:
            self._wanted = request
            if self._drawing:
                return
            self._drawing = True
        self.run_worker(self._draw_newest, group="drawing", thread=True)

    def _draw_newest(self) -> None:
        """In a thread: until nothing newer is wished for."""
        while True:
            with self._lock:
                request, self._wanted = self._wanted, None
                if request is None:
                    self._drawing = False
                    return
            try:
                drawn = self._drawer.draw(request)
            except EdgemedError as error:
                self.post_message(self.Drew(request, error))
            else:
                self.post_message(self.Drew(request, drawn, self._pixels.encode(drawn.canvas)))

    def on_picture_canvas_drew(self, message: Drew) -> None:
        if message.request.picture is not self.picture:
            return  # of a picture that was taken away meanwhile
        if isinstance(message.outcome, EdgemedError):
            self.error = message.outcome
            self._put(None)
            self.post_message(self.PictureFailed(self, message.outcome))
        else:
            self.viewport = replace(self.viewport, image=message.outcome.viewport.image)
            self.own_window = message.outcome.own_window
            self._put(message.encoded)
        self._say()

    @property
    def _pixels(self) -> Surface:
        return cast(Surface, self._surface)

    def _put(self, encoded: object) -> None:
        self._pixels.put(encoded)

    def _say(self) -> None:
        self._info.set_class(self.error is not None, "-failed")
        self._info.update(self.description)


def describe(canvas: PictureCanvas) -> str:
    """One line that says what is to be seen, part by part."""
    picture = canvas.picture
    if picture is None:
        return _("No image")
    name = short_name(picture.name)
    if canvas.error is not None:
        return f"{name} · {one_line(canvas.error.message)}"
    if canvas.model_view and canvas.preparation is not None:
        size = canvas.preparation.size_px
        # Not within the other text: before Python 3.12, Babel finds no string in there.
        seen = _("What the model sees: {width} × {height} pixels").format(width=size, height=size)
        return f"{name} · {seen}"
    if canvas.mask_tool is not None:
        return " · ".join([name, *_masks(canvas.view), _("Masking: arrows move, Shift sizes, Enter keeps, Esc ends")])
    return " · ".join([name, *_parts(canvas, picture)])


def short_name(name: str) -> str:
    """A file name on one line, its middle left out where it is long."""
    line = one_line(name)
    half = NAME_COLUMNS // 2
    return line if cell_len(line) <= NAME_COLUMNS else f"{set_cell_size(line, half - 1).rstrip()}…{line[-(half - 8) :]}"


def _masks(view: View) -> list[str]:
    count = len(view.masks)
    return [ngettext("{count} mask", "{count} masks", count).format(count=count)] if count else []


def _parts(canvas: PictureCanvas, picture: PictureLike) -> list[str]:
    facts, view = picture.facts, canvas.view
    parts = [f"{facts.width_px} × {facts.height_px}"]
    if len(canvas.pictures) > 1:
        parts.append(_("Image {number}/{total}").format(number=canvas.position + 1, total=len(canvas.pictures)))
    if facts.frames > 1:
        parts.append(_("Frame {number}/{total}").format(number=view.frame + 1, total=facts.frames))
    parts.append(_("Zoom {percent} %").format(percent=round(100 * canvas.viewport.zoom)))
    if picture.monochrome and canvas.window is not None:
        parts.append(describe_window(canvas.window, view.window is not None))
    if view.invert:
        parts.append(_("inverted"))
    return parts + _masks(view)
