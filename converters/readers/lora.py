"""Reader (d): LoRA adapters, PEFT folders and llama.cpp's GGUF adapters, over any checkpoint.

    groups, files = merge_peft(folder, groups)      # tensors of a checkpoint by group (names.py)
    llm = merge_gguf_adapter(path, llm)             # W + (alpha / rank) · B @ A on an LlmSpec

The merged weights are made while they are read; nothing is stored. DoRA, and adapters of convolutions or embeddings, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import Keys

from converters.checkpoint import F32, LlmSpec, TensorSource
from converters.llm import llm_slots
from converters.readers.gguf_file import open_gguf
from converters.readers.names import Groups, canonical_name
from converters.readers.store import Weights, find_weights, open_weights, read_json
from converters.tensors import LoraTensor, permute_heads, read_all
from edgemed.core.errors import CheckpointError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
_PART = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"(.+)\.modules_to_save(?:\.default)?\.(.+)")


@dataclass(frozen=True)
class Lora:
    """One matrix' update: scale · B @ A, with A [rank, in] and B [out, rank]."""

    a: F32
    b: F32
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: updates and replaced tensors by (group, canonical name)."""

    loras: dict[tuple[str, str], Lora]
    replaced: dict[tuple[str, str], TensorSource]
    files: tuple[Path, ...]
    transpose: bool = False


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_NAME).is_file()


def load_peft(folder: Path) -> Adapter:
    """A PEFT LoRA folder, with the non_lora_trainables that LLaVA saves beside it. Raises CheckpointError, UnsupportedError."""
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        found = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise UnsupportedError(f"Expected a LoRA adapter in {folder}, found {found}.", "Merge it with PEFT, then convert the merged model.")
    weights = open_weights(folder, "adapter_model")
    pairs: dict[tuple[str, str], dict[str, TensorSource]] = {}
    modules: dict[tuple[str, str], str] = {}  # a pattern of PEFT's is about the name in the model that was trained
    replaced: dict[tuple[str, str], TensorSource] = {}
    for name, tensor in weights.tensors.items():
        part, saved = _PART.fullmatch(name), _SAVED.fullmatch(name)
        if part:
            place = _place(part[1] + ".weight", folder)
            modules[place] = part[1].removeprefix("base_model.model.")
            pairs.setdefault(place, {})[part[2]] = tensor
        elif "lora_" in name:
            raise UnsupportedError(
                f"Expected LoRA of linear layers in {folder}, found '{name}'.", "Merge it with PEFT, then convert the merged model."
            )
        elif not name.endswith(".base_layer.weight"):
            replaced[_place(f"{saved[1]}.{saved[2]}" if saved else name, folder)] = tensor
    extra = find_weights(folder, "non_lora_trainables") or Weights()
    replaced |= {_place(name, folder): tensor for name, tensor in extra.tensors.items()}
    loras = {place: _lora(modules[place], pair, config, folder) for place, pair in pairs.items()}
    return Adapter(loras, replaced, (*weights.files, *extra.files), bool(config.get("fan_in_fan_out")))


def _place(name: str, folder: Path) -> tuple[str, str]:
    # PEFT wraps the model once ("base_model.model."), LLaVA's own saving of non-LoRA tensors keeps only "base_model."
    name = name.removeprefix("base_model.").replace(".base_layer.", ".")
    for candidate in (name.removeprefix("model."), name):
        try:
            place = canonical_name(candidate)
        except UnsupportedError:
            raise
        except CheckpointError:
            continue
        if place is not None:
            return place
    raise CheckpointError(
        f"Expected tensors of a LLaVA model's adapter in {folder}, found '{name}'.", "Check that this is the right adapter."
    )


def _lora(module: str, pair: Mapping[str, TensorSource], config: Mapping[str, Any], folder: Path) -> Lora:
    if set(pair) != {"A", "B"}:
        raise CheckpointError(
            f"Expected lora_A and lora_B for '{module}' in {folder}, found one of them.", "Copy or download the adapter again."
        )
    a, b = read_all(pair["A"]), read_all(pair["B"])
    rank = int(_pattern(config.get("rank_pattern"), module, config.get("r", a.shape[0])))
    alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"Expected rank {rank} for '{module}' in {folder}, found {a.shape[0]} and {b.shape[-1]}.", "Check adapter_config.json."
        )
    return Lora(a, b, alpha / float(np.sqrt(rank)) if config.get("use_rslora") else alpha / rank)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    # PEFT: a key is a regular expression for the whole name or its end after a dot; the first that matches counts
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def merge_peft(folder: Path, groups: Groups) -> tuple[Groups, tuple[Path, ...]]:
    """Groups with the adapter's updates on top, and the adapter's files. Raises CheckpointError where a target is missing."""
    adapter = load_peft(folder)
    out = {"llm": dict(groups.llm), "tower": dict(groups.tower), "projector": dict(groups.projector)}
    for (group, name), tensor in adapter.replaced.items():
        out[group][name] = tensor
    for (group, name), lora in adapter.loras.items():
        out[group][name] = _merged(out[group].get(name), name, lora, adapter.transpose, folder)
    return Groups(**out), adapter.files


def _merged(base: TensorSource | None, name: str, lora: Lora, transpose: bool, where: Path) -> LoraTensor:
    if base is None:
        raise CheckpointError(
            f"Expected the adapter {where} to change tensors of its base, found no '{name}' there.", "Check that it is its base."
        )
    expected = (lora.a.shape[1], lora.b.shape[0]) if transpose else (lora.b.shape[0], lora.a.shape[1])
    if base.shape != expected:
        raise CheckpointError(
            f"Expected a base with shape {list(expected)} for '{name}' of {where}, found {list(base.shape)}.", "Check that it is its base."
        )
    return LoraTensor(base, lora.a, lora.b, lora.scale, f"lora({where.name})", transpose)


def merge_gguf_adapter(path: Path, llm: LlmSpec) -> LlmSpec:
    """`llm` with a llama.cpp adapter on top; dense and quantised ones. Raises CheckpointError, UnsupportedError."""
    file = open_gguf(path)
    fields = file.fields
    if fields.get(Keys.General.TYPE) != "adapter" or fields.get(Keys.Adapter.TYPE) != "lora":
        raise CheckpointError(
            f"Expected a GGUF adapter of type lora at {path}, found {fields.get(Keys.General.TYPE)!r}.", "Check the path."
        )
    if fields.get(Keys.General.ARCHITECTURE) != llm.arch:
        raise CheckpointError(
            f"Expected an adapter for {llm.arch} at {path}, found one for {fields.get(Keys.General.ARCHITECTURE)}.",
            "Check that it is its base.",
        )
    alpha = float(fields.get(Keys.Adapter.LORA_ALPHA, 0.0))
    slots = {slot.gguf: slot for slot in llm_slots(llm)}
    merged = dict(llm.tensors)
    names = {name.rpartition(".")[0] for name in file.tensors}
    for name in sorted(names):
        a, b, slot = file.tensors.get(f"{name}.lora_a"), file.tensors.get(f"{name}.lora_b"), slots.get(name)
        if a is None or b is None or slot is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"Expected lora_a and lora_b of {llm.arch}'s tensors in {path}, found '{name}'.", "Check that it is its base."
            )
        rows = read_all(b)
        if slot.rope_head_dim and rows.shape[0] % slot.rope_head_dim == 0:
            rows = permute_heads(rows, slot.rope_head_dim, to_hf=True)
        # llama.cpp takes an alpha of 0 for "no scaling"
        lora = Lora(read_all(a), rows, alpha / a.shape[0] if alpha else 1.0)
        merged[slot.name] = _merged(merged.get(slot.name), slot.name, lora, False, path)
    return replace(llm, tensors=merged)
