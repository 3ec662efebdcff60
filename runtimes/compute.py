"""llama.cpp's graphs, drawn from a model's shape: how much they need to be computed.

    sizes = llm_compute(shape.llm, setup, placement, type_bytes)       # {GPU: bytes, CPU: bytes}
    sizes = tower_compute(shape.tower, flash_attention=False, places=(CPU,), type_bytes=type_bytes)

After llama-graph.cpp with models/llama.cpp, qwen2.cpp, phi2.cpp and stablelm.cpp, and mtmd's clip.cpp with models/llava.cpp, at the
pinned version: the order of the nodes matters, as memory is reused in it. Another architecture is drawn as llama's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from runtimes.graph import BF16, CPU, F16, F32, I32, I64, Graph, Place, Tensor, TypeBytes, align
from runtimes.shape import LlmShape, TowerShape

# llama.cpp pads the cache's cells to this (llama-context.cpp).
CELL_PADDING = 256
# The rotation that llama.cpp puts before a quantised cache works on heads of whole 64s (llama-kv-cache.cpp).
_ROTATION = 64
_F32_BLOCK = frozenset({F32, F16, BF16})


@dataclass(frozen=True)
class Setup:
    """What a context is made with. `cells` of the cache in all; `outputs` rows of logits in a batch at most."""

    cells: int
    micro_batch: int
    slots: int
    outputs: int
    kv_type: int
    flash_attention: bool

    @property
    def padded_cells(self) -> int:
        """Cells as llama.cpp makes them."""
        return align(self.cells, CELL_PADDING)

    @property
    def batch_rows(self) -> int:
        """Tokens of the largest graph: rounded up to whole rows for each sequence."""
        return align(min(self.padded_cells, self.micro_batch), self.slots)


@dataclass(frozen=True)
class Usage:
    """Bytes: compute buffers by place, and the CPU's scratch memory, which llama.cpp does not report."""

    buffers: Mapping[Place, int]
    scratch_bytes: int


def llm_compute(
    shape: LlmShape, setup: Setup, layer_places: Sequence[Place], output_place: Place, places: Sequence[Place], type_bytes: TypeBytes,
    threads: int, offload: bool = True,
) -> Usage:  # fmt: skip
    """The larger of the graphs that llama.cpp reserves room for: a full batch of tokens, and one token a slot. (A batch of rows
    has at most as many rows of logits, and was seen not to make the buffers grow.)"""
    sizes: dict[Place, int] = dict.fromkeys(places, 0)
    scratch = 0
    for batch, outputs in ((setup.batch_rows, min(setup.batch_rows, setup.outputs)), (setup.slots, setup.slots)):
        drawing = _LlmGraph(shape, setup, layer_places, output_place, places, type_bytes, batch, outputs)
        scratch = max(scratch, cpu_scratch(drawing.graph, threads, type_bytes) if set(layer_places) == {CPU} else 0)
        for place, size in drawing.graph.allocate(places, offload).items():
            sizes[place] = max(sizes[place], size)
    return Usage(sizes, scratch)


def tower_compute(shape: TowerShape, flash_attention: bool, places: Sequence[Place], type_bytes: TypeBytes, threads: int) -> Usage:
    """One image."""
    drawing = _TowerGraph(shape, flash_attention, places[0], type_bytes)
    scratch = cpu_scratch(drawing.graph, threads, type_bytes) if places[0] == CPU else 0
    return Usage(drawing.graph.allocate(places), scratch)


def cpu_scratch(graph: Graph, threads: int, type_bytes: TypeBytes) -> int:
    """ggml_graph_plan's work buffer: a product's right side in the type that its left side is multiplied with, attention's tiles."""
    most = 0
    for node in graph.nodes:
        if node.op == "mul_mat":
            most = max(most, _converted_bytes(node.sources[0].type, node.sources[1].shape, type_bytes))
        elif node.op == "flash_attn":
            head = node.sources[0].shape[0]
            most = max(most, 4 * threads * (64 * head + 2 * 64 * 64 + 64 * head + 2 * 64 * head))  # GGML_FA_TILE_Q, _KV: 64
        elif node.op in ("soft_max", "rope"):
            most = max(most, 4 * node.shape[0] * threads)
    return most


# ggml-cpu.c type_traits_cpu: blocks of 32 are multiplied with Q8_0 or Q8_1, K- and I-quants with Q8_K.
_WITH_Q8_0 = frozenset({2, 6, 8, 20, 39})
_WITH_Q8_1 = frozenset({3, 7})
_Q8_0, _Q8_1, _Q8_K = 8, 9, 15


def _converted_bytes(left: int, right: tuple[int, ...], type_bytes: TypeBytes) -> int:
    if left == F32:
        return 0
    values = prod(right)
    if left in (F16, BF16):
        return 2 * values
    kind = _Q8_0 if left in _WITH_Q8_0 else _Q8_1 if left in _WITH_Q8_1 else _Q8_K
    block = 256 if kind == _Q8_K else 32
    return type_bytes(kind, (align(values, block),))


class _LlmGraph:
    """One batch: `rows` tokens, with logits for `outputs` of them."""

    def __init__(
        self, shape: LlmShape, setup: Setup, layer_places: Sequence[Place], output_place: Place, places: Sequence[Place],
        type_bytes: TypeBytes, rows: int, outputs: int,
    ) -> None:  # fmt: skip
        self.graph = Graph(type_bytes)
        self.shape, self.setup, self.rows, self.outputs = shape, setup, rows, outputs
        self.layer_places, self.output_place = layer_places, output_place
        # Where everything is on the GPU, or a batch is small, norms stay with their layer (llama-context.cpp, graph_get_cb).
        self.pin_norms = len(places) > 1 and (rows < 32 or CPU not in layer_places)
        self.draw()

    def weight(self, name: str, place: Place) -> Tensor | None:
        info = self.shape.tensors.get(name)
        return None if info is None else self.graph.stored(info.type, info.shape, place)

    def draw(self) -> None:
        g, setup = self.graph, self.setup
        table = self.weight("token_embd.weight", CPU)
        assert table is not None
        embedded = g.get_rows(table, g.input(I32, (self.rows,)))
        images = g.input(F32, (self.shape.width, self.rows))  # unused here, but allocated
        g.expand(embedded)
        g.expand(images)
        x = embedded
        self.positions = g.input(I32, (self.rows,))
        self.k_ids = g.input(I64, (self.rows,))
        transposed = not setup.flash_attention
        self.v_ids = g.input(I64, (self.rows * self.shape.kv_width if transposed else self.rows,))
        self.mask = g.input(F16 if setup.flash_attention else F32, (setup.padded_cells, self.rows))
        self.k_rotation, self.v_rotation = self.rotations()
        self.out_ids = g.input(I32, (self.outputs,))
        for index in range(self.shape.layers):
            x = self.layer(index, x)
        x = self.norm(x, "output_norm", self.output_place)
        x.is_output = True
        head = self.weight("output.weight", self.output_place) or self.weight("token_embd.weight", self.output_place)
        assert head is not None
        logits = self.bias(g.mul_mat(head, x), "output.bias", self.output_place)
        logits.is_output = True
        g.expand(logits)

    def rotations(self) -> tuple[Tensor | None, Tensor | None]:
        if self.setup.kv_type in _F32_BLOCK or self.shape.head_dim % _ROTATION:
            return None, None
        size = _ROTATION
        while self.shape.head_dim % (2 * size) == 0:
            size *= 2
        return self.graph.input(F32, (size, size)), self.graph.input(F32, (_ROTATION, _ROTATION))

    def norm(self, x: Tensor, name: str, place: Place, layer: bool = False) -> Tensor:
        g = self.graph
        weight, bias = self.weight(f"{name}.weight", place), self.weight(f"{name}.bias", place)
        # LayerNorm goes with a bias in these architectures; unlike RMS norm, ggml does not compute it in place.
        x = g.like("norm" if bias is not None else "rms_norm", x)
        if layer and self.pin_norms:
            x.pinned = place
        if weight is not None:
            x = g.like("mul", x, weight)
        return x if bias is None else g.like("add", x, bias)

    def bias(self, x: Tensor, name: str, place: Place) -> Tensor:
        bias = self.weight(name, place)
        return x if bias is None else self.graph.like("add", x, bias)

    def linear(self, x: Tensor, name: str, place: Place) -> Tensor:
        weight = self.weight(f"{name}.weight", place)
        assert weight is not None
        return self.bias(self.graph.mul_mat(weight, x), f"{name}.bias", place)

    def layer(self, index: int, x: Tensor) -> Tensor:
        """models/llama.cpp, qwen2.cpp, phi2.cpp, stablelm.cpp."""
        g, block, place, arch = self.graph, f"blk.{index}", self.layer_places[index], self.shape.arch
        last = index == self.shape.layers - 1
        normed = self.norm(x, f"{block}.attn_norm", place, layer=True)
        cur = self.attention(index, normed)
        residual, parallel = x, normed
        if last:
            cur = g.get_rows(cur, self.out_ids)
            residual = g.get_rows(residual, self.out_ids)
            if arch in ("phi2", "stablelm"):
                parallel = g.get_rows(parallel, self.out_ids)
        if arch == "phi2":
            return g.like("add", g.like("add", cur, self.mlp(block, parallel, place)), residual)
        middle = g.like("add", cur, residual)
        separate = f"{block}.ffn_norm.weight" in self.shape.tensors
        normed = self.norm(middle, f"{block}.ffn_norm", place, layer=True) if separate else parallel
        return g.like("add", self.mlp(block, normed, place), middle)

    def mlp(self, block: str, x: Tensor, place: Place) -> Tensor:
        g = self.graph
        up = self.linear(x, f"{block}.ffn_up", place)
        if f"{block}.ffn_gate.weight" in self.shape.tensors:
            hidden = g.like("glu", self.linear(x, f"{block}.ffn_gate", place), up)
        else:
            hidden = g.like("unary", up)
        return self.linear(hidden, f"{block}.ffn_down", place)

    def rotate(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        if rotation is None:
            return x
        g, size = self.graph, rotation.shape[0]
        return g.reshape(g.mul_mat(rotation, g.reshape(x, (size, prod(x.shape) // size))), x.shape)

    def attention(self, index: int, x: Tensor) -> Tensor:
        g, s, block, place = self.graph, self.shape, f"blk.{index}", self.layer_places[index]
        head, rows = s.head_dim, self.rows
        q = g.reshape(self.linear(x, f"{block}.attn_q", place), (head, s.heads, rows))
        k = g.reshape(self.linear(x, f"{block}.attn_k", place), (head, s.kv_heads, rows))
        v = g.reshape(self.linear(x, f"{block}.attn_v", place), (head, s.kv_heads, rows))
        q, k = g.like("rope", q, self.positions), g.like("rope", k, self.positions)
        if s.arch == "phi2":
            q = g.like("scale", q)
        q, k, v = self.rotate(q, self.k_rotation), self.rotate(k, self.k_rotation), self.rotate(v, self.v_rotation)
        for tensor in (q, v, k):
            g.expand(tensor)
        cells = self.setup.padded_cells
        k_cache = g.stored(self.setup.kv_type, (s.kv_width, cells), place, weight=False)
        v_cache = g.stored(self.setup.kv_type, (s.kv_width, cells), place, weight=False)
        g.expand(g.set_rows(k_cache, g.view(k, (s.kv_width, rows)), self.k_ids))
        if self.setup.flash_attention:
            g.expand(g.set_rows(v_cache, g.view(v, (s.kv_width, rows)), self.v_ids))
        else:
            flat = g.reshape(g.reshape(v, (s.kv_width, rows)), (1, s.kv_width * rows))
            g.expand(g.set_rows(g.reshape(v_cache, (1, s.kv_width * cells)), flat, self.v_ids))
        out = self.attend(q, g.view(k_cache, (head, s.kv_heads, cells)), v_cache)
        g.expand(out)
        out = self.rotate(out, self.v_rotation)
        return self.linear(out, f"{block}.attn_output", place)

    def attend(self, q: Tensor, k: Tensor, v_cache: Tensor) -> Tensor:
        """build_attn_mha."""
        g, s = self.graph, self.shape
        head, rows, cells = s.head_dim, self.rows, self.setup.padded_cells
        q = g.permute(g.view(q, (head, s.heads, rows)), (head, rows, s.heads))
        k = g.permute(k, (head, cells, s.kv_heads))
        if self.setup.flash_attention:
            v = g.permute(g.view(v_cache, (head, s.kv_heads, cells)), (head, cells, s.kv_heads))
            if self.setup.kv_type == F32:
                k, v = g.cast(k, F16), g.cast(v, F16)
            out = g.make("flash_attn", F32, (head, s.heads, rows), (q, k, v, self.mask))
            if self.setup.kv_type not in (F16, F32) and rows > 2:
                # CUDA's kernels for many rows read a cache of F16: fattn-common.cuh makes a copy behind the result.
                out.gpu_extra_bytes = align(out.size_bytes, 128) - out.size_bytes + 2 * align(2 * head * cells * s.kv_heads, 128)
            return g.reshape(out, (head * s.heads, rows))
        v = g.permute(g.view(v_cache, (cells, s.kv_heads, head)), (cells, head, s.kv_heads))
        kq = g.make("mul_mat", F32, (cells, rows, s.heads), (k, q))
        kq = g.like("soft_max", kq, self.mask)
        kqv = g.make("mul_mat", F32, (head, rows, s.heads), (v, kq))
        return g.cont(g.permute(kqv, (head, s.heads, rows)), (head * s.heads, rows))


class _TowerGraph:
    """models/llava.cpp for one image, with the two-layer projector."""

    def __init__(self, shape: TowerShape, flash_attention: bool, place: Place, type_bytes: TypeBytes) -> None:
        self.graph, self.shape, self.place, self.flash = Graph(type_bytes), shape, place, flash_attention
        self.draw()

    def weight(self, name: str) -> Tensor | None:
        info = self.shape.tensors.get(name)
        return None if info is None else self.graph.stored(info.type, info.shape, self.place)

    def add(self, x: Tensor, name: str) -> Tensor:
        bias = self.weight(name)
        return x if bias is None else self.graph.like("add", x, bias)

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight = self.weight(f"{name}.weight")
        assert weight is not None
        return self.add(self.graph.mul_mat(weight, x), f"{name}.bias")

    def norm(self, x: Tensor, name: str) -> Tensor:
        g = self.graph
        x, weight = g.like("norm", x), self.weight(f"{name}.weight")
        return self.add(x if weight is None else g.like("mul", x, weight), f"{name}.bias")

    def draw(self) -> None:
        g, s = self.graph, self.shape
        x = self.embed()
        if s.has_cls:
            cls = self.weight("v.class_embd")
            assert cls is not None
            x = g.make("concat", F32, (s.width, s.rows), (x, cls))
        table = self.weight("v.position_embd.weight")
        assert table is not None
        x = g.like("add", x, g.get_rows(table, g.input(I32, (s.rows,))))
        if "v.pre_ln.weight" in s.tensors:
            x = self.norm(x, "v.pre_ln")
        for index in range(s.layers):
            x = self.layer(f"v.blk.{index}", x)
        if "v.post_ln.weight" in s.tensors:
            x = self.norm(x, "v.post_ln")
        x = g.get_rows(g.reshape(x, (s.width, s.rows)), g.input(I32, (s.patches,)))
        x = g.like("unary", self.linear(x, "mm.0"))
        g.expand(self.linear(x, "mm.2"))

    def embed(self) -> Tensor:
        """clip.cpp build_inp: a convolution as a product, then patches' rows."""
        g, s = self.graph, self.shape
        kernel = self.weight("v.patch_embd.weight")
        assert kernel is not None
        values, side = 3 * s.patch_px**2, s.size_px // s.patch_px
        pixels = g.input(F32, (s.size_px, s.size_px, 3))
        columns = g.make("im2col", F32 if kernel.type == BF16 else F16, (values, side, side), (kernel, pixels))
        x = g.mul_mat(g.reshape(columns, (values, s.patches)), g.reshape(kernel, (values, s.width)))
        x = g.reshape(x, (side, side, 1, s.width))
        x = g.cont(g.permute(x, (side, side, s.width)), (side, side, s.width))
        x = g.reshape(x, (s.patches, s.width))
        x = g.cont(g.permute(x, (s.width, s.patches)), (s.width, s.patches))
        return self.add(x, "v.patch_embd.bias")

    def layer(self, block: str, x: Tensor) -> Tensor:
        g, s = self.graph, self.shape
        head = s.width // s.heads
        normed = self.norm(x, f"{block}.ln1")
        q, k, v = (g.reshape(self.linear(normed, f"{block}.attn_{part}"), (head, s.heads, s.rows)) for part in "qkv")
        for tensor in (q, k, v):
            g.expand(tensor)
        q, k = g.permute(q, (head, s.rows, s.heads)), g.permute(k, (head, s.rows, s.heads))
        if self.flash:
            v = g.permute(v, (head, s.rows, s.heads))
            attended = g.make("flash_attn", F32, (head, s.heads, s.rows), (q, g.cast(k, F16), g.cast(v, F16)))
            cur = g.reshape(attended, (s.width, s.rows))
        else:
            v = g.cont(g.permute(v, (s.rows, head, s.heads)), (s.rows, head, s.heads))
            kq = g.like("soft_max", g.make("mul_mat", F32, (s.rows, s.rows, s.heads), (k, q)))
            kqv = g.make("mul_mat", F32, (head, s.rows, s.heads), (v, kq))
            cur = g.cont(g.permute(kqv, (head, s.heads, s.rows)), (s.width, s.rows))
        x = g.like("add", self.linear(cur, f"{block}.attn_out"), x)
        hidden = g.like("unary", self.linear(self.norm(x, f"{block}.ln2"), f"{block}.ffn_up"))
        return g.like("add", x, self.linear(hidden, f"{block}.ffn_down"))
