"""Checkpoint readers: `open_checkpoint` finds the layout by what config.json declares and returns a Checkpoint.

    checkpoint = open_checkpoint(Path("tiny-llava-v1-hf"))
    checkpoint = open_checkpoint(Path("SmolLM2.gguf"), mmproj=Path("tower.gguf"), adapter=Path("lora.gguf"), template="chatml")

Readers: hf (a), llava (b), factory (c), adapters over any of them (d), deltas over a base (e), gguf (f). The table is keyed by
`architectures`; names and paths never matter. Weights are opened lazily: headers are read and checked, data stays on disk.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint
from converters.llm import Slot, check_tensors
from converters.readers.assemble import Options, list_files
from converters.readers.config import has_experts
from converters.readers.delta import add_base
from converters.readers.factory import FACTORY
from converters.readers.gguf import read_artifact, read_gguf
from converters.readers.hf import HF
from converters.readers.layout import Layout, Source, optional_json
from converters.readers.llava import ARCHITECTURES, LLAVA
from converters.readers.lora import CONFIG_NAME, is_adapter, merge_gguf_adapter, merge_peft
from converters.readers.names import Groups
from converters.readers.store import read_json
from edgemed.core.errors import CheckpointError, InputError, UnsupportedError
from edgemed.core.files import found_at
from edgemed.core.images import ImagePreparation
from edgemed.core.manifest import MANIFEST_NAME

LAYOUTS: dict[str, Layout] = {
    "LlavaForConditionalGeneration": HF,
    "TinyLlavaForConditionalGeneration": FACTORY,
    **{name: LLAVA for name in ARCHITECTURES},
}
# What a folder's model_type says where `architectures` is missing or still names the bare language model (LoRA folders do so).
_BY_TYPE: dict[str, str] = {
    "tinyllava": "TinyLlavaForConditionalGeneration",
    "llava": "LlavaLlamaForCausalLM",
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "tiny_llava": "TinyLlavaLlamaForCausalLM",
    "tiny_llava_phi": "TinyLlavaPhiForCausalLM",
    "tiny_llava_stablelm": "TinyLlavaStablelmForCausalLM",
    "tiny_llava_qwen": "TinyLlavaQwen2ForCausalLM",
}
_MOE_REASON = "llama.cpp has no architecture with Med-MoE's always-on expert and unnormalised top-1 router."
REFUSED: dict[str, str] = {
    "MoELLaVAPhiForCausalLM": _MOE_REASON,
    "MoELLaVAStablelmForCausalLM": _MOE_REASON,
    "MoELLaVAQWenForCausalLM": _MOE_REASON,
    "EvalMoELLaVAPhiForCausalLM": _MOE_REASON,
    "EvalMoELLaVAStablelmForCausalLM": _MOE_REASON,
    "LlavaNextForConditionalGeneration": "Its images are cut into tiles, which the runtime does not do.",
    "LlavaMPTForCausalLM": "Its language model MPT is not among the families that convert.",
}


def open_checkpoint(
    source: Path,
    *,
    adapter: Path | None = None,
    base: Path | None = None,
    vision_tower: Path | None = None,
    mmproj: Path | None = None,
    template: str | None = None,
    image_mode: str | None = None,
    image: ImagePreparation | None = None,
    name: str | None = None,
    pre: str | None = None,
) -> Checkpoint:
    """The checkpoint at `source`: a folder, a language model's GGUF, or a folder that edgemed converted.

    adapter: a PEFT folder or a GGUF adapter to merge. base: what a delta is added to, or an adapter's own base (where `source` is the
    adapter). vision_tower: a tower's folder, instead of the one inside. mmproj: tower and projector for a GGUF. template, image_mode
    (pad, stretch, crop) and image override what the layout says. pre: llama.cpp's name of the tokenizer's splitting rule.
    Raises CheckpointError, UnsupportedError, MissingExtraError, InputError.
    """
    options = Options(adapter, base, vision_tower, mmproj, template, image_mode, name, pre, image)
    for path in (source, adapter, base, vision_tower, mmproj):
        if path is not None and not path.exists():
            raise CheckpointError(f"Expected a checkpoint at {path}, found {found_at(path, 'no such file or folder')}.", "Check the path.")
    in_gguf = source.is_file() or (source / MANIFEST_NAME).is_file()
    for option, path, fits in (("--base", base, not in_gguf), ("--vision-tower", vision_tower, not in_gguf), ("--mmproj", mmproj, in_gguf)):
        if path is not None and not fits:
            raise InputError(f"Expected no {option} for the {'GGUF' if in_gguf else 'checkpoint'} {source}, found {path}.", "Leave it out.")
    if source.is_file():
        return _with_adapter(read_gguf(source, options), options)
    if (source / MANIFEST_NAME).is_file():
        return _with_adapter(read_artifact(source, options), options)
    return _read_folder(source, options)


def _read_folder(source: Path, options: Options) -> Checkpoint:
    folder, root = source, source
    adapter = options.adapter
    if adapter is None and is_adapter(source):
        adapter, root = source, _find_base(source, options)
    peft = adapter is not None and adapter.is_dir()
    if adapter is not None and peft:
        own = optional_json(adapter / "config.json")
        # LLaVA saves its configuration beside the adapter; the base may be a bare language model.
        folder = adapter if own.get("architectures") or own.get("model_type") else root
    config = read_json(folder / "config.json")
    found = find_architecture(config, folder)
    config, layout = {**config, "architectures": [found]}, LAYOUTS[found]
    if options.vision_tower is not None and layout is not LLAVA:
        raise InputError(f"Expected no --vision-tower for {folder}, whose tower is inside, found {options.vision_tower}.", "Leave it out.")
    groups, files = layout.load(root)
    delta = options.base is not None and adapter != source
    if delta and options.base is not None:
        groups, more = add_base(groups, options.base)
        files = (*files, *more)
    if adapter is not None and peft:
        groups, more = merge_peft(adapter, groups)
        files = (*files, *more)
    checkpoint = layout.read(Source(folder, config, groups, files, root, delta), options)
    if adapter is not None and peft:
        return replace(checkpoint, reader=f"{checkpoint.reader}+lora", path=source, files=list_files(source, files))
    return _with_adapter(checkpoint, options)


def _find_base(adapter: Path, options: Options) -> Path:
    if (adapter / "language_model").is_dir():  # TinyLLaVA_Factory saves the base's parts beside the adapter
        return adapter
    named = read_json(adapter / CONFIG_NAME).get("base_model_name_or_path")
    root = options.base or (Path(str(named)) if named else None)
    if root is None:
        raise CheckpointError(f"Expected the base's name in {adapter / CONFIG_NAME}, found none.", "Name its folder with --base.")
    if not root.is_dir():
        found = found_at(root, "no such folder")
        raise CheckpointError(f"Expected the base of the adapter {adapter} at '{root}', found {found}.", "Name its folder with --base.")
    return root


def _with_adapter(checkpoint: Checkpoint, options: Options) -> Checkpoint:
    """A GGUF adapter goes on top of whatever language model was read; a PEFT folder over a GGUF does, too."""
    if options.adapter is None:
        return checkpoint
    files = {**checkpoint.files, **list_files(checkpoint.path, [options.adapter] if options.adapter.is_file() else [])}
    if options.adapter.is_file():
        return replace(checkpoint, reader=f"{checkpoint.reader}+lora", llm=merge_gguf_adapter(options.adapter, checkpoint.llm), files=files)
    base = Groups(dict(checkpoint.llm.tensors), dict(checkpoint.tower.tensors), dict(checkpoint.projector.tensors))
    groups, more = merge_peft(options.adapter, base)
    for have, merged in ((base.llm, groups.llm), (base.tower, groups.tower), (base.projector, groups.projector)):
        check_tensors(merged, {name: Slot(name, "", tensor.shape) for name, tensor in have.items()}, options.adapter)
    return replace(
        checkpoint,
        reader=f"{checkpoint.reader}+lora",
        llm=replace(checkpoint.llm, tensors=groups.llm),
        tower=replace(checkpoint.tower, tensors=groups.tower),
        projector=replace(checkpoint.projector, tensors=groups.projector),
        files={**files, **list_files(checkpoint.path, more)},
    )


def find_architecture(config: dict[str, Any], folder: Path) -> str:
    """The key of LAYOUTS that config.json declares. Raises UnsupportedError with the reason where it is known."""
    declared = config.get("architectures")
    found = str(declared[0]) if isinstance(declared, list) and declared else None
    where = folder / "config.json"
    if found is None or (found not in LAYOUTS and found not in REFUSED and "text_config" not in config):
        found = _BY_TYPE.get(str(config.get("model_type")), found)
        if found == "LlavaLlamaForCausalLM" and "text_config" in config:  # transformers and LLaVA share the type "llava"
            found = "LlavaForConditionalGeneration"
    if found in REFUSED or has_experts(config):
        raise UnsupportedError(
            f"Expected a dense LLaVA model in {where}, found {found}, which does not convert.", REFUSED.get(str(found), _MOE_REASON)
        )
    if found not in LAYOUTS:
        raise UnsupportedError(
            f"Expected an architecture out of {', '.join(LAYOUTS)} in {where}, found {found}.", "Other models do not convert."
        )
    return found
