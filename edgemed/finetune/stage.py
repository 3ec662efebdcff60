"""One stage from its recipe to its folder: data, model, training (resumed where it was interrupted), export.

The output folder holds an HF `LlavaForConditionalGeneration` checkpoint (adapters merged), the tokenizer, `preprocessor_config.json`,
`edgemed.json` (image preparation and template, exactly as trained), `recipe.toml`, `run.json` and `loss.png`; with LoRA also
`adapter/`, the adapter alone. Under torchrun every process runs `train`; the first writes.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from edgemed.core.contract import count_image_tokens
from edgemed.core.conversation import find_template
from edgemed.core.errors import DatasetError, RecipeError, ResourceError
from edgemed.core.units import parse_bytes
from edgemed.data import Sample, load_samples
from edgemed.data.samples import merge_answers, mirror
from edgemed.data.splits import BY_FOLDER, leave_out
from edgemed.finetune.callbacks import Deadline, Reporter, RoundingCallback, Stop
from edgemed.finetune.describe import Sets, describe_code, describe_result, describe_run
from edgemed.finetune.examples import PRELOAD_BYTES, Collator, Examples
from edgemed.finetune.export import save_checkpoint
from edgemed.finetune.features import FeatureCache, accept_features, tower_compute, tower_of
from edgemed.finetune.interrupted import StageInterrupted
from edgemed.finetune.model import compile_blocks, load_model, rates, repeated_blocks
from edgemed.finetune.progress import Prepare, Report
from edgemed.finetune.recipe import DataRecipe, FeatureRecipe, Recipe
from edgemed.finetune.sampling import StepSampler
from edgemed.finetune.trainer import StageTrainer
from edgemed.finetune.workspace import Workspace

# About so many checkpoints to resume from, and points of the loss curve, a run.
SAVES, POINTS = 20, 100
# On a GPU lengths are padded to a multiple of this: attention's kernels want 8, and the fewer lengths there are, the less memory is cut
# into pieces that fit none of them.
GPU_LENGTHS = 64
Save = Callable[[Recipe, Any, Any, dict[str, Any]], None]


def train(recipe: Recipe, report: Report | None = None, save: Save = save_checkpoint, prepare: Prepare | None = None) -> Path:
    """Run the stage; returns the output folder. `save` writes it, from recipe, model, tokenizer and the content of run.json.
    `report` is told of every step, `prepare` of what has to be computed before the first one.

    Goes on from the folder's newest checkpoint, if there is one of this recipe and data. Raises DatasetError, CheckpointError,
    RecipeError, ResourceError; StageInterrupted after Ctrl-C, when a checkpoint was saved.
    """
    recipe = _settle(recipe)
    main = int(os.environ.get("RANK", "0")) == 0
    per_set = [(d.name, d.repeat, load_set(d)) for d in recipe.data]
    fingerprint, code = describe_run(recipe, per_set), describe_code()
    with Workspace(recipe.output, main) as work:
        if work.check(fingerprint):
            work.clear()
            return recipe.output
        transformers.set_seed(recipe.seed)
        model, tokenizer = load_model(recipe)
        examples = build_examples(recipe, per_set, model, tokenizer, prepare)
        if recipe.optim.compile:
            compile_blocks(model)
        trainer, stop = _trainer(recipe, model, tokenizer, examples, work, report)
        with stop, without_cudnn_attention():
            result = _run(trainer, work)
        if stop.stopped:
            raise StageInterrupted(trainer.state.global_step, trainer.state.max_steps)
        if not math.isfinite(result.training_loss):
            raise RecipeError("Expected a finite loss, found NaN.", "Lower the learning rates.")
        model = _gathered(trainer, recipe, model)
        if main:
            run = describe_result(recipe, per_set, fingerprint, code, trainer, result)
            save(recipe, model, tokenizer, run)
            work.clear()
        trainer.accelerator.wait_for_everyone()
    return recipe.output


def load_set(data: DataRecipe) -> list[Sample]:
    """A data set's rows without those held out, merged and with mirrored ones after them where the recipe asks. Raises DatasetError."""
    samples = leave_out(load_samples(data.name, data.path, data.split, data.max_missing), data.hold_out, data.name in BY_FOLDER)
    if not samples:
        raise DatasetError(f"Expected rows of {data.name} beside those held out, found none.", "Hold out a smaller share of its images.")
    if data.merge_answers:
        samples = merge_answers(samples)
    return samples + [mirror(s) for s in samples if s.image] if data.mirror else samples


def _settle(recipe: Recipe) -> Recipe:
    """With what this machine decides. Raises ResourceError, RecipeError."""
    gpu = torch.cuda.is_available()
    if recipe.optim.bf16 is True and not gpu:
        raise ResourceError("Expected a GPU for optim.bf16, found none.", "Set bf16 = false in the recipe.")
    if recipe.lora and recipe.lora.base_bits == 4 and not gpu:
        raise ResourceError("Expected a GPU for lora.base_bits = 4, found none.", "Set base_bits = 16 in the recipe.")
    if not any(rates(recipe).values()):
        raise RecipeError("Expected a learning rate above 0 for some part of this stage, found none.", "Correct [optim].")
    if recipe.optim.bf16 != "auto":
        return recipe
    optim = recipe.optim.model_copy(update={"bf16": gpu and torch.cuda.is_bf16_supported()})
    return recipe.model_copy(update={"optim": optim})


def build_examples(recipe: Recipe, sets: Sets, model: Any, tokenizer: Any, prepare: Prepare | None = None) -> Examples:
    """The rows of all sets. Raises DatasetError, RecipeError."""
    template = find_template(recipe.template)
    if template.bos and tokenizer.bos_token_id is None:
        raise RecipeError(
            f"Expected a BOS token for the template '{template.name}', found a tokenizer without one.", "Choose another template."
        )
    config = (model.get_base_model() if recipe.lora else model).config
    tower = config.vision_config
    tokens = count_image_tokens(tower.image_size, tower.patch_size, tower.model_type, config.vision_feature_select_strategy)
    limits = recipe.max_tokens, recipe.capitalise, recipe.pack, recipe.seed, 0 if recipe.features else PRELOAD_BYTES, recipe.max_broken
    examples = Examples(
        [(samples, repeat) for _, repeat, samples in sets], tokenizer, template, recipe.image, config.image_token_id, tokens, *limits
    )
    if recipe.features:
        cache_features(recipe, recipe.features, model, examples, prepare)
    return examples


def cache_features(recipe: Recipe, features: FeatureRecipe, model: Any, examples: Examples, prepare: Prepare | None = None) -> None:
    """Compute the frozen tower's features where they are not cached, and let rows and model work with them.

    Under torchrun the first process to come fills the cache; the others wait and find it filled.
    """
    base = model.get_base_model() if recipe.lora else model
    if torch.cuda.is_available():
        tower_of(model).to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    autocast = torch.bfloat16 if recipe.optim.bf16 is True else None
    cache = FeatureCache.open(features.folder, base, recipe.image, parse_bytes(features.limit), autocast)
    examples.use_features(cache, tower_compute(base, recipe.image, autocast), progress=prepare)
    accept_features(base)


def divide_batch(recipe: Recipe, processes: int) -> tuple[int, int]:
    """(rows at once, micro-batches a step) of each process, so that all together see the recipe's rows a step. Raises RecipeError."""
    optim = recipe.optim
    rows = optim.batch_size * optim.accumulation
    if rows % processes:
        raise RecipeError(
            f"Expected batch_size × accumulation to be a multiple of {processes} processes, found {rows}.", "Correct [optim]."
        )
    share = rows // processes
    at_once = max(n for n in range(1, min(share, optim.batch_size) + 1) if share % n == 0)
    return at_once, share // at_once


def _trainer(
    recipe: Recipe, model: Any, tokenizer: Any, examples: Examples, work: Workspace, report: Report | None
) -> tuple[StageTrainer, Stop]:
    optim = recipe.optim
    rows = optim.batch_size * optim.accumulation
    steps = optim.max_steps if optim.max_steps > 0 else math.ceil(len(examples) / rows * optim.epochs)
    every = RoundingCallback.REFRESH if recipe.lora and recipe.lora.rounding else 1
    workers = examples.workers if optim.workers is None else optim.workers
    text_rows = any(row.image is None for row in examples.rows)
    arguments = _arguments(recipe, steps, every, work, workers, text_rows, sorted({type(b).__name__ for b in repeated_blocks(model)}))
    sampler = StepSampler(examples.lengths, rows, steps, recipe.seed, optim.group_by_length)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    image_id = (model.get_base_model() if recipe.lora else model).config.image_token_id
    stop = Stop(every)
    callbacks: list[TrainerCallback] = [stop]
    if recipe.lora and recipe.lora.rounding:
        callbacks.append(RoundingCallback(model, recipe.lora.rounding, recipe.seed))
    multiple = GPU_LENGTHS if torch.cuda.is_available() else 1
    data = {"train_dataset": examples, "data_collator": Collator(pad, step=True, multiple=multiple)}
    trainer = StageTrainer(recipe, work, sampler, image_id, model=model, args=arguments, callbacks=callbacks, **data)
    if optim.max_minutes:
        trainer.add_callback(Deadline(trainer.clock, optim.max_minutes))
    if report is not None and work.main:
        trainer.add_callback(Reporter(report, rows, trainer.losses))
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer, stop


def _arguments(
    recipe: Recipe, steps: int, every: int, work: Workspace, workers: int, text_rows: bool, blocks: list[str]
) -> TrainingArguments:
    optim = recipe.optim
    gpu = torch.cuda.is_available()
    at_once, accumulation = divide_batch(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    save_steps = max(1, steps // SAVES) if optim.save_steps is None else optim.save_steps
    again = optim.gradient_checkpointing and not optim.sharding  # FSDP has its own way
    return TrainingArguments(
        output_dir=str(work.trainer),
        max_steps=steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulation,
        learning_rate=max(rates(recipe).values()),
        lr_scheduler_type="cosine",
        warmup_steps=int(optim.warmup_ratio * steps),
        max_grad_norm=optim.max_grad_norm,
        bf16=bool(optim.bf16),
        logging_steps=max(1, steps // POINTS),
        save_strategy="steps" if save_steps else "no",
        save_steps=-(-max(save_steps, 1) // every) * every,
        logging_nan_inf_filter=False,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_pin_memory=gpu,
        accelerator_config={"non_blocking": gpu},
        seed=recipe.seed,
        disable_tqdm=True,
        label_names=["labels"],
        use_cpu=not gpu and not torch.backends.mps.is_available(),
        # A step without any image leaves the projector without a gradient.
        ddp_find_unused_parameters=text_rows,
        **({"fsdp": True, "fsdp_config": _sharding(recipe, blocks)} if optim.sharding else {}),
        **(computing_again() if again else {}),
    )


def computing_again() -> dict[str, Any]:
    """Gradient checkpointing, by the name that this transformers has for it."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _sharding(recipe: Recipe, blocks: list[str]) -> dict[str, Any]:
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        # Named, since some versions of transformers list blocks for SigLIP that its tower does not have.
        "transformer_layer_cls_to_wrap": blocks,
        "state_dict_type": "FULL_STATE_DICT",
        "activation_checkpointing": recipe.optim.gradient_checkpointing,
    }


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """cuDNN's attention wants a workspace of its own, and is suspected to plan anew for every length (docs/LOG.md, 2026-11-28)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _run(trainer: StageTrainer, work: Workspace) -> Any:
    newest = work.newest()
    try:
        return trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ResourceError(
            f"Expected a compiler that works for optim.compile, found none ({str(error).splitlines()[0]}).", "Set compile = false."
        ) from error
    except torch.distributed.DistBackendError as error:
        raise ResourceError(
            f"Expected all processes of this run to the end, found one gone ({str(error).splitlines()[0]}).",
            "See what it said, then run the same command again: it goes on from the last checkpoint.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"Expected memory for the optimizer's state, found none left ({str(error).splitlines()[0]}).",
            "Train a LoRA, with base_bits = 4 if need be, or set optim.sharding on several GPUs.",
        ) from error


def _gathered(trainer: StageTrainer, recipe: Recipe, model: Any) -> Any:
    """The model that was trained; where it was sharded, a new one with the weights of all processes (in the first process)."""
    if not trainer.is_fsdp_enabled:
        return model
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.args.should_save:
        return model
    fresh, _ = load_model(recipe)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    return fresh
