"""libllama through ctypes: a model with its context, sampler chains. One of the files here that touch ctypes.

    llm = LanguageModel(path, settings, threads, no_space_prefix=False)
    llm.decode_tokens([1, 2, 3], positions=[0, 1, 2], sequences=[[0], [0], [0]], outputs=[2])
    token = sampler.sample(llm, 2)

llama_cpp is imported before numpy: the other way round, some builds crash while loading a model. Nothing here knows prompts,
images or requests. One thread at a time may decode; tokenising is safe from any.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp
import numpy as np
from llama_cpp._ctypes_extensions import load_shared_library
from numpy.typing import NDArray

from edgemed.core.errors import EngineError, EngineLoadError, EngineMemoryError
from edgemed.core.probe import relative_l2
from runtimes.account import Lines, lacks_memory, read_account
from runtimes.direct import NOT_TAKEN, ModelRows
from runtimes.gguf_header import read_header
from runtimes.libbatch import RowBatch, TokenBatch
from runtimes.messages import Buffer, EngineSettings, Sampling

# The wrapper's own type hints say array where its functions want pointers.
lib: Any = llama_cpp.llama_cpp

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

# Rows of logits that one batch may ask for (or slots, if they are more); each enlarges llama.cpp's compute buffer by a vocabulary.
MAX_OUTPUTS = 32
# Flash attention on a CPU computes this many rows at once, also where fewer are left; not with a q8_0 or bf16 cache (ggml-cpu/ops.cpp).
CPU_TILE_ROWS = 64
# Tokens that a repeat penalty looks back on.
PENALTY_TOKENS = 256
_KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
_FLASH = {"auto": -1, "off": 0, "on": 1}
_PREC_F32 = 10  # GGML_PREC_F32
# Logits of one batch computed twice on one GPU differ by less.
_SAME = 1e-3
_GPU_DEVICE_TYPES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU

_base = load_shared_library("ggml-base", lib._base_path)
_ggml = load_shared_library("ggml", lib._base_path)
# Some builds install it under its versioned name alone, some have one for each kind of processor or none apart.
_cpu_files = sorted(p for p in Path(lib._base_path).glob("*ggml-cpu[.-]*") if {".so", ".dll", ".dylib"} & set(p.suffixes))
_cpu = ctypes.CDLL(str(_cpu_files[0])) if _cpu_files and not any("ggml-cpu-" in p.name for p in _cpu_files) else None
for _library, _name, _args, _result in (
    (_base, "ggml_blck_size", [ctypes.c_int], ctypes.c_int64),
    (_base, "ggml_type_size", [ctypes.c_int], ctypes.c_size_t),
    (_base, "ggml_type_name", [ctypes.c_int], ctypes.c_char_p),
    (_base, "ggml_backend_tensor_set", [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t], None),
    (_base, "ggml_get_type_traits", [ctypes.c_int], ctypes.c_void_p),
    (_base, "ggml_prec_set_acc", [ctypes.c_void_p, ctypes.c_int], ctypes.c_bool),
    (_base, "ggml_backend_dev_description", [ctypes.c_void_p], ctypes.c_char_p),
    (_base, "ggml_backend_dev_type", [ctypes.c_void_p], ctypes.c_int),
    (_base, "ggml_backend_dev_buffer_type", [ctypes.c_void_p], ctypes.c_void_p),
    (_base, "ggml_backend_buft_alloc_buffer", [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_void_p),
    (_ggml, "ggml_backend_dev_count", [], ctypes.c_size_t),
    (_ggml, "ggml_backend_dev_get", [ctypes.c_size_t], ctypes.c_void_p),
):
    _function = getattr(_library, _name)
    _function.argtypes, _function.restype = _args, _result

# The binding's own makes a pointer object of each result; an address is all that is needed.
_logits_address = lib._lib["llama_get_logits_ith"]
_logits_address.argtypes, _logits_address.restype = [ctypes.c_void_p, ctypes.c_int32], ctypes.c_void_p


_X86_FEATURES = ("avx", "f16c", "fma", "bmi2", "avx2", "avx_vnni", "avx512", "avx512_vbmi", "avx512_vnni", "avx512_bf16")
_CPU_FEATURES = (*_X86_FEATURES, "neon", "dotprod", "fp16_va", "matmul_int8")

# ggml's number of types at the pinned version; a larger number in a file is damage or a newer format.
TYPE_COUNT = 43


def tensor_bytes(type_id: int, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor of ggml type `type_id`; None where the type is unknown or a row is no whole number of blocks."""
    if not 0 <= type_id < TYPE_COUNT:
        return None
    block, size = int(_base.ggml_blck_size(type_id)), int(_base.ggml_type_size(type_id))
    if block == 0 or size == 0 or shape[0] % block:
        return None
    count = 1
    for n in shape:
        count *= n
    return count // block * size


def set_tensor(tensor: int, values: I32) -> None:
    """Overwrite a tensor's data, wherever its buffer is."""
    _base.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def set_exact(tensor: int) -> bool:
    """Have a graph's node, if it is a matrix product or an attention, add up in float32; whether it is one."""
    return bool(_base.ggml_prec_set_acc(tensor, _PREC_F32))


def gpu_devices() -> list[tuple[int, str]]:
    """(handle, description) of each GPU that the installed build can use."""
    handles = [int(_ggml.ggml_backend_dev_get(i)) for i in range(int(_ggml.ggml_backend_dev_count()))]
    found = [h for h in handles if int(_base.ggml_backend_dev_type(h)) in _GPU_DEVICE_TYPES]
    return [(h, bytes(_base.ggml_backend_dev_description(h)).decode()) for h in found]


def hold_gpu_memory(device: int, size: int) -> int | None:
    """Take `size` bytes of a GPU until the process ends; a handle, or None where they cannot be had."""
    handle = gpu_devices()[device][0]
    buffer = _base.ggml_backend_buft_alloc_buffer(_base.ggml_backend_dev_buffer_type(handle), size)
    return int(buffer) if buffer else None


def has_gpu_library() -> bool:
    """Whether the installed build can use NVIDIA's GPUs, told without waking one."""
    return bool(cuda_libraries())


def cuda_libraries() -> list[Path]:
    """The files of it: a build installs a copy under each of its names, and the linker takes one of them."""
    return sorted(path for path in Path(lib._base_path).iterdir() if "ggml-cuda" in path.name)


def runtime_version() -> str:
    """llama.cpp's version with the size and time of the installed library, so that a rebuild counts as another runtime."""
    files = [p for p in sorted(Path(lib._base_path).iterdir()) if "mtmd" in p.name or "ggml" in p.name]
    stats = [p.stat() for p in files]
    return f"{lib.llama_version().decode()} {sum(s.st_size for s in stats)} {max(s.st_mtime_ns for s in stats)}"


_lines = Lines()


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _user: object) -> None:
    # 4 is GGML_LOG_LEVEL_ERROR; stderr is collected by the parent for its error messages.
    if level == 4:
        os.write(2, text)
    _lines.add(level, text.decode(errors="replace"))


def quiet_logs() -> None:
    """Only errors to stderr; sizes are kept for `current_account`."""
    lib.llama_log_set(_log, ctypes.c_void_p(0))


def log_callback() -> object:
    """The callback of `quiet_logs`, for libmtmd."""
    return _log


def current_account() -> tuple[Buffer, ...]:
    """What llama.cpp and libmtmd have said of their buffers so far, in this process."""
    return read_account(_lines.kept)


def load_error(message: str, hint: str) -> EngineLoadError:
    """The error for something that did not load: for lack of memory, if llama.cpp's own last errors say so."""
    return (EngineMemoryError if lacks_memory(_lines.errors) else EngineLoadError)(message, hint)


def cpu_features() -> frozenset[str]:
    """What of the processor the installed build uses, in ggml's names: "avx2", "neon", "dotprod", "matmul_int8", …"""
    if _cpu is None:
        return frozenset()
    return frozenset(name for name in _CPU_FEATURES if getattr(_cpu, f"ggml_cpu_has_{name}")())


class NotANumberError(EngineError):
    """The model computed NaN; what the cache holds of it may spoil what comes after."""


class LanguageModel:
    """A loaded GGUF with its context and one reusable batch."""

    def __init__(self, path: Path, settings: EngineSettings, threads: int, no_space_prefix: bool) -> None:
        """`no_space_prefix`: our prompts carry SentencePiece's leading blank themselves. Raises EngineLoadError."""
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), _model_params(settings, no_space_prefix))
        if not self._model:
            raise load_error(f"llama.cpp could not load {path.name}.", "Run: edgemed verify, or convert the model again.")
        self.kv_tokens = settings.kv_tokens or settings.slots * settings.context_tokens
        self._ctx = lib.llama_init_from_model(self._model, _context_params(settings, threads, self.kv_tokens))
        if not self._ctx:
            lib.llama_model_free(self._model)
            raise load_error(
                f"llama.cpp could not make a context of {self.kv_tokens} tokens for {path.name}, mostly for lack of memory.",
                "Use a smaller context or fewer slots.",
            )
        self._memory = lib.llama_get_memory(self._ctx)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.batch_tokens = int(lib.llama_n_batch(self._ctx))
        self.width = int(lib.llama_model_n_embd(self._model))
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        self.bos = int(lib.llama_vocab_bos(self._vocab))
        self.size_bytes = int(lib.llama_model_size(self._model))
        self._end_tokens = frozenset(t for t in range(self.vocab_size) if lib.llama_vocab_is_eog(self._vocab, t))
        self.max_outputs = max(MAX_OUTPUTS, settings.slots)
        self._batch = TokenBatch(self.batch_tokens, self.max_outputs)
        self._single = TokenBatch(1, 1)
        self._single.fill([0], [[0]], [0])
        self._single.struct.token = self._single.token_pointer
        self._rows = RowBatch(self._ctx, self.width)
        self._direct: ModelRows | None = None
        self._piece_buffer = ctypes.create_string_buffer(256)
        self._views: dict[int, F32] = {}
        # What the tokenizer reads as a control token wherever it stands, where it can be broken up (ConversationTemplate.control). Plain
        # words that a vocabulary marks so are left to people.
        written = (self.piece(t, special=True).decode(errors="replace") for t in range(self.vocab_size) if self.is_control(t))
        self.controls = tuple(text for text in written if len(text) > 1 and not text.isalnum() and not any(map(str.isspace, text[:2])))
        self.token_rows = find_token_rows(path)
        # A state that is carried from token to token cannot be cut back, and a sliding window forgets what another sequence would need.
        carried = lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model)
        self.reuses = not carried and int(lib.llama_model_n_swa(self._model)) == 0
        # Of how many rows of a batch the attention costs the same as of fewer.
        on_gpu = settings.gpu_layers != 0 and bool(gpu_devices())
        tiled = not on_gpu and settings.flash_attention != "off" and settings.kv_type in ("f16", "f32")
        self.tile_rows = CPU_TILE_ROWS if tiled and settings.micro_batch % CPU_TILE_ROWS == 0 else 1

    @property
    def address(self) -> Any:
        """llama_model, for libmtmd."""
        return self._model

    def close(self) -> None:
        """Free context and model."""
        self._rows.close()
        lib.llama_free(self._ctx)
        lib.llama_model_free(self._model)

    def kv_bytes(self, settings: EngineSettings) -> int:
        """Bytes of the key-value cache, from the model's shape (llama.cpp tells it only in its log)."""
        heads, kv_heads = int(lib.llama_model_n_head(self._model)), int(lib.llama_model_n_head_kv(self._model))
        row, cells = self.width // heads * kv_heads, int(lib.llama_n_ctx(self._ctx))
        return int(lib.llama_model_n_layer(self._model)) * 2 * cells * (tensor_bytes(_KV_TYPES[settings.kv_type], (row,)) or 0)

    # -- text ---------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, control tokens recognised, none added."""
        data = text.encode()
        # A token covers at least one byte, but for a few that SentencePiece adds around.
        size = len(data) + 8
        buffer = (ctypes.c_int32 * size)()
        n = int(lib.llama_tokenize(self._vocab, data, len(data), buffer, size, False, True))
        if n < 0:
            raise EngineError(f"llama.cpp could not tokenise a text of {len(data)} bytes.", "Shorten it.")
        return buffer[:n]

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens are empty unless `special`."""
        n = int(lib.llama_token_to_piece(self._vocab, token, self._piece_buffer, len(self._piece_buffer), 0, special))
        if n < 0:
            self._piece_buffer = ctypes.create_string_buffer(-n)
            return self.piece(token, special)
        return self._piece_buffer.raw[:n]

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return token in self._end_tokens

    def is_control(self, token: int) -> bool:
        """Whether the token has no text of its own."""
        return bool(lib.llama_vocab_is_control(self._vocab, token))

    # -- decoding -----------------------------------------------------------------------------------------------------

    def decode_tokens(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> int:
        """Run a batch of token ids; logits are kept for the batch indices `outputs`. Returns llama_decode's code (0 is good).

        A token may belong to several sequences, if they share all cells before it.
        """
        batch = self._batch
        n = batch.fill(positions, sequences, outputs)
        batch.tokens[:n] = tokens
        batch.struct.token, batch.struct.embd = batch.token_pointer, None
        return int(lib.llama_decode(self._ctx, batch.struct))

    def decode_token(self, token: int, position: int, sequence: int) -> int:
        """`decode_tokens` of one token whose logits are wanted: an answer's next one."""
        return int(lib.llama_decode(self._ctx, self._single.set(token, position, sequence)))

    def decode_rows(self, rows: Sequence[F32], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]) -> int:
        """`decode_tokens` of embeddings, one after another: float32 [any, width] each, whose rows are contiguous."""
        self._batch.check(positions, sequences, outputs)
        return int(lib.llama_process(self._ctx, lib.LLAMA_PROCESS_TYPE_DECODE, self._rows.fill(rows, positions, sequences, outputs)))

    @property
    def takes_rows(self) -> bool:
        """Whether `decode_among` can be used."""
        return self._direct is not None

    def take_rows(self) -> None:
        """Have images' rows go to the GPU past the batches, having seen it work. With dense prompts and all layers on the GPU only.

        Raises EngineLoadError.
        """
        if self.token_rows is None:
            return
        self._direct = ModelRows()
        ids = [(k + 1) * self.vocab_size // 6 for k in range(4)]
        known = [(1, self.token_rows(ids[1:3]))]
        positions, sequences, outputs = range(4), [[0]] * 4, [3]
        found = []
        for tokens, images in ((ids, []), ([ids[0], 0, 0, ids[3]], known)):
            code = self.decode_among(tokens, images, positions, sequences, outputs)
            if code == 0:
                found.append(self.logits(3).copy())
            self.forget(0, 0)
            if code != 0:
                raise load_error("llama.cpp did not take an image's rows on their way to the GPU.", "Leave dense_prompts out.")
        if not relative_l2(found[1], found[0]) < _SAME:
            raise load_error("An image's rows did not arrive on the GPU as they were sent.", "Leave dense_prompts out.")

    def decode_among(
        self,
        tokens: Sequence[int],
        images: Sequence[tuple[int, F32]],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        outputs: Sequence[int],
    ) -> int:
        """`decode_tokens`, some of which are images' rows: the number of the first, float32 [any, width]; their ids mean nothing.

        Returns NOT_TAKEN, too, after which rows go the other way.
        """
        assert self._direct is not None
        code = self._direct.run(images, len(tokens), self.width, lambda: self.decode_tokens(tokens, positions, sequences, outputs))
        if code == NOT_TAKEN:
            self._direct = None
        return code

    def logits(self, index: int) -> F32:
        """A view of the last batch's logits at batch index `index`, float32 [vocab]; valid until the next decode."""
        address = _logits_address(self._ctx, index)
        if not address:
            raise EngineError(f"llama.cpp kept no logits for row {index}.", "Report this as a fault of edgemed.")
        view = self._views.get(address)
        if view is None:
            # A view costs more to make than to search, and llama.cpp's rows stay where they are from token to token.
            if len(self._views) > self.max_outputs:
                self._views.clear()
            view = np.frombuffer((ctypes.c_float * self.vocab_size).from_address(address), np.float32)
            self._views[address] = view
        return view

    def sample(self, sampler: Sampler, index: int) -> int:
        """Draw a token from the logits at batch index `index`. Raises NotANumberError."""
        logits = self.logits(index)
        first = int(logits.argmax())  # of several that are not, the first
        if math.isnan(logits[first]):
            raise NotANumberError("Expected numbers for an answer's next word, found NaN.", "Ask another way, or run: edgemed verify")
        # The chain would copy the vocabulary's logits into an array of candidates first.
        return first if sampler.greedy else int(lib.llama_sampler_sample(sampler.chain, self._ctx, index))

    # -- key-value cache ----------------------------------------------------------------------------------------------

    def forget(self, sequence: int, start: int) -> None:
        """Drop a sequence's cells from position `start` on."""
        lib.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def wipe(self) -> None:
        """Empty the cache, and set its memory to 0."""
        lib.llama_memory_clear(self._memory, True)

    def share(self, source: int, target: int, stop: int) -> None:
        """Let `target` see `source`'s cells of positions below `stop`, without a copy (the cache is unified)."""
        lib.llama_memory_seq_cp(self._memory, source, target, 0, stop)


# Architectures whose graph takes an embedding's row as it is. Some others scale it first.
_PLAIN_ROWS = frozenset({"llama", "qwen2", "phi2", "stablelm"})


class _TypeTraits(ctypes.Structure):
    """ggml_type_traits in ggml.h, to the field that is needed."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def find_token_rows(path: Path) -> Callable[[Sequence[int]], F32] | None:
    """What makes rows of token ids, float32 [n, width], as llama.cpp's graph looks them up; None for an architecture not known to."""
    header = read_header(path, tensor_bytes)
    table = header.tensors.get("token_embd.weight")
    if table is None or header.values.get("general.architecture") not in _PLAIN_ROWS:
        return None
    width, row_bytes = table.shape[0], table.size_bytes // table.shape[1]
    stored = np.memmap(path, np.uint8, "r", table.start, (table.shape[1], row_bytes))
    convert = _TypeTraits.from_address(_base.ggml_get_type_traits(table.type)).to_float

    def rows(ids: Sequence[int]) -> F32:
        taken = np.ascontiguousarray(stored[list(ids)])
        if not convert:  # float32 has no conversion
            return taken.view(np.float32)
        out = np.empty((len(ids), width), np.float32)
        convert(taken.ctypes.data, out.ctypes.data, out.size)  # rows are whole blocks, so that all of them are one row
        return out

    return rows


class Sampler:
    """A chain of llama.cpp's samplers."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if sampling.repeat_penalty != 1.0:
            self._add(lib.llama_sampler_init_penalties(vocab_size, PENALTY_TOKENS, sampling.repeat_penalty, 0.0, 0.0))
        self.greedy = sampling.temperature <= 0 and sampling.repeat_penalty == 1.0
        if sampling.temperature <= 0:
            self._add(lib.llama_sampler_init_greedy())
            return
        if sampling.top_k > 0:
            self._add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            self._add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            self._add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(lib.llama_sampler_init_temp(sampling.temperature))
        # 0xFFFFFFFF would ask llama.cpp for a seed by chance; -1 is a seed like any other.
        self._add(lib.llama_sampler_init_dist(sampling.seed % 0xFFFFFFFF))

    def _add(self, sampler: object) -> None:
        lib.llama_sampler_chain_add(self.chain, sampler)

    def accept(self, tokens: Sequence[int]) -> None:
        """Tell the chain of tokens that it did not draw (a prompt's, for the repeat penalty)."""
        for token in tokens:
            lib.llama_sampler_accept(self.chain, token)

    def close(self) -> None:
        """Free the chain."""
        lib.llama_sampler_free(self.chain)


def _model_params(settings: EngineSettings, no_space_prefix: bool) -> Any:
    params = lib.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    params.split_mode = lib.LLAMA_SPLIT_MODE_NONE
    # A negative main GPU means none at all, not even for large batches.
    params.main_gpu = settings.device if settings.gpu_layers != 0 and gpu_devices() else -1
    params.use_extra_bufts = settings.repack
    if no_space_prefix:
        overrides = (lib.llama_model_kv_override * 2)()  # the second, empty one ends the list
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL
        overrides[0].key = b"tokenizer.ggml.add_space_prefix"
        overrides[0].value.val_bool = False
        params.kv_overrides = overrides
    return params


def _context_params(settings: EngineSettings, threads: int, kv_tokens: int) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx = kv_tokens
    params.n_batch = settings.batch_tokens
    params.n_ubatch = min(settings.micro_batch, settings.batch_tokens)
    params.n_seq_max = settings.slots
    params.n_outputs_max = max(MAX_OUTPUTS, settings.slots)
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = _FLASH[settings.flash_attention]
    params.type_k = params.type_v = _KV_TYPES[settings.kv_type]
    params.kv_unified = True
    params.offload_kqv = params.op_offload = settings.gpu_layers != 0
    params.no_perf = True
    return params
