"""Is a converted folder right? Hashes, the probe's embedding in the engine, and the logits after it.

    parity = verify_artifact(artifact)          # raises ArtifactError (hashes), EngineLoadError (the tower is off)
    for what, found, allowed in parity.rows(): ...

What the source's weights say of the probe is in the manifest since the conversion; what the engine says is measured here. The
logits are stored in the certificate the first time, and compared with from then on, so that another machine, build or device that
answers differently is seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemed.core.conversation import Segment, Turn, render
from edgemed.core.errors import ArtifactError, EngineLoadError, ResourceError
from edgemed.core.manifest import Artifact, Certificate, Summary, save_manifest, verify_files
from edgemed.core.probe import PROBE_QUESTION, PROBE_SEED, probe_pixels, relative_l2, summarise
from runtimes.engine import Engine
from runtimes.messages import EngineSettings, PreparedImage
from runtimes.prompt import IMAGE_TOKEN

F32 = NDArray[np.float32]

# Relative L2 of the logits' summary between two runs of one file: kernels of other backends round otherwise, and quantised
# activations amplify that. A wrong tower or a misread token moves it by more than 0.5.
LOGITS_TOLERANCE = 0.15
# Positions whose logits are kept: the last of the prompt, all after the image.
LOGIT_ROWS = 8
_TEXT_TOKENS = 256


@dataclass(frozen=True)
class Parity:
    """How far the converted files are from what they should be (relative L2), and how far they may be."""

    files: int
    vision_distance: float
    vision_tolerance: float
    logits_distance: float | None
    logits_tolerance: float
    stored: bool
    runtime: str
    # To the probe by the written file's own weights, where its types lose more than rounding.
    written_distance: float | None = None
    written_tolerance: float | None = None
    transformers_vision_distance: float | None = None
    transformers_logits_distance: float | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, found, allowed) for a table."""
        logits = "stored for later" if self.logits_distance is None else f"{self.logits_distance:.2e}"
        rows = [
            ("files with the recorded SHA-256", str(self.files), "all"),
            ("tower and projector, against the source's weights", f"{self.vision_distance:.2e}", f"{self.vision_tolerance:.2e}"),
            ("logits after an image, against the last verification", logits, f"{self.logits_tolerance:.2e}"),
        ]
        if self.written_distance is not None:
            row = ("tower and projector, against the written weights", f"{self.written_distance:.2e}", f"{self.written_tolerance:.2e}")
            rows.insert(2, row)
        if self.transformers_vision_distance is not None:
            rows.append(("tower and projector, against transformers", f"{self.transformers_vision_distance:.2e}", "reported"))
            rows.append(("logits after an image, against transformers", f"{self.transformers_logits_distance:.2e}", "reported"))
        return rows

    def describe(self) -> dict[str, Any]:
        """For a result in JSON."""
        return asdict(self)


def verify_artifact(artifact: Artifact, reference: Path | None = None) -> Parity:
    """Verify a folder; what was measured goes into its certificate. Raises ArtifactError, EngineLoadError."""
    verify_files(artifact, use_cache=False)
    certificate = artifact.manifest.certificate
    if certificate is None or certificate.probe != PROBE_SEED:
        raise ArtifactError(f"Expected a parity certificate in {artifact.folder}, found none that is known.", "Convert the model again.")
    context = min(artifact.manifest.llm.context_length, artifact.manifest.vision.image_tokens + _TEXT_TOKENS)
    with Engine.open(artifact, EngineSettings(context_tokens=context)) as engine:
        rows, logits = measure_probe(engine)
        against = _compare_transformers(engine, reference, rows, logits) if reference else (None, None)
        runtime = engine.report.runtime
    distance = _compare_rows(rows, certificate.vision, "the source's weights")
    written = certificate.vision_stored
    parity = Parity(
        files=len(artifact.manifest.files),
        vision_distance=distance,
        vision_tolerance=certificate.vision.tolerance,
        logits_distance=_compare_logits(artifact, certificate, logits),
        logits_tolerance=LOGITS_TOLERANCE,
        stored=certificate.logits is None or reference is not None,
        runtime=runtime,
        written_distance=_compare_rows(rows, written, "the written weights") if written else None,
        written_tolerance=written.tolerance if written else None,
        transformers_vision_distance=against[0],
        transformers_logits_distance=against[1],
    )
    if parity.stored:
        updated = _updated(certificate, parity, logits)
        try:
            save_manifest(artifact.folder, artifact.manifest.model_copy(update={"certificate": updated}))
        except ResourceError:  # a model that belongs to somebody else is compared all the same
            return replace(parity, stored=False)
    return parity


def _probe_image(engine: Engine) -> PreparedImage:
    size_px = engine.artifact.manifest.image.size_px
    return PreparedImage(probe_pixels(size_px).tobytes(), size_px)


def _probe_segments(engine: Engine) -> list[Segment]:
    return render(engine.artifact.manifest.template, [Turn("user", PROBE_QUESTION, images=1)])


def measure_probe(engine: Engine) -> tuple[F32, F32]:
    """The probe in an engine: (rows of the image, logits [LOGIT_ROWS, vocab] of the prompt's end)."""
    image = _probe_image(engine)
    return engine.embed(image), engine.evaluate(_probe_segments(engine), [image])[-LOGIT_ROWS:]


def _compare_transformers(engine: Engine, folder: Path, rows: F32, logits: F32) -> tuple[float, float]:
    from bench.reference import measure_reference

    image = engine.artifact.manifest.image
    ids = [None if i == IMAGE_TOKEN else i for i in engine.tokenize(_probe_segments(engine))]
    right_rows, right_logits = measure_reference(folder, probe_pixels(image.size_px), image, ids)
    # Either side may have rows of padding behind the vocabulary.
    vocab = min(logits.shape[1], right_logits.shape[1])
    return relative_l2(rows, right_rows), relative_l2(logits[:, :vocab], right_logits[-LOGIT_ROWS:, :vocab])


def _compare_rows(rows: F32, expected: Summary, what: str) -> float:
    distance = relative_l2(summarise(rows), np.asarray(expected.rows, np.float32))
    if not distance <= expected.tolerance:
        raise EngineLoadError(
            f"Expected the tower within {expected.tolerance:.2g} of {what}, found {distance:.2g}.",
            "Convert the model again, or install the pinned llama-cpp-python.",
        )
    return distance


def _compare_logits(artifact: Artifact, certificate: Certificate, logits: F32) -> float | None:
    if not np.isfinite(logits).all():
        raise EngineLoadError(
            f"Expected finite logits from {artifact.llm_path}, found others.", "Check the weights that it was converted from."
        )
    if certificate.logits is None:
        return None
    distance = relative_l2(summarise(logits), np.asarray(certificate.logits.rows, np.float32))
    if not distance <= certificate.logits.tolerance:
        raise EngineLoadError(
            f"Expected logits within {certificate.logits.tolerance:.2g} of the last verification, found {distance:.2g}.",
            "Install the pinned llama-cpp-python; if this machine is right, convert the model again.",
        )
    return distance


def _updated(certificate: Certificate, parity: Parity, logits: F32) -> Certificate:
    """The first verification stays what later ones compare with; a comparison with transformers is always written down."""
    changes: dict[str, Any] = {}
    if certificate.logits is None:
        rows = tuple(tuple(float(v) for v in row) for row in summarise(logits))
        changes["logits"] = Summary(rows=rows, tolerance=LOGITS_TOLERANCE)
        changes["vision_distance"] = parity.vision_distance
        changes["verified_with"] = f"llama-cpp-python {parity.runtime}"
    if parity.transformers_vision_distance is not None:
        changes["transformers_vision_distance"] = parity.transformers_vision_distance
        changes["transformers_logits_distance"] = parity.transformers_logits_distance
    return certificate.model_copy(update=changes)
