"""The vision half of a parity certificate: the probe's right embedding, summarised, and how far a runtime may be from it.

    certificate, notes = build_certificate(checkpoint, planned, mmproj_path)

The right embedding comes from the source weights. Where types lose more than rounding, the written file's weights are read back
and run through the same forward pass: that tells what quantisation alone does to the probe, and a runtime must come close to it,
which a wrong graph does not, however coarse the types. `edgemed verify` adds what the runtime measures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader

from converters.checkpoint import F32, Checkpoint, ProjectorSpec, TensorSource, TowerSpec
from converters.forward import image_rows
from converters.quantise import Planned
from converters.tensors import GgufTensor, read_all
from converters.vision import source_names
from edgemed.core.errors import CheckpointError
from edgemed.core.manifest import Certificate, Summary
from edgemed.core.probe import PROBE_SEED, probe_pixels, relative_l2, summarise

# Relative L2 of a runtime's summary to one made from the same weights. Floats: measured at 5e-4 to 9e-4 (llama.cpp's activations
# are F16 in places). Blocks: activations are quantised to 8 bits as well, measured at 1e-2 to 2e-2; kernels differ between machines.
FLOAT_TOLERANCE = 2e-3
BLOCK_TOLERANCE = 4e-2


def count_passes(tower: TowerSpec, tensors: Sequence[Planned]) -> int:
    """How often build_certificate runs through the tower's layers."""
    return 1 + (tower.activation == "gelu") + _is_lossy(tensors)


def _is_lossy(tensors: Sequence[Planned]) -> bool:
    return any(t.type not in (Type.F32, Type.F16) for t in tensors)


def build_certificate(
    checkpoint: Checkpoint, tensors: Sequence[Planned], path: Path, after_layer: Callable[[], None] | None = None
) -> tuple[Certificate, tuple[str, ...]]:
    """The certificate, and notes on what llama.cpp or the types change, as measured on the probe (relative L2).

    `tensors` and `path` are the mmproj as planned and as written. Raises CheckpointError for weights that overflow.
    """
    pixels = probe_pixels(checkpoint.tower.image_size_px)

    def run(tower: TowerSpec, projector: ProjectorSpec, activation: str | None = None) -> F32:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # told below, by a tensor's name
            rows = summarise(image_rows(tower, projector, pixels, checkpoint.image, activation=activation, after_layer=after_layer))
        if not np.isfinite(rows).all():
            most, name = max((float(np.abs(read_all(t.source)).max()), t.source.name) for t in tensors)
            raise CheckpointError(
                f"Expected numbers for the probe image, found an overflow; the largest weight, {most:.3g}, is in '{name}'.",
                "Use an undamaged checkpoint.",
            )
        return rows

    tower, projector = checkpoint.tower, checkpoint.projector
    right = run(tower, projector)
    notes = []
    stored = None
    tolerance = FLOAT_TOLERANCE
    if tower.activation == "gelu":
        gelu = relative_l2(run(tower, projector, "gelu_pytorch_tanh"), right)
        tolerance += gelu
        notes.append(f"llama.cpp runs the tower's exact GELU in its tanh form, which moves the probe's embedding by {gelu:.1e}.")
    if _is_lossy(tensors):
        stored = run(*read_back(tower, path))
        distance = relative_l2(stored, right)
        tolerance = BLOCK_TOLERANCE + distance
        notes.append(f"The tower's and projector's types move the probe's embedding by {distance:.1e}.")
    certificate = Certificate(
        probe=PROBE_SEED,
        vision=_summary(right, tolerance),
        vision_stored=None if stored is None else _summary(stored, BLOCK_TOLERANCE),
    )
    return certificate, tuple(notes)


def _summary(rows: F32, tolerance: float) -> Summary:
    return Summary(rows=tuple(tuple(float(v) for v in row) for row in rows), tolerance=tolerance)


def read_back(tower: TowerSpec, path: Path) -> tuple[TowerSpec, ProjectorSpec]:
    """Tower and projector with the weights and activations of a written mmproj. Zeros that pad the feed-forward stay in."""
    names = source_names(tower.layers)
    tensors: dict[str, TensorSource] = {}
    for t in GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        tensors[names[t.name]] = GgufTensor(t.name, shape, path, int(t.data_offset), t.tensor_type)
    activation = "gelu_pytorch_tanh" if tower.activation == "gelu" else tower.activation
    return replace(tower, tensors=tensors, activation=activation), ProjectorSpec("mlp2x_gelu", tensors, "gelu_pytorch_tanh")
