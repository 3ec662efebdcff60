"""A GGUF's header, read with bounds checks: metadata, and each tensor's shape, type and place. No tensor data is touched.

    header = read_header(path)              # raises ArtifactError
    header.values["general.architecture"]; header.tensors["output.weight"].shape

libmtmd trusts a file and ends the process, or reads short, where it is damaged; this reads it first. Shapes are in ggml's order
(fastest axis first). Long arrays (vocabularies) are skipped and kept as their length.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgemed.core.errors import ArtifactError
from edgemed.core.files import os_errors

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Longer arrays are vocabularies and merges, which nobody here looks at.
KEPT_ARRAY = 64
_MAX_ENTRIES = 1 << 20
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}

Value = str | int | float | bool | list["Value"]


@dataclass(frozen=True)
class ArrayLength:
    """Stands for an array too long to keep."""

    length: int


@dataclass(frozen=True)
class TensorInfo:
    """Shape in ggml's order, ggml type number, and place in the file in bytes."""

    shape: tuple[int, ...]
    type: int
    start: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF says about itself."""

    path: Path
    values: dict[str, object]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, tensor_bytes: Callable[[int, tuple[int, ...]], int | None]) -> Header:
    """Parse and check that every tensor lies inside the file; `tensor_bytes(type, shape)` knows ggml's types. Raises ArtifactError."""
    with os_errors(path), path.open("rb") as f:
        if path.stat().st_size < 24:
            raise _damaged(path, "a file of a few bytes")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(path, data).read(tensor_bytes)
            except (struct.error, UnicodeDecodeError, OverflowError, IndexError) as error:
                raise _damaged(path, f"a header that breaks off or makes no sense ({error})") from error


def _damaged(path: Path, found: str) -> ArtifactError:
    return ArtifactError(f"Expected a GGUF model in {path.name}, found {found}.", "Copy the file again, or convert the model again.")


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def read(self, tensor_bytes: Callable[[int, tuple[int, ...]], int | None]) -> Header:
        if self.data[:4] != MAGIC:
            raise _damaged(self.path, "a file of another kind")
        self.at = 4
        version, n_tensors, n_values = self.scalar("<I"), self.scalar("<Q"), self.scalar("<Q")
        if version not in VERSIONS or n_tensors > _MAX_ENTRIES or n_values > _MAX_ENTRIES:
            raise _damaged(self.path, f"version {version} with {n_tensors} tensors and {n_values} values")
        values = dict((self.string(), self.value(int(self.scalar("<I")))) for _ in range(int(n_values)))
        infos = [self.tensor() for _ in range(int(n_tensors))]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _damaged(self.path, f"an alignment of {alignment}")
        start = (self.at + alignment - 1) // alignment * alignment
        tensors = {name: self.place(name, shape, kind, start + offset, tensor_bytes) for name, shape, kind, offset in infos}
        return Header(self.path, values, tensors)

    def scalar(self, layout: str) -> int | float:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value  # type: ignore[no-any-return]

    def string(self) -> str:
        n = int(self.scalar("<Q"))
        if self.at + n > len(self.data):
            raise _damaged(self.path, "a text that runs past the file's end")
        text = self.data[self.at : self.at + n].decode()
        self.at += n
        return text

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _damaged(self.path, f"a value of unknown kind {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> object:
        kind, n = int(self.scalar("<I")), int(self.scalar("<Q"))
        if n <= KEPT_ARRAY:
            return [self.value(kind) for _ in range(n)]
        if kind in _SCALARS:
            self.at += n * struct.calcsize(_SCALARS[kind])
        elif kind == _STRING and n <= len(self.data):
            for _ in range(n):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
        else:
            raise _damaged(self.path, f"an array of unknown kind {kind}")
        if self.at > len(self.data):
            raise _damaged(self.path, "a list that runs past the file's end")
        return ArrayLength(n)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.string(), int(self.scalar("<I"))
        if not 1 <= dims <= 4:
            raise _damaged(self.path, f"a tensor '{name[:64]}' of {dims} dimensions")
        shape = tuple(int(self.scalar("<Q")) for _ in range(dims))
        return name, shape, int(self.scalar("<I")), int(self.scalar("<Q"))

    def place(
        self, name: str, shape: tuple[int, ...], kind: int, start: int, tensor_bytes: Callable[[int, tuple[int, ...]], int | None]
    ) -> TensorInfo:
        size = tensor_bytes(kind, shape)
        if size is None:
            raise _damaged(self.path, f"the tensor {name} of unknown type {kind} or of rows {shape[0]} long that this type cannot hold")
        if start + size > len(self.data):
            missing = start + size - len(self.data)
            raise _damaged(self.path, f"its end {missing} bytes too early, in the tensor {name}")
        return TensorInfo(shape, kind, start, size)
