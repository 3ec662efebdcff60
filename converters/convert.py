"""From a checkpoint to an artifact: two GGUF files and a manifest, streamed, all or nothing.

    artifact = convert(checkpoint, Path("out"), Recipe.of(bits=4))

Nothing is ever whole in memory, nothing half-written appears under its final name (staging.py). Knows no checkpoint layout
(readers/) and no quantisation rule (recipes.py).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_VERSION
from gguf import GGMLQuantizationType as Type

from converters.calibration.fit import fit_tensor
from converters.calibration.moments import Calibration
from converters.calibration.search import choose_types, measure_losses
from converters.certificate import build_certificate, count_passes
from converters.checkpoint import Checkpoint, TensorSource
from converters.llm import llm_metadata, llm_tensors
from converters.metadata import Metadata, text, u32
from converters.quantise import Planned
from converters.recipes import Recipe, file_type
from converters.staging import commit, staged
from converters.tokenizers import tokenizer_metadata
from converters.vision import PaddedTensor, vision_metadata, vision_tensors
from converters.writer import ALIGNMENT, data_bytes, header_bytes, write_gguf
from edgemed.core.errors import InputError, ResourceError
from edgemed.core.files import os_errors, real_path, sha256_file
from edgemed.core.manifest import (
    Artifact,
    FileRecord,
    LlmRecord,
    Manifest,
    SourceRecord,
    TensorRecord,
    VisionRecord,
    load_artifact,
    save_manifest,
)
from edgemed.core.units import format_bytes
from edgemed.core.versions import package_version

# Called with (done, total), in bytes; the certificate's layers count as their share of the tower's file.
Progress = Callable[[int, int], None]

# Headers with a vocabulary of 150,000 tokens take 4 MB, a manifest less than one.
_SPARE_BYTES = 8_000_000


@dataclass(frozen=True)
class Plan:
    """One file to be written."""

    kind: str
    name: str
    quant: str
    arch: str
    metadata: Metadata
    tensors: Sequence[Planned]

    @property
    def parameters(self) -> int:
        """The model's weights, without zeros that only fill blocks."""
        return sum(prod(t.source.base.shape if isinstance(t.source, PaddedTensor) else t.shape) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(t.size_bytes for t in self.tensors) / self.parameters

    @property
    def records(self) -> list[TensorRecord]:
        return [
            TensorRecord(
                source=t.source.name,
                name=t.name,
                file="llm" if self.kind == "llm" else "mmproj",
                type=t.type.name,
                shape=t.shape,
                size_bytes=t.size_bytes,
            )
            for t in self.tensors
        ]


def convert(
    checkpoint: Checkpoint,
    out_dir: Path,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    budget_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Write the artifact of `checkpoint` into `out_dir`, replacing one that is there once the new one is complete.

    With a calibration, matrices are rounded by it, and their types are the best mixture in `budget_bytes` for both files; where that
    is left out, in what the recipe's own types take.
    Raises CheckpointError (weights), RecipeError (types), ResourceError (disk full; nothing is left) and InputError (out_dir).
    """
    plans = [plan_vision(checkpoint, recipe), plan_llm(checkpoint, recipe)]
    if calibration is not None:
        plans = choose_mixture(checkpoint, recipe, plans, calibration, budget_bytes, threads or os.cpu_count() or 1)
    sources = {name: _source_path(checkpoint, name) for name in checkpoint.files}
    _check_target(out_dir, sources)
    vision, llm = plans
    size = sum(data_bytes(p.tensors) for p in plans)
    layer_bytes = data_bytes(vision.tensors) // checkpoint.tower.layers
    total = size + layer_bytes * checkpoint.tower.layers * count_passes(checkpoint.tower, vision.tensors)
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    with staged(out_dir) as staging, ThreadPoolExecutor(1, thread_name_prefix="hash") as hasher:
        _check_space(out_dir, size + _SPARE_BYTES)
        advance(0)
        hashes = hasher.submit(_hash_sources, checkpoint, sources)
        workers = threads or os.cpu_count() or 1
        files = {
            vision.name: write_gguf(staging / vision.name, vision.arch, vision.metadata, vision.tensors, threads=workers, advance=advance)
        }
        certificate, notes = build_certificate(checkpoint, vision.tensors, staging / vision.name, lambda: advance(layer_bytes))
        files[llm.name] = write_gguf(staging / llm.name, llm.arch, llm.metadata, llm.tensors, threads=workers, advance=advance)
        _sync(staging, files)
        source = SourceRecord(reader=checkpoint.reader, path=str(checkpoint.path), files=hashes.result(), notes=(*checkpoint.notes, *notes))
        manifest = _manifest(checkpoint, recipe, plans, files, source).model_copy(update={"certificate": certificate})
        if calibration is not None:
            record = calibration.record.model_copy(update={"budget_bytes": budget_bytes})
            manifest = manifest.model_copy(update={"calibration": record, "calibration_sha256": record.samples_sha256})
        save_manifest(staging, manifest)
        commit(staging, out_dir)
    return load_artifact(out_dir)


def choose_mixture(
    checkpoint: Checkpoint, recipe: Recipe, plans: Sequence[Plan], calibration: Calibration, budget_bytes: int | None, threads: int
) -> list[Plan]:
    """The recipe's plans with each matrix's type and rounding chosen by a calibration. Raises RecipeError (budget too small)."""
    positions = calibration.record.positions
    fits = {
        t.name: fit_tensor(t.source, calibration.moments[t.name], positions)
        for p in plans
        for t in p.tensors
        if t.name in calibration.moments
    }
    matrices = [replace(t, fit=fits[t.name]) for p in plans for t in p.tensors if t.name in fits]
    size = sum(header_bytes(p.arch, p.metadata, p.tensors) + data_bytes(p.tensors) for p in plans)
    # What no choice changes; a tensor may end up to ALIGNMENT bytes before the next begins.
    fixed = size - data_bytes(matrices) + ALIGNMENT * len(matrices)
    types = choose_types(
        {t.name: t.shape for t in matrices}, measure_losses(matrices, threads), size if budget_bytes is None else budget_bytes, fixed
    )
    vision, llm = plan_vision(checkpoint, recipe, types), plan_llm(checkpoint, recipe, types)
    return [replace(p, tensors=[replace(t, fit=fits.get(t.name)) for t in p.tensors]) for p in (vision, llm)]


def plan_llm(checkpoint: Checkpoint, recipe: Recipe, chosen: Mapping[str, Type] | None = None) -> Plan:
    """The LLM's file: names, types (the recipe's, but for those `chosen`), metadata."""
    tensors = llm_tensors(checkpoint.llm)
    types = recipe.llm_types(((name, source.shape) for name, source in tensors), checkpoint.rounded) | dict(chosen or {})
    quant = _label(recipe.llm, tensors, types)
    metadata = {
        **_general(checkpoint.name, quant),
        **llm_metadata(checkpoint.llm, checkpoint.name),
        **tokenizer_metadata(checkpoint.tokenizer, checkpoint.template),
    }
    return Plan("llm", f"{_file_stem(checkpoint.name)}-{quant}.gguf", quant, checkpoint.llm.arch, metadata, _planned(tensors, types))


def plan_vision(checkpoint: Checkpoint, recipe: Recipe, chosen: Mapping[str, Type] | None = None) -> Plan:
    """The tower and projector's file."""
    tower, projector, width = checkpoint.tower, checkpoint.projector, checkpoint.llm.hidden
    stored_ffn = recipe.padded_ffn(tower.ffn)
    tensors = vision_tensors(tower, projector, width=width, stored_ffn=stored_ffn)
    types = recipe.vision_types((name, source.shape) for name, source in tensors) | dict(chosen or {})
    quant = _label(recipe.vision, tensors, types)
    metadata = {**_general(checkpoint.name, quant), **vision_metadata(tower, checkpoint.image, width=width, stored_ffn=stored_ffn)}
    return Plan("mmproj", f"mmproj-{_file_stem(checkpoint.name)}-{quant}.gguf", quant, "clip", metadata, _planned(tensors, types))


def _planned(tensors: Sequence[tuple[str, TensorSource]], types: Mapping[str, Type]) -> list[Planned]:
    return [Planned(name, source, types[name]) for name, source in tensors]


def _label(asked: str, tensors: Sequence[tuple[str, TensorSource]], types: Mapping[str, Type]) -> str:
    """What a file is called after: the type asked for, or the most common one where rows did not allow that."""
    values: Counter[Type] = Counter()
    for name, source in tensors:
        values[types[name]] += prod(source.shape)
    most = values.most_common(1)[0][0].name
    return asked if asked.startswith(most) else most


def _general(name: str, quant: str) -> Metadata:
    return {"general.name": text(name), "general.quantization_version": u32(GGML_QUANT_VERSION), "general.file_type": u32(file_type(quant))}


def _file_stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _source_path(checkpoint: Checkpoint, name: str) -> Path:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    return folder / name  # an absolute name stays what it is


def _hash_sources(checkpoint: Checkpoint, paths: Mapping[str, Path]) -> dict[str, FileRecord]:
    out = {}
    for name, record in checkpoint.files.items():
        with os_errors(paths[name]):
            out[name] = record if record.sha256 else FileRecord(size_bytes=paths[name].stat().st_size, sha256=sha256_file(paths[name]))
    return out


def _check_target(out_dir: Path, sources: Mapping[str, Path]) -> None:
    # An artifact that is converted anew into its own folder would be replaced while it is read.
    if any(real_path(path).parent == real_path(out_dir) for path in sources.values()):
        raise InputError(
            f"Expected an output folder other than the source's, found {out_dir} for both.", "Choose another folder with --out."
        )


def _check_space(folder: Path, needed: int) -> None:
    with os_errors(folder):
        free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"Expected {format_bytes(needed)} of free disk space for {folder}, found {format_bytes(free)}.",
            "Free some space or choose another folder with --out.",
        )


def _sync(folder: Path, names: Mapping[str, FileRecord]) -> None:
    for name in names:
        with os_errors(folder / name), (folder / name).open("rb+") as f:
            os.fsync(f.fileno())


def _manifest(
    checkpoint: Checkpoint, recipe: Recipe, plans: Sequence[Plan], files: dict[str, FileRecord], source: SourceRecord
) -> Manifest:
    vision, llm = plans
    return Manifest(
        name=checkpoint.name,
        bits=recipe.bits,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tool_versions=tool_versions(),
        source=source,
        llm=LlmRecord(
            file=llm.name,
            arch=llm.arch,
            quant=llm.quant,
            parameters=llm.parameters,
            bits_per_weight=round(llm.bits_per_weight, 4),
            context_length=checkpoint.llm.context_length,
            vocab_size=checkpoint.llm.vocab_size,
            embedding_length=checkpoint.llm.hidden,
        ),
        vision=VisionRecord(
            file=vision.name,
            tower=checkpoint.tower.kind,
            quant=vision.quant,
            parameters=vision.parameters,
            bits_per_weight=round(vision.bits_per_weight, 4),
            image_tokens=checkpoint.tower.image_tokens,
            skip_first_token=checkpoint.tower.skip_first_token,
            keep_cls=checkpoint.tower.keep_cls,
        ),
        files=files,
        image=checkpoint.image,
        template=checkpoint.template,
        space_prefix=checkpoint.tokenizer.space_prefix,
        recipe=recipe.describe(),
        tensors=tuple(record for plan in plans for record in plan.records),
    )


def tool_versions() -> dict[str, str]:
    """What made the files."""
    names = ("edgemed", "gguf", "llama-cpp-python", "numba", "numpy")
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}
