"""Checks on a GGUF pair before llama.cpp sees it: what would end its process, and files that do not belong together.

    check_pair(artifact, tensor_bytes)      # raises ArtifactError: one sentence, expected and found

llama.cpp checks an LLM's tensors itself; libmtmd takes a tower's names, shapes and types on trust. Says nothing about values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from edgemed.core.errors import ArtifactError
from edgemed.core.manifest import Artifact, Manifest
from runtimes.gguf_header import Header, read_header

_F32, _F16, _BF16 = 0, 1, 30
_NUMBERS = (
    "clip.vision.image_size",
    "clip.vision.patch_size",
    "clip.vision.embedding_length",
    "clip.vision.feed_forward_length",
    "clip.vision.block_count",
    "clip.vision.projection_dim",
    "clip.vision.attention.head_count",
)


def check_pair(artifact: Artifact, tensor_bytes: Callable[[int, tuple[int, ...]], int | None]) -> None:
    """Read both headers and compare them with each other and with the manifest. Raises ArtifactError."""
    llm = read_header(artifact.llm_path, tensor_bytes)
    _check_llm(llm, artifact.manifest)
    tower = read_header(artifact.mmproj_path, tensor_bytes)
    _Tower(tower, artifact.manifest).check()


def _refuse(header: Header, what: str, expected: object, found: object) -> NoReturn:
    raise ArtifactError(
        f"Expected {what} {expected} in {header.path.name}, found {'none' if found is None else found}.",
        "Put the pair's own two files back, or convert the model again.",
    )


def _check_llm(llm: Header, manifest: Manifest) -> None:
    record = manifest.llm
    arch = llm.values.get("general.architecture")
    if arch != record.arch:
        _refuse(llm, "the architecture", record.arch, arch)
    width = llm.values.get(f"{arch}.embedding_length")
    if width != record.embedding_length:
        _refuse(llm, "an embedding length of", record.embedding_length, width)
    context = llm.values.get(f"{arch}.context_length")
    if context != record.context_length:
        _refuse(llm, "a context length of", record.context_length, context)
    embedding = llm.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape != (record.embedding_length, record.vocab_size):
        _refuse(llm, "token_embd.weight of shape", (record.embedding_length, record.vocab_size), embedding and embedding.shape)


class _Tower:
    """One mmproj's checks. Shapes are in ggml's order."""

    def __init__(self, header: Header, manifest: Manifest) -> None:
        self.header, self.manifest = header, manifest

    def check(self) -> None:
        self.check_values()
        self.check_embeddings()
        for index in range(self.number("clip.vision.block_count")):
            self.check_block(f"v.blk.{index}")
        for name in ("v.pre_ln", "v.post_ln"):
            if f"{name}.weight" in self.header.tensors:
                self.check_norm(name)
        self.check_projector()

    def number(self, key: str) -> int:
        value = self.header.values.get(key)
        if not isinstance(value, int) or value <= 0:
            _refuse(self.header, f"{key} to be", "a positive number", value)
        return value

    def check_values(self) -> None:
        values = self.header.values
        wanted = {"general.architecture": "clip", "clip.has_vision_encoder": True, "clip.projector_type": "mlp"}
        for key, expected in wanted.items():
            if values.get(key) != expected:
                _refuse(self.header, f"{key} to be", expected, values.get(key))
        for key in _NUMBERS:
            self.number(key)
        if not isinstance(values.get("clip.vision.attention.layer_norm_epsilon"), float):
            _refuse(self.header, "clip.vision.attention.layer_norm_epsilon to be", "a number", None)
        for key in ("clip.vision.image_mean", "clip.vision.image_std"):
            numbers = values.get(key)
            if not isinstance(numbers, list) or len(numbers) != 3:
                _refuse(self.header, f"{key} to be", "three numbers", numbers)
        if values.get("clip.use_gelu") and values.get("clip.use_silu"):
            _refuse(self.header, "the activation to be", "one", "both GELU and SiLU")
        if "clip.vision.image_grid_pinpoints" in values:
            _refuse(self.header, "an image to be", "one tile", "clip.vision.image_grid_pinpoints")
        if self.number("clip.vision.image_size") != self.manifest.image.size_px:
            _refuse(self.header, "clip.vision.image_size to be", self.manifest.image.size_px, values["clip.vision.image_size"])
        width, heads = self.number("clip.vision.embedding_length"), self.number("clip.vision.attention.head_count")
        if width % heads:
            _refuse(self.header, "a number of heads that divides", width, heads)
        layers = values.get("clip.vision.feature_layer", [])
        blocks = self.number("clip.vision.block_count")
        if not isinstance(layers, list) or any(not isinstance(v, int) or not 0 <= v <= blocks for v in layers) or len(layers) > 1:
            _refuse(self.header, "clip.vision.feature_layer to be", f"one layer of at most {blocks}", layers)

    def shape(self, name: str, expected: tuple[int | None, ...], types: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """The tensor's shape, after comparing it where `expected` is a number."""
        tensor = self.header.tensors.get(name)
        found = tensor.shape if tensor is not None else ()
        if tensor is None or len(found) != len(expected) or any(e not in (None, n) for e, n in zip(expected, found, strict=True)):
            text = " × ".join("any" if n is None else str(n) for n in expected)
            _refuse(self.header, f"the tensor {name} of shape", text, tensor and " × ".join(map(str, tensor.shape)))
        if types is not None and tensor.type not in types:
            _refuse(self.header, f"the tensor {name} of ggml type", " or ".join(map(str, types)), tensor.type)
        return tensor.shape

    def check_vector(self, name: str, length: int) -> None:
        # llama.cpp's CPU kernels end the process on 16-bit biases and norms.
        self.shape(name, (length,), (_F32,))

    def check_norm(self, name: str) -> None:
        width = self.number("clip.vision.embedding_length")
        self.check_vector(f"{name}.weight", width)
        self.check_vector(f"{name}.bias", width)

    def check_embeddings(self) -> None:
        width, patch = self.number("clip.vision.embedding_length"), self.number("clip.vision.patch_size")
        patches = (self.number("clip.vision.image_size") // patch) ** 2
        clip = self.manifest.vision.tower == "clip"
        self.shape("v.patch_embd.weight", (patch, patch, 3, width), (_F32, _F16, _BF16))
        self.shape("v.position_embd.weight", (width, patches + clip))
        if "v.patch_embd.bias" in self.header.tensors:
            self.check_vector("v.patch_embd.bias", width)
        if clip:
            self.check_vector("v.class_embd", width)
            self.check_norm("v.pre_ln")
        elif "v.class_embd" in self.header.tensors:
            _refuse(self.header, "a SigLIP tower without", "v.class_embd", "one")
        record = self.manifest.vision
        if patches + record.keep_cls - record.skip_first_token != record.image_tokens:
            _refuse(self.header, "patches for", f"{record.image_tokens} rows an image", patches)

    def check_block(self, block: str) -> None:
        width = self.number("clip.vision.embedding_length")
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            self.check_linear(f"{block}.{part}", width, width)
        self.check_norm(f"{block}.ln1")
        self.check_norm(f"{block}.ln2")
        ffn = self.shape(f"{block}.ffn_up.weight", (width, None))[1]
        self.check_linear(f"{block}.ffn_up", width, ffn)
        self.check_linear(f"{block}.ffn_down", ffn, width)

    def check_linear(self, name: str, inputs: int, outputs: int) -> None:
        self.shape(f"{name}.weight", (inputs, outputs))
        if f"{name}.bias" in self.header.tensors:
            self.check_vector(f"{name}.bias", outputs)

    def check_projector(self) -> None:
        width, out = self.number("clip.vision.embedding_length"), self.manifest.llm.embedding_length
        hidden = self.shape("mm.0.weight", (width, None))[1]
        self.check_vector("mm.0.bias", hidden)
        found = self.shape("mm.2.weight", (hidden, None))[1]
        if found != out or self.number("clip.vision.projection_dim") != out:
            _refuse(self.header, f"rows as wide as the LLM's in {self.manifest.llm.file},", out, found)
        self.check_vector("mm.2.bias", out)
