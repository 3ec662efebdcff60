"""Reader (f): a GGUF language model and an mmproj as the source, dequantised row by row.

    checkpoint = read_gguf(Path("llm.gguf"), options)          # options.mmproj names the tower and projector
    checkpoint = read_artifact(Path("converted/"), options)    # both, and the rest, from a folder with a manifest

Rows of q and k go back into HF's order. A tower whose feed-forward was padded with zeros, and a linear projector written as two
layers, stay so: the function is the same. The tower's and the projector's GELU is what llama.cpp computes, the tanh form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import Keys

from converters.checkpoint import Checkpoint, LlmSpec, Tensors, TensorSource, TowerSpec
from converters.llm import check_layer_count, check_llm, llm_slots
from converters.readers.assemble import Options, build_projector, list_files
from converters.readers.config import LLM_TYPES, check_tower, count_layers
from converters.readers.gguf_file import GgufFile, open_gguf
from converters.readers.preparation import build_preparation, choose_template
from converters.tensors import ArrayTensor, RopeRows, read_all
from converters.tokenizers import tokenizer_from_gguf
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.manifest import load_artifact

Fields = Mapping[str, Any]
_REQUIRED = object()


def _field(fields: Fields, key: str, where: Path, default: Any = _REQUIRED) -> Any:
    value = fields.get(key, default)
    if value is _REQUIRED or isinstance(value, (list, str)):
        raise CheckpointError(
            f"Expected a number for {key} in {where}, found {fields.get(key)!r}.", "Use a whole file of a supported architecture."
        )
    return value


def _count(fields: Fields, key: str, where: Path, default: Any = _REQUIRED) -> int:
    value = int(_field(fields, key, where, default))
    if not 1 <= value < 1 << 31:
        raise CheckpointError(f"Expected a positive number of 32 bits for {key} in {where}, found {value}.", "Get the file again.")
    return value


def gguf_llm(file: GgufFile) -> LlmSpec:
    """The language model in `file`. Raises CheckpointError, UnsupportedError."""
    arches = {kind.arch for kind in LLM_TYPES.values()}
    arch = file.fields.get(Keys.General.ARCHITECTURE)
    if not isinstance(arch, str) or arch not in arches:
        raise UnsupportedError(
            f"Expected a language model of architecture {', '.join(sorted(arches))} in {file.path}, found {arch!r}.", "Check the path."
        )

    def get(key: str, default: Any = _REQUIRED) -> Any:
        return _field(file.fields, key.format(arch=arch), file.path, default)

    def count(key: str, default: Any = _REQUIRED) -> int:
        return _count(file.fields, key.format(arch=arch), file.path, default)

    scaling = file.fields.get(Keys.Rope.SCALING_TYPE.format(arch=arch), "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedError(f"Expected plain or linear rotary positions in {file.path}, found '{scaling}'.", "Use another model.")
    eps = Keys.Attention.LAYERNORM_EPS if arch in ("phi2", "stablelm") else Keys.Attention.LAYERNORM_RMS_EPS
    hidden, heads = count(Keys.LLM.EMBEDDING_LENGTH), count(Keys.Attention.HEAD_COUNT)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"Expected tensor 'token_embd.weight' in {file.path}, found none.", "Get the file again.")
    head_dim = count(Keys.Attention.KEY_LENGTH, hidden // heads)
    spec = LlmSpec(
        arch=arch,
        layers=count(Keys.LLM.BLOCK_COUNT),
        hidden=hidden,
        ffn=count(Keys.LLM.FEED_FORWARD_LENGTH),
        heads=heads,
        kv_heads=count(Keys.Attention.HEAD_COUNT_KV, heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        context_length=count(Keys.LLM.CONTEXT_LENGTH),
        norm_eps=float(get(eps)),
        rope_theta=float(get(Keys.Rope.FREQ_BASE, 10000.0)),
        rope_dims=count(Keys.Rope.DIMENSION_COUNT, head_dim),
        tensors={},
        rope_linear_factor=float(get(Keys.Rope.SCALING_FACTOR)) if scaling == "linear" else None,
    )
    if arch == "stablelm":  # the graph goes by this tensor alone
        spec = replace(spec, parallel_residual="blk.0.ffn_norm.weight" not in file.tensors)
    spec = replace(spec, tensors=_canonical(spec, file))
    check_llm(spec, file.path)
    return spec


def _canonical(spec: LlmSpec, file: GgufFile) -> Tensors:
    check_layer_count(spec.layers, len(file.tensors), file.path)
    slots = {slot.gguf: slot for slot in llm_slots(spec)}
    out: dict[str, TensorSource] = {}
    for name, tensor in file.tensors.items():
        if name not in slots:
            raise UnsupportedError(
                f"Expected tensors of {spec.arch} in {file.path}, found '{name}'.", "Use a file of a plain model of this architecture."
            )
        head_dim = slots[name].rope_head_dim
        out[slots[name].name] = RopeRows(tensor, head_dim, to_hf=True) if head_dim else tensor
    return out


_TOWER_NAMES = {
    "v.class_embd": "embeddings.class_embedding", "v.patch_embd.weight": "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": "embeddings.patch_embedding.bias", "v.position_embd.weight": "embeddings.position_embedding.weight",
    "v.pre_ln.weight": "pre_layrnorm.weight", "v.pre_ln.bias": "pre_layrnorm.bias",
}  # fmt: skip
_LAYER_NAMES = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
_LAYER = re.compile(r"v\.blk\.(\d+)\.(\w+)\.(weight|bias)")
_PROJECTOR = {"mm.0": "linear_1", "mm.2": "linear_2"}


def vision_tensors(file: GgufFile) -> tuple[dict[str, TensorSource], dict[str, TensorSource]]:
    """An mmproj's tower and projector, by HF's names. Raises UnsupportedError for tensors of other parts."""
    tower: dict[str, TensorSource] = {}
    projector: dict[str, TensorSource] = {}
    for name, tensor in file.tensors.items():
        layer = _LAYER.fullmatch(name)
        stem, _, leaf = name.rpartition(".")
        if layer and layer[2] in _LAYER_NAMES:
            tower[f"encoder.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = tensor
        elif name in _TOWER_NAMES:
            tower[_TOWER_NAMES[name]] = tensor
        elif stem in _PROJECTOR:
            projector[f"{_PROJECTOR[stem]}.{leaf}"] = tensor
        else:
            raise UnsupportedError(
                f"Expected tensors of a CLIP or SigLIP tower and a two-layer projector in {file.path}, found '{name}'.",
                "Files of other projectors, and old ones with a final norm, do not convert.",
            )
    return _swap_feed_forward(tower), projector


def _swap_feed_forward(tower: dict[str, TensorSource]) -> dict[str, TensorSource]:
    # Old files have up and down exchanged; llama.cpp tells by the shape, too.
    for name in [n for n in tower if n.endswith("mlp.fc2.weight")]:
        other = name.replace("fc2", "fc1")
        hidden = tower.get("embeddings.position_embedding.weight")
        if hidden is not None and other in tower and tower[name].shape[-1] == hidden.shape[-1] != tower[name].shape[0]:
            for leaf in ("weight", "bias"):
                a, b = other.replace("weight", leaf), name.replace("weight", leaf)
                if a in tower and b in tower:
                    tower[a], tower[b] = tower[b], tower[a]
    return tower


def gguf_tower(file: GgufFile, tensors: dict[str, TensorSource]) -> TowerSpec:
    """The tower in an mmproj. Raises CheckpointError, UnsupportedError."""
    fields = file.fields
    kind = fields.get("clip.projector_type", fields.get("clip.vision.projector_type"))
    if fields.get(Keys.General.ARCHITECTURE) != "clip" or kind != "mlp":
        raise UnsupportedError(f"Expected an mmproj of projector type 'mlp' in {file.path}, found {kind!r}.", "Check the path.")
    if fields.get("clip.use_silu"):
        raise UnsupportedError(f"Expected a GELU tower in {file.path}, found SiLU.", "Use another model.")

    def count(key: str) -> int:
        return _count(fields, f"clip.vision.{key}", file.path)

    clip = "embeddings.class_embedding" in tensors
    if clip and tensors["embeddings.class_embedding"].shape != (count("embedding_length"),):
        tensors["embeddings.class_embedding"] = ArrayTensor("v.class_embd", np.ravel(read_all(tensors["embeddings.class_embedding"])))
    present = count_layers(tensors)
    feature = fields.get("clip.vision.feature_layer")
    # without the key, llama.cpp runs one layer less than the file counts
    layers = max(feature) if isinstance(feature, list) and feature else count("block_count") - 1
    if not 1 <= layers <= present:
        raise CheckpointError(
            f"Expected the feature layer among the tower's {present} layers in {file.path}, found {layers}.", "Get the file again."
        )
    ffn = tensors.get("encoder.layers.0.mlp.fc1.weight")
    spec = TowerSpec(
        kind="clip" if clip else "siglip",
        layers=layers,
        hidden=count("embedding_length"),
        ffn=ffn.shape[0] if ffn is not None else count("feed_forward_length"),
        heads=count("attention.head_count"),
        image_size_px=count("image_size"),
        patch_size_px=count("patch_size"),
        norm_eps=float(_field(fields, "clip.vision.attention.layer_norm_epsilon", file.path)),
        activation="gelu_pytorch_tanh" if fields.get("clip.use_gelu") else "quick_gelu",
        tensors=tensors,
    )
    check_tower(spec, present, file.path)
    return spec


def read_gguf(source: Path, options: Options) -> Checkpoint:
    """A language model's GGUF with an mmproj beside it (options.mmproj)."""
    file = open_gguf(source)
    if options.mmproj is None:
        raise CheckpointError(
            f"Expected an mmproj for the language model {source}, found none.", "Name the tower and projector's GGUF with --mmproj."
        )
    vision = open_gguf(options.mmproj)
    llm = gguf_llm(file)
    tower_tensors, projector_tensors = vision_tensors(vision)
    tower = gguf_tower(vision, tower_tensors)
    projector = build_projector(projector_tensors, "gelu_pytorch_tanh", tower, llm, options.mmproj)
    tokenizer = tokenizer_from_gguf(file.fields, llm.vocab_size, source)
    means = {key: vision.fields.get(f"clip.vision.{key}") for key in ("image_mean", "image_std")}
    image, notes = build_preparation(tower, means, None, options.image_mode)
    default: Literal["chatml", "v1"] = "chatml" if "<|im_end|>" in tokenizer.tokens else "v1"
    template, more = choose_template(options.template, file.fields.get(Keys.Tokenizer.CHAT_TEMPLATE), default, tokenizer)
    if options.image is None and options.image_mode is None:
        more = (*more, f"A GGUF does not say how images were prepared for training; '{image.mode}' was taken, another can be named.")
    return Checkpoint(
        reader="gguf",
        path=source,
        name=options.name or str(file.fields.get(Keys.General.NAME) or source.stem),
        llm=llm,
        tower=tower,
        projector=projector,
        tokenizer=tokenizer,
        image=options.image or image,
        template=template,
        files=list_files(source, (source, options.mmproj)),
        notes=(*notes, *more),
    )


def read_artifact(folder: Path, options: Options) -> Checkpoint:
    """A folder that edgemed converted: what its GGUFs do not say is in the manifest."""
    artifact = load_artifact(folder)
    manifest = artifact.manifest
    named = replace(
        options,
        mmproj=options.mmproj or artifact.mmproj_path,
        image=options.image or (manifest.image if options.image_mode is None else None),
        name=options.name or manifest.name,
        template=options.template or manifest.template.name,
    )
    found = read_gguf(artifact.llm_path, named)
    tower = replace(found.tower, skip_first_token=manifest.vision.skip_first_token, keep_cls=manifest.vision.keep_cls)
    tokenizer = replace(found.tokenizer, space_prefix=manifest.space_prefix)
    template = found.template if options.template else manifest.template
    return replace(
        found,
        path=folder,
        tower=tower,
        tokenizer=tokenizer,
        template=template,
        files=list_files(folder, (artifact.llm_path, named.mmproj or folder)),
    )
