"""Every error that edgemed raises on purpose, as one tree.

    EdgemedError                 one sentence (expected, found) and a hint (what to do)
    ├── InputError               what the person handed over cannot be used
    │   ├── ImageError           missing, empty, not an image, too large
    │   │   └── DicomError       a DICOM file: truncated, hostile, or of a kind that cannot be shown
    │   ├── DatasetError         a data set's files or rows
    │   ├── CheckpointError      a model to read: missing shard, wrong shape, unknown layout
    │   │   └── UnsupportedError an architecture or type that has no counterpart in llama.cpp
    │   ├── ArtifactError        a converted folder: hash, size, pair or manifest is wrong
    │   ├── RegistryError        models.toml or a name looked up in it
    │   ├── RecipeError          a training or quantisation recipe
    │   └── ContextOverflowError a conversation longer than the context
    ├── StoreError               the case store: not there, damaged, from a newer version, in use by another program
    │   ├── PassphraseError      the passphrase is wrong, too short, or was tried too often
    │   └── AuditError           the audit log was changed
    ├── HubError                 a download: unreachable, incomplete, wrong hash
    ├── EndpointError            a server that answers questions: unreachable, refuses, or has no such model
    ├── EngineError              llama.cpp's process
    │   ├── EngineLoadError      the model does not load, or fails its self-check
    │   │   └── EngineMemoryError it does not load because memory could not be had: a smaller plan may
    │   └── EngineDiedError      the process ended while it was needed
    ├── ResourceError            the machine: disk full, too little memory, no such device
    └── MissingExtraError        an optional dependency is not installed

Foreign errors are turned into these at one border each (files: core/files.py, images: core/images.py,
hub: hub/, llama.cpp: runtimes/). Nothing here prints; the command line formats.
"""

from __future__ import annotations


class EdgemedError(Exception):
    """Base of the tree. `message` is one sentence, `hint` names the next thing to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[EdgemedError], tuple[str, str]]:
        return type(self), (self.message, self.hint)


class InputError(EdgemedError):
    """What the person handed over cannot be used."""


class ImageError(InputError):
    """An image is missing, empty, no image, or too large."""


class DicomError(ImageError):
    """A DICOM file is truncated, hostile, or of a kind that cannot be shown."""


class DatasetError(InputError):
    """A data set's files or rows are not as its format says."""


class CheckpointError(InputError):
    """A model to read is incomplete, corrupt or of an unknown layout."""


class UnsupportedError(CheckpointError):
    """An architecture or type that llama.cpp has no counterpart for."""


class ArtifactError(InputError):
    """A converted folder does not match its manifest, or its files do not match each other."""


class RegistryError(InputError):
    """models.toml is wrong, or a name is not in it."""


class RecipeError(InputError):
    """A training or quantisation recipe is wrong."""


class ContextOverflowError(InputError):
    """A conversation does not fit the context."""


class StoreError(EdgemedError):
    """The case store is not there, damaged, from a newer version, or in use by another program."""


class PassphraseError(StoreError):
    """The passphrase is wrong, too short, or was tried too often."""


class AuditError(StoreError):
    """The audit log was changed, or an entry of it is missing."""


class HubError(EdgemedError):
    """A download failed, was cut, or arrived with another hash."""


class EndpointError(EdgemedError):
    """A server that answers questions cannot be reached, refuses, or has no such model."""


class EngineError(EdgemedError):
    """Something about the process that runs llama.cpp."""


class EngineLoadError(EngineError):
    """The model does not load, or fails its self-check."""


class EngineMemoryError(EngineLoadError):
    """The model does not load because memory could not be had; a smaller plan may."""


class EngineDiedError(EngineError):
    """The engine's process ended while it was needed."""


class ResourceError(EdgemedError):
    """The machine lacks disk, memory or a device."""


class MissingExtraError(EdgemedError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, what: str, extra: str) -> MissingExtraError:
        """The error for a feature `what` that needs the extra `extra` of pyproject.toml."""
        return cls(f"{what} needs packages that are not installed.", f"Run: pip install 'edgemed[{extra}]'")
