"""How much memory a model will take with given settings, by the headers of its two files alone.

    estimate = estimate_memory(read_shape(artifact, tensor_bytes), settings, Host(gpu=False), tensor_bytes)
    estimate.static_bytes("CPU"), estimate.dynamic_bytes("CPU")

**Static** is what is held from the end of loading to the close, whatever is asked: the language model's weights, the vision tower
with its projector, the key-value cache, llama.cpp's output buffer, and the program itself (Python and libraries; CUDA's context on a
GPU). **Dynamic** is the peak while an image is encoded, a prompt is filled in and an answer is decoded: static and the compute buffers
of both graphs, the CPU's scratch memory and the images' rows. On a CPU, "taken" is the PSS of the process tree, so that weights that
are mapped from the file count, though the system can drop and read them again; they are an item of their own. On a GPU, "taken" is
what the card has given out.

What llama.cpp allocates is derived (weights' places, cache, graph.py and compute.py for compute buffers). These are not: the
program's own size, the bytes of an entry of the vocabulary, copies of an image's rows, CUDA's context and cuBLAS. They were measured
(docs/LOG.md, 2026-11-22) and stand here as constants, or in a device's profile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from runtimes.compute import Setup, Usage, llm_compute, tower_compute
from runtimes.dense import LEAST_ROWS
from runtimes.direct import pinned_images
from runtimes.gguf_header import TensorInfo
from runtimes.graph import ALIGNMENT, CPU, CUDA_ROW_PADDING, GPU, Place, align
from runtimes.messages import DenseState, EngineSettings
from runtimes.shape import LlmShape, PairShape, tower_flash_attention

KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}
# Rows of logits that one batch may ask for (or slots, if they are more); libllama makes contexts with it.
MAX_OUTPUTS = 32

# Measured: Python with numpy and llama.cpp's libraries, in the engine's process and in the one that asks it.
PROGRAM_BYTES = 118_500_000
# Measured: llama.cpp's vocabulary, an entry of its tokens and one of its merges.
TOKEN_BYTES = 160
MERGE_BYTES = 175
# An image's rows in libmtmd, in ours and in the embedding cache; on their way to llama.cpp they go through a batch's buffer
# (libllama.py). With the tower on a GPU, memory for the next image's is made ready as well (vision.py).
ROW_COPIES = 3
# Measured on an H100 beyond an engine's context: cuBLAS with its kernels for a tower and for a language model's layers; copies of
# layers that stay in main memory, made for large batches; attention without flash attention; a context not made small (libcuda.py).
TOWER_CUDA_BYTES = 51_000_000
LAYERS_CUDA_BYTES = 28_000_000
PARTIAL_CUDA_BYTES = 27_000_000
PLAIN_ATTENTION_CUDA_BYTES = 76_000_000
LARGE_CONTEXT_BYTES = 331_000_000
# cudaMalloc gives memory out in pieces of this size.
CUDA_GRAIN_BYTES = 2 << 20

What = Literal[
    "weights",
    "repacked weights",
    "tower weights",
    "cache",
    "output",
    "compute",
    "tower compute",
    "scratch",
    "images",
    "dense prompts",
    "program",
]
_DYNAMIC = frozenset({"compute", "tower compute", "scratch", "images", "dense prompts"})


@dataclass(frozen=True)
class Item:
    """A part of the whole. `mapped`: pages of a file, which the system can drop."""

    what: What
    place: Place
    size_bytes: int
    mapped: bool = False


@dataclass(frozen=True)
class Host:
    """What the model runs on. `gpu`: llama.cpp finds a GPU; `features`: of the CPU, as libllama.cpu_features()."""

    gpu: bool
    features: frozenset[str] = frozenset({"avx2"})
    context_bytes: int = 0
    threads: int = 8
    dense: DenseState = "no"


@dataclass(frozen=True)
class Estimate:
    """All parts."""

    items: tuple[Item, ...]

    def sum(self, place: Place, *what: str) -> int:
        """Bytes of some kinds at a place; of all where none is named."""
        return sum(item.size_bytes for item in self.items if item.place == place and (not what or item.what in what))

    def static_bytes(self, place: Place) -> int:
        return sum(item.size_bytes for item in self.items if item.place == place and item.what not in _DYNAMIC)

    def dynamic_bytes(self, place: Place) -> int:
        return self.sum(place)

    @cached_property
    def mapped_bytes(self) -> int:
        """Of the CPU's bytes, those that are pages of the model's file."""
        return sum(item.size_bytes for item in self.items if item.mapped)


TensorBytes = Callable[[int, tuple[int, ...]], int | None]


def estimate_memory(shape: PairShape, settings: EngineSettings, host: Host, tensor_bytes: TensorBytes) -> Estimate:
    """Add everything up. `settings` as they would be loaded with, `gpu_layers` -1 meaning all."""

    def sizes(type_: int, dimensions: tuple[int, ...]) -> int:
        # Only a cache's row can miss a whole block here: the headers were checked. llama.cpp refuses that; a plan counts it as F16.
        found = tensor_bytes(type_, dimensions)
        return found if found is not None else tensor_bytes(1, dimensions) or 0

    llm = shape.llm
    on_gpu = gpu_layers(llm, settings) if host.gpu else 0
    first = max(llm.layers + 1 - on_gpu, 0)
    layer_places: list[Place] = [GPU if index >= first else CPU for index in range(llm.layers)]
    output_place: Place = GPU if on_gpu else CPU
    places: tuple[Place, ...] = (GPU, CPU) if on_gpu else (CPU,)
    setup = setup_of(settings)
    usage = llm_compute(llm, setup, layer_places, output_place, places, sizes, host.threads)
    tower_place = place_of_tower(settings, host)
    tower_places: tuple[Place, ...] = (GPU, CPU) if tower_place == GPU else (CPU,)
    flash = tower_flash_attention(settings.vision_flash_attention, shape.tower.head_dim, tower_place == GPU)
    tower = tower_compute(shape.tower, flash, tower_places, sizes, host.threads)
    row = sizes(setup.kv_type, (llm.kv_width, setup.padded_cells))
    items = [
        *_weights(llm, layer_places, output_place, settings, host),
        Item("tower weights", tower_place, sum(_stored(t, tower_place) for t in shape.tower.tensors.values())),
        *(Item("cache", place, 2 * row * layer_places.count(place)) for place in places),
        Item("output", CPU, 4 * llm.vocab * settings.slots),
        *_computed(usage, tower),
        *_images(shape, settings, ROW_COPIES + (tower_place == GPU)),
        Item("dense prompts", GPU, _dense_bytes(shape, settings, tower_place == GPU) if settings.dense_prompts else 0),
        Item("program", CPU, PROGRAM_BYTES + TOKEN_BYTES * llm.vocab + MERGE_BYTES * llm.merges),
    ]
    if GPU in places or tower_place == GPU:
        items.append(Item("program", GPU, host.context_bytes + _cuda_bytes(llm, settings, tower_place == GPU, on_gpu) + _grains(items)))
    return Estimate(tuple(item for item in items if item.size_bytes))


def _cuda_bytes(llm: LlmShape, settings: EngineSettings, tower: bool, layers: int) -> int:
    """What CUDA takes beside a small context and the buffers."""
    parts = (
        (not settings.shrink_context, LARGE_CONTEXT_BYTES),
        (tower, TOWER_CUDA_BYTES),
        (layers > 0, LAYERS_CUDA_BYTES),
        (0 < layers <= llm.layers, PARTIAL_CUDA_BYTES),
        (layers > 0 and settings.flash_attention == "off", PLAIN_ATTENTION_CUDA_BYTES),
    )
    return sum(size for applies, size in parts if applies)


def _dense_bytes(shape: PairShape, settings: EngineSettings, tower: bool) -> int:
    """cuda/prompts.cu: for each graph the largest matrix in BF16 with what it is multiplied with."""
    llm, rows = shape.llm, setup_of(settings).batch_rows
    layers: list[tuple[int, ...]] = [t.shape for name, t in llm.tensors.items() if llm.layer_of(name) is not None and len(t.shape) == 2]
    products = [(matrix, rows) for matrix in layers]
    if settings.slots >= LEAST_ROWS:  # so many answers' next tokens at once
        products.append((llm.tensors["token_embd.weight" if llm.tied else "output.weight"].shape, settings.slots))
    most = max(2 * prod(matrix) + 2 * matrix[0] * n for matrix, n in products)
    towers = [t.shape for t in shape.tower.tensors.values() if tower and len(t.shape) == 2]
    return most + max((2 * prod(matrix) + 2 * matrix[0] * shape.tower.rows for matrix in towers), default=0)


def gpu_layers(llm: LlmShape, settings: EngineSettings) -> int:
    """Layers on the GPU, the output layer counted as one more, as llama.cpp counts."""
    return llm.layers + 1 if settings.gpu_layers < 0 else min(settings.gpu_layers, llm.layers + 1)


def place_of_tower(settings: EngineSettings, host: Host) -> Place:
    """Where the tower is computed."""
    wanted = settings.tower == "gpu" or (settings.tower == "auto" and settings.gpu_layers != 0)
    return GPU if host.gpu and wanted else CPU


def setup_of(settings: EngineSettings) -> Setup:
    """A context's parameters as libllama.py sets them."""
    return Setup(
        cells=settings.kv_tokens or settings.slots * settings.context_tokens,
        micro_batch=min(settings.micro_batch, settings.batch_tokens),
        slots=settings.slots,
        outputs=max(MAX_OUTPUTS, settings.slots),
        kv_type=KV_TYPES[settings.kv_type],
        # "auto" is on wherever the graph's attention runs with its layer, which it does on CPUs and on CUDA.
        flash_attention=settings.flash_attention != "off",
    )


def _weights(llm: LlmShape, layers: list[Place], output: Place, settings: EngineSettings, host: Host) -> list[Item]:
    """llama-model-loader.cpp: each tensor in the first buffer type of its layer that takes it; CPU tensors stay in the mapped file."""
    mapped: list[TensorInfo] = []
    repacked = on_gpu = 0
    # With a GPU in sight, its host memory comes before repacking, and a mapped file before that.
    repack = settings.repack and not (host.gpu and settings.gpu_layers != 0)
    for name, tensor in llm.tensors.items():
        index = llm.layer_of(name)
        place = CPU if name.startswith("token_embd") else output if index is None else layers[index]
        if place == GPU:
            on_gpu += _stored(tensor, GPU)
        elif repack and not name.startswith("token_embd") and repacks(tensor, host.features):
            repacked += align(tensor.size_bytes, ALIGNMENT[CPU])
        else:
            mapped.append(tensor)
    if llm.tied:
        # The embedding is the output layer too: a second copy where that one is to lie elsewhere.
        table = llm.tensors["token_embd.weight"]
        on_gpu += _stored(table, GPU) if output == GPU else 0
        repacked += table.size_bytes if output == CPU and repack and repacks(table, host.features) else 0
    span = max((t.start + t.size_bytes for t in mapped), default=0) - min((t.start for t in mapped), default=0)
    return [Item("weights", CPU, span, mapped=True), Item("repacked weights", CPU, repacked), Item("weights", GPU, on_gpu)]


def repacks(tensor: TensorInfo, features: frozenset[str]) -> bool:
    """Whether ggml-cpu/repack.cpp takes a matrix: its type, its rows and the processor decide."""
    if len(tensor.shape) != 2 or tensor.type not in _REPACKED:
        return False
    return any(tensor.shape[1] % rows == 0 and needed <= features for needed, rows in _REPACKED[tensor.type])


_AVX2, _AVX512 = frozenset({"avx2"}), frozenset({"avx512"})
_ARM = (frozenset({"neon", "dotprod"}), frozenset({"neon", "matmul_int8"}))
# ggml type: (what the processor must have, rows in a block).
_REPACKED: dict[int, tuple[tuple[frozenset[str], int], ...]] = {
    2: ((_AVX2, 8), (_ARM[0], 4), (_ARM[1], 4)),  # Q4_0
    8: ((_ARM[0], 4), (_ARM[1], 4)),  # Q8_0
    10: ((_AVX512, 8),),  # Q2_K
    12: ((_AVX2, 8), (_ARM[0], 8), (_ARM[1], 8)),  # Q4_K
    13: ((_ARM[0], 8), (_ARM[1], 8)),  # Q5_K
    14: ((_ARM[0], 8), (_ARM[1], 8)),  # Q6_K
    20: ((_AVX2, 8), (_ARM[0], 4)),  # IQ4_NL
    39: ((_AVX2, 8), (_ARM[0], 4)),  # MXFP4
}
_UNPADDED = frozenset({0, 1, 26, 27, 30})


def _stored(tensor: TensorInfo, place: Place) -> int:
    """A weight's bytes in a buffer: CUDA pads the last row of quantised ones."""
    size, width = tensor.size_bytes, tensor.shape[0]
    if place == GPU and tensor.type not in _UNPADDED and width % CUDA_ROW_PADDING:
        rows = 1
        for n in tensor.shape[1:]:
            rows *= n
        size += size // rows * (CUDA_ROW_PADDING - width % CUDA_ROW_PADDING) // width
    return align(size, ALIGNMENT[place])


def _computed(llm: Usage, tower: Usage) -> list[Item]:
    items = [Item("compute", place, size) for place, size in llm.buffers.items()]
    items += [Item("tower compute", place, size) for place, size in tower.buffers.items()]
    return [*items, Item("scratch", CPU, llm.scratch_bytes + tower.scratch_bytes)]


def _images(shape: PairShape, settings: EngineSettings, copies: int) -> list[Item]:
    """Pixels as numbers, twice, the rows of an image a slot (those beyond the first only in the embedding cache), and a batch of rows.

    With dense prompts the whole cache is taken at loading (direct.py).
    """
    rows = 4 * shape.image_tokens * shape.tower.out_width
    pixels = 4 * 3 * shape.tower.size_px**2
    kept = min((settings.slots - 1) * rows, settings.embedding_cache_bytes)
    if settings.dense_prompts:
        kept = pinned_images(settings.embedding_cache_bytes, rows) * rows
    batch = 4 * settings.batch_tokens * shape.tower.out_width
    return [Item("images", CPU, copies * rows + 2 * pixels + kept + batch)]


def _grains(items: list[Item]) -> int:
    return sum(align(item.size_bytes, CUDA_GRAIN_BYTES) - item.size_bytes for item in items if item.place == GPU)
