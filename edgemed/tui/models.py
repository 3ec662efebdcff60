"""Where the program's model comes from: a protocol that the command line fills in, since it alone may convert and load.

    models.find()                 # the artifact that is there, or None
    models.make(progress)         # converts one; long
    models.fit(artifact)          # what of it fits this machine, in a few lines
    models.open(artifact, note)   # an engine

`FakeModels` answers without a model, for tests and `edgemed chat --fake`. All of it is for worker threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from edgemed.core.manifest import Artifact
from edgemed.core.units import format_bytes
from runtimes.consult import Answering
from runtimes.fake import FakeEngine, Script, fake_artifact
from runtimes.planner import Plan

Progress = Callable[[int, int], None]


class Models(Protocol):
    """A model to be found, made and opened."""

    @property
    def name(self) -> str:
        """What `make` makes."""

    def find(self) -> Artifact | None:
        """The model on this machine. Raises ArtifactError where it is damaged."""

    def make(self, progress: Progress) -> Artifact:
        """Convert the model. Raises CheckpointError, HubError (not pulled), ResourceError."""

    def fit(self, artifact: Artifact) -> tuple[str, ...]:
        """What fits this machine, in lines. Raises ResourceError where nothing does."""

    def open(self, artifact: Artifact, note: Callable[[str], None]) -> Answering:
        """Load it. Raises EngineError and its kin."""


def describe_fit(plan: Plan) -> tuple[str, ...]:
    """A plan for this machine in lines."""
    places = [(place, plan.estimate.dynamic_bytes(place)) for place in ("GPU", "CPU")]
    sizes = ", ".join(f"{format_bytes(size)} {'GPU memory' if place == 'GPU' else 'memory'}" for place, size in places if size)
    return (f"{plan.target.profile.title}: {sizes}, context of {plan.settings.context_tokens} tokens.", *plan.reasons)


class FakeModels:
    """The fake engine's: there at once, or made when asked (`missing`)."""

    name = "fake"

    def __init__(self, script: Script | None = None, missing: bool = False) -> None:
        self.engine: FakeEngine | None = None
        self._script, self._missing = script, missing

    def find(self) -> Artifact | None:
        return None if self._missing else fake_artifact()

    def make(self, progress: Progress) -> Artifact:
        for done in range(1, 5):
            progress(done, 4)
        self._missing = False
        return fake_artifact()

    def fit(self, artifact: Artifact) -> tuple[str, ...]:
        return ("No model is loaded: answers are made up.",)

    def open(self, artifact: Artifact, note: Callable[[str], None]) -> Answering:
        self.engine = FakeEngine(self._script, artifact)
        return self.engine
