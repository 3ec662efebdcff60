"""Which files answered: the name under which a model goes into records, reports and the audit log.

    identify_model(artifact).sha256      # of manifest.json, which holds the hashes of the weights
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemed.core.manifest import Artifact


@dataclass(frozen=True)
class ModelIdentity:
    """Which files answered: the model's name, its quant, and the SHA-256 of its manifest (which holds those of the weights)."""

    name: str
    quant: str
    sha256: str


def identify_model(artifact: Artifact) -> ModelIdentity:
    """An artifact's identity. Raises InputError or ResourceError where its manifest cannot be read any more."""
    from edgemed.core.files import os_errors, sha256_file
    from edgemed.core.manifest import MANIFEST_NAME

    path = artifact.folder / MANIFEST_NAME
    manifest = artifact.manifest
    if not manifest.files:  # the fake engine's: there is no folder
        digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()
    else:
        with os_errors(path):
            digest = sha256_file(path)
    return ModelIdentity(manifest.name, manifest.llm.quant, digest)
