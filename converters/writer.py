"""A GGUF file, written in one streamed pass: metadata and tensor infos first, then each tensor's data as it is quantised.

    record = write_gguf(path, "llama", metadata, planned, threads=2)      # FileRecord with size and SHA-256

gguf's own writer makes the header; data goes past it, so that nothing waits in memory. Knows no architecture.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGUFWriter

from converters import blocks, ggml
from converters.metadata import Metadata
from converters.quantise import Planned, quantised_pieces
from edgemed.core.errors import CheckpointError
from edgemed.core.files import CHUNK_BYTES, os_errors
from edgemed.core.manifest import FileRecord

ALIGNMENT = 32
# Called with the bytes written since the last call.
Advance = Callable[[int], None]


def data_bytes(tensors: Sequence[Planned]) -> int:
    """Bytes of all tensors' data as they will lie in the file, padding included."""
    return sum(_padded(t.size_bytes) for t in tensors)


def write_gguf(
    path: Path, arch: str, metadata: Metadata, tensors: Sequence[Planned], *, threads: int, advance: Advance | None = None
) -> FileRecord:
    """Write `path` whole; on an error what was written stays, so give a temporary name. Raises CheckpointError, ResourceError."""
    compiled = blocks.worthwhile((t.type, prod(t.shape)) for t in tensors)
    for kind in {t.type for t in tensors}:
        ggml.prepare(kind)
        if compiled and blocks.can(kind):
            blocks.prepare(kind)
    with os_errors(path):
        _write_header(path, arch, metadata, tensors)
        digest = hashlib.sha256()
        with path.open("rb+") as f:
            while piece := f.read(CHUNK_BYTES):
                digest.update(piece)
            _pad(f, f.tell(), digest)
            _write_data(f, tensors, digest, threads, compiled, advance)
            size = f.tell()
    return FileRecord(size_bytes=size, sha256=digest.hexdigest())


def header_bytes(arch: str, metadata: Metadata, tensors: Sequence[Planned]) -> int:
    """Bytes of everything before the data, padding included; types make no difference to it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        with os_errors(path):
            _write_header(path, arch, metadata, tensors)
            return _padded(path.stat().st_size)


def _write_header(path: Path, arch: str, metadata: Metadata, tensors: Sequence[Planned]) -> None:
    writer = GGUFWriter(path, arch)
    for key, value in metadata.items():
        if key != "general.architecture":  # GGUFWriter has put it first
            writer.add_key_value(key, value.value, value.type, value.item)
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise CheckpointError(f"Expected every tensor once, found '{tensor.name}' twice.", "Report this checkpoint's layout.")
        seen.add(tensor.name)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_data(
    f: BinaryIO, tensors: Sequence[Planned], digest: hashlib._Hash, threads: int, compiled: bool, advance: Advance | None
) -> None:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="quantise")
    try:
        current: Planned | None = None
        written = 0
        for tensor, data in quantised_pieces(tensors, pool, threads + 2, compiled):
            if tensor is not current:
                _pad(f, written, digest)
                current, written = tensor, 0
            f.write(memoryview(data).cast("B"))
            digest.update(data)
            written += data.nbytes
            if advance:
                advance(data.nbytes)
        _pad(f, written, digest)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pad(f: BinaryIO, written: int, digest: hashlib._Hash) -> None:
    padding = bytes(_padded(written) - written)
    f.write(padding)
    digest.update(padding)


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT
