"""Random two-layer models in every published layout, and the transformers modules with the same weights to compare with.

    reference = make_checkpoint(tmp_path, "hf", "llama", "siglip")
    checkpoint = open_checkpoint(reference.source, **reference.options)
    reference.vision_embeds(pixels)                  # float32 [tokens, hidden]: what the LLM sees
    reference.logits(before, embeds, after)          # float32 [positions, vocab]

Layouts: hf, llava, factory, lora, delta, gguf. Families: llama, mistral, qwen2, phi, stablelm (and smollm: llama with a byte-level
tokenizer). Towers: clip, siglip. Weights are seeded; they are rounded to the type they are saved in before the reference is built,
so that reader and reference start from the same numbers. Needs torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers_fixture import save_tokenizer

HIDDEN, HEADS, FFN, LAYERS = 64, 4, 128, 2
TOWER_HIDDEN, TOWER_HEADS, TOWER_FFN, TOWER_LAYERS = 32, 2, 64, 3
IMAGE_PX, PATCH_PX = 32, 8
FAMILIES = ("llama", "mistral", "qwen2", "phi", "stablelm")
TOWERS = ("clip", "siglip")
READERS = ("hf", "llava", "factory", "lora", "delta", "gguf")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
State = dict[str, torch.Tensor]


@dataclass
class Parts:
    """Configurations and float32 weights under canonical names."""

    family: str
    tower_kind: str
    text_config: Any
    vision_config: Any
    llm: State
    tower: State
    projector: State


@dataclass
class Reference:
    """A saved checkpoint and what transformers makes of its weights."""

    source: Path
    reader: str
    parts: Parts
    # Keyword arguments for open_checkpoint beside the source.
    options: dict[str, Any] = field(default_factory=dict)
    feature_layer: int = -2
    # Rows of the hidden state that become image tokens.
    first_token: int = 0
    projector_kind: str = "mlp2x_gelu"
    projector_tanh: bool = False

    @cached_property
    def tower(self) -> Any:
        return build_tower(self.parts.vision_config, self.parts.tower)

    @cached_property
    def llm(self) -> Any:
        return build_llm(self.parts.text_config, self.parts.llm)

    @torch.no_grad()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        w = self.parts.projector
        x = torch.nn.functional.linear(features, w["linear_1.weight"], w["linear_1.bias"])
        if self.projector_kind == "linear":
            return x
        x = torch.nn.functional.gelu(x, approximate="tanh" if self.projector_tanh else "none")
        return torch.nn.functional.linear(x, w["linear_2.weight"], w["linear_2.bias"])

    @torch.no_grad()
    def vision_embeds(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [size, size, 3] → float32 [tokens, hidden]."""
        mean, std = normalisation(self.parts.tower_kind)
        x = (torch.from_numpy(pixels.astype(np.float32)) / 255 - torch.tensor(mean)) / torch.tensor(std)
        states = self.tower(pixel_values=x.permute(2, 0, 1)[None], output_hidden_states=True).hidden_states
        return self.project(states[self.feature_layer][0, self.first_token :]).numpy()

    @torch.no_grad()
    def logits(self, before: list[int], embeds: np.ndarray | None, after: list[int]) -> np.ndarray:
        """float32 [positions, vocab] after text, an image's embedding and text."""
        table = self.llm.get_input_embeddings()
        rows = [table(torch.tensor(before, dtype=torch.long)), table(torch.tensor(after, dtype=torch.long))]
        if embeds is not None:
            rows.insert(1, torch.from_numpy(np.asarray(embeds, np.float32)))
        return self.llm(inputs_embeds=torch.cat(rows)[None]).logits[0].float().numpy()


def normalisation(tower: str) -> tuple[list[float], list[float]]:
    if tower == "siglip":
        return [0.5] * 3, [0.5] * 3
    return [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def make_text_config(family: str, vocab_size: int, **more: Any) -> Any:
    from transformers import LlamaConfig, MistralConfig, PhiConfig, Qwen2Config, StableLmConfig

    common = dict(
        vocab_size=vocab_size, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    make, own = {
        "llama": (LlamaConfig, dict(num_key_value_heads=2, rms_norm_eps=1e-5)),
        "smollm": (LlamaConfig, dict(num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True)),
        "mistral": (MistralConfig, dict(num_key_value_heads=2, rms_norm_eps=1e-5, sliding_window=None)),
        "qwen2": (Qwen2Config, dict(num_key_value_heads=2, tie_word_embeddings=True)),
        "phi": (PhiConfig, dict(num_key_value_heads=HEADS, hidden_act="gelu_new")),
        "stablelm": (StableLmConfig, dict(num_key_value_heads=HEADS, use_qkv_bias=True)),
    }[family]
    return make(**common | own | more)


def make_vision_config(tower: str, **more: Any) -> Any:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    common = dict(
        hidden_size=TOWER_HIDDEN, intermediate_size=TOWER_FFN, num_hidden_layers=TOWER_LAYERS, num_attention_heads=TOWER_HEADS,
        image_size=IMAGE_PX, patch_size=PATCH_PX,
    )  # fmt: skip
    return SiglipVisionConfig(**common | dict(vision_use_head=False) | more) if tower == "siglip" else CLIPVisionConfig(**common | more)


def build_tower(config: Any, state: State) -> Any:
    from transformers import CLIPVisionModel, SiglipVisionModel

    model = (SiglipVisionModel if config.model_type == "siglip_vision_model" else CLIPVisionModel)(config)
    return _load(model, state)


def build_llm(config: Any, state: State) -> Any:
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), state)


def _load(model: Any, state: State) -> Any:
    missing, unexpected = model.load_state_dict(state, strict=False)
    own = [k for k in missing if "position_ids" not in k and k != "lm_head.weight"]
    assert not own and not unexpected, (own, unexpected)
    return model.float().eval()


def random_state(model: Any, generator: torch.Generator) -> State:
    """Seeded weights of a size that makes every nonlinearity matter."""
    out = {}
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or (tied and name == "lm_head.weight"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim == 1:
            out[name] = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embed" in name:
            out[name] = noise * 0.5
        else:
            out[name] = noise * (1.5 / np.sqrt(value[0].numel()))
    return out


def make_parts(family: str, tower: str, vocab_size: int, *, dtype: str = "F16", seed: int = 0, projector: str = "mlp2x_gelu",
               text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None) -> Parts:  # fmt: skip
    from transformers import AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

    generator = torch.Generator().manual_seed(seed)
    text_config, vision_config = make_text_config(family, vocab_size, **(text or {})), make_vision_config(tower, **(vision or {}))
    vision_model = (SiglipVisionModel if tower == "siglip" else CLIPVisionModel)(vision_config)
    llm = random_state(AutoModelForCausalLM.from_config(text_config), generator)
    state = random_state(vision_model, generator)
    width, hidden = vision_config.hidden_size, text_config.hidden_size
    shapes = {"linear_1.weight": (hidden, width), "linear_1.bias": (hidden,)}
    if projector == "mlp2x_gelu":
        shapes |= {"linear_2.weight": (hidden, hidden), "linear_2.bias": (hidden,)}
    project = {k: torch.randn(s, generator=generator) * (0.1 if len(s) == 1 else 1 / np.sqrt(s[1])) for k, s in shapes.items()}
    parts = [{k: v.to(DTYPES[dtype]).float() for k, v in part.items()} for part in (llm, state, project)]
    return Parts(family, tower, text_config, vision_config, *parts)


def save_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def save_weights(folder: Path, state: State, *, dtype: str = "F16", shards: int = 1, stem: str = "model") -> None:
    """model.safetensors, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(DTYPES[dtype]).contiguous() for k, v in state.items()}
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names, where = list(state), {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({k: state[k] for k in names[i::shards]}, folder / file, metadata={"format": "pt"})
        where |= {k: file for k in names[i::shards]}
    save_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": where})


def preprocessor(tower: str) -> dict[str, Any]:
    mean, std = normalisation(tower)
    common = {"do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": mean, "image_std": std, "resample": 3}
    if tower == "siglip":
        return common | {"image_processor_type": "SiglipImageProcessor", "size": {"height": IMAGE_PX, "width": IMAGE_PX}}
    own = {"size": {"shortest_edge": IMAGE_PX}, "do_center_crop": True, "crop_size": {"height": IMAGE_PX, "width": IMAGE_PX}}
    return common | own | {"image_processor_type": "CLIPImageProcessor"}


# ---------------------------------------------------------------- (a) transformers

HF_SPELLINGS = {
    # 4.x; 5.x as saved by default; 5.x native: prefixes for (model.layers, lm_head, projector, tower)
    "4": ("language_model.model.", "language_model.", "multi_modal_projector.", "vision_tower.vision_model."),
    "5": ("language_model.model.", "language_model.", "multi_modal_projector.", "vision_tower."),
    "5-native": ("model.language_model.", "", "model.multi_modal_projector.", "model.vision_tower."),
}


def hf_names(parts: Parts, spelling: str) -> State:
    body, head, projector, tower = HF_SPELLINGS[spelling]
    out = {(head + k if k.startswith("lm_head") else body + k.removeprefix("model.")): v for k, v in parts.llm.items()}
    out |= {projector + k: v for k, v in parts.projector.items()}
    return out | {tower + k: v for k, v in parts.tower.items()}


def hf_config(parts: Parts, feature_layer: int, strategy: str) -> dict[str, Any]:
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 5, "ignore_index": -100,
        "projector_hidden_act": "gelu", "vision_feature_layer": feature_layer, "vision_feature_select_strategy": strategy,
        "text_config": parts.text_config.to_dict(), "vision_config": parts.vision_config.to_dict(), "torch_dtype": "float16",
    }  # fmt: skip
    if parts.text_config.tie_word_embeddings:
        config["tie_word_embeddings"] = True
    return config


def make_hf(folder: Path, parts: Parts, *, spelling: str = "4", feature_layer: int = -2, strategy: str | None = None,
            dtype: str = "F16", shards: int = 1) -> Reference:  # fmt: skip
    strategy = strategy or ("full" if parts.tower_kind == "siglip" else "default")
    save_weights(folder, hf_names(parts, spelling), dtype=dtype, shards=shards)
    save_json(folder / "config.json", hf_config(parts, feature_layer, strategy))
    save_json(folder / "preprocessor_config.json", preprocessor(parts.tower_kind))
    return Reference(folder, "hf", parts, {}, feature_layer, int(strategy == "default"))


# ---------------------------------------------------------------- (b) original LLaVA

LLAVA_ARCHITECTURES = {
    "llama": ("TinyLlavaLlamaForCausalLM", "tiny_llava"),
    "smollm": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "qwen2": ("TinyLlavaQwen2ForCausalLM", "tiny_llava_qwen"),
    "phi": ("TinyLlavaPhiForCausalLM", "tiny_llava_phi"),
    "stablelm": ("TinyLlavaStablelmForCausalLM", "tiny_llava_stablelm"),
}


def llava_config(parts: Parts, **more: Any) -> dict[str, Any]:
    architecture, model_type = LLAVA_ARCHITECTURES[parts.family]
    kind = "mlp2x_gelu" if "linear_2.weight" in parts.projector else "linear"
    own = parts.text_config.to_dict() | {"architectures": [architecture], "model_type": model_type}
    return own | {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": parts.vision_config.hidden_size,
        "mm_projector_type": kind,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    } | more  # fmt: skip


def llava_projector(parts: Parts, prefix: str = "model.mm_projector.") -> State:
    index = {"linear_1": "0.", "linear_2": "2."} if "linear_2.weight" in parts.projector else {"linear_1": ""}
    return {f"{prefix}{index[k.split('.')[0]]}{k.split('.')[1]}": v for k, v in parts.projector.items()}


def trimmed_tower(parts: Parts) -> State:
    """TinyLLaVA's code deletes SigLIP's last layer, though the configuration still counts it."""
    last = f"encoder.layers.{parts.vision_config.num_hidden_layers - 1}."
    return {k: v for k, v in parts.tower.items() if parts.tower_kind == "clip" or not k.startswith(last)}


def save_tower(folder: Path, parts: Parts, *, weights: bool = True, dtype: str = "F16") -> None:
    """A tower's folder as published: SiglipVisionModel or CLIPVisionModel of transformers 4.x."""
    architecture = "SiglipVisionModel" if parts.tower_kind == "siglip" else "CLIPVisionModel"
    save_json(folder / "config.json", parts.vision_config.to_dict() | {"architectures": [architecture]})
    save_json(folder / "preprocessor_config.json", preprocessor(parts.tower_kind))
    if weights:
        save_weights(folder, {f"vision_model.{k}": v for k, v in parts.tower.items()}, dtype=dtype)


def make_llava(
    folder: Path, parts: Parts, *, inside: bool = True, feature: str = "patch", layer: int = -2, dtype: str = "F16", shards: int = 1
) -> Reference:
    state = parts.llm | llava_projector(parts)
    if inside:
        state |= {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in trimmed_tower(parts).items()}
    save_weights(folder, state, dtype=dtype, shards=shards)
    save_tower(folder / "vision_tower", parts, weights=not inside, dtype=dtype)
    save_json(folder / "config.json", llava_config(parts, mm_vision_select_feature=feature, mm_vision_select_layer=layer))
    clip = parts.tower_kind == "clip"
    return Reference(folder, "llava", parts, {}, layer if clip else -2, int(clip and feature == "patch"))


# ---------------------------------------------------------------- (c) TinyLLaVA_Factory


def make_factory(
    folder: Path, parts: Parts, *, folders: bool = False, strategy: str = "patch", dtype: str = "F16", shards: int = 1
) -> Reference:
    kind = "mlp2x_gelu" if "linear_2.weight" in parts.projector else "linear"
    connector = llava_projector(parts, "_connector.")
    if folders:
        save_weights(folder / "language_model", parts.llm, dtype=dtype)
        save_json(folder / "language_model" / "config.json", parts.text_config.to_dict())
        save_tower(folder / "vision_tower", parts, dtype=dtype)
        save_weights(folder / "connector", connector, dtype=dtype)
    else:
        state = {f"language_model.{k}": v for k, v in parts.llm.items()} | {f"connector.{k}": v for k, v in connector.items()}
        save_weights(folder, state | {f"vision_tower._vision_tower.vision_model.{k}": v for k, v in parts.tower.items()}, dtype=dtype)
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": kind,
        "image_aspect_ratio": "square",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": strategy,
        "text_config": parts.text_config.to_dict(),
        "vision_config": parts.vision_config.to_dict(),
        "tokenizer_use_fast": False,
        "hidden_size": parts.text_config.hidden_size,
        "vocab_size": parts.text_config.vocab_size,
    }
    save_json(folder / "config.json", config)
    return Reference(folder, "factory", parts, {}, -2, int(strategy == "patch"))


# ---------------------------------------------------------------- (d) adapters

LORA_TARGETS = {"phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")}
GATED_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_pairs(parts: Parts, rank: int, seed: int, dtype: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for every linear layer of the language model's blocks, by the layer's canonical name without '.weight'."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, value in parts.llm.items():
        module = name.removesuffix(".weight")
        if value.ndim == 2 and module.split(".")[-1] in LORA_TARGETS.get(parts.family, GATED_TARGETS):
            a = torch.randn(rank, value.shape[1], generator=generator) / np.sqrt(value.shape[1])
            b = torch.randn(value.shape[0], rank, generator=generator) * 0.3
            out[module] = (a.to(DTYPES[dtype]).float(), b.to(DTYPES[dtype]).float())
    return out


def merge_lora(parts: Parts, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], scale: float | Mapping[str, float]) -> Parts:
    def factor(name: str) -> float:
        return scale if isinstance(scale, (int, float)) else scale[name]

    llm = {k: v for k, v in parts.llm.items()}
    for name, (a, b) in pairs.items():
        llm[f"{name}.weight"] = parts.llm[f"{name}.weight"] + factor(name) * (b @ a)
    return Parts(parts.family, parts.tower_kind, parts.text_config, parts.vision_config, llm, parts.tower, parts.projector)


def save_lora(
    folder: Path,
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    dtype: str = "F16",
    prefix: str = "base_model.model.",
    **config: Any,
) -> None:
    state = {f"{prefix}{k}.lora_{n}.weight": v for k, ab in pairs.items() for n, v in zip("AB", ab, strict=True)}
    save_weights(folder, state, dtype=dtype, stem="adapter_model")
    save_json(folder / "adapter_config.json", {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False} | config)


def make_lora(folder: Path, parts: Parts, *, base: str = "llava", rank: int = 4, alpha: float = 8.0, dtype: str = "F16") -> Reference:
    """LLaVA's own output: adapter, config.json and non_lora_trainables (the projector) over a base that lacks them.

    base: llava (a bare language model; config and projector come with the adapter) or hf (a whole checkpoint).
    """
    pairs = lora_pairs(parts, rank, 7, dtype)
    root = folder / "base"
    if base == "hf":
        reference = make_hf(root, parts, dtype=dtype)
        save_tokenizer(root, parts.family)
        prefix = "base_model.model.language_model."
    else:
        save_weights(root, parts.llm, dtype=dtype)
        save_json(root / "config.json", parts.text_config.to_dict())
        save_tower(folder / "tower", parts, dtype=dtype)
        save_json(folder / "config.json", llava_config(parts, mm_vision_tower=str(folder / "tower")))
        projector = {f"base_model.{k}": v for k, v in llava_projector(parts, "model.model.mm_projector.").items()}
        torch.save({k: v.to(DTYPES[dtype]) for k, v in projector.items()}, folder / "non_lora_trainables.bin")
        reference = Reference(folder, "lora", parts, {}, -2, int(parts.tower_kind == "clip"))
        prefix = "base_model.model."
    save_lora(folder, pairs, dtype=dtype, prefix=prefix, r=rank, lora_alpha=alpha, base_model_name_or_path=str(root))
    reference.source, reference.reader, reference.parts = folder, "lora", merge_lora(parts, pairs, alpha / rank)
    return reference


# ---------------------------------------------------------------- (e) deltas


def make_delta(folder: Path, parts: Parts, *, dtype: str = "F16") -> Reference:
    """LLaVA-Med v1.0: target minus base in float16, two added rows, the projector as it is, the tower elsewhere."""
    generator = torch.Generator().manual_seed(11)
    grown = ("model.embed_tokens.weight", "lm_head.weight")
    base = {k: (v + 0.1 * torch.randn(v.shape, generator=generator)).half() for k, v in parts.llm.items()}
    base = {k: v[:-2] if k in grown else v for k, v in base.items()}
    delta = {}
    for name, value in parts.llm.items():
        delta[name] = value.half()
        rows = base[name].shape[0]
        delta[name][:rows] -= base[name]
    target = {}
    for name, value in delta.items():
        target[name] = value.float().clone()
        target[name][: base[name].shape[0]] += base[name].float()
        target[name] = target[name].half().float()
    save_weights(folder / "base", base)
    save_json(folder / "base" / "config.json", parts.text_config.to_dict())
    save_weights(folder, delta | {k: v.half() for k, v in llava_projector(parts).items()})
    save_tower(folder / "tower", parts)
    config = llava_config(parts, mm_vision_tower="tower", image_aspect_ratio="square", mm_use_im_start_end=True)
    if "linear_2.weight" not in parts.projector:
        del config["mm_projector_type"]  # v1.0 knew no other
    save_json(folder / "config.json", config)
    merged = Parts(parts.family, parts.tower_kind, parts.text_config, parts.vision_config, target, parts.tower, parts.projector)
    return Reference(folder, "delta", merged, {"base": folder / "base"}, -2, int(parts.tower_kind == "clip"))


# ---------------------------------------------------------------- (f) GGUF

_TOWER_GGUF = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def save_llm_gguf(path: Path, parts: Parts, tokenizer_folder: Path, *, dtype: str = "F16") -> None:
    """The language model as llama.cpp's own converter names and permutes it; written with gguf's writer, apart from ours."""
    import gguf

    from converters.llm import llm_metadata
    from converters.readers.config import build_llm as build_spec
    from converters.tensors import ArrayTensor
    from converters.tokenizers import load_tokenizer, tokenizer_metadata
    from edgemed.core.conversation import TEMPLATES

    tensors = {k: ArrayTensor(k, v.numpy()) for k, v in parts.llm.items()}
    config = parts.text_config.to_dict()
    spec = build_spec(config, config["model_type"], tensors, "the fixture")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, spec.arch.upper()), spec.layers)
    writer = gguf.GGUFWriter(path, spec.arch)
    tokenizer = load_tokenizer(tokenizer_folder, spec.vocab_size, spec.arch, apart=False)
    for key, value in (llm_metadata(spec, "fixture") | tokenizer_metadata(tokenizer, TEMPLATES["v1"])).items():
        if key != "general.architecture":
            writer.add_key_value(key, value.value, value.type, value.item)
    state = dict(parts.llm)
    if spec.arch in ("phi2", "stablelm") and "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name, value in state.items():
        if spec.arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = spec.heads if "q_proj" in name else spec.kv_heads
            value = value.reshape(heads, 2, spec.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        stem, _, leaf = name.rpartition(".")
        _add_gguf(writer, f"{names.get_name(stem)}.{leaf}", value, dtype)
    _finish_gguf(writer)


def save_mmproj_gguf(path: Path, parts: Parts, *, dtype: str = "F16", layers: int | None = None) -> None:
    import gguf

    config = parts.vision_config
    layers = layers or config.num_hidden_layers - 1
    mean, std = normalisation(parts.tower_kind)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", parts.tower_kind == "siglip")
    for key, value in {
        "image_size": config.image_size, "patch_size": config.patch_size, "embedding_length": config.hidden_size, "block_count": layers,
        "feed_forward_length": config.intermediate_size, "projection_dim": HIDDEN, "attention.head_count": config.num_attention_heads,
    }.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", mean)
    writer.add_array("clip.vision.image_std", std)
    writer.add_array("clip.vision.feature_layer", [layers])
    for name, value in parts.tower.items():
        piece = name.split(".")
        if name.startswith("post_layernorm") or (piece[0] == "encoder" and int(piece[2]) >= layers):
            continue
        if piece[0] == "encoder":
            gguf_name = f"v.blk.{piece[2]}.{_TOWER_GGUF['.'.join(piece[3:-1])]}.{piece[-1]}"
        else:
            stem = name if name in _TOWER_GGUF else name.rpartition(".")[0]
            gguf_name = _TOWER_GGUF[stem] + name.removeprefix(stem)
        _add_gguf(writer, gguf_name, value, dtype)
    for name, value in parts.projector.items():
        _add_gguf(writer, name.replace("linear_1", "mm.0").replace("linear_2", "mm.2"), value, dtype)
    _finish_gguf(writer)


def _add_gguf(writer: Any, name: str, value: torch.Tensor, dtype: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType["F32" if value.ndim == 1 else dtype]
    if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quantize(value.contiguous().numpy(), kind), raw_dtype=kind)


def _finish_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_gguf(folder: Path, parts: Parts, *, dtype: str = "F16") -> Reference:
    """An LLM's GGUF and an mmproj; F16 (or F32, which the parts are rounded to float16 for all the same)."""
    save_llm_gguf(folder / "llm.gguf", parts, folder, dtype=dtype)
    save_mmproj_gguf(folder / "mmproj.gguf", parts, dtype=dtype)
    options = {"mmproj": folder / "mmproj.gguf", "template": "v1", "image_mode": "pad"}
    return Reference(folder / "llm.gguf", "gguf", parts, options, -2, int(parts.tower_kind == "clip"), projector_tanh=True)


def make_checkpoint(folder: Path, reader: str, family: str, tower: str, *, dtype: str = "F16", seed: int = 0,
                    projector: str = "mlp2x_gelu", **more: Any) -> Reference:  # fmt: skip
    """A checkpoint in `folder` (made if it is not there) and its reference; `more` goes to the layout's own builder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = save_tokenizer(folder, family)
    rows = -(-(vocab + 1) // 32) * 32  # rows to spare, as published models have
    parts = make_parts(family, tower, rows, dtype=dtype, seed=seed, projector=projector)
    reference = MAKERS[reader](folder, parts, dtype=dtype, **more)
    reference.projector_kind = projector
    return reference


MAKERS = {"hf": make_hf, "llava": make_llava, "factory": make_factory, "lora": make_lora, "delta": make_delta, "gguf": make_gguf}
