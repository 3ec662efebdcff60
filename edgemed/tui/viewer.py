"""A medical image in the terminal: zoom, pan, window and level, frames, masks over burnt-in text, and what the model sees.

    view = ImageView(graphics)                            # terminal.detect_graphics(), before the program starts
    view.show(picture, case_image.view, key=case_image.id)
    view.show_series(pictures, keys)                      # several files as one stack: frame keys go on from file to file
    view.preparation = artifact_preparation               # core.images.ImagePreparation: `v` then shows the tower's exact pixels
    def on_image_view_view_changed(self, message): ...    # message.view is what to keep; message.key says of which image

Rendering and scaling run in a worker thread (canvas.py). Under the image a line of text says the same for whoever cannot see it.
Knows neither files nor the store nor the model; several side by side are viewgrid.py's business. Unused keys go on to the screen.

Keys: + - zoom, f fit, arrows pan, Shift+arrows window (up, down: centre; left, right: width), 1-9 presets, 0 the file's own window,
i invert, [ ] frames, Home End first and last frame, m masks, v what the model sees, r everything as it was (masks stay).
Masks: arrows move, Shift+arrows size, Enter keeps, n next, Delete removes, Escape or m ends.
Mouse: drag pans, Shift+drag or the right button changes the window, the wheel zooms in a fitted image, steps a stack's frames, pans
a magnified one; Ctrl+wheel always zooms; in masks a drag draws.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from edgemed.clinic.records import View
from edgemed.tui.canvas import PictureCanvas
from edgemed.tui.i18n import N_
from edgemed.tui.masks import MaskTool
from edgemed.tui.viewport import Viewport
from edgemed.tui.windowing import adjusted

ZOOM_STEP = 1.25
PAN_STEP = 0.25
# A drag over the whole image changes the window's width and centre by this many steps (windowing.STEP each).
DRAG_STEPS = 20
ARROWS = (("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1))


class ImageView(PictureCanvas, can_focus=True):
    """One image, or a stack of images, under a person's hands."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("plus,equals_sign", "zoom(1)", N_("Zoom in"), key_display="+", show=False),
        Binding("minus", "zoom(-1)", N_("Zoom out"), key_display="-", show=False),
        Binding("f", "fit", N_("Fit"), show=False),
        *(Binding(key, f"move({right}, {down})", N_("Move"), show=False) for key, right, down in ARROWS),
        *(Binding(f"shift+{key}", f"alter({right}, {down})", N_("Window"), show=False) for key, right, down in ARROWS),
        *(Binding(str(number), f"preset({number})", N_("Window preset"), show=False) for number in range(10)),
        Binding("i", "invert", N_("Invert"), show=False),
        Binding("right_square_bracket,pagedown", "step(1)", N_("Next frame"), key_display="]", show=False),
        Binding("left_square_bracket,pageup", "step(-1)", N_("Previous frame"), key_display="[", show=False),
        Binding("home", "first_frame", N_("First frame"), show=False),
        Binding("end", "last_frame", N_("Last frame"), show=False),
        Binding("m", "masks", N_("Mask text")),
        Binding("v", "model_view", N_("What the model sees")),
        Binding("r", "reset", N_("Reset view"), show=False),
        Binding("enter", "mask_keep", N_("Keep mask"), show=False),
        Binding("n", "mask_next", N_("Next mask"), show=False),
        Binding("delete,backspace", "mask_remove", N_("Remove mask"), show=False),
        Binding("escape", "mask_end", N_("End masks"), show=False),
    ]

    class ViewChanged(Message):
        """An image is looked at in another way by the person's hand: to be kept with it, and shown to the model the same way."""

        def __init__(self, image_view: ImageView, view: View, key: str) -> None:
            super().__init__()
            self.image_view = image_view
            self.view = view
            self.key = key

        @property
        def control(self) -> ImageView:
            return self.image_view

    class Looked(Message):
        """Zoom, pan or frame changed by the person's hand (for a grid whose views follow one another)."""

        def __init__(self, image_view: ImageView) -> None:
            super().__init__()
            self.image_view = image_view

    _drag: tuple[str, float, float] | None = None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys that mean nothing here now are left to the screen: without an image all, without the mask tool its own."""
        if action in ("mask_keep", "mask_next", "mask_remove", "mask_end"):
            return self.mask_tool is not None
        if action == "model_view":
            return self.picture is not None and self.preparation is not None
        ours = ("zoom", "fit", "move", "alter", "preset", "invert", "step", "first_frame", "last_frame", "masks", "reset")
        return self.picture is not None if action in ours else super().check_action(action, parameters)

    def change_view(self, view: View) -> None:
        """Look at the picture as `view` says, and tell the owner if that is a change."""
        if view != self.view:
            self.view = view
            self.post_message(self.ViewChanged(self, view, self.key))
            self.redraw()

    # Zoom and pan

    def action_zoom(self, steps: int) -> None:
        self._look(self.viewport.zoomed(ZOOM_STEP**steps))

    def action_fit(self) -> None:
        self._look(replace(self.viewport, zoom=1.0, centre=(0.5, 0.5)))

    def action_move(self, right: int, down: int) -> None:
        if self.mask_tool is not None:
            self._place(self.mask_tool.moved(*self._mask_step(right, down)))
        else:
            self._look(self.viewport.panned(right * PAN_STEP, down * PAN_STEP))

    def _look(self, viewport: Viewport) -> None:
        if viewport != self.viewport:
            self.viewport = viewport
            self.post_message(self.Looked(self))
            self.redraw()

    def follow(self, viewport: Viewport, position: int, frame: int) -> None:
        """Look where another view looks: its zoom and centre, and its place in the stack, as far as this one has it."""
        self.viewport = replace(self.viewport, zoom=viewport.zoom, centre=viewport.centre)
        if self.pictures:
            position = min(position, len(self.pictures) - 1)
            self._turn_to(position, min(frame, self.pictures[position].facts.frames - 1))
        self.redraw()

    # Window

    def action_alter(self, right: int, down: int) -> None:
        if self.mask_tool is not None:
            self._place(self.mask_tool.sized(*self._mask_step(right, down)))
        else:
            self.alter_window(-down, right)

    def alter_window(self, centre_steps: float, width_steps: float) -> None:
        """Move the window's centre up and widen it by steps; nothing for colour."""
        if self.picture is not None and self.picture.monochrome and self.window is not None:
            self.change_view(replace(self.view, window=adjusted(self.window, centre_steps, width_steps)))

    def action_preset(self, number: int) -> None:
        """The file's `number`th window; 0 is what the file says by itself."""
        if self.picture is None:
            return
        windows = self.picture.windows
        if number == 0:
            self.change_view(replace(self.view, window=None))
        elif number <= len(windows):
            self.change_view(replace(self.view, window=windows[number - 1]))

    def action_invert(self) -> None:
        self.change_view(replace(self.view, invert=not self.view.invert))

    def action_reset(self) -> None:
        self.action_fit()
        self.change_view(View(frame=self.view.frame, masks=self.view.masks))

    # Frames and files

    def action_step(self, by: int) -> None:
        """The next or previous frame; after a file's last one the next file of the stack, looked at in the same way."""
        if self.picture is None:
            return
        frame, position = self.view.frame + by, self.position
        if not 0 <= frame < self.picture.facts.frames:
            position += by
            if not 0 <= position < len(self.pictures):
                return
            frame = 0 if by > 0 else self.pictures[position].facts.frames - 1
        self._step_to(position, frame)

    def action_first_frame(self) -> None:
        self._step_to(0, 0)

    def action_last_frame(self) -> None:
        self._step_to(len(self.pictures) - 1, self.pictures[-1].facts.frames - 1)

    def _step_to(self, position: int, frame: int) -> None:
        self._turn_to(position, frame)
        self.post_message(self.Looked(self))

    def _turn_to(self, position: int, frame: int) -> None:
        if position != self.position:
            # Masks cover what is burnt into one file; in another they would hide anatomy.
            self.masks[self.position] = self.view.masks
            self.position = position
            self.mask_tool = None
            self.view = replace(self.view, frame=-1, masks=self.masks.get(position, ()))
            self.own_window = None
        self.change_view(replace(self.view, frame=frame))

    def action_model_view(self) -> None:
        """The exact pixels that the tower is given, or the image again."""
        self.model_view = not self.model_view
        self.mask_tool = None
        self.action_fit()
        self.redraw()

    # Masks

    def action_masks(self) -> None:
        """The mask tool, with a rectangle in the middle of what is visible; or its end."""
        if self.mask_tool is not None or self.picture is None:
            self.action_mask_end()
            return
        self.model_view = False
        width, height = self.viewport.canvas
        self._place(self._tool_between((width * 0.4, height * 0.45), (width * 0.6, height * 0.55)))

    def action_mask_keep(self) -> None:
        if self.mask_tool is not None:
            masks = self.mask_tool.fixed(self.view.masks)
            self.mask_tool = replace(self.mask_tool, index=masks.index(self.mask_tool.box))
            self.change_view(replace(self.view, masks=masks))

    def action_mask_next(self) -> None:
        if self.mask_tool is not None:
            self._place(self.mask_tool.next(self.view.masks))

    def action_mask_remove(self) -> None:
        if self.mask_tool is not None:
            masks = self.mask_tool.removed(self.view.masks)
            self.mask_tool = replace(self.mask_tool, index=None)
            self.change_view(replace(self.view, masks=masks))

    def action_mask_end(self) -> None:
        self._place(None)

    def _place(self, tool: MaskTool | None) -> None:
        self.mask_tool = tool
        self.redraw()

    def _mask_step(self, right: int, down: int) -> tuple[int, int]:
        """A key's step in own pixels: one pixel of the screen, and at least one of the image."""
        pixel = 1 / self.viewport.scale
        return right * max(1, round(pixel * self.viewport.pixel_aspect)), down * max(1, round(pixel))

    def _tool_between(self, first: tuple[float, float], last: tuple[float, float]) -> MaskTool | None:
        """A new mask between two points of the canvas."""
        if self.picture is None:
            return None
        facts = self.picture.facts
        return MaskTool.at((facts.width_px, facts.height_px), *self.viewport.to_image(*first), *self.viewport.to_image(*last))

    # Mouse: positions are pixels of the canvas

    def _point(self, event: events.MouseEvent) -> tuple[float, float]:
        region = self._surface.content_region
        across, down = self.graphics.pixels_per_cell
        return (event.screen_x - region.x + 0.5) * across, (event.screen_y - region.y + 0.5) * down

    def on_mouse_down(self, event: events.MouseDown) -> None:
        if self.picture is None or not self._surface.region.contains(event.screen_x, event.screen_y):
            return
        kind = "mask" if self.mask_tool else "window" if event.shift or event.button == 3 else "pan"
        self._drag = (kind, *self._point(event))
        self.capture_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if self._drag is None:
            return
        kind, x0, y0 = self._drag
        x, y = self._point(event)
        if kind == "mask":
            self._place(self._tool_between((x0, y0), (x, y)))
            return
        self._drag = (kind, x, y)
        right, down = (x - x0) / self.viewport.canvas[0], (y - y0) / self.viewport.canvas[1]
        if kind == "pan":
            self._look(self.viewport.panned(-right, -down))
        else:
            self.alter_window(-down * DRAG_STEPS, right * DRAG_STEPS)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        if self._drag is None:
            return
        kind, x0, y0 = self._drag
        self._drag = None
        self.release_mouse()
        if kind == "mask" and self._point(event) != (x0, y0):
            self.action_mask_keep()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        self._wheel(event, 1)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        self._wheel(event, -1)

    def _wheel(self, event: events.MouseEvent, down: int) -> None:
        if self.picture is None:
            return
        event.stop()
        stack = len(self.pictures) > 1 or self.picture.facts.frames > 1
        if event.ctrl or (self.viewport.zoom == 1 and not stack):
            self._look(self.viewport.zoomed(ZOOM_STEP**-down, at=self._point(event)))
        elif self.viewport.zoom == 1:
            self.action_step(down)
        else:
            self._look(self.viewport.panned(*((PAN_STEP * down / 2, 0.0) if event.shift else (0.0, PAN_STEP * down / 2))))
