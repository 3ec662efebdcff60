"""The model of a stage: loaded or joined, and which of its parts learn.

align     projector
instruct  projector + LLM (or LoRA on it)
vqa       projector + LLM (or LoRA on it)
and the tower too where its learning rate is above 0 (not in align).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from edgemed.core.contract import checkpoint_errors, require_llava
from edgemed.core.errors import CheckpointError, MissingExtraError, RecipeError
from edgemed.finetune.recipe import JoinRecipe, LoraRecipe, Recipe

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|dense|fc1|fc2)"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARTS = ("projector", "llm", "tower")


def part_of(name: str) -> str:
    """Which part a parameter belongs to, by HF's module names: 'projector', 'tower' or 'llm'."""
    if "multi_modal_projector" in name:
        return "projector"
    return "tower" if "vision_tower" in name else "llm"


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a recipe, parts frozen by its stage. Raises CheckpointError, RecipeError."""
    folder = recipe.model or (recipe.join.llm if recipe.join else None)
    assert folder is not None  # load_recipe saw to it
    for path in (folder, recipe.join and recipe.join.tower):
        if path and not (path / "config.json").is_file():
            raise CheckpointError(f"Expected an HF checkpoint at {path}, found no config.json there.", "Check the path in the recipe.")
    with checkpoint_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _load_quantised(recipe) if recipe.lora and recipe.lora.base_bits == 4 else load_full(recipe, tokenizer)
    if recipe.image.size_px != model.config.vision_config.image_size:
        raise RecipeError(
            f"Expected image.size_px = {model.config.vision_config.image_size} for this tower, found {recipe.image.size_px}.",
            "Correct the recipe.",
        )
    # FSDP wants one type in all that it shards together.
    if recipe.optim.bf16 is True and not recipe.optim.sharding:
        _round_frozen(model, recipe)
    if recipe.lora:
        model = _add_lora(model, recipe)
    _freeze(model, recipe)
    return model, tokenizer


def _round_frozen(model: Any, recipe: Recipe) -> None:
    """Parts that do not learn in bfloat16, half the memory; `exact_model` (export.py) goes back to the exact weights."""
    rate = rates(recipe)
    if not rate["tower"]:
        model.model.vision_tower.to(torch.bfloat16)
    # Rounding as the converter rounds, and taking an adapter out of the weights again, need them exact.
    exact = recipe.lora and (recipe.lora.rounding > 0 or recipe.lora.adapter is not None)
    if not exact and ((recipe.lora and recipe.lora.base_bits == 16) or not rate["llm"]):
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)
        model.tie_weights()


def load_full(recipe: Recipe, tokenizer: Any) -> Any:
    """The recipe's starting point in float32, nothing frozen."""
    if recipe.join:
        return join(recipe.join, tokenizer)
    return _load_llava(recipe.model)


def _load_llava(folder: Any, **options: Any) -> Any:
    """A checkpoint in float32. Raises CheckpointError for another layout or a damaged file."""
    require_llava(folder)
    with checkpoint_errors(folder):
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)


def _load_quantised(recipe: Recipe) -> Any:
    """The recipe's starting point with the LLM's matrices in NF4 on the GPU; tower, projector and head as they are (QLoRA)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("QLoRA needs bitsandbytes, which is not installed.", "Run: pip install 'edgemed[qlora]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if recipe.optim.bf16 is True else torch.float32,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )
    device = {"": torch.cuda.current_device()}
    return _load_llava(recipe.model, quantization_config=config, device_map=device)


def merged(model: Any, recipe: Recipe, tokenizer: Any, adapter: Path) -> Any:
    """A trained model with the saved adapter merged into the exact base weights, which training may have rounded to bfloat16."""
    full, trained = load_full(recipe, tokenizer), model.get_base_model()
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(full.model, part).load_state_dict(getattr(trained.model, part).state_dict())
    full = _add_lora(full, recipe)  # an adapter that training went on with comes out of the weights first
    _load_adapter(full, adapter)
    return full.merge_and_unload()


def join(recipe: JoinRecipe, tokenizer: Any) -> Any:
    """A LlavaForConditionalGeneration from a bare LLM and tower, with a fresh two-layer projector."""
    image_id = tokenizer.convert_tokens_to_ids(recipe.image_token)
    if image_id is None or image_id == tokenizer.unk_token_id:
        raise RecipeError(
            f"Expected join.image_token in the tokenizer, found no '{recipe.image_token}'.", "Name a token of the LLM that text never uses."
        )
    with checkpoint_errors(recipe.tower):
        vision_config = AutoConfig.from_pretrained(recipe.tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    _check_tower(vision_config, recipe)
    if recipe.tower_activation:
        vision_config.hidden_act = recipe.tower_activation
    if recipe.image_size_px:
        if recipe.image_size_px % vision_config.patch_size:
            raise RecipeError(
                f"Expected an image size that is a multiple of {vision_config.patch_size}, found {recipe.image_size_px}.",
                "Set join.image_size_px (or --image-size) to one.",
            )
        vision_config.image_size = recipe.image_size_px
    with checkpoint_errors(recipe.llm):
        text_config = AutoConfig.from_pretrained(recipe.llm)
    if not hasattr(text_config, "vocab_size") or hasattr(text_config, "vision_config"):
        raise CheckpointError(
            f"Expected a bare language model at {recipe.llm}, found {text_config.model_type}.", "Name a model of text alone."
        )
    text_config.vocab_size = _rows_for(text_config.vocab_size, image_id)
    full = "full" if "siglip" in vision_config.model_type else "default"
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        projector_hidden_act=recipe.activation,
        vision_feature_select_strategy=full,
        vision_feature_layer=recipe.feature_layer,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).float()
    with checkpoint_errors(recipe.tower):
        tower = AutoModel.from_pretrained(recipe.tower, dtype=torch.float32)
    if recipe.image_size_px:
        _resample_positions(tower, recipe.image_size_px)
    _copy(model.model.vision_tower, tower, recipe.tower)
    with checkpoint_errors(recipe.llm):
        llm = AutoModelForCausalLM.from_pretrained(recipe.llm, dtype=torch.float32)
    make_room(llm, image_id)
    _copy(model.model.language_model, llm.model, recipe.llm)
    if llm.lm_head.bias is not None:
        raise CheckpointError(
            f"Expected a language model whose head has no bias at {recipe.llm}, found one with a bias, which LlavaForConditionalGeneration"
            " does not have.",
            "Join another language model.",
        )
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = llm.generation_config
    return model


def _check_tower(config: Any, recipe: JoinRecipe) -> None:
    layers, size = getattr(config, "num_hidden_layers", 0), getattr(config, "image_size", None)
    if not layers or not size or not hasattr(config, "patch_size"):
        raise CheckpointError(
            f"Expected a CLIP or SigLIP vision tower at {recipe.tower}, found {config.model_type}.", "Name a tower's checkpoint."
        )
    if not -layers - 1 <= recipe.feature_layer <= layers:
        raise RecipeError(
            f"Expected a feature layer from {-layers - 1} to {layers} of the tower {recipe.tower}, found {recipe.feature_layer}.",
            "Choose one of them; -2 is usual.",
        )


@torch.no_grad()
def _resample_positions(tower: Any, size_px: int) -> None:
    """Position embeddings for images of `size_px`, by bicubic interpolation of their grid (Dosovitskiy et al. 2021, section 3.2)."""
    embeddings = getattr(tower, "vision_model", tower).embeddings
    old = embeddings.position_embedding.weight
    before, after = embeddings.image_size // embeddings.patch_size, size_px // embeddings.patch_size
    extra = old.shape[0] - before**2  # CLIP's class token stands first
    grid = old[extra:].T.reshape(1, -1, before, before)
    new = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    weight = torch.cat([old[:extra], new.reshape(old.shape[1], -1).T])
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(weight)


def _rows_for(rows: int, token_id: int) -> int:
    """Rows of an embedding that has a place for `token_id`: as many as there are, or the next multiple of 64."""
    return rows if token_id < rows else -(-(token_id + 1) // 64) * 64


@torch.no_grad()
def make_room(llm: Any, token_id: int) -> None:
    """Rows for a new token, where the embedding ends before it: the mean of the others, so that no logit of theirs is ever the highest."""
    for module in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        weight = module.weight
        more = _rows_for(weight.shape[0], token_id) - weight.shape[0]
        if more:
            module.weight = torch.nn.Parameter(torch.cat([weight, weight.mean(0, keepdim=True).expand(more, -1)]))
    llm.config.vocab_size = llm.get_input_embeddings().weight.shape[0]
    llm.tie_weights()


def _copy(target: Any, source: Any, path: Path) -> None:
    state = source.state_dict()
    wanted = target.state_dict().keys()
    strip = "vision_model."
    renamed = {k if k in wanted else k.removeprefix(strip): v for k, v in state.items()}
    missing = [k for k in wanted if k not in renamed]
    if missing:
        raise CheckpointError(
            f"Expected the tensor {missing[0]} in {path}, found none.", "Check that the folder holds the right kind of model."
        )
    target.load_state_dict({k: renamed[k] for k in wanted})


def _add_lora(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    assert recipe.lora is not None
    config = LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, target_modules=LORA_TARGETS)
    model = get_peft_model(model, config)
    if recipe.lora.adapter:
        _go_on_with(model, recipe.lora.adapter, recipe.lora)
    return model


def _load_adapter(model: Any, folder: Path) -> None:
    """The weights of a saved adapter into a model's own, all of them. Raises CheckpointError."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Expected an adapter's weights in {path}, found none ({error}).", "Copy the folder again.") from error
    own = {name: value.shape for name, value in get_peft_model_state_dict(model).items()}
    found = {name: value.shape for name, value in state.items()}
    if own != found:
        name = min(n for n in own.keys() | found.keys() if own.get(n) != found.get(n))
        raise CheckpointError(
            f"Expected an adapter of this model in {folder}, found a difference at {name}.",
            "Name the adapter that the model has merged in.",
        )
    set_peft_model_state_dict(model, state)


@torch.no_grad()
def _go_on_with(model: Any, folder: Path, lora: LoraRecipe) -> None:
    """Load an adapter that the weights have merged in, and take it out of them."""
    from peft import LoraConfig, PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"Expected an adapter at {folder}, found no adapter_config.json there.", "Check lora.adapter in the recipe.")
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or config.use_rslora or config.use_dora or config.alpha_pattern or config.rank_pattern:
        raise CheckpointError(f"Expected a plain LoRA in {folder}, found another kind of adapter.", "Name an adapter of edgemed's own.")
    if (config.r, config.lora_alpha) != (lora.rank, lora.alpha):
        raise RecipeError(
            f"Expected lora.rank and alpha of the adapter in {folder}, {config.r} and {config.lora_alpha:g}, found {lora.rank} and"
            f" {lora.alpha:g}.",
            "Correct the recipe.",
        )
    _load_adapter(model, folder)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.get_base_layer().weight.sub_(module.get_delta_weight("default"))


def compile_blocks(model: Any) -> None:
    """torch.compile for the language model's blocks: one program serves them all. Not for the tower's: transformers watches their outputs,
    which cuts each of them into pieces (docs/LOG.md, 2026-11-28)."""
    # Under torchrun torch would cut a compiled program where a bucket of gradients is full, so that they are sent while it goes on. A block
    # is small enough to wait for, and the cutting has failed (torch 2.11, 64 rows a GPU: "'int' object has no attribute 'meta'").
    torch._dynamo.config.optimize_ddp = False
    # Stages in one process, rows with and without a mask share one budget of recompilations.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)  # its name before torch 2.7, too
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in repeated_blocks(base.model.language_model):
        block.compile(dynamic=True)


def repeated_blocks(model: Any) -> list[Any]:
    """The layers of a tower, a language model or both."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return [block for blocks in lists if len({type(block) for block in blocks}) == 1 for block in blocks]


def rates(recipe: Recipe) -> dict[str, float]:
    """Learning rate of each part in this stage; 0 means frozen."""
    optim = recipe.optim
    if recipe.stage == "align":
        return {"projector": optim.projector_rate, "llm": 0.0, "tower": 0.0}
    return {"projector": optim.projector_rate, "llm": optim.llm_rate, "tower": optim.tower_rate}


def _freeze(model: Any, recipe: Recipe) -> None:
    rate = rates(recipe)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        adapter = "lora_" in name
        parameter.requires_grad_(rate[part] > 0 and (part != "llm" or recipe.lora is None or adapter))
    # A feature is taken before the tower's last layers; what it never passes through must not count as trainable.
    base = model.get_base_model() if recipe.lora else model
    tower = base.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    used = base.config.vision_feature_layer % (base.config.vision_config.num_hidden_layers + 1)
    for layer in tower.encoder.layers[used:]:
        layer.requires_grad_(False)
    tower.post_layernorm.requires_grad_(False)
