"""What an engine is asked and what it answers: frozen values that travel between the parent and the engine's process.

    request = Request(turns=(Turn("user", "What is shown?", images=1),), images=(image,), max_tokens=64)
    for event in engine.submit(request): ...       # Token, Token, …, then one Finished or Failed

Knows neither numpy nor llama.cpp, so that a screen or a web handler can import it for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edgemed.core.conversation import Turn
from edgemed.core.errors import EdgemedError

FinishReason = Literal["end", "stop", "length", "cancelled"]
# How the tower's graph is run: as llama.cpp does it, or with CLIP's positions and rows rewritten (see vision.py).
VisionMode = Literal["plain", "rewrite"]
VisionCheck = Literal["probed", "remembered", "skipped"]
# Whether a GPU is one for dense prompts, and whether their library was built (dense.py).
DenseState = Literal["no", "not built", "built"]


@dataclass(frozen=True)
class EngineSettings:
    """How a model is loaded. Zero-cost to change between loads, fixed within one.

    `context_tokens` is what one conversation may use, at most what the model was trained on; the key-value cache has room for
    `slots` of them unless `kv_tokens` says less. `gpu_layers` -1 puts every layer on the GPU where the installed build has one, 0
    keeps all on the CPU.
    """

    context_tokens: int = 2048
    slots: int = 1
    # Cells of the key-value cache that all slots share; None: slots × context_tokens.
    kv_tokens: int | None = None
    # None: physical cores.
    threads: int | None = None
    # Most tokens handed to llama.cpp at once, and most it computes at once.
    batch_tokens: int = 512
    micro_batch: int = 512
    # Prompt tokens a step while another slot is answering, so that a long prompt does not stall its stream.
    shared_prefill_tokens: int = 128
    gpu_layers: int = -1
    device: int = 0
    kv_type: Literal["f16", "f32", "bf16", "q8_0"] = "f16"
    flash_attention: Literal["auto", "on", "off"] = "auto"
    # "auto": on a CPU, and on a GPU where the tower's heads have a size that this makes faster (shape.py).
    vision_flash_attention: Literal["auto", "on", "off"] = "auto"
    # Where the vision tower is computed; "auto": where the layers are, the GPU if any is there.
    tower: Literal["auto", "gpu", "cpu"] = "auto"
    # Compare the tower with the manifest's certificate at the first load by this runtime.
    self_check: bool = True
    # Image embeddings kept for follow-up questions.
    embedding_cache_bytes: int = 128_000_000
    # CPU weights are repacked for speed into memory of their own; False keeps the mapped file's pages only.
    repack: bool = True
    # Keep CUDA's own memory small: no thread stacks in its context, small workspaces for cuBLAS (libcuda.py).
    shrink_context: bool = True
    # Multiply long prompts as dense BF16 matrices: sooner on large GPUs, for more memory; its library must have been built (dense.py).
    dense_prompts: bool = False
    # Bytes of private memory that the engine's process may take, to emulate a smaller machine; None: no limit (not on Windows).
    memory_limit_bytes: int | None = None
    # The engine's process is ended where it is waited for and has neither run a batch nor encoded an image for so long; on a weak CPU
    # either may take minutes.
    silence_limit_s: float = 1200.0


@dataclass(frozen=True)
class PreparedImage:
    """Pixels at the tower's exact size: `pixels` is RGB, row by row, size_px × size_px × 3 bytes."""

    pixels: bytes = field(repr=False)
    size_px: int


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0 is greedy, whatever the rest says but for `repeat_penalty`.

    top_k 0 and top_p 1 and min_p 0 switch these filters off. The same seed, request and slots' load give the same text.
    """

    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 40
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """A conversation to be continued. `turns` end with the user's; `images` are all turns' images, in order."""

    turns: tuple[Turn, ...] = field(repr=False)
    images: tuple[PreparedImage, ...] = field(default=(), repr=False)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 512
    # Beside the template's own.
    stop: tuple[str, ...] = ()
    # Put each token's log-probability (natural logarithm, before sampling filters) into its event.
    logprobs: bool = False
    # Go on to `max_tokens` past every end and stop: what is measured then has one length.
    ignore_end: bool = False


@dataclass(frozen=True)
class Usage:
    """Counts of tokens. `cached_tokens` of the prompt were in the key-value cache already; `late_tokens` came after a cancel."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    new_tokens: int
    late_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds. queue: submit to slot; encode: images (0 if cached); prefill: slot to first token; first_token: submit to first token.

    `decode_tokens_per_s` counts the tokens after the first over `decode_s`.
    """

    queue_s: float
    encode_s: float
    prefill_s: float
    first_token_s: float
    decode_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Token:
    """One token was drawn. `text` is what it lets out: empty while a character or a possible stop string is incomplete.

    The texts of all tokens joined are the answer. The end token is one of them (its text is whatever was still held back).
    """

    text: str
    id: int
    index: int
    logprob: float | None = None


@dataclass(frozen=True)
class Finished:
    """The answer ended: the model's end token, a stop string, max_tokens or the context's end, or a cancel."""

    text: str
    reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Failed:
    """The request cannot be answered. Comes before the first token, unless the process died."""

    error: EdgemedError


Event = Token | Finished | Failed


@dataclass(frozen=True)
class Collected:
    """A request of a group, answered: `logprobs` are the tokens' natural logarithms, in order, where the request asked for them."""

    finished: Finished
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """Memory that llama.cpp or libmtmd holds: weights, cache, output, compute, tower weights or tower compute; where; bytes."""

    what: str
    place: str
    size_bytes: int


@dataclass(frozen=True)
class LoadReport:
    """What loading found. `vision_distance` is the probe's relative L2 (None: not probed now, see `vision_check`).

    `account` is the runtime's own (account.py); libmtmd's compute buffer joins it at the first image, in EngineStats.
    """

    load_s: float
    model_bytes: int
    vision_bytes: int
    kv_bytes: int
    kv_tokens: int
    devices: tuple[str, ...]
    vision_mode: VisionMode
    vision_check: VisionCheck
    vision_distance: float | None
    runtime: str
    account: tuple[Buffer, ...] = ()


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of a process tree. `pss` shares mapped pages out fairly, `anonymous` leaves mapped files out; None: the system won't say."""

    pid: int
    rss_bytes: int
    pss_bytes: int | None
    anonymous_bytes: int | None
    device_process_bytes: int | None
    device_used_bytes: int | None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot. tokens_per_s is drawn tokens over the last seconds with work, all slots together."""

    pid: int
    slots: int
    busy: int
    queued: int
    kv_used_tokens: int
    kv_size_tokens: int
    tokens_per_s: float
    total_tokens: int
    images_encoded: int
    embeddings_reused: int
    model_bytes: int
    vision_bytes: int
    kv_bytes: int
    restarts: int
    memory: MemoryReport
    account: tuple[Buffer, ...] = ()
