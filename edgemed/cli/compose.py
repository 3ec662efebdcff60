"""Where rooms that never import one another meet: source → converter, artifact → engine. Used by the commands.

A SOURCE is a path or a name of models.toml, a DIR a converted folder or an artifact's name; left out, either means edgemed-demo,
which is converted first where that was not done yet. Nothing here reaches for the network: what is not pulled is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.cli.output import Output

if TYPE_CHECKING:
    from PIL.Image import Image

    from converters.calibration.moments import Calibration
    from converters.checkpoint import Checkpoint
    from converters.recipes import Recipe
    from edgemed.clinic.records import View
    from edgemed.core.images import ImagePreparation
    from edgemed.core.manifest import Artifact
    from edgemed.core.registry import ModelEntry
    from edgemed.data import Sample
    from runtimes.messages import EngineSettings, PreparedImage

DEMO_BITS = 4
# Calibration never sees what a model is measured on.
CALIBRATION_SPLIT = "train"
CALIBRATION_SAMPLES = 256
CONTEXT_TOKENS = 2048
# Kept for question and answer beside images.
TEXT_TOKENS = 1024


@dataclass(frozen=True)
class SourceOptions:
    """What a person said about a source; None where the checkpoint or models.toml tells."""

    adapter: Path | None = None
    base: Path | None = None
    vision_tower: Path | None = None
    mmproj: Path | None = None
    template: str | None = None
    image_mode: str | None = None
    name: str | None = None
    pre: str | None = None


def find_entry(source: str | None) -> ModelEntry | None:
    """The registry's entry that SOURCE means, or None where it is a path."""
    from edgemed.core.registry import DEFAULT_MODEL, load_registry

    registry = load_registry()
    if source is None:
        return registry.find(DEFAULT_MODEL)
    if Path(source).exists() or not registry.knows(source):
        return None
    return registry.find(source)


def named_bits(source: str | None) -> int | None:
    """The bits of an artifact's name, as in `convert tinyllava-med-fq4`; None for any other SOURCE."""
    entry = find_entry(source)
    return next((a.bits for a in entry.artifacts if a.name == source), None) if entry else None


def open_source(source: str | None, options: SourceOptions) -> Checkpoint:
    """Open a checkpoint by path or name. Raises CheckpointError, RegistryError, HubError (not pulled)."""
    from converters.readers import open_checkpoint
    from edgemed.core.errors import CheckpointError
    from edgemed.core.files import found_at
    from edgemed.core.registry import locate_sources

    entry = find_entry(source)
    if entry is None:
        path = Path(source or "")
        if not path.exists():
            raise CheckpointError(
                f"Expected a checkpoint at {path}, found {found_at(path, 'no such file or folder')}, and no model of that name.",
                "See: edgemed models list",
            )
        return open_checkpoint(
            path,
            adapter=options.adapter,
            base=options.base,
            vision_tower=options.vision_tower,
            mmproj=options.mmproj,
            template=options.template,
            image_mode=options.image_mode,
            name=options.name,
            pre=options.pre,
        )
    parts = locate_sources(entry)
    checkpoint = open_checkpoint(
        parts.model,
        adapter=options.adapter or parts.adapter,
        base=options.base or parts.base,
        vision_tower=options.vision_tower or parts.vision_tower,
        mmproj=options.mmproj or parts.mmproj,
        template=options.template or entry.template,
        image=_image_of(entry, options.image_mode),
        name=options.name or entry.name,
        pre=options.pre,
    )
    return replace(checkpoint, rounded=checkpoint.rounded or entry.rounded)


def _image_of(entry: ModelEntry, mode: str | None) -> ImagePreparation:
    from edgemed.core.errors import InputError
    from edgemed.core.images import ImagePreparation

    if mode not in (None, "pad", "stretch", "crop"):
        raise InputError(f"Expected --image-mode pad, stretch or crop, found '{mode}'.", "Pass one of them.")
    return ImagePreparation.model_validate(entry.image.model_dump() | ({"mode": mode} if mode else {}))


def default_out(source: str | None, checkpoint: Checkpoint, recipe: Recipe, plain_bits: bool, suffix: str = "") -> Path:
    """Where an artifact goes without --out: its name in models.toml, else the model's name and type."""
    from edgemed.core.paths import artifacts_dir

    entry = find_entry(source)
    if entry is not None and plain_bits:
        return artifacts_dir() / entry.artifact_name(recipe.bits)
    folder = artifacts_dir() / f"{folder_name(checkpoint.name)}-{recipe.llm}{suffix}"
    _check_owner(folder, checkpoint)
    return folder


def folder_name(name: str) -> str:
    """A checkpoint's name is whatever its folder or its authors say: it must not lead out of the folder."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def _check_owner(folder: Path, checkpoint: Checkpoint) -> None:
    """Two checkpoints of one name must not take each other's place. Raises InputError."""
    from edgemed.core.errors import EdgemedError, InputError
    from edgemed.core.files import real_path
    from edgemed.core.manifest import MANIFEST_NAME, load_artifact

    if not (folder / MANIFEST_NAME).is_file():
        return
    try:
        path = load_artifact(folder).manifest.source.path
    except EdgemedError:
        return  # damaged: writing it anew is the way out
    if real_path(Path(path)) != real_path(checkpoint.path):
        raise InputError(
            f"Expected {folder} to be free or made from {checkpoint.path}, found a model made from {path}.",
            "Choose another folder with --out, or another name with --name.",
        )


@dataclass(frozen=True)
class Fitting:
    """What a calibrated conversion is fitted to: training questions and, where said, the bytes that both files may take."""

    dataset: str
    samples: Sequence[Sample]
    budget_bytes: int | None = None


def read_fitting(calibrate: str | None, count: int | None, budget: str | None) -> Fitting | None:
    """From --calibrate, --samples and --budget. Raises InputError, DatasetError, MissingExtraError."""
    from edgemed.core.errors import InputError
    from edgemed.core.units import parse_bytes

    budget_bytes = parse_bytes(budget) if budget is not None else None
    if calibrate is None:
        for option, value in (("--budget", budget), ("--samples", count)):
            if value is not None:
                raise InputError(f"Expected --calibrate with {option}, found {option} alone.", "Add --calibrate slake=PATH.")
        return None
    from converters.calibration.gather import draw_samples
    from converters.calibration.reference import check_extra
    from edgemed.data import load_samples

    check_extra("Calibrating")
    name, sep, path = calibrate.partition("=")
    if not (sep and name and path):
        raise InputError(f"Expected --calibrate NAME=PATH, found '{calibrate}'.", "For example: --calibrate slake=../data/slake")
    return Fitting(name, draw_samples(load_samples(name, Path(path), CALIBRATION_SPLIT), count or CALIBRATION_SAMPLES), budget_bytes)


def calibrate_checkpoint(checkpoint: Checkpoint, fitting: Fitting, out: Output) -> Calibration:
    """Gather moments, with a bar."""
    from converters.calibration.gather import gather

    out.note(f"Calibrating on {len(fitting.samples)} questions of {fitting.dataset}: transformers runs in float32, this takes minutes …")
    with out.progress() as bar:
        return gather(
            checkpoint, fitting.samples, fitting.dataset, CALIBRATION_SPLIT, progress=lambda done, total: bar("calibrate", done, total)
        )


def convert_source(
    source: str | None,
    options: SourceOptions,
    recipe: Recipe,
    out: Output,
    *,
    out_dir: Path | None = None,
    plain_bits: bool = True,
    threads: int | None = None,
    fitting: Fitting | None = None,
) -> Artifact:
    """Read, calibrate where asked, quantise and write; notes and progress bars on stderr."""
    from converters.convert import convert

    checkpoint = open_source(source, options)
    plain = plain_bits and fitting is None
    folder = out_dir or default_out(source, checkpoint, recipe, plain, "-calibrated" if fitting else "")
    if out_dir is not None:
        _check_owner(out_dir, checkpoint)
    if fitting and checkpoint.rounded and recipe.bits == 4:
        # edgemed-demo lost two points of open recall on SLAKE by it (docs/LOG.md, 2026-11-28).
        out.warn(
            "This model learnt with the rounding errors of the plain 4-bit types, which a calibration replaces by others. Measure both with"
            " edgemed eval."
        )
    calibration = calibrate_checkpoint(checkpoint, fitting, out) if fitting else None
    out.note(f"Converting {checkpoint.name} ({checkpoint.reader}) to {recipe.llm}, tower {recipe.vision}, into {folder}")
    with out.progress() as bar:
        artifact = convert(
            checkpoint,
            folder,
            recipe,
            calibration=calibration,
            budget_bytes=fitting.budget_bytes if fitting else None,
            threads=threads,
            progress=lambda done, total: bar("convert", done, total),
        )
    for note in artifact.manifest.source.notes:
        out.warn(note)
    return artifact


def require_artifact(folder: Path | None, out: Output) -> Artifact:
    """The artifact of a folder or of a name; edgemed-demo, converted now if need be, where none is given."""
    from converters.staging import recover
    from edgemed.core.manifest import load_artifact
    from edgemed.core.paths import artifacts_dir

    if folder is not None:
        named = artifacts_dir() / folder.name
        if not folder.exists() and len(folder.parts) == 1 and named.is_dir():
            folder = named
        recover(folder)
        return load_artifact(folder)
    found = find_default()
    if found is not None:
        return found
    from converters.recipes import Recipe

    return convert_source(None, SourceOptions(), Recipe.of(bits=DEMO_BITS), out)


def find_default() -> Artifact | None:
    """The converted edgemed-demo, or None where that was not done yet. Raises ArtifactError where it is damaged."""
    from converters.staging import recover
    from edgemed.core.manifest import MANIFEST_NAME, load_artifact
    from edgemed.core.paths import artifacts_dir
    from edgemed.core.registry import DEFAULT_MODEL, load_registry

    default = artifacts_dir() / load_registry().find(DEFAULT_MODEL).artifact_name(DEMO_BITS)
    recover(default)
    return load_artifact(default) if (default / MANIFEST_NAME).is_file() else None


def open_view(path: Path, view: View, out: Output) -> tuple[Image, View]:
    """An image file, plain or DICOM, as a person sees it, and the view with the window that was used. Warns of what it may show.

    Raises ImageError, DicomError, MissingExtraError.
    """
    from edgemed.clinic.imaging import open_picture, suspect_burnt_in

    picture = open_picture(path)
    used = picture.resolve(view)
    image = picture.render(view)
    for warning in (*picture.facts.warnings, *suspect_burnt_in(picture)):
        out.warn(f"{picture.name}: {warning}")
    if picture.facts.frames > 1:
        out.warn(f"{picture.name}: frame {view.frame} of 0 to {picture.facts.frames - 1} is looked at; --frame chooses another.")
    return image, used


def prepare_view(image: Image, artifact: Artifact) -> PreparedImage:
    """An image that a person saw, as the artifact's tower was trained to see it."""
    from edgemed.core.images import prepare
    from runtimes.consult import pack_pixels

    return pack_pixels(prepare(image, artifact.manifest.image))


def prepare_images(paths: Sequence[Path], artifact: Artifact) -> tuple[PreparedImage, ...]:
    """Plain image files as the artifact's tower was trained to see them. Raises ImageError."""
    from runtimes.engine import prepare_image

    return tuple(prepare_image(artifact, path) for path in paths)


def engine_settings(artifact: Artifact, images: int = 1, context: int | None = None) -> EngineSettings:
    """One conversation: the context that most models have, more where so many images need it, at most what the model has."""
    from runtimes.messages import EngineSettings

    m = artifact.manifest
    wanted = context or max(CONTEXT_TOKENS, images * m.vision.image_tokens + TEXT_TOKENS)
    return EngineSettings(context_tokens=min(wanted, m.llm.context_length))
