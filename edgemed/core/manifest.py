"""manifest.json of a converted folder (an artifact): what it is made of, how it is to be fed, and proof that it is right.

    artifact = load_artifact(folder)        # sizes checked; raises ArtifactError
    verify_files(artifact)                  # hashes too

The converter writes it, everything else reads it. Knows nothing about GGUF.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from edgemed.core.conversation import ConversationTemplate
from edgemed.core.errors import ArtifactError, EdgemedError
from edgemed.core.files import describe_os_error, found_at, os_errors, save_text, sha256_file
from edgemed.core.images import ImagePreparation
from edgemed.core.model import Count, Float32, Frozen
from edgemed.core.paths import cache_dir

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
# Of a file in the manifest's own folder.
FileName = Annotated[str, Field(pattern=r"^[^/\\]*$")]


class FileRecord(Frozen):
    """Size and SHA-256 of one file."""

    size_bytes: Count
    # Empty while a conversion has not come to it.
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")


class TensorRecord(Frozen):
    """One tensor's way: name in the source, name and GGUF type in `file` ("llm" or "mmproj"), shape in numpy order."""

    source: str
    name: str
    file: Literal["llm", "mmproj"]
    type: str
    shape: tuple[Count, ...]
    size_bytes: Count


class SourceRecord(Frozen):
    """Where the weights came from."""

    reader: str
    path: str
    files: dict[str, FileRecord]
    notes: tuple[str, ...] = ()


class LlmRecord(Frozen):
    """The language model's file."""

    file: FileName
    arch: str
    quant: str
    parameters: Count
    bits_per_weight: float = Field(ge=0, allow_inf_nan=False)
    context_length: int = Field(ge=1, lt=1 << 32)
    vocab_size: Count
    embedding_length: Count


class VisionRecord(Frozen):
    """The tower and projector's file, and how the embedding of one image is laid out for the LLM."""

    file: FileName
    tower: Literal["clip", "siglip"]
    quant: str
    parameters: Count
    bits_per_weight: float = Field(ge=0, allow_inf_nan=False)
    # Rows that the LLM sees for one image, after what follows.
    image_tokens: int = Field(ge=1, le=1 << 20)
    # SigLIP: the first patch's row is left out (TinyLLaVA_Factory and HF's "default" strategy drop token 0 of any tower).
    skip_first_token: bool = False
    # CLIP: CLS is kept, as the first row (LLaVA's "cls_patch", HF's "full").
    keep_cls: bool = False


class Summary(Frozen):
    """A probe's summary (core/probe.py), row by row, and how far a file may be from it (relative L2)."""

    rows: tuple[tuple[Float32, ...], ...]
    tolerance: Float32 = Field(gt=0)

    @field_validator("rows")
    @classmethod
    def _check_rows(cls, rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        if len({len(row) for row in rows}) != 1:
            raise ValueError("expected rows, all of one length")
        return rows


class Certificate(Frozen):
    """The parity certificate. `vision` comes from the source weights (numpy); the rest is measured by `edgemed verify`."""

    probe: str
    vision: Summary
    # The same from the written file's own weights, where its types lose more than rounding: a runtime must come close to these.
    vision_stored: Summary | None = None
    # Measured by verify on the converted files: distances are relative L2.
    vision_distance: float | None = None
    logits: Summary | None = None
    transformers_vision_distance: float | None = None
    transformers_logits_distance: float | None = None
    verified_with: str | None = None

    @property
    def expected_vision(self) -> Summary:
        """What a runtime must come close to: the probe by the written file's own weights."""
        return self.vision_stored or self.vision


class CalibrationRecord(Frozen):
    """What a quantisation was fitted to: which questions (hash of `samples`), how many answer positions, how long it took."""

    dataset: str
    split: str
    samples: Count
    samples_sha256: str
    positions: Count
    elapsed_s: float
    # What both files were allowed to take, where that was asked for; else the plain recipe's bytes.
    budget_bytes: int | None = None


class Manifest(Frozen):
    """manifest.json."""

    schema_version: int = SCHEMA_VERSION
    name: str
    bits: int
    created: str
    tool_versions: dict[str, str]
    source: SourceRecord
    llm: LlmRecord
    vision: VisionRecord
    files: dict[str, FileRecord]
    image: ImagePreparation
    template: ConversationTemplate
    # Where a SentencePiece tokenizer puts its blank: nowhere (BPE), before the first text, before each chunk between images (LLaVA
    # tokenises these apart), or ("each", the legacy way) before each chunk and behind each control token in it.
    space_prefix: Literal["none", "first", "chunk", "each"]
    recipe: dict[str, str]
    calibration_sha256: str | None = None
    calibration: CalibrationRecord | None = None
    tensors: tuple[TensorRecord, ...]
    certificate: Certificate | None = None


@dataclass(frozen=True)
class Artifact:
    """A converted folder with its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def llm_path(self) -> Path:
        return self.folder / self.manifest.llm.file

    @property
    def mmproj_path(self) -> Path:
        return self.folder / self.manifest.vision.file


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, whole or not at all."""
    save_text(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")


def load_artifact(folder: Path) -> Artifact:
    """Read a folder's manifest and check that its files are there with the recorded sizes. Raises ArtifactError."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        found = "no manifest.json in it" if folder.is_dir() else found_at(folder, "no such folder")
        raise ArtifactError(
            f"Expected a converted model's folder at {folder}, found {found}.",
            "Make one with: edgemed convert SOURCE --bits 4",
        )
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise describe_os_error(error, path) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"Expected JSON in {path}, found something else ({error}).", "Convert the model again.") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"Expected manifest schema {SCHEMA_VERSION} in {path}, found {version}.", "Convert the model with this edgemed."
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"Expected a valid manifest in {path}, found {error.error_count()} problem(s), first at '{where}': {first['msg']}.",
            "Convert the model again.",
        ) from error
    artifact = Artifact(folder, manifest)
    for name, record in manifest.files.items():
        if Path(name).name != name:
            raise ArtifactError(f"Expected plain file names in {path}, found '{name}'.", "Convert the model again.")
        _check_size(folder / name, record)
    for name in (manifest.llm.file, manifest.vision.file):
        if name not in manifest.files:
            raise ArtifactError(
                f"Expected '{name}' among the manifest's files in {folder}, found no record of it.", "Convert the model again."
            )
    return artifact


def _check_size(path: Path, record: FileRecord) -> None:
    if not path.is_file():
        raise ArtifactError(f"Expected the file {path}, found {found_at(path)}.", "Copy the whole folder, or convert the model again.")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise ArtifactError(
            f"Expected {record.size_bytes} bytes in {path}, found {size}.", "Copy the file again, or convert the model again."
        )


def verify_files(artifact: Artifact, use_cache: bool = True) -> None:
    """Compare every file's SHA-256 with the manifest. Raises ArtifactError.

    A file already hashed is not read again while its path, size, inode and times stay the same (`use_cache`).
    """
    for name, record in artifact.manifest.files.items():
        path = artifact.folder / name
        with os_errors(path):
            _check_size(path, record)
            stat = path.stat()
            key = f"{path.resolve()}|{stat.st_size}|{stat.st_ino}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{record.sha256}"
            if use_cache and key in _verified():
                continue
            found = sha256_file(path)
        if found != record.sha256:
            raise ArtifactError(
                f"Expected SHA-256 {record.sha256[:12]}… for {path}, found {found[:12]}….",
                "Copy the file again, or convert the model again.",
            )
        _remember(key)


def _verified_path() -> Path:
    return cache_dir() / "verified.json"


def _verified() -> list[str]:
    try:
        keys = json.loads(_verified_path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []  # a cache that cannot be read is a cache that is empty
    return keys if isinstance(keys, list) else []


def _remember(key: str) -> None:
    # Where the cache cannot be written (a read-only home), files are hashed again next time.
    with suppress(EdgemedError):
        save_text(_verified_path(), json.dumps([*_verified()[-199:], key]))
