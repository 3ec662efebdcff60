"""Readers (b) and (e): the original LLaVA layout, its forks TinyLLaVA and LLaVA-Med, and LLaVA-Med v1.0's deltas.

One flat config.json beside the language model's own keys; the projector is `model.mm_projector`, the tower lies inside the checkpoint
or in a folder that `mm_vision_tower` (or a person) names. The reference code ignores a tower inside and loads the named one; a
published checkpoint has equal ones, so the one inside is taken, and said so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint, LlmSpec, Tensors, TowerSpec
from converters.readers.assemble import Options, build_projector, list_files
from converters.readers.config import build_llm, build_tower, count_layers, first
from converters.readers.delta import norm_of_delta
from converters.readers.layout import Layout, Source, image_processor, saved_jinja
from converters.readers.names import Groups, split_names
from converters.readers.preparation import build_preparation, choose_template
from converters.readers.store import Weights, find_weights, open_file, read_json
from converters.tokenizers import load_tokenizer
from edgemed.core.conversation import ConversationTemplate
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.files import found_at


@dataclass(frozen=True)
class _Kind:
    """What an architecture's name stands for: the language model's type and the template it was trained with."""

    model_type: str
    template: str


ARCHITECTURES: dict[str, _Kind] = {
    "LlavaLlamaForCausalLM": _Kind("llama", "v1"),
    "LlavaMistralForCausalLM": _Kind("mistral", "mistral_instruct"),
    "TinyLlavaLlamaForCausalLM": _Kind("llama", "v1"),
    "TinyLlavaPhiForCausalLM": _Kind("phi", "phi"),
    # Their training code knows no template of their own and falls back to v1, with "</s>" as text.
    "TinyLlavaStablelmForCausalLM": _Kind("stablelm", "v1"),
    "TinyLlavaQwen2ForCausalLM": _Kind("qwen2", "v1"),
}
_DELTA_TEMPLATE = "simple"
# Published towers by what their tensors show: (kind, width, positions, patch) → heads, layers and image size, which they do not.
_TOWERS: dict[tuple[str, int, int, int], tuple[int, int, int]] = {
    ("clip", 1024, 577, 14): (16, 24, 336),
    ("clip", 1024, 257, 14): (16, 24, 224),
    ("clip", 768, 197, 16): (12, 12, 224),
    ("clip", 768, 50, 32): (12, 12, 224),
    ("siglip", 1152, 729, 14): (16, 27, 384),
    ("siglip", 1152, 256, 14): (16, 27, 224),
    ("siglip", 768, 196, 16): (12, 12, 224),
}


def load_llava(folder: Path) -> tuple[Groups, tuple[Path, ...]]:
    weights = find_weights(folder, "model", "pytorch_model")
    if weights is None:
        steps = sorted(folder.glob("checkpoint-*"), key=lambda step: (len(step.name), step.name))  # 900 before 1000
        hint = (
            f"The whole model is in a step's folder, such as {steps[-1]}: pass that one."
            if steps
            else "Check that the checkpoint is complete."
        )
        raise CheckpointError(f"Expected model.safetensors (or shards with an index) in {folder}, found none.", hint)
    groups = split_names(weights.tensors)
    if not groups.projector:
        beside = next((folder / name for name in ("mm_projector.safetensors", "mm_projector.bin") if (folder / name).is_file()), None)
        extra = open_file(beside) if beside else Weights()
        groups.projector = split_names(extra.tensors).projector  # embed_tokens may be saved with it: the model's own are newer
        weights = Weights(weights.tensors, (*weights.files, *extra.files))
    return groups, weights.files


def read_llava(source: Source, options: Options) -> Checkpoint:
    folder, config, groups = source.folder, source.config, source.groups
    architecture = str(config["architectures"][0])
    kind = ARCHITECTURES[architecture]
    _refuse(config, folder)
    model_type = kind.model_type
    llm = build_llm(config, model_type, groups.llm, folder)
    if not source.delta:
        _refuse_delta(llm, folder)
    tower, tower_folder, tower_files, notes = _read_tower(source, options)
    projector = build_projector(groups.projector, "gelu", tower, llm, folder)
    processor = image_processor(tower_folder or folder) or image_processor(folder)
    aspect = config.get("image_aspect_ratio") if not source.delta else None
    image, more = build_preparation(tower, processor, aspect, options.image_mode)
    default = _DELTA_TEMPLATE if source.delta else kind.template
    tokenizer = load_tokenizer(source.tokenizer_folder, llm.vocab_size, llm.arch, apart=True, pre=options.pre)
    template, last = choose_template(options.template, saved_jinja(folder), default, tokenizer)
    if config.get("mm_use_im_start_end") is True and not template.image_prefix:
        template = _mark_images(template)
    return Checkpoint(
        reader="delta" if source.delta else "llava",
        path=folder,
        name=options.name or folder.name,
        llm=llm,
        tower=tower,
        projector=projector,
        tokenizer=tokenizer,
        image=options.image or image,
        template=template,
        files=list_files(folder, (*source.weights, *tower_files)),
        notes=(*notes, *more, *last),
    )


def _mark_images(template: ConversationTemplate) -> ConversationTemplate:
    marks = ("<im_start>", "<im_end>")
    return template.model_copy(update={"image_prefix": marks[0], "image_suffix": marks[1], "control": (*template.control, *marks)})


def _refuse_delta(llm: LlmSpec, folder: Path) -> None:
    norm = norm_of_delta(llm.tensors)
    if norm is not None and norm[1]:
        raise CheckpointError(
            f"Expected whole weights in {folder}, found what looks like a delta (the last norm's weights are {norm[0]:.3f} on average).",
            "Name its base with --base.",
        )


def _refuse(config: dict[str, Any], folder: Path) -> None:
    kind = first(config, "mm_projector_type", default="linear")
    if kind not in ("linear", "mlp2x_gelu"):
        raise UnsupportedError(f"Expected the projector linear or mlp2x_gelu in {folder}, found '{kind}'.", "Others do not convert.")
    if str(first(config, "mm_patch_merge_type", default="flat")) != "flat":
        raise UnsupportedError(
            f"Expected flat image features in {folder}, found '{config['mm_patch_merge_type']}'.", "Tiled models do not convert."
        )


def _read_tower(source: Source, options: Options) -> tuple[TowerSpec, Path | None, tuple[Path, ...], tuple[str, ...]]:
    """Tower, its folder if it has one, files read from there, and sentences for a person."""
    named = _named_folder(source, options)
    config = _vision_config(named)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    tensors: Tensors = source.groups.tower
    if options.vision_tower is not None or not tensors:
        if named is None:
            raise CheckpointError(
                f"Expected a vision tower inside {source.folder} or at '{source.config.get('mm_vision_tower')}', found none.",
                "Download that tower and name its folder with --vision-tower.",
            )
        weights = find_weights(named, "model", "pytorch_model")
        if weights is None:
            raise CheckpointError(
                f"Expected model.safetensors in the tower's folder {named}, found none.", "Check that the tower is complete."
            )
        tensors, files = split_names(weights.tensors).tower, weights.files
    elif named is not None and find_weights(named, "model", "pytorch_model") is not None:
        notes = (f"The tower inside the checkpoint was taken, not the one in {named}; name that one to use it instead.",)
    layer, more = _feature_layer(source.config)
    feature = str(first(source.config, "mm_vision_select_feature", default="patch"))
    vision = config if config is not None else _guess_config(tensors, source.folder)
    if "embeddings.class_embedding" not in tensors:
        # SigLIP in these code bases: the last layer is deleted, the last hidden state is the feature, and no token is dropped.
        # A tower that was saved without that layer may count the rest alone, so a published one's depth goes first.
        nominal = _TOWERS.get(_shape_key(tensors))
        layer, feature, more = nominal[1] - 1 if nominal else -2, "full", ()
    return build_tower(vision, tensors, named or source.folder, layer, feature), named, files, (*notes, *more)


def _feature_layer(config: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    if config.get("mm_vision_select_layer") is None:
        return -2, ("config.json names no mm_vision_select_layer; -2 was taken, as every published recipe has it.",)
    return config["mm_vision_select_layer"], ()


def _named_folder(source: Source, options: Options) -> Path | None:
    if options.vision_tower is not None:
        if not options.vision_tower.is_dir():
            raise CheckpointError(
                f"Expected a tower's folder at {options.vision_tower}, found {found_at(options.vision_tower)}.", "Check the path."
            )
        return options.vision_tower
    named = first(source.config, "mm_vision_tower", default="")
    candidates = [Path(str(named)), source.folder / str(named)] if named else []
    candidates += [source.folder / "vision_tower", source.root / "vision_tower"]
    return next((c for c in candidates if (c / "config.json").is_file() and c.resolve() != source.folder.resolve()), None)


def _vision_config(folder: Path | None) -> dict[str, Any] | None:
    """The tower's configuration; a whole CLIP or SigLIP model's folder has it as a part."""
    if folder is None:
        return None
    config = read_json(folder / "config.json")
    nested = config.get("vision_config")
    return {"model_type": config.get("model_type"), **nested} if isinstance(nested, dict) else config


def _shape_key(tensors: Tensors) -> tuple[str, int, int, int]:
    """A tower's key of _TOWERS; zeros where the tensors that tell are missing."""
    kind = "clip" if "embeddings.class_embedding" in tensors else "siglip"
    patch, positions = tensors.get("embeddings.patch_embedding.weight"), tensors.get("embeddings.position_embedding.weight")
    if patch is None or positions is None or len(patch.shape) != 4:
        return kind, 0, 0, 0
    return kind, patch.shape[0], positions.shape[0], patch.shape[-1]


def _guess_config(tensors: Tensors, folder: Path) -> dict[str, Any]:
    key, mlp = _shape_key(tensors), tensors.get("encoder.layers.0.mlp.fc1.weight")
    if key[1] == 0 or mlp is None:
        raise CheckpointError(
            f"Expected a whole vision tower in {folder}, found {count_layers(tensors)} layers of one.", "Check the checkpoint."
        )
    kind = key[0]
    if key not in _TOWERS:
        raise CheckpointError(
            f"Expected a published tower in {folder}, found a {kind} one of width {key[1]} with {key[2]} positions"
            f" (about {math.isqrt(key[2]) * key[3]} px).",
            "Name a folder with this tower's config.json with --vision-tower.",
        )
    heads, layers, size = _TOWERS[key]
    return {
        "model_type": f"{kind}_vision_model", "hidden_size": key[1], "intermediate_size": mlp.shape[0], "num_hidden_layers": layers,
        "num_attention_heads": heads, "image_size": size, "patch_size": key[3],
    }  # fmt: skip


LLAVA = Layout(load_llava, read_llava)
