"""What a training of edgemed-demo leaves: adapter, tower and projector in fp16 and run.json, a quarter of a checkpoint's size.

    save_parts(folder, recipe, model, run)
    adapter, vision = load_parts(folder, model)     # a folder of save_parts, or edgemed/demo itself

edgemed/demo holds the same tensors at 8 bits as GGUF (bench/pack_demo.py), so that a training can go on from what ships.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from converters.tensors import permute_heads

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
_TOWER = {
    "v.patch_embd": "embeddings.patch_embedding",
    "v.position_embd": "embeddings.position_embedding",
    "mm.0": "linear_1",
    "mm.2": "linear_2",
}
_TOWER_BLOCK = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
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
    adapter = _renamed(folder / "adapter.gguf", _adapter_name, get_peft_model_state_dict(model))
    for name in adapter:
        if name.endswith(("q_proj.lora_B.weight", "k_proj.lora_B.weight")):  # llama.cpp interleaves the halves of each head's rotary pairs
            adapter[name] = torch.from_numpy(permute_heads(adapter[name].numpy(), head, to_hf=True))
    return adapter, _renamed(folder / "mmproj.gguf", _vision_name, base.state_dict())


def _adapter_name(name: str) -> str:
    _, layer, kind, leaf, factor = name.split(".")
    return f".layers.{layer}.{BLOCK[kind]}.lora_{factor[-1].upper()}.{leaf}"


def _vision_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    if stem in _TOWER:
        return f".{_TOWER[stem]}.{leaf}"
    _, _, layer, kind = stem.split(".")
    return f".encoder.layers.{layer}.{_TOWER_BLOCK[kind]}.{leaf}"


def _renamed(path: Path, rename: Callable[[str], str], names: Iterable[str]) -> State:
    """A GGUF's tensors, each under the one of `names` that ends as `rename` says."""
    import gguf

    known, out = list(names), {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        [name] = [known_name for known_name in known if known_name.endswith(rename(tensor.name))]
        out[name] = torch.from_numpy(values.reshape(tuple(int(n) for n in reversed(tensor.shape))))
    return out
