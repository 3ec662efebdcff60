"""Any checkpoint that the readers read → transformers' LlavaForConditionalGeneration, where fine-tuning starts.

    export_hf(checkpoint, Path("out"))          # config.json, weights, tokenizer, preprocessor_config.json, edgemed.json

Streams: a tensor is read and written in pieces. An image needs a token of its own there, `<image>`: the tokenizer's, a spare row of
the embedding, or a new row. Needs no torch. Knows no GGUF.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from converters.checkpoint import Checkpoint, LlmSpec, TensorSource, TokenizerSpec, TowerSpec
from converters.safetensors_writer import count_bytes, stored_type, write_weights
from converters.tensors import ArrayTensor, GrownTensor, read_all
from converters.tokenizer_json import save_tokenizer
from edgemed.core.contract import Contract, save_contract, save_processor
from edgemed.core.conversation import IMAGE_MARKER, to_jinja
from edgemed.core.errors import ResourceError, UnsupportedError
from edgemed.core.files import atomic_folder, os_errors, save_text
from edgemed.core.units import format_bytes

Progress = Callable[[int, int], None]
# Names as transformers 4.x wrote them, which 4.x and 5.x read.
_LLM, _PROJECTOR, _TOWER = "language_model.", "multi_modal_projector.", "vision_tower.vision_model."
_TYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Rows are added up to a multiple of this, as published embeddings have them.
_ROW_BLOCK = 64
# The tokenizer's files and the configuration.
_SPARE_BYTES = 64 << 20


def export_hf(checkpoint: Checkpoint, out: Path, progress: Progress | None = None) -> Path:
    """Write the checkpoint into the new or empty folder `out`.

    Raises UnsupportedError for what LlavaForConditionalGeneration cannot hold (a projector of one layer, a head with a bias),
    ResourceError (disk), InputError (`out` holds files).
    """
    checkpoint = with_image_token(checkpoint)
    tensors = dict(hf_tensors(checkpoint))
    total = sum(map(count_bytes, tensors.values()))
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    with atomic_folder(out) as part:
        with os_errors(out):
            free = shutil.disk_usage(part).free
        if free < total + _SPARE_BYTES:
            raise ResourceError(
                f"Expected {format_bytes(total + _SPARE_BYTES)} of free disk space for {out}, found {format_bytes(free)}.",
                "Free some space or choose another folder with --out.",
            )
        write_weights(part, tensors, advance)
        save_text(part / "config.json", json.dumps(hf_config(checkpoint), indent=1))
        save_tokenizer(checkpoint.tokenizer, part, to_jinja(checkpoint.template))
        save_processor(part, checkpoint.image)
        save_contract(part, Contract(image=checkpoint.image, template=checkpoint.template, rounded=checkpoint.rounded))
    return out


def with_image_token(checkpoint: Checkpoint) -> Checkpoint:
    """With `<image>` in the tokenizer and a row for it in the embedding."""
    spec, llm = checkpoint.tokenizer, checkpoint.llm
    if IMAGE_MARKER in spec.tokens:
        return checkpoint
    spare = [i for i, kind in enumerate(spec.types) if kind == TokenType.UNUSED]
    rows = llm.vocab_size if spare else -(-(llm.vocab_size + 1) // _ROW_BLOCK) * _ROW_BLOCK
    image = spare[0] if spare else llm.vocab_size
    tokenizer = _name_token(_grow_tokenizer(spec, rows), image)
    tables = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    grown = {name: GrownTensor(t, rows) if name in tables and rows > t.shape[0] else t for name, t in llm.tensors.items()}
    return replace(checkpoint, tokenizer=tokenizer, llm=replace(llm, vocab_size=rows, tensors=grown))


def _grow_tokenizer(spec: TokenizerSpec, rows: int) -> TokenizerSpec:
    have, more = len(spec.tokens), rows - len(spec.tokens)
    return replace(
        spec,
        tokens=[*spec.tokens, *(f"[PAD{i}]" for i in range(have, rows))],
        types=[*spec.types, *[int(TokenType.UNUSED)] * more],
        scores=None if spec.scores is None else [*spec.scores, *[0.0] * more],
    )


def _name_token(spec: TokenizerSpec, token_id: int) -> TokenizerSpec:
    tokens, types = list(spec.tokens), list(spec.types)
    tokens[token_id], types[token_id] = IMAGE_MARKER, int(TokenType.CONTROL)
    return replace(spec, tokens=tokens, types=types)


def hf_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, TensorSource]]:
    """Name in transformers and source of every tensor; what a layout leaves out and no answer depends on is filled in."""
    llm, tower = checkpoint.llm, checkpoint.tower
    if checkpoint.projector.kind != "mlp2x_gelu":
        raise UnsupportedError(
            f"Expected a projector of two layers in {checkpoint.path}, found one, which LlavaForConditionalGeneration does not have.",
            "Convert to GGUF, or train a projector of two layers with edgemed finetune new and align.",
        )
    for name, tensor in llm.tensors.items():
        if name != "lm_head.bias":
            yield _LLM + name, tensor
        elif np.any(read_all(tensor)):
            raise UnsupportedError(
                f"Expected a head without a bias in {checkpoint.path}, found one, which LlavaForConditionalGeneration does not have.",
                "Convert to GGUF instead.",
            )
    yield from ((_LLM + name, zeros) for name, zeros in _missing_biases(llm))
    yield from ((_PROJECTOR + name, tensor) for name, tensor in checkpoint.projector.tensors.items())
    yield from ((_TOWER + name, tensor) for name, tensor in tower.tensors.items())
    for leaf, value in (("weight", 1.0), ("bias", 0.0)):  # behind the feature
        if f"post_layernorm.{leaf}" not in tower.tensors:
            yield f"{_TOWER}post_layernorm.{leaf}", ArrayTensor("made", np.full(tower.hidden, value, np.float32))


def _missing_biases(llm: LlmSpec) -> Iterator[tuple[str, TensorSource]]:
    """Zeros where transformers' Llama has a bias in all four of attention's layers and the checkpoint in some."""
    if not _attention_bias(llm):
        return
    for i in range(llm.layers):
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name = f"model.layers.{i}.self_attn.{leaf}"
            if f"{name}.bias" not in llm.tensors:
                yield f"{name}.bias", ArrayTensor("made", np.zeros(llm.tensors[f"{name}.weight"].shape[0], np.float32))


def _attention_bias(llm: LlmSpec) -> bool:
    return llm.arch == "llama" and any(f"model.layers.0.self_attn.{leaf}.bias" in llm.tensors for leaf in ("q_proj", "o_proj"))


def hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.json."""
    tower, llm = checkpoint.tower, checkpoint.llm
    stored = 1 + max(int(name.split(".")[2]) for name in tower.tensors if name.startswith("encoder.layers."))
    kinds = [stored_type(tensor) for tensor in llm.tensors.values()]
    tied = "lm_head.weight" not in llm.tensors
    clip = tower.kind == "clip"
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": _TYPE_NAMES[max(set(kinds), key=kinds.count)],
        "image_token_index": checkpoint.tokenizer.tokens.index(IMAGE_MARKER),
        "image_seq_length": tower.image_tokens,
        "projector_hidden_act": checkpoint.projector.activation,
        "multimodal_projector_bias": True,
        "vision_feature_layer": tower.layers - stored - 1,
        "vision_feature_select_strategy": "default" if (clip and not tower.keep_cls) or tower.skip_first_token else "full",
        "tie_word_embeddings": tied,
        "text_config": llm_config(llm) | {"tie_word_embeddings": tied} | _special_ids(checkpoint.tokenizer),
        "vision_config": tower_config(tower, stored),
    }


def _special_ids(spec: TokenizerSpec) -> dict[str, int | None]:
    return {"bos_token_id": spec.bos_id, "eos_token_id": spec.eos_id, "pad_token_id": spec.pad_id}


def llm_config(spec: LlmSpec) -> dict[str, Any]:
    """text_config of transformers 5.x for a language model."""
    rope: dict[str, Any] = {"rope_theta": spec.rope_theta, "rope_type": "default"}
    if spec.rope_linear_factor is not None:
        rope |= {"rope_type": "linear", "factor": spec.rope_linear_factor}
    partial = rope | {"partial_rotary_factor": spec.rope_dims / spec.head_dim}
    common = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.context_length,
        "rope_parameters": rope,
        "hidden_act": "silu",
    }
    bias = "model.layers.0.self_attn.q_proj.bias" in spec.tensors
    own: dict[str, dict[str, Any]] = {
        "llama": {
            "model_type": "llama",
            "head_dim": spec.head_dim,
            "rms_norm_eps": spec.norm_eps,
            "attention_bias": _attention_bias(spec),
            "mlp_bias": False,
        },
        "qwen2": {"model_type": "qwen2", "rms_norm_eps": spec.norm_eps, "use_sliding_window": False},
        "phi2": {"model_type": "phi", "layer_norm_eps": spec.norm_eps, "hidden_act": "gelu_new", "rope_parameters": partial},
        "stablelm": {
            "model_type": "stablelm",
            "layer_norm_eps": spec.norm_eps,
            "use_qkv_bias": bias,
            "use_parallel_residual": spec.parallel_residual,
            "rope_parameters": partial,
        },
    }
    return common | own[spec.arch]


def tower_config(spec: TowerSpec, stored_layers: int) -> dict[str, Any]:
    """vision_config; it counts all layers that are stored, also those behind the feature."""
    return {
        "model_type": "clip_vision_model" if spec.kind == "clip" else "siglip_vision_model",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": stored_layers,
        "num_attention_heads": spec.heads,
        "image_size": spec.image_size_px,
        "patch_size": spec.patch_size_px,
        "layer_norm_eps": spec.norm_eps,
        "hidden_act": spec.activation,
        **({} if spec.kind == "clip" else {"vision_use_head": False}),
    }
