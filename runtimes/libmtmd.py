"""libmtmd through ctypes: a tower with its projector that turns prepared pixels into rows for the LLM.

    tower = VisionTower(path, image_size_px=384, llm=llm, threads=2, gpu=None, rewritable=False)
    rows = tower.encode(pixels)                                  # float32 [patches, width]
    rows = tower.encode(pixels, positions=..., patches=...)      # with the graph's index inputs overwritten (rewritable towers)

libmtmd copies pixels of the tower's exact size untouched; other sizes are refused here. One thread at a time. Nothing here
knows which indices are right (see vision.py).
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp.mtmd_cpp
import numpy as np
from numpy.typing import NDArray

from edgemed.core.errors import EngineError
from runtimes import libllama
from runtimes.direct import TowerRows

lib: Any = llama_cpp.mtmd_cpp

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_GGML_TYPE_I32 = 26
_SOURCES = 10  # GGML_MAX_SRC
# The graph's index inputs that `encode` can overwrite.
_INPUTS = (b"positions", b"patches")


class _Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml.h at the pinned version, up to its name."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


class VisionTower:
    """A loaded mmproj."""

    def __init__(
        self,
        path: Path,
        image_size_px: int,
        llm: libllama.LanguageModel,
        threads: int,
        gpu: int | None,
        rewritable: bool,
        flash_attention: bool = False,
        exact: bool = False,
        direct: TowerRows | None = None,
    ) -> None:
        """`llm` is what the rows are for, `gpu` a device handle or None for the CPU. Raises EngineLoadError.

        `exact`: products of F16 weights are added up in float32. llama.cpp's CUDA backend has cuBLAS do it in F16, which costs a
        CLIP-L tower a relative error of 3e-3 (docs/LOG.md, 2026-11-22). `direct`: how rows come from a GPU, if not as libmtmd fetches them.
        """
        lib.mtmd_helper_log_set(libllama.log_callback(), ctypes.c_void_p(0))
        self._size_px, self._width = image_size_px, llm.width
        self._exact, self._direct = exact, direct
        self._wanted: dict[bytes, I32] = {}
        self._written: set[bytes] = set()
        # Addresses of the nodes at which there was something to do, in this encode and as known from earlier ones.
        self._done: set[int] = set()
        self._places: set[int] = set()
        self._remembers = True
        self._spare: F32 | None = None
        params = lib.mtmd_context_params_default()
        params.use_gpu = gpu is not None
        params.device = gpu
        params.print_timings = False
        params.n_threads = threads
        params.warmup = False  # the self-check or the first image does it
        params.flash_attn_type = int(flash_attention)
        # Kept as an attribute: libmtmd calls it as long as the tower lives.
        self._callback = self._node_callback() if rewritable or exact else None
        if self._callback is not None:
            params.cb_eval = self._callback
        # Rows are fed by us and texts tokenised elsewhere. But without a language model, libmtmd leaves unset how it counts an image's rows
        # (mtmd_context::pos_type at the pinned version), and ends the process where memory held another way by chance.
        self._ctx = lib.mtmd_init_from_file(os.fsencode(path), llm.address, params)
        if not self._ctx:
            raise libllama.load_error(f"llama.cpp could not load {path.name}.", "Run: edgemed verify, or convert the model again.")

    def close(self) -> None:
        """Free the tower."""
        lib.mtmd_free(self._ctx)

    def encode(self, pixels: bytes, positions: I32 | None = None, patches: I32 | None = None) -> F32:
        """RGB bytes of the tower's size → a new float32 [patches, width]. Raises EngineError.

        `positions` (which position embedding each row of the graph gets) and `patches` (which rows go to the projector) replace
        what llama.cpp puts there; the tower must have been made `rewritable`.
        """
        if len(pixels) != self._size_px * self._size_px * 3:
            raise EngineError(f"Expected {self._size_px}² RGB pixels, found {len(pixels)} bytes.", "Prepare the image again.")
        self._wanted = {name: values for name, values in zip(_INPUTS, (positions, patches), strict=True) if values is not None}
        buffer = (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        bitmap = lib.mtmd_bitmap_init(self._size_px, self._size_px, buffer)
        chunks = lib.mtmd_input_chunks_init()
        try:
            return self._encode_chunk(bitmap, chunks)
        finally:
            self._wanted = {}
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def _encode_chunk(self, bitmap: int | None, chunks: int | None) -> F32:
        marker = lib.mtmd_default_marker()
        text = lib.mtmd_input_text(marker, len(marker), False, False)
        bitmaps = (lib.mtmd_bitmap_p_ctypes * 1)(bitmap)
        code = lib.mtmd_tokenize(self._ctx, chunks, ctypes.byref(text), bitmaps, 1)
        if code != 0 or lib.mtmd_input_chunks_size(chunks) != 1:
            raise EngineError(f"libmtmd refused an image (code {code}).", "Report this as a fault of edgemed.")
        chunk = lib.mtmd_input_chunks_get(chunks, 0)
        rows = int(lib.mtmd_input_chunk_get_n_tokens(chunk))
        out, fetched = self._memory(rows), False
        if self._direct is None:
            code = self._run(chunk)
        else:
            code, fetched = self._direct.run(out, lambda: self._run(chunk))
        if code != 0:
            raise EngineError(f"libmtmd could not encode an image (code {code}).", "Free some memory and try again.")
        if missed := self._wanted.keys() - self._written:
            name = missed.pop().decode()
            raise EngineError(f"llama.cpp's vision graph has no input '{name}' to correct.", "Install the pinned llama-cpp-python.")
        if not fetched:  # out of memory that libmtmd overwrites at the next encode
            np.copyto(out, np.ctypeslib.as_array(lib.mtmd_get_output_embd(self._ctx), shape=out.shape))
        return out

    def _memory(self, rows: int) -> F32:
        if self._direct is not None:
            return self._direct.memory(rows, self._width)
        out, self._spare = self._spare, None
        return out if out is not None and len(out) == rows else np.empty((rows, self._width), np.float32)

    def prepare(self, rows: int) -> None:
        """Get memory for the next image's rows ready: pages that are new have to be cleared by the system at their first use."""
        if self._direct is not None:
            self._direct.prepare(rows, self._width)
        elif self._spare is None:
            self._spare = np.empty((rows, self._width), np.float32)
            self._spare.fill(0)

    def _run(self, chunk: int) -> int:
        """Encode with whatever the graph's nodes need; libmtmd's code."""
        code = self._run_once(chunk)
        if code == 0 and self._places and self._done != self._places:
            # Another graph than before: it is looked at whole, now and from now on.
            self._remembers = False
            self._places.clear()
            code = self._run_once(chunk)
        if code == 0 and self._remembers:
            self._places |= self._done
        return code

    def _run_once(self, chunk: int) -> int:
        self._done, self._written = set(), set()
        return int(lib.mtmd_encode_chunk(self._ctx, chunk))

    def _node_callback(self) -> object:
        """What llama.cpp calls before a part of the graph runs, when its inputs already lie on the device that will read them.

        It is called for each of some 800 nodes before the first is computed, so that its time adds to the encode's. libmtmd draws the
        graph in the same memory each time: from the second encode on, only the nodes known from the first are looked at.
        """
        places, visit = self._places, self._visit

        def on_node(node: int, _ask: bool, _user: object) -> bool:
            if node in places or not places:
                visit(node)
            return False  # no need to stop after this node, and so no call after it

        callback: object = libllama.lib.ggml_backend_sched_eval_callback(on_node)
        return callback

    def _visit(self, node: int) -> None:
        if self._exact and libllama.set_exact(node):
            self._done.add(node)
        for address in _Tensor.from_address(node).src:
            if address is None:
                break
            source = _Tensor.from_address(address)
            if source.type == _GGML_TYPE_I32 and (name := _input_name(source)):
                self._done.add(node)
                self._write(name, address, source)

    def _write(self, name: bytes, address: int, tensor: _Tensor) -> None:
        values = self._wanted.get(name)
        if values is not None and tensor.ne[0] == values.size:
            libllama.set_tensor(address, values)
            self._written.add(name)


def _input_name(tensor: _Tensor) -> bytes | None:
    """Which of the index inputs it is; on a GPU it is a copy with a longer name: "CUDA0#positions#0"."""
    return next((name for name in _INPUTS if name in tensor.name), None)
