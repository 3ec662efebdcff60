"""Reader (a): transformers' LlavaForConditionalGeneration, in every spelling of its tensors that 4.x and 5.x write."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from converters.checkpoint import Checkpoint, TokenizerSpec
from converters.readers.assemble import Options, build_projector, list_files
from converters.readers.config import build_llm, build_tower, first
from converters.readers.layout import Layout, Source, image_processor, saved_jinja, section
from converters.readers.names import Groups, split_names
from converters.readers.preparation import build_preparation, choose_template
from converters.readers.store import open_weights
from converters.tensors import ArrayTensor
from converters.tokenizers import load_tokenizer
from edgemed.core.contract import load_contract

# transformers' LlavaConfig, where vision_config is left out: CLIP-L/14-336.
_CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip


def load_hf(folder: Path) -> tuple[Groups, tuple[Path, ...]]:
    weights = open_weights(folder, "model", "pytorch_model")
    return split_names(weights.tensors), weights.files


def read_hf(source: Source, options: Options) -> Checkpoint:
    folder, config, groups = source.folder, source.config, source.groups
    text = section(config, "text_config", folder)
    vision = section(config, "vision_config", folder) if "vision_config" in config else _CLIP_L
    model_type = str(first(text, "model_type", default="llama"))
    # 4.x writes false beside a language model that ties
    said = [value for value in (text.get("tie_word_embeddings"), config.get("tie_word_embeddings")) if value is not None]
    tied = any(said) if said else None
    _add_head_bias(groups)
    llm = build_llm({**text, "tie_word_embeddings": tied}, model_type, groups.llm, folder)
    strategy = str(first(config, "vision_feature_select_strategy", default="default"))
    tower = build_tower(vision, groups.tower, folder, first(config, "vision_feature_layer", default=-2), strategy)
    projector = build_projector(groups.projector, str(first(config, "projector_hidden_act", default="gelu")), tower, llm, folder)
    image, notes = build_preparation(tower, image_processor(folder), None, options.image_mode)
    contract = load_contract(folder)
    # edgemed's own training tokenises the text around an image apart; transformers' processor does not
    tokenizer = load_tokenizer(source.tokenizer_folder, llm.vocab_size, llm.arch, apart=contract is not None, pre=options.pre)
    template, more = choose_template(options.template, saved_jinja(folder), _template(model_type, tokenizer), tokenizer)
    if contract is not None:  # how edgemed trained it; what the layout would suggest does not count then
        image = contract.image if options.image_mode is None else contract.image.model_copy(update={"mode": options.image_mode})
        template, notes, more = (template if options.template else contract.template), (), ()
    return Checkpoint(
        reader="hf",
        path=folder,
        name=options.name or folder.name,
        llm=llm,
        tower=tower,
        projector=projector,
        tokenizer=tokenizer,
        image=options.image or image,
        template=template,
        rounded=contract is not None and contract.rounded,
        files=list_files(folder, source.weights),
        notes=(*notes, *more),
    )


def _add_head_bias(groups: Groups) -> None:
    # transformers 5.x gives every language model the same head without a bias; Phi-2's graph in llama.cpp asks for one
    head = groups.llm.get("lm_head.weight")
    if head is not None and "model.final_layernorm.bias" in groups.llm and "lm_head.bias" not in groups.llm:
        groups.llm["lm_head.bias"] = ArrayTensor("zeros", np.zeros(head.shape[0], np.float32))


def _template(model_type: str, tokenizer: TokenizerSpec) -> str:
    if tokenizer.model == "llama":
        return "mistral_instruct" if model_type == "mistral" else "hf_llava"
    return "chatml" if "<|im_end|>" in tokenizer.tokens else "phi"


HF = Layout(load_hf, read_hf)
