"""A stage's recipe: a small TOML file, checked before anything is loaded, and saved beside the result.

    output = "out/vqa"
    model = "out/instruct"                      # an HF checkpoint: the previous stage's, or any LlavaForConditionalGeneration
    [[data]]
    name = "slake"
    path = "slake"

What a recipe leaves out comes from the stage's own in recipes/STAGE.toml, which holds the paper's hyper-parameters, and template and
image preparation from the `edgemed.json` of the model it starts from. Paths are relative to the recipe. Knows no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from edgemed.core.contract import CONTRACT_NAME, load_contract
from edgemed.core.conversation import TEMPLATES, find_template
from edgemed.core.errors import InputError, RecipeError
from edgemed.core.files import found_at, os_errors, real_path
from edgemed.core.images import ImagePreparation
from edgemed.core.model import Frozen
from edgemed.core.units import parse_bytes
from edgemed.data.splits import parse_part

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Stage = Literal["align", "instruct", "vqa"]
STAGES: tuple[Stage, ...] = ("align", "instruct", "vqa")
DEFAULTS = Path(__file__).parent / "recipes"


class Described(Frozen):
    """A table of a recipe. What stands below a key is its line in docs/recipes.md."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class DataRecipe(Described):
    """One data set; there may be several."""

    name: str
    """slake, vqa-rad, pathvqa, llava, captions or csv: how the files are laid out (docs/finetuning.md)."""
    path: Path
    """The set's folder or file."""
    split: str = "train"
    """Which part of it."""
    hold_out: tuple[str, ...] = ()
    """Shares of the images that are kept for measuring: "1/5" is the first of five parts, which
    `edgemed eval --dataset NAME@1/5=…` asks about."""
    merge_answers: bool = False
    """Questions asked of one image several times become one row with all their answers (PathVQA's "What is present?"); not yes and no."""
    mirror: bool = False
    """Every row once more with its image mirrored, and left and right swapped in its texts."""
    max_missing: float = Field(default=0.0, ge=0, le=1)
    """Share of rows that may lack their image (figures vanish from PMC); they are left out."""
    repeat: int = Field(default=1, ge=1)
    """How often its rows are seen in an epoch."""


class JoinRecipe(Described):
    """A bare LLM and tower, joined by a fresh projector; instead of `model`. `edgemed finetune new` writes the same as a checkpoint."""

    llm: Path
    """A language model as an HF checkpoint."""
    tower: Path
    """A CLIP or SigLIP tower as an HF checkpoint."""
    image_token: str
    """A token of the LLM's own that text never uses."""
    feature_layer: int = -2
    """Which of the tower's hidden states is used."""
    activation: Literal["gelu", "gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    """The projector's."""
    tower_activation: str | None = None
    """libmtmd computes the tanh GELU only; a tower trained with another one is set to this before training."""
    image_size_px: int | None = Field(default=None, ge=14)
    """Another image size than the tower's own: its position embeddings are resampled. A multiple of the patch size."""


class FeatureRecipe(Described):
    """A frozen tower's features, computed once an image and kept on disk."""

    folder: Path
    """Where; several towers and runs may share it."""
    limit: str = "50GB"
    """What all towers' together may take."""


class LoraRecipe(Described):
    """Low-rank adapters on every linear layer of the LLM, whose own weights stay."""

    rank: int = Field(default=32, ge=1)
    """Of each adapter."""
    alpha: float = Field(default=64, gt=0)
    """Its changes count alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that are left out at each step."""
    adapter: Path | None = None
    """An adapter of the same rank and alpha that `model` has merged in (an earlier stage's adapter/): training goes on with it, and what is
    saved beside the result holds both stages' changes."""
    rounding: float = Field(default=0.0, ge=0, le=1)
    """Share of the time in which the LLM computes with the rounding error that 4 bits will leave, so that it learns to live with it."""
    base_bits: Literal[4, 16] = 16
    """4: the frozen LLM is kept in NF4 while training (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); needs the qlora extra and a GPU."""


class OptimRecipe(Described):
    """Steps, batch and learning rates.

    A step sees batch_size × accumulation rows, whatever the number of processes: under torchrun they are divided among them. A part
    whose rate is 0 is frozen, where the stage does not freeze it anyway.
    """

    epochs: float = Field(default=1.0, gt=0)
    """How often all rows are seen."""
    max_steps: int = -1
    """So many steps instead of `epochs`, where it is above 0."""
    max_minutes: float | None = Field(default=None, gt=0)
    """On hired hardware: the schedule follows the share of these minutes that has passed, and training ends with them."""
    batch_size: int = Field(default=8, ge=1)
    """Rows at once; fewer are taken where memory does not hold them."""
    accumulation: int = Field(default=1, ge=1)
    """Batches to a step."""
    projector_rate: float = Field(default=2e-5, ge=0)
    """The projector's learning rate at its highest; the schedule is a cosine."""
    llm_rate: float = Field(default=2e-5, ge=0)
    """The language model's, or its adapters'."""
    tower_rate: float = Field(default=0.0, ge=0)
    """The vision tower's."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps in which the rates rise from 0."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are shortened to this length."""
    bf16: bool | Literal["auto"] = False
    """Compute in bfloat16. "auto": where the GPU has it."""
    gradient_checkpointing: bool = False
    """Activations are computed again in the backward pass instead of kept: slower, much smaller."""
    compile: bool = False
    """torch.compile of the language model's blocks: fewer and larger programs on a GPU, for some time before the first steps."""
    sharding: bool = False
    """FSDP: weights and optimizer state are divided among the processes of torchrun."""
    group_by_length: bool = False
    """Rows of like length share a step, so that little is padding."""
    save_steps: int | None = Field(default=None, ge=0)
    """A checkpoint to go on from every so many steps; 0: none. About twenty in all where left out."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that load images; left out: none where all are in memory or cached as features, else one a core but one."""
    rotate_deg: float = Field(default=0.0, ge=0)
    """Random rotation of the prepared image, up to so many degrees. (Mirroring is a data set's, since left and right are asked about.)"""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Random enlargement or reduction, as a share."""
    shift: float = Field(default=0.0, ge=0, lt=1)
    """Random shift, as a share of the side."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Random brightness, as a share of the whole range."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Random contrast, as a share of the distance from the mean."""

    @property
    def moves_pixels(self) -> bool:
        """Whether an image looks another way at each step."""
        return bool(self.rotate_deg or self.scale or self.shift or self.brightness or self.contrast)


class Recipe(Described):
    """Everything a stage needs."""

    stage: Stage
    """The command's; not written in the file."""
    output: Path
    """The folder to write: an HF checkpoint, run.json with everything that made it, the loss curve, and with [lora] the adapter alone."""
    model: Path | None = None
    """An HF LlavaForConditionalGeneration checkpoint to start from: the stage before's, or one of `edgemed finetune new` or
    `edgemed convert --to hf`."""
    join: JoinRecipe | None = None
    template: str
    """Conversation template. Left out: that of `model`, where edgemed wrote it."""
    image: ImagePreparation
    data: tuple[DataRecipe, ...] = Field(min_length=1)
    optim: OptimRecipe = OptimRecipe()
    lora: LoraRecipe | None = None
    features: FeatureRecipe | None = None
    max_broken: float = Field(default=0.0, ge=0, le=1)
    """Share of images that may be unreadable; rows that need them are left out, or another row takes their place."""
    pack: int = Field(default=1, ge=1)
    """Up to so many questions about one image share a sequence and the image in it; none sees another, so that the loss stays the same."""
    max_tokens: int = Field(default=2048, ge=16)
    """Longest row, its image included; a longer one is refused before training."""
    capitalise: bool = False
    """Write answers with a capital first letter: medical sets mix "yes" and "Yes", and a small model need not learn both."""
    seed: int = 0
    """Of everything that is drawn: the same recipe, data and machine give the same weights."""
    save_dtype: Literal["source", "float16", "bfloat16", "float32"] = "source"
    """The checkpoint's. "source": the type of the weights that training began with, so that frozen parts stay bit-identical."""


def stage_defaults(stage: Stage) -> dict[str, Any]:
    """What a recipe of this stage leaves out, beside what every stage has alike."""
    return _read(DEFAULTS / f"{stage}.toml")


def load_recipe(stage: str, path: Path) -> Recipe:
    """Read and check a recipe. Raises RecipeError with every problem found, CheckpointError for a damaged edgemed.json."""
    if stage not in STAGES:
        raise RecipeError(f"Expected a stage out of {', '.join(STAGES)}, found '{stage}'.", "Choose one of them.")
    folder = real_path(path).parent
    data = _fill_in({"stage": stage, **merge(stage_defaults(stage), _read(path))}, folder)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"Expected a valid recipe in {path}, found {problems}.", "Correct these keys.") from error
    problems = "; ".join(_problems(recipe))
    if problems:
        raise RecipeError(f"Expected a valid recipe in {path}, found {problems}.", "Correct these keys.")
    find_template(recipe.template)
    return _resolve(recipe, folder)


def merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, table by table; arrays and values replace."""
    out = dict(base)
    for key, value in own.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"Expected a recipe at {path}, found {found_at(path, 'no such file')}.", "Check the path.")
    with os_errors(path):
        raw = path.read_bytes()
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"Expected TOML in {path}, found something else ({error}).", "Correct the line.") from error


def _fill_in(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With template and image preparation of the model that training starts from, where the recipe does not say."""
    model = data.get("model")
    contract = load_contract(folder / model) if isinstance(model, str) else None
    if contract is None:
        if isinstance(model, str) and not {"template", "image"} <= data.keys() and not (folder / model).is_dir():
            found = found_at(folder / model, "no such folder")
            raise RecipeError(f"Expected a checkpoint at {folder / model}, found {found}.", "Correct 'model' in the recipe.")
        return data
    template = contract.template
    if "template" not in data and TEMPLATES.get(template.name) != template:
        raise RecipeError(
            f"Expected a template of edgemed's own in {folder / str(model) / CONTRACT_NAME}, found another called '{template.name}'.",
            f"Name one in the recipe: {', '.join(TEMPLATES)}.",
        )
    return {"template": template.name, "image": contract.image.model_dump(), **data}


def _problems(recipe: Recipe) -> list[str]:
    """What no single key shows."""
    out = []
    lora = recipe.lora
    if (recipe.model is None) == (recipe.join is None):
        out.append(f"{'both' if recipe.model else 'neither'} of 'model' and '[join]'")
    if recipe.optim.compile and recipe.optim.sharding:
        out.append("optim.compile beside optim.sharding")
    if lora and recipe.stage == "align":
        out.append("[lora], though the align stage trains the projector alone")
    if lora and lora.adapter and recipe.join:
        out.append("lora.adapter beside [join], though a fresh model has no adapter merged in")
    if lora and lora.adapter and lora.base_bits == 4:
        out.append("lora.adapter beside QLoRA, whose frozen weights cannot be unmerged")
    for data in recipe.data:
        out += [f"data.hold_out '{part}', which is no share such as 1/5" for part in data.hold_out if not _is_share(part)]
    if lora and lora.base_bits == 4:
        out += ["[join], which QLoRA cannot start from: run edgemed finetune new first"] if recipe.join else []
        out += ["optim.sharding beside QLoRA"] if recipe.optim.sharding else []
        out += ["lora.rounding beside QLoRA"] if lora.rounding else []
        out += ["optim.compile beside QLoRA, which nobody has tried"] if recipe.optim.compile else []
    return out + (_feature_problems(recipe, recipe.features) if recipe.features else [])


def _is_share(text: str) -> bool:
    try:
        parse_part(text)
    except InputError:
        return False
    return True


def _feature_problems(recipe: Recipe, features: FeatureRecipe) -> list[str]:
    """Why features that are computed once would not be those of each step."""
    optim, out = recipe.optim, []
    if recipe.stage != "align" and optim.tower_rate:
        out.append("[features] beside optim.tower_rate, though a tower that learns has other features at each step")
    if optim.moves_pixels:
        out.append("[features] beside optim.rotate_deg, scale, shift, brightness or contrast, though a changed image has other features")
    if any(data.mirror for data in recipe.data):
        out.append("[features] beside data.mirror, though a mirrored image has other features")
    try:
        parse_bytes(features.limit)
    except InputError as error:
        out.append(f"features.limit: {error.message}")
    return out


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    join = recipe.join and recipe.join.model_copy(update={"llm": folder / recipe.join.llm, "tower": folder / recipe.join.tower})
    data = tuple(d.model_copy(update={"path": folder / d.path}) for d in recipe.data)
    model = recipe.model and folder / recipe.model
    features = recipe.features and recipe.features.model_copy(update={"folder": folder / recipe.features.folder})
    lora = recipe.lora
    if lora and lora.adapter:
        lora = lora.model_copy(update={"adapter": folder / lora.adapter})
    paths = {"output": folder / recipe.output, "model": model, "join": join, "data": data, "features": features, "lora": lora}
    return recipe.model_copy(update=paths)
