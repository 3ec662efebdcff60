"""What calibration keeps of a layer: second moments of its input and of the gradient at its output. Knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from converters.checkpoint import F32
from edgemed.core.manifest import CalibrationRecord

_UNSEEN = 1e-4


@dataclass(eq=False)
class Moments:
    """Sums over tokens.

    covariance: Σ |g|²·x·xᵀ, float32 [inputs, inputs]; or its diagonal [inputs], where the input is too wide for it.
    outputs: Σ g², float32 [outputs]. columns and rows: of a token embedding, Σ g² by column and by the row that was looked up.
    """

    covariance: F32
    outputs: F32
    columns: F32 | None = None
    rows: F32 | None = None

    @property
    def importance(self) -> F32:
        """What ggml's quantisers take: a weight for each input channel, of mean about 1."""
        diagonal = self.covariance if self.covariance.ndim == 1 else np.diagonal(self.covariance)
        if self.columns is not None:
            diagonal = diagonal + self.columns
        mean = float(diagonal.mean())
        # A channel that was never seen still needs a scale that fits it a little.
        return np.maximum(diagonal / mean, _UNSEEN).astype(np.float32) if mean > 0 else np.ones(len(diagonal), np.float32)


@dataclass(frozen=True)
class Calibration:
    """Moments by GGUF name, and where they come from."""

    moments: Mapping[str, Moments]
    record: CalibrationRecord
