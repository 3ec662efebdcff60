"""Checkpoints of full width with random weights: sizes, memory and speed do not depend on the values.

    python -m bench.full_width tiny OUT        # TinyLlama-1.1B + SigLIP so400m/384 + two-layer projector, 3.0 GB
    python -m bench.full_width med OUT         # Mistral-7B + CLIP-L/336 + two-layer projector, 15.1 GB
    python -m bench.full_width clip336 OUT     # one tower each, over a one-layer LLM of the projector's true width
    python -m bench.full_width clip224 OUT     # CLIP-L/224 with LLaVA-Med v1.0's one-layer projector
    python -m bench.full_width siglip OUT

Layouts: transformers' LlavaForConditionalGeneration; `clip224` is the original LLaVA layout, which alone has one-layer projectors.
Seeded, bfloat16, drawn in as many threads as there are cores (up to 0.2 GB of memory each). The tokenizer is SentencePiece-like, made
of all short words of the alphabet. Knows no quality: such a model says nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import string
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE_VALUES = 1 << 22
AHEAD = os.cpu_count() or 1
SHARD_BYTES = 5_000_000_000
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llm:
    """A Llama or Mistral."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int


@dataclass(frozen=True)
class Tower:
    """A CLIP or SigLIP, with the layers that are stored."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    image: int


@dataclass(frozen=True)
class Model:
    """A whole model; `feature_layer` in transformers' counting."""

    llm: Llm
    tower: Tower
    feature_layer: int
    linear: bool = False


def _short(hidden: int) -> Llm:
    return Llm("llama", 1, hidden, 512, hidden // 128, hidden // 128, 1024)


SIGLIP = Tower("siglip", 26, 1152, 4304, 16, 384)  # TinyLLaVA's, whose last layer was deleted
CLIP_336 = Tower("clip", 24, 1024, 4096, 16, 336)
CLIP_224 = Tower("clip", 24, 1024, 4096, 16, 224)
MODELS = {
    "tiny": Model(Llm("llama", 22, 2048, 5632, 32, 4, 32000), SIGLIP, -1),
    "med": Model(Llm("mistral", 32, 4096, 14336, 32, 8, 32000), CLIP_336, -2),
    "small": Model(Llm("llama", 30, 576, 1536, 9, 3, 49152), SIGLIP, -1),  # SmolLM2-135M: a tower three times its language model
    "siglip": Model(_short(2048), SIGLIP, -1),
    "clip336": Model(_short(4096), CLIP_336, -2),
    "clip224": Model(_short(4096), CLIP_224, -2, linear=True),
}


def llm_shapes(m: Llm) -> Shapes:
    """Names as in a bare causal model."""
    head = m.hidden // m.heads
    out: Shapes = {"model.embed_tokens.weight": (m.vocab, m.hidden)}
    for i in range(m.layers):
        p = f"model.layers.{i}."
        for name, rows in (("q", m.heads), ("k", m.kv_heads), ("v", m.kv_heads)):
            out[f"{p}self_attn.{name}_proj.weight"] = (rows * head, m.hidden)
        out[f"{p}self_attn.o_proj.weight"] = (m.hidden, m.hidden)
        out |= {f"{p}mlp.{n}_proj.weight": (m.ffn, m.hidden) for n in ("gate", "up")}
        out[f"{p}mlp.down_proj.weight"] = (m.hidden, m.ffn)
        out |= {f"{p}{n}_layernorm.weight": (m.hidden,) for n in ("input", "post_attention")}
    return out | {"model.norm.weight": (m.hidden,), "lm_head.weight": (m.vocab, m.hidden)}


def tower_shapes(t: Tower) -> Shapes:
    """Names as in a standalone vision model, after `vision_model.`."""
    d, patch = t.hidden, 14
    clip = t.kind == "clip"
    out: Shapes = {"embeddings.patch_embedding.weight": (d, 3, patch, patch)}
    out |= {"embeddings.class_embedding": (d,)} if clip else {"embeddings.patch_embedding.bias": (d,)}
    out["embeddings.position_embedding.weight"] = ((t.image // patch) ** 2 + clip, d)
    norms = ["pre_layrnorm"] if clip else []
    linear: Shapes = {}
    for i in range(t.layers):
        p = f"encoder.layers.{i}."
        linear |= {f"{p}self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")}
        linear |= {f"{p}mlp.fc1": (t.ffn, d), f"{p}mlp.fc2": (d, t.ffn)}
        norms += [f"{p}layer_norm1", f"{p}layer_norm2"]
    for name, shape in {**linear, **{n: (d,) for n in [*norms, "post_layernorm"]}}.items():
        out |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return out


def random_piece(name: str, shape: tuple[int, ...], rng: np.random.Generator, rows: int) -> NDArray[np.uint16]:
    """bfloat16 bits of the next `rows` rows: scaled so that activations keep their size through the layers."""
    values = rng.standard_normal((rows, *shape[1:]), dtype=np.float32)
    if len(shape) == 1:
        values = values * np.float32(0.05) + np.float32("norm" in name and name.endswith("weight"))
    elif "embed_tokens" in name:
        values *= np.float32(0.02)
    elif "position" in name:
        values *= np.float32(0.3)
    else:
        values *= np.float32(np.prod(shape[1:]) ** -0.5)
    bits = values.view(np.uint32)
    out: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return out


def tensor_pieces(name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint16]]:
    """A tensor's bits, piece by piece; the seed is its name."""
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")))
    step = max(1, PIECE_VALUES // int(np.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield random_piece(name, shape, rng, min(step, shape[0] - start))


def save_safetensors(path: Path, shapes: Shapes) -> None:
    """One file, streamed."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as f, ThreadPoolExecutor() as pool:
        f.write(len(raw).to_bytes(8, "little") + raw)
        # A few tensors ahead of the writing: drawing numbers is the work.
        ahead: deque[Future[list[NDArray[np.uint16]]]] = deque()
        for name, shape in [*shapes.items(), *[("", ())] * AHEAD]:
            if name:
                ahead.append(pool.submit(lambda n, s: list(tensor_pieces(n, s)), name, shape))
            if len(ahead) > AHEAD or not name:
                for piece in ahead.popleft().result() if ahead else []:
                    f.write(memoryview(piece).cast("B"))


def save_shards(folder: Path, shapes: Shapes) -> None:
    """model.safetensors, or shards of at most SHARD_BYTES with an index."""
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        n = 2 * int(np.prod(shape))
        if size + n > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += n
    if len(shards) == 1:
        save_safetensors(folder / "model.safetensors", shapes)
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_safetensors(folder / file, shard)
        where |= {name: file for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")


def words(count: int) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Tokens and the merge that makes each: letters, all pairs, all triples, then pairs of pairs."""
    letters = "▁" + string.ascii_lowercase
    pairs = ["".join(p) for p in itertools.product(letters, repeat=2)]
    made: Iterator[tuple[str, tuple[str, str] | None]] = itertools.chain(
        ((a, None) for a in letters),
        ((p, (p[0], p[1])) for p in pairs),
        ((p + a, (p, a)) for p in pairs for a in letters),
        ((p + q, (p, q)) for p in pairs for q in pairs),
    )
    return itertools.islice(made, count)


def save_tokenizer(folder: Path, size: int) -> None:
    """tokenizer.json of a Llama-like tokenizer with `size` tokens."""
    special = ["<unk>", "<s>", "</s>"]
    own = list(words(size - 259))
    vocab = {t: i for i, t in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *(t for t, _ in own)])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(special)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": bos,
            "pair": [*bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{m[0]} {m[1]}" for _, m in own if m],
        },
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": True,
    }
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def text_config(m: Llm) -> dict[str, Any]:
    """config.json of the LLM."""
    return {
        "architectures": ["MistralForCausalLM" if m.kind == "mistral" else "LlamaForCausalLM"],
        "model_type": m.kind,
        "hidden_size": m.hidden,
        "intermediate_size": m.ffn,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "num_key_value_heads": m.kv_heads,
        "vocab_size": m.vocab,
        "max_position_embeddings": 2048 if m.kind == "llama" else 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def vision_config(t: Tower) -> dict[str, Any]:
    """config.json of the tower."""
    clip = t.kind == "clip"
    return {
        "architectures": ["CLIPVisionModel" if clip else "SiglipVisionModel"],
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": t.hidden,
        "intermediate_size": t.ffn,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "image_size": t.image,
        "patch_size": 14,
        "hidden_act": "quick_gelu" if clip else "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-5 if clip else 1e-6,
        **({} if clip else {"vision_use_head": False}),
    }


def preprocessor_config(t: Tower) -> dict[str, Any]:
    """preprocessor_config.json: OpenAI's and Google's published ones."""
    size = {"height": t.image, "width": t.image}
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
    if t.kind == "siglip":
        return common | {"image_processor_type": "SiglipImageProcessor", "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    crop = {"do_center_crop": True, "crop_size": size, "size": {"shortest_edge": t.image}}
    return common | crop | {"image_processor_type": "CLIPImageProcessor", "image_mean": mean, "image_std": std}


def save_hf(folder: Path, m: Model) -> None:
    """transformers' layout, in its published (4.x) spelling."""
    shapes = {f"language_model.{k}": v for k, v in llm_shapes(m.llm).items()}
    shapes |= {f"vision_tower.vision_model.{k}": v for k, v in tower_shapes(m.tower).items()}
    for name, columns in (("linear_1", m.tower.hidden), ("linear_2", m.llm.hidden)):
        shapes |= {f"multi_modal_projector.{name}.weight": (m.llm.hidden, columns), f"multi_modal_projector.{name}.bias": (m.llm.hidden,)}
    save_shards(folder, shapes)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text_config(m.llm),
        "vision_config": vision_config(m.tower),
        "image_token_index": m.llm.vocab - 1,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": m.feature_layer,
        "vision_feature_select_strategy": "full" if m.tower.kind == "siglip" else "default",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(m.tower), indent=1), encoding="utf-8")


def save_llava(folder: Path, m: Model) -> None:
    """The original layout, with the tower in a folder of its own and a one-layer projector."""
    shapes = llm_shapes(m.llm) | {"model.mm_projector.weight": (m.llm.hidden, m.tower.hidden), "model.mm_projector.bias": (m.llm.hidden,)}
    save_shards(folder, shapes)
    tower = folder / "vision_tower"
    tower.mkdir(exist_ok=True)
    save_shards(tower, {f"vision_model.{k}": v for k, v in tower_shapes(m.tower).items()})
    config = text_config(m.llm) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": m.tower.hidden,
        "mm_projector_type": "linear",
        "mm_vision_select_layer": m.feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (tower / "config.json").write_text(json.dumps(vision_config(m.tower), indent=1), encoding="utf-8")
    (tower / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(m.tower), indent=1), encoding="utf-8")


def build(name: str, folder: Path) -> None:
    """Write the model called `name`."""
    m = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (save_llava if m.linear else save_hf)(folder, m)
    save_tokenizer(folder, m.llm.vocab)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.full_width", description="Write a checkpoint of full width with random weights.")
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    build(arguments.model, arguments.out)
    size = sum(p.stat().st_size for p in arguments.out.rglob("*") if p.is_file())
    print(f"{arguments.model}: {size / 1e9:.3f} GB in {arguments.out}")


if __name__ == "__main__":
    main()
