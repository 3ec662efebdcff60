"""LoRA adapters as files of their own: a PEFT folder written as llama.cpp's GGUF adapter.

    save_gguf_adapter(folder, Path("adapter.gguf"), llm, quant="Q8_0")

Reading and merging them is readers/lora.py's.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, Keys

from converters.checkpoint import F32, LlmSpec
from converters.llm import Slot, llm_slots
from converters.readers.lora import CONFIG_NAME, Lora, load_peft
from converters.readers.store import read_json
from converters.tensors import permute_heads
from edgemed.core.errors import InputError, UnsupportedError
from edgemed.core.files import atomic_path

_BLOCK = 32  # elements in a row's block of every type that adapters are written in


def save_gguf_adapter(source: Path, out: Path, llm: LlmSpec, quant: str = "Q8_0") -> None:
    """Write a PEFT folder's LoRA as a llama.cpp adapter for `llm` (whose tensors are not read).

    quant: F32, F16 or Q8_0; a matrix whose rows are no multiple of 32 is kept at F16. Scales other than alpha / rank (rslora,
    patterns) go into B. Raises UnsupportedError where the adapter changes more than matrices of the language model.
    """
    if quant not in ("F32", "F16", "Q8_0"):
        raise InputError(f"Expected an adapter type out of F32, F16, Q8_0, found '{quant}'.", "Pass one of them.")
    adapter = load_peft(source)
    slots = {slot.name: slot for slot in llm_slots(llm)}
    foreign = [name for group, name in (*adapter.loras, *adapter.replaced) if group != "llm" or name not in slots]
    if adapter.replaced or foreign or adapter.transpose:
        found = foreign[0] if foreign else next((name for _, name in adapter.replaced), "fan_in_fan_out")
        raise UnsupportedError(
            f"Expected LoRA on matrices of the language model alone in {source}, found '{found}'.", "Keep the PEFT folder."
        )
    alpha = float(read_json(source / CONFIG_NAME).get("lora_alpha", 8))
    with atomic_path(out) as part:
        writer = gguf.GGUFWriter(part, llm.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        for (_, name), lora in adapter.loras.items():
            for leaf, values in _parts(slots[name], lora, alpha).items():
                _add(writer, f"{slots[name].gguf}.{leaf}", values, GGMLQuantizationType[quant])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _parts(slot: Slot, lora: Lora, alpha: float) -> dict[str, F32]:
    b = lora.b * np.float32(lora.scale / (alpha / lora.a.shape[0]))
    return {"lora_a": lora.a, "lora_b": permute_heads(b, slot.rope_head_dim) if slot.rope_head_dim else b}


def _add(writer: gguf.GGUFWriter, name: str, values: F32, kind: GGMLQuantizationType) -> None:
    if kind is GGMLQuantizationType.Q8_0 and values.shape[-1] % _BLOCK:
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values, np.float32), kind), raw_dtype=kind)
