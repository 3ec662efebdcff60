"""Reader (c): TinyLLaVA_Factory, fused into one file or as three sub-folders (pretraining, LoRA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint, TokenizerSpec
from converters.readers.assemble import Options, build_projector, list_files
from converters.readers.config import build_llm, build_tower, first
from converters.readers.layout import Layout, Source, image_processor, optional_json, saved_jinja, section
from converters.readers.names import Groups, split_names
from converters.readers.preparation import build_preparation, choose_template
from converters.readers.store import Weights, open_weights
from converters.tokenizers import load_tokenizer
from edgemed.core.errors import UnsupportedError

_PARTS = ("language_model", "vision_tower", "connector")
# All of its templates are v1's words; they differ in how an answer ends.
_TEMPLATES = {"</s>": "v1", "<|endoftext|>": "phi", "<|im_end|>": "v1_im_end"}


def load_factory(folder: Path) -> tuple[Groups, tuple[Path, ...]]:
    if (folder / "language_model").is_dir():
        weights = Weights()
        for part in _PARTS:
            weights |= open_weights(folder / part, "model", "pytorch_model")
    else:
        weights = open_weights(folder, "model", "pytorch_model")
    return split_names(weights.tensors), weights.files


def read_factory(source: Source, options: Options) -> Checkpoint:
    folder, config, groups = source.folder, source.config, source.groups
    connector = str(first(config, "connector_type", default="linear"))
    if connector not in ("linear", "mlp2x_gelu"):
        raise UnsupportedError(f"Expected the connector linear or mlp2x_gelu in {folder}, found '{connector}'.", "Others do not convert.")
    text = _part_config(source, "text_config", "language_model")
    model_type = str(first(text, "model_type", default="llama"))
    llm = build_llm(text, model_type, groups.llm, folder)
    strategy = str(first(config, "vision_feature_select_strategy", default="patch"))
    vision = _part_config(source, "vision_config", "vision_tower")
    tower = build_tower(vision, groups.tower, folder, first(config, "vision_feature_layer", default=-2), strategy)
    projector = build_projector(groups.projector, "gelu", tower, llm, folder)
    processor = image_processor(source.root / "vision_tower") or image_processor(folder)
    image, notes = build_preparation(tower, processor, config.get("image_aspect_ratio"), options.image_mode)
    tokenizer = load_tokenizer(source.tokenizer_folder, llm.vocab_size, llm.arch, apart=True, pre=options.pre)
    template, more = choose_template(options.template, saved_jinja(folder), _template(tokenizer), tokenizer)
    return Checkpoint(
        reader="factory",
        path=folder,
        name=options.name or folder.name,
        llm=llm,
        tower=tower,
        projector=projector,
        tokenizer=tokenizer,
        image=options.image or image,
        template=template,
        files=list_files(folder, source.weights),
        notes=(*notes, *more),
    )


def _part_config(source: Source, key: str, part: str) -> dict[str, Any]:
    """A part's configuration: its own folder's, with what the whole model's says on top."""
    own = optional_json(source.root / part / "config.json")
    own = own["vision_config"] if isinstance(own.get("vision_config"), dict) else own
    return {**own, **(section(source.config, key, source.folder) if key in source.config or not own else {})}


def _template(tokenizer: TokenizerSpec) -> str | None:
    return _TEMPLATES.get(tokenizer.tokens[tokenizer.eos_id]) if tokenizer.eos_id is not None else None


FACTORY = Layout(load_factory, read_factory)
