"""`edgemed chat`: the terminal program, composed of a model, the case store and the screens.

What can be refused is refused here, in a sentence, before the screens take the terminal over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgemed.cli.options import Fake, Folder, Language, LoadDevice, Look, Store, Watch
from edgemed.cli.output import Output, Progress

if TYPE_CHECKING:
    from edgemed.core.manifest import Artifact
    from runtimes.consult import Answering
    from runtimes.planner import Target

_NEEDED = ("textual", "textual_image", "sqlcipher3", "argon2", "pydicom")


def chat(
    folder: Folder = None,
    store: Store = None,
    watch: Watch = None,
    device: LoadDevice = None,
    language: Language = "",
    theme: Look = "",
    fake: Fake = False,
) -> None:
    """Cases, images and answers in the terminal: an encrypted record for a clinic. Advises only; not for clinical use."""
    check_terminal()
    check_packages()
    from edgemed.cli.cases import actor_name, store_file
    from edgemed.clinic.store import harden_process
    from edgemed.tui.app import ChatOptions, build_app
    from edgemed.tui.models import FakeModels

    harden_process()
    options = ChatOptions(check_language(language), check_theme(theme), check_watch(watch))
    models = FakeModels() if fake else ScreenModels(folder, device, find_given(folder))
    app = build_app(models, store_file(store), actor_name(), options)
    try:
        app.run()
    finally:
        app.finish()
    if app.return_code:
        raise typer.Exit(app.return_code)


def check_terminal() -> None:
    """Raises InputError where there is no terminal to draw on, or to type on."""
    from edgemed.core.errors import InputError

    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.__stderr__)):
        raise InputError(
            "Expected a terminal for the chat, found a file or a pipe in its place.", "Run it in a terminal; for scripts use: edgemed ask"
        )


def check_packages() -> None:
    """Raises MissingExtraError."""
    from edgemed.core.errors import MissingExtraError

    if not all(find_spec(name) for name in _NEEDED):
        raise MissingExtraError.of("The terminal program", "clinic")


def check_language(language: str) -> str:
    """A language of the screens, or empty. Raises InputError."""
    from edgemed.tui.i18n import choose_language

    return choose_language(language) if language else ""


def check_theme(theme: str) -> str:
    """A look, or empty. Raises InputError."""
    from edgemed.core.errors import InputError
    from edgemed.tui.themes import THEMES

    if theme and theme not in THEMES:
        raise InputError(f"Expected --theme {', '.join(THEMES)}, found '{theme}'.", "Pass one of them.")
    return theme


def check_watch(folder: Path | None) -> Path | None:
    """A folder that is there, or None. Raises InputError."""
    from edgemed.core.errors import InputError
    from edgemed.core.files import found_at

    if folder is not None and not folder.is_dir():
        raise InputError(f"Expected a folder to watch at {folder}, found {found_at(folder)}.", "Check --watch.")
    return folder


def find_given(folder: Path | None) -> Artifact | None:
    """The model of DIR, where one is given. Raises ArtifactError."""
    from edgemed.cli.compose import require_artifact

    return None if folder is None else require_artifact(folder, Output(quiet=True))


@dataclass(frozen=True)
class ScreenOutput(Output):
    """A conversion's words while the screens own the terminal: progress goes to them, the rest into the manifest alone."""

    show: Callable[[int, int], None] = lambda done, total: None

    def note(self, text: str) -> None:
        """Nothing: there is no line for it."""

    def warn(self, text: str) -> None:
        """Nothing: the manifest keeps a source's notes."""

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """To the screen."""
        yield lambda what, done, total: self.show(done, total)


class ScreenModels:
    """edgemed.tui.models.Models over the converter and the engine, which the screens may not import."""

    def __init__(self, folder: Path | None, device: str | None, given: Artifact | None) -> None:
        from edgemed.core.registry import DEFAULT_MODEL

        self._given, self._device = given, device
        self.name = folder.name if folder else DEFAULT_MODEL
        self._target: Target | None = self._load_target() if device else None

    def find(self) -> Artifact | None:
        """The model of DIR, or the converted edgemed-demo, or None."""
        from edgemed.cli.compose import find_default

        return self._given or find_default()

    def make(self, progress: Callable[[int, int], None]) -> Artifact:
        """Convert edgemed-demo."""
        from edgemed.cli.compose import require_artifact

        return require_artifact(None, ScreenOutput(quiet=True, show=progress))

    def fit(self, artifact: Artifact) -> tuple[str, ...]:
        """What fits this machine."""
        from edgemed.cli.plan import make_wish
        from edgemed.tui.models import describe_fit
        from runtimes.opening import plan_artifact

        return describe_fit(plan_artifact(artifact, self._load_target(), make_wish()))

    def open(self, artifact: Artifact, note: Callable[[str], None]) -> Answering:
        """The engine, by the best plan that memory allows."""
        from edgemed.cli.plan import make_wish
        from runtimes.opening import open_planned

        return open_planned(artifact, self._load_target(), make_wish(), note)[0]

    def _load_target(self) -> Target:
        from runtimes.opening import load_target

        return load_target(self._device)
