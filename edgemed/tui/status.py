"""The line above the keys: which model, its quant, memory in use, tokens a second, and whether it is answering."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

from edgemed.core.errors import EdgemedError
from edgemed.core.manifest import Artifact
from edgemed.core.text import one_line
from edgemed.core.units import format_bytes
from edgemed.tui.engines import EngineHolder
from edgemed.tui.i18n import _
from runtimes.messages import EngineStats

if TYPE_CHECKING:
    from edgemed.tui.app import ChatApp

# How often a working engine is asked for its memory and speed.
STATS_S = 2.0


@dataclass(frozen=True)
class ModelState:
    """What the line says."""

    model: str = ""
    state: str = "none"
    memory_bytes: int = 0
    tokens_per_s: float = 0.0
    answering: bool = False
    note: str = ""

    @classmethod
    def of(cls, artifact: Artifact | None, engines: EngineHolder) -> ModelState:
        """Before any figures are there."""
        model = f"{one_line(artifact.manifest.name)} · {one_line(artifact.manifest.llm.quant)}" if artifact else ""
        return cls(model, engines.state, note=one_line(engines.note))

    def with_stats(self, stats: EngineStats) -> ModelState:
        """With an engine's figures: the memory of its process and, where it has one, of the GPU."""
        memory = (stats.memory.pss_bytes or stats.memory.rss_bytes) + (stats.memory.device_process_bytes or 0)
        return replace(self, memory_bytes=memory, tokens_per_s=stats.tokens_per_s)

    def describe(self) -> str:
        """The line's text."""
        if not self.model:
            return _("no model: press F3")
        doing = {
            "none": _("not loaded"),
            "loading": _("loading …"),
            "ready": _("answering …") if self.answering else _("ready"),
            "failed": _("could not be loaded"),
        }[self.state]
        memory = format_bytes(self.memory_bytes) if self.memory_bytes else ""
        speed = _("{speed} tokens/s").format(speed=f"{self.tokens_per_s:.1f}") if self.tokens_per_s else ""
        return " · ".join(part for part in (self.model, memory, speed, doing) if part)


class StatusBar(Static):
    """The line. Screens that have an engine's user in them set `answering`."""

    DEFAULT_CSS = """
    StatusBar { height: 1; background: $panel; color: $foreground; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
    """

    state: reactive[ModelState] = reactive(ModelState())

    def on_mount(self) -> None:
        app: ChatApp = self.app  # type: ignore[assignment]
        self.state = ModelState.of(app.artifact, app.engines)
        self.set_interval(STATS_S, self.ask_engine)
        self.ask_engine()

    def watch_state(self, state: ModelState) -> None:
        self.update(Content(state.describe()))

    def ask_engine(self) -> None:
        """Take figures now."""
        if self.state.state == "ready" and self.screen.is_current:
            self.run_worker(self._take_stats, exclusive=True, group="stats")  # type: ignore[arg-type]

    async def _take_stats(self) -> None:
        app: ChatApp = self.app  # type: ignore[assignment]
        try:
            stats = await app.offload(app.engines.stats)
        except EdgemedError:  # it died and does not come back: the next question says why
            stats = None
        if stats is not None:
            self.state = self.state.with_stats(stats)
