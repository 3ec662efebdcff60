"""How large llama.cpp's compute buffers are for a graph: ggml's scheduler and allocator, on sizes alone.

    graph = Graph()
    x = graph.input(F32, (576, 512)); y = graph.mul_mat(graph.weight(Q4_K, (576, 1536), GPU), x)
    graph.expand(y)
    sizes = graph.allocate((GPU, CPU))          # {GPU: bytes, CPU: bytes}

A copy in small of ggml-backend.cpp (which node runs where, what is copied between places) and ggml-alloc.c (best fit, in-place
reuse, freeing after the last use) at the pinned version, so that a plan needs neither the model nor the device. Shapes are in
ggml's order. Knows no architecture (see compute.py) and nothing of CUDA's pools, which are no part of these buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

Place = Literal["GPU", "CPU"]
GPU: Place = "GPU"
CPU: Place = "CPU"

# ggml.h's type numbers.
F32, F16, Q8_0, I32, I64, BF16 = 0, 1, 8, 26, 27, 30
# ggml-backend.cpp TENSOR_ALIGNMENT and ggml-cuda.cu's buffers; quantised rows on CUDA are padded to MATRIX_ROW_PADDING values.
ALIGNMENT: dict[Place, int] = {CPU: 32, GPU: 128}
CUDA_ROW_PADDING = 512
# From so many rows on, weights that lie on the CPU are copied to the GPU for a batch (ggml-cuda.cu, op_offload_min_batch_size).
OFFLOAD_ROWS = 32
_IN_PLACE = frozenset({"add", "mul", "scale", "unary", "rope", "rms_norm", "soft_max"})  # of ggml_op_can_inplace
_VIEWS = frozenset({"view", "reshape", "permute"})
_FLOAT_TYPES = frozenset({F32, F16, I32, I64, BF16})

TypeBytes = Callable[[int, tuple[int, ...]], int]


@dataclass(eq=False)
class Tensor:
    """One tensor of a graph. `place` is set for what is allocated already: weights and the key-value cache."""

    op: str
    type: int
    shape: tuple[int, ...]
    size_bytes: int
    sources: list[Tensor] = field(default_factory=list)
    root: Tensor | None = None  # of a view: the tensor that owns the memory
    place: Place | None = None
    weight: bool = False
    is_input: bool = False
    is_output: bool = False
    # ggml_backend_sched_set_tensor_backend
    pinned: Place | None = None
    # What a node's kernel wants beside its result, on the GPU only.
    gpu_extra_bytes: int = 0

    @property
    def home(self) -> Place | None:
        """Where it lies already, if it does."""
        return self.root.place if self.root is not None else self.place

    def alloc_bytes(self, place: Place) -> int:
        """Bytes in a buffer of `place`, before alignment."""
        if place == GPU and self.type not in _FLOAT_TYPES and self.shape[0] % CUDA_ROW_PADDING:
            row = self.size_bytes * self.shape[0] // prod(self.shape)
            return self.size_bytes + row * (CUDA_ROW_PADDING - self.shape[0] % CUDA_ROW_PADDING) // self.shape[0]
        return self.size_bytes + (self.gpu_extra_bytes if place == GPU else 0)


def align(size: int, alignment: int) -> int:
    """The next multiple."""
    return (size + alignment - 1) // alignment * alignment


class Graph:
    """Tensors in the order in which llama.cpp would compute them."""

    def __init__(self, type_bytes: TypeBytes) -> None:
        self._type_bytes = type_bytes
        self.nodes: list[Tensor] = []
        self.leafs: list[Tensor] = []
        self._seen: set[Tensor] = set()

    # -- tensors ------------------------------------------------------------------------------------------------------

    def make(self, op: str, type_: int, shape: Sequence[int], sources: Sequence[Tensor] = ()) -> Tensor:
        """A tensor with memory of its own."""
        return Tensor(op, type_, tuple(shape), self._type_bytes(type_, tuple(shape)), list(sources))

    def input(self, type_: int, shape: Sequence[int]) -> Tensor:
        """What the program fills in before each batch."""
        tensor = self.make("none", type_, shape)
        tensor.is_input = True
        return tensor

    def stored(self, type_: int, shape: Sequence[int], place: Place, weight: bool = True) -> Tensor:
        """A weight, or a cache (`weight` False)."""
        tensor = self.make("none", type_, shape)
        tensor.place, tensor.weight = place, weight
        return tensor

    def view(self, source: Tensor, shape: Sequence[int], op: str = "view") -> Tensor:
        """Another look at a tensor's memory."""
        root = source.root or source
        size = self._type_bytes(source.type, tuple(shape))
        return Tensor(op, source.type, tuple(shape), size, [source], root)

    def reshape(self, source: Tensor, shape: Sequence[int]) -> Tensor:
        return self.view(source, shape, "reshape")

    def permute(self, source: Tensor, shape: Sequence[int]) -> Tensor:
        return self.view(source, shape, "permute")

    def mul_mat(self, a: Tensor, b: Tensor) -> Tensor:
        return self.make("mul_mat", F32, (a.shape[1], *b.shape[1:]), (a, b))

    def like(self, op: str, *sources: Tensor) -> Tensor:
        """An operation whose result has its first source's shape."""
        return self.make(op, F32, sources[0].shape, sources)

    def get_rows(self, table: Tensor, ids: Tensor) -> Tensor:
        return self.make("get_rows", F32, (table.shape[0], ids.shape[0]), (table, ids))

    def set_rows(self, cache: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Rows written into a cache: a view of it."""
        return Tensor("set_rows", cache.type, cache.shape, cache.size_bytes, [rows, ids, cache], cache.root or cache)

    def cast(self, source: Tensor, type_: int) -> Tensor:
        return self.make("copy", type_, source.shape, (source,))

    def cont(self, source: Tensor, shape: Sequence[int]) -> Tensor:
        return self.make("cont", source.type, shape, (source,))

    # -- order --------------------------------------------------------------------------------------------------------

    def expand(self, tensor: Tensor) -> None:
        """Append a tensor and what it needs, sources first (ggml_build_forward_expand)."""
        stack: list[tuple[Tensor, int]] = [(tensor, 0)]
        while stack:
            node, at = stack.pop()
            if at == 0:
                if node in self._seen:
                    continue
                self._seen.add(node)
            if at < len(node.sources):
                stack += [(node, at + 1), (node.sources[at], 0)]
            else:
                (self.leafs if node.op == "none" else self.nodes).append(node)

    # -- sizes --------------------------------------------------------------------------------------------------------

    def allocate(self, places: Sequence[Place], offload: bool = True) -> dict[Place, int]:
        """Bytes of each place's compute buffer. `places` from the first choice to the CPU; `offload`: large batches go to the GPU."""
        schedule = _Schedule(self, places, offload)
        return _Allocator(schedule, places).run()


class _Schedule:
    """ggml_backend_sched_split_graph: a place for each node, and copies of what lies elsewhere."""

    def __init__(self, graph: Graph, places: Sequence[Place], offload: bool) -> None:
        self.places, self.offload = places, offload and len(places) > 1
        self.of: dict[Tensor, Place] = {}
        self.nodes: list[tuple[Tensor, Place]] = []
        self.leafs = graph.leafs
        for tensor in (*graph.leafs, *graph.nodes):
            place = tensor.pinned or self._from_sources(tensor)
            if place is not None:
                self.of[tensor] = place
        working = [node for node in graph.nodes if node.op not in _VIEWS]
        self._expand(working, gpu_only=True)
        self._expand(list(reversed(working)), gpu_only=True)
        self._expand(working, gpu_only=False)
        self._expand(list(reversed(working)), gpu_only=False)
        self._fill(graph.nodes)
        self._split(graph.nodes)

    def _from_sources(self, tensor: Tensor) -> Place | None:
        if tensor.home is not None:
            return tensor.home
        if tensor.is_input:
            return CPU
        if tensor.op in ("rope", "flash_attn"):
            return None
        for source in tensor.sources:
            if source.weight:
                if self.offload and source.place == CPU and _batch_rows(tensor) >= OFFLOAD_ROWS:
                    return GPU
                return source.place
        return None

    def _expand(self, nodes: list[Tensor], gpu_only: bool) -> None:
        current: Place | None = None
        for node in nodes:
            place = self.of.get(node)
            if place is not None:
                current = None if gpu_only and place == CPU and len(self.places) > 1 else place
            elif current is not None:
                self.of[node] = current

    def _fill(self, nodes: list[Tensor]) -> None:
        for node in nodes:
            if node not in self.of:
                self.of[node] = self.of[node.root] if node.root in self.of else self.places[0]
            for source in node.sources:
                if source not in self.of:
                    self.of[source] = self.of.get(source.root, self.of[node]) if source.root is not None else self.of[node]

    def _supported(self, tensor: Tensor, place: Place) -> bool:
        where = tensor.home or self.of.get(tensor) or (self.of.get(tensor.root) if tensor.root is not None else None)
        return where == place

    def _split(self, nodes: list[Tensor]) -> None:
        copies: dict[tuple[Tensor, Place], Tensor] = {}
        split: list[Tensor] = []
        inputs: list[Tensor] = []
        working = [self.of[node] for node in nodes if node.op not in _VIEWS]
        current = working[0] if working else CPU

        def close() -> None:
            for tensor in inputs:
                self.nodes.append((Tensor("none", tensor.type, tensor.shape, 0, [tensor], tensor.root or tensor), self.of[tensor]))
                self.nodes.append((copies[tensor, current], current))
            self.nodes.extend((node, self.of[node]) for node in split)
            split.clear()
            inputs.clear()

        for node in nodes:
            if node.op in _VIEWS:
                split.append(node)
                continue
            place = self.of[node]
            foreign = bool(inputs) and any(
                s.weight and self.of[s] != current and not self._supported(s, current) and s.root is None for s in node.sources
            )
            if place != current or foreign:
                close()
                current = place
            for index, source in enumerate(node.sources):
                if self.of[source] != current and not self._supported(source, current):
                    copy = copies.get((source, current))
                    if copy is None:
                        copy = Tensor("none", source.type, source.shape, source.size_bytes)
                        copies[source, current] = copy
                        self.of[copy] = current
                        inputs.append(source)
                    node.sources[index] = copy
            split.append(node)
        close()


def _batch_rows(tensor: Tensor) -> int:
    """ggml-cuda.cu, get_op_batch_size."""
    if tensor.op == "get_rows":
        return 0
    return tensor.shape[1] if tensor.op == "mul_mat" else prod(tensor.shape[1:])


class _Arena:
    """ggml_dyn_tallocr with one chunk: free blocks by address, the last one endless."""

    def __init__(self, alignment: int) -> None:
        self._alignment = alignment
        self._free = [(0, 1 << 62)]
        self.peak = 0

    def take(self, size: int) -> int:
        size = align(size, self._alignment)
        fits = [i for i in range(len(self._free) - 1) if self._free[i][1] >= size]
        # Of equally small blocks the last one, as there.
        index = min(fits, key=lambda i: (self._free[i][1], -i)) if fits else len(self._free) - 1
        offset, room = self._free[index]
        self._free[index] = (offset + size, room - size)
        if room == size:
            del self._free[index]
        self.peak = max(self.peak, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        size = align(size, self._alignment)
        if size == 0:
            return
        blocks = sorted([*self._free, (offset, size)])
        merged = [blocks[0]]
        for start, length in blocks[1:]:
            last, room = merged[-1]
            if last + room == start:
                merged[-1] = (last, room + length)
            else:
                merged.append((start, length))
        self._free = merged

    def align(self, size: int) -> int:
        return align(size, self._alignment)


@dataclass
class _Use:
    children: int = 0
    views: int = 0
    place: Place = CPU
    offset: int = 0
    own: bool = False


class _Allocator:
    """ggml_gallocr_alloc_graph_impl."""

    def __init__(self, schedule: _Schedule, places: Sequence[Place]) -> None:
        self._schedule = schedule
        self._arenas = {place: _Arena(ALIGNMENT[place]) for place in places}
        self._uses: dict[Tensor, _Use] = {}

    def run(self) -> dict[Place, int]:
        for leaf in self._schedule.leafs:
            self._allocate(leaf, self._schedule.of.get(leaf, CPU))
        for node, place in self._schedule.nodes:
            if node.root is not None and node.op != "none":
                self._use(node.root).views += 1
            if node.is_input:
                self._allocate(node, place)
            for source in node.sources:
                self._use(source).children += 1
                if source.is_input:
                    self._allocate(source, place)
        for node, place in self._schedule.nodes:
            for source in node.sources:
                self._allocate(source, place)
            self._allocate(node, place)
            for source in node.sources:
                self._release(source)
        return {place: arena.peak for place, arena in self._arenas.items()}

    def _use(self, tensor: Tensor) -> _Use:
        return self._uses.setdefault(tensor, _Use())

    def _allocate(self, node: Tensor, place: Place) -> None:
        use = self._use(node)
        if node.home is not None or node.root is not None or use.own:
            return
        use.own = True
        if node.op in _IN_PLACE and self._reuse(node, use):
            return
        use.place = place
        use.offset = self._arenas[place].take(node.alloc_bytes(place))

    def _reuse(self, node: Tensor, use: _Use) -> bool:
        for parent in node.sources:
            parent_use = self._use(parent)
            # A view is never "own" in ggml, so that its memory is never taken over.
            if parent.root is not None or not parent_use.own or parent.is_output:
                continue
            if (parent.type, parent.shape) != (node.type, node.shape) or (parent_use.children, parent_use.views) != (1, 0):
                continue
            use.place, use.offset = parent_use.place, parent_use.offset
            parent_use.own = False
            self._trim(node, parent, use)
            return True
        return False

    def _trim(self, node: Tensor, parent: Tensor, use: _Use) -> None:
        arena = self._arenas[use.place]
        old, new = arena.align(parent.alloc_bytes(use.place)), arena.align(node.alloc_bytes(use.place))
        if old > new:
            arena.give(use.offset + new, old - new)

    def _release(self, source: Tensor) -> None:
        use = self._use(source)
        use.children -= 1
        if use.children or use.views:
            return
        if source.root is not None:
            root = self._use(source.root)
            root.views -= 1
            if root.views == 0 and root.children == 0 and root.own:
                self._free(source.root, root)
        elif use.own:
            self._free(source, use)

    def _free(self, tensor: Tensor, use: _Use) -> None:
        if not tensor.is_output:
            self._arenas[use.place].give(use.offset, tensor.alloc_bytes(use.place))
            use.own = False
