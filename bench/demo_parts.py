"""What a training of edgemed-demo leaves: adapter, tower and projector in fp16 and run.json, a quarter of a checkpoint's size.

    save_parts(folder, model, run)
    adapter, vision = load_parts(folder, model)     # a folder of save_parts, or edgemed/demo itself

edgemed/demo holds the same tensors at 8 bits as GGUF (bench/pack_demo.py), so that a training can go on from what ships.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from converters.readers.gguf import vision_tensors
from converters.readers.gguf_file import open_gguf
from converters.tensors import permute_heads, read_all

State = dict[str, torch.Tensor]
ADAPTER, VISION = "adapter_model.safetensors", "vision.safetensors"
# A Llama block's tensors: GGUF's names and HF's.
BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def save_parts(out: Path, model: Any, run: dict[str, Any]) -> None:
    """Adapter, tower and projector in fp16; layers of the tower that no feature passes through stay behind."""
    from peft import get_peft_model_state_dict

    out.mkdir(parents=True, exist_ok=True)
    adapter = {k: v.detach().half().cpu().contiguous() for k, v in get_peft_model_state_dict(model).items()}
    base = model.get_base_model()
    vision = base.config.vision_config.num_hidden_layers
    unused = [f"layers.{i}." for i in range(base.config.vision_feature_layer % (vision + 1), vision)]
    parts = {
        k: v.detach().half().cpu().contiguous()
        for k, v in base.state_dict().items()
        if ("vision_tower" in k or "multi_modal" in k) and not any(layer in k for layer in unused)
    }
    save_file(adapter, out / ADAPTER)
    save_file(parts, out / VISION)
    (out / "run.json").write_text(json.dumps(run))


def load_parts(folder: Path, model: Any) -> tuple[State, State]:
    """The adapter's and the vision tensors in float32, by the names that they have in `model` (a peft model of the same shape)."""
    if not (folder / "adapter.gguf").is_file():
        adapter, vision = (load_file(folder / file) for file in (ADAPTER, VISION))
        return {k: v.float() for k, v in adapter.items()}, {k: v.float() for k, v in vision.items()}
    from peft import get_peft_model_state_dict

    base = model.get_base_model()
    head = base.config.text_config.hidden_size // base.config.text_config.num_attention_heads
    known, adapter = list(get_peft_model_state_dict(model)), {}
    for name, tensor in open_gguf(folder / "adapter.gguf").tensors.items():
        values = read_all(tensor)
        if name.endswith(("attn_q.weight.lora_b", "attn_k.weight.lora_b")):  # llama.cpp interleaves the halves of each head's rotary pairs
            values = permute_heads(values, head, to_hf=True)
        adapter[_find(known, _adapter_name(name))] = torch.from_numpy(values)
    tower, projector = vision_tensors(open_gguf(folder / "mmproj.gguf"))
    state = list(base.state_dict())
    return adapter, {_find(state, f".{name}"): torch.from_numpy(read_all(tensor)) for name, tensor in (tower | projector).items()}


def _find(names: Iterable[str], end: str) -> str:
    """The one of `names` that ends so."""
    [name] = [name for name in names if name.endswith(end)]
    return name


def _adapter_name(name: str) -> str:
    _, layer, kind, leaf, factor = name.split(".")
    return f".layers.{layer}.{BLOCK[kind]}.lora_{factor[-1].upper()}.{leaf}"
