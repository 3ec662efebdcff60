"""Which runtime was already found right for which tower: the self-check's memory, in the cache folder.

The probe costs one encoding (seconds for a large tower on a CPU), so it is made once for each tower's file, installed runtime,
device and way of attention, but each time where prompts are dense. A cache that cannot be read or written only means that the probe
is made again.
"""

from __future__ import annotations

import json
from contextlib import suppress

from edgemed.core.errors import EdgemedError
from edgemed.core.files import save_text
from edgemed.core.manifest import Manifest
from edgemed.core.paths import cache_dir
from runtimes.messages import EngineSettings, VisionCheck
from runtimes.vision import VisionEncoder

_KEPT = 100


def check_vision(
    encoder: VisionEncoder, manifest: Manifest, runtime: str, device: str, flash_attention: bool, settings: EngineSettings
) -> tuple[VisionCheck, float | None]:
    """Set the encoder's mode, by memory or by probe. Raises EngineLoadError where no mode agrees with the certificate."""
    certificate = manifest.certificate
    if certificate is None or not settings.self_check:
        return "skipped", None
    reference = manifest.files[manifest.vision.file].sha256
    attention = "on" if flash_attention else "off"
    key = f"{runtime}|{device}|flash attention {attention}|{reference}|{hash(certificate.expected_vision)}"
    known = _load()
    mode = None if settings.dense_prompts else known.get(key)  # what multiplies then is a library of this machine's own making
    if mode in ("plain", "rewrite"):
        encoder.mode = mode  # type: ignore[assignment]
        return "remembered", None
    distance = encoder.check(certificate)
    if settings.dense_prompts:
        return "probed", distance
    # Where the cache cannot be written (a read-only home), the probe is made again next time.
    with suppress(EdgemedError):
        kept = dict(list(known.items())[-_KEPT:])
        save_text(cache_dir() / "probes.json", json.dumps({**kept, key: encoder.mode}))
    return "probed", distance


def _load() -> dict[str, str]:
    try:
        data = json.loads((cache_dir() / "probes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
