"""The stage runner: HF Trainer with one learning rate a part, and an export that loses nothing.

The output folder holds an HF `LlavaForConditionalGeneration` checkpoint (adapters merged), the tokenizer, `preprocessor_config.json`,
`edgemed.json` (image preparation and template, exactly as trained) and `run.json`; with LoRA also `adapter/`, the adapter alone.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from edgemed.core.contract import Contract, count_image_tokens, save_contract
from edgemed.core.conversation import find_template
from edgemed.core.errors import RecipeError, ResourceError
from edgemed.core.files import os_errors, save_text
from edgemed.data import hash_samples, load_samples
from edgemed.finetune.examples import IGNORE, Collator, Examples
from edgemed.finetune.model import PARTS, load_model, merged, part_of, rates
from edgemed.finetune.recipe import OptimRecipe, Recipe
from edgemed.finetune.rounding import LoraRounding


class StageTrainer(Trainer):
    """Trainer that normalises (and slightly moves) pixels on the device and gives each part its own rate."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rate = rates(self.recipe)
            groups = []
            for part in PARTS:
                parameters = [p for n, p in self.model.named_parameters() if p.requires_grad and part_of(n) == part]
                if parameters:
                    groups.append({"params": parameters, "lr": rate[part]})
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.optim.weight_decay, fused=torch.cuda.is_available())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Linear warm-up, then a cosine to 0, over steps or over the minutes allowed, whichever is further."""
        if self.lr_scheduler is None:
            optim, begin = self.recipe.optim, time.monotonic()

            def factor(step: int) -> float:
                done = step / num_training_steps
                if optim.max_minutes:
                    done = max(done, (time.monotonic() - begin) / (60 * optim.max_minutes))
                if done < optim.warmup_ratio:
                    return min(1.0, max(done, 1 / num_training_steps) / optim.warmup_ratio)
                return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        """Cross entropy of the answers; logits are made from the first answer's position on only."""
        pixels, labels = inputs.pop("pixels", None), inputs.pop("labels")
        if pixels is not None:
            inputs["pixel_values"] = self._normalise(pixels, model.training)
        first = max(1, int((labels != IGNORE).any(0).int().argmax()))
        keep = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        outputs = model(**inputs, logits_to_keep=keep)
        logits, wanted = outputs.logits.float(), labels[:, first:]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (wanted != IGNORE).sum()
        return (total / count, outputs) if return_outputs else total / count

    def _normalise(self, pixels: torch.Tensor, training: bool) -> torch.Tensor:
        image = self.recipe.image
        x = pixels.permute(0, 3, 1, 2).float() / 255.0
        if training:
            x = move_images(x, self.recipe.optim, torch.tensor(image.pad_colour) / 255.0)
        mean = torch.tensor(image.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(image.std, device=x.device).view(1, 3, 1, 1)
        return (x - mean) / std


def move_images(x: torch.Tensor, optim: OptimRecipe, fill: torch.Tensor) -> torch.Tensor:
    """float [n, 3, S, S] → the same, each image rotated, scaled and shifted at random within the recipe; outside is `fill`."""
    if not (optim.rotate_deg or optim.scale or optim.shift):
        return x
    n = x.shape[0]

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, device=x.device) * 2 - 1) * limit

    angle, zoom = uniform(math.radians(optim.rotate_deg)), 1 + uniform(optim.scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, uniform(2 * optim.shift)], 1), torch.stack([sin, cos, uniform(2 * optim.shift)], 1)], 1)
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    colour = fill.to(x.device).view(1, 3, 1, 1)
    return torch.nn.functional.grid_sample(x - colour, grid, align_corners=False) + colour


class Deadline(TrainerCallback):
    """Ends training after so many minutes."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or time.monotonic() > self.end


class RoundingCallback(TrainerCallback):
    """Every REFRESH steps draws anew whether the LLM computes with 4-bit rounding errors, and brings them up to date."""

    REFRESH = 8

    def __init__(self, model: Any, share: float, seed: int) -> None:
        self.rounding, self.share, self.draw = LoraRounding(model), share, random.Random(seed)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.REFRESH == 0:
            self.rounding.apply(self.draw.random() < self.share)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rounding.apply(False)


def train(recipe: Recipe) -> Path:
    """Run the stage; returns the output folder. Raises DatasetError, CheckpointError, RecipeError, ResourceError."""
    if recipe.optim.bf16 and not torch.cuda.is_available():
        raise ResourceError("Expected a GPU for optim.bf16, found none.", "Set bf16 = false in the recipe.")
    if not any(rates(recipe).values()):
        raise RecipeError("Expected a learning rate above 0 for some part of this stage, found none.", "Correct [optim].")
    transformers.set_seed(recipe.seed)
    per_set = [(d, load_samples(d.name, d.path, d.split)) for d in recipe.data]
    model, tokenizer = load_model(recipe)
    base = model.get_base_model() if recipe.lora else model
    template = find_template(recipe.template)
    if template.bos and tokenizer.bos_token_id is None:
        raise RecipeError(
            f"Expected a BOS token for the template '{template.name}', found a tokenizer without one.", "Choose another template."
        )
    config = base.config
    tower = config.vision_config
    tokens = count_image_tokens(tower.image_size, tower.patch_size, tower.model_type, config.vision_feature_select_strategy)
    sets = [(part, d.repeat) for d, part in per_set]
    limits = recipe.max_tokens, recipe.capitalise, recipe.pack, recipe.seed
    examples = Examples(sets, tokenizer, template, recipe.image, config.image_token_id, tokens, *limits)
    trainer = _trainer(recipe, model, tokenizer, examples)
    result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise RecipeError("Expected a finite loss, found NaN.", "Lower the learning rates.")
    run = {
        "recipe": recipe.model_dump(mode="json"),
        "data": {d.name: {"rows": len(part), "split": d.split, "sha256": hash_samples(part)} for d, part in per_set},
        "steps": result.global_step,
        "steps_per_s": result.metrics["train_steps_per_second"],
        "loss": [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]},
    }
    save_checkpoint(recipe, model, tokenizer, run)
    return recipe.output


def _trainer(recipe: Recipe, model: Any, tokenizer: Any, examples: Examples) -> StageTrainer:
    optim = recipe.optim
    steps = optim.max_steps if optim.max_steps > 0 else math.ceil(len(examples) / (optim.batch_size * optim.accumulation) * optim.epochs)
    arguments = TrainingArguments(
        output_dir=str(recipe.output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.accumulation,
        learning_rate=max(rates(recipe).values()),
        lr_scheduler_type="cosine",
        warmup_steps=int(optim.warmup_ratio * steps),
        max_grad_norm=optim.max_grad_norm,
        bf16=optim.bf16,
        logging_steps=max(1, steps // 100),
        save_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=optim.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
        disable_tqdm=not sys.stderr.isatty(),
        label_names=["labels"],
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    callbacks: list[TrainerCallback] = [Deadline(optim.max_minutes)] if optim.max_minutes else []
    if recipe.lora and recipe.lora.rounding:
        callbacks.append(RoundingCallback(model, recipe.lora.rounding, recipe.seed))
    return StageTrainer(recipe, model=model, args=arguments, train_dataset=examples, data_collator=Collator(pad), callbacks=callbacks)


def save_checkpoint(recipe: Recipe, model: Any, tokenizer: Any, run: dict[str, Any]) -> None:
    """Write the stage's folder; run.json comes last and marks it complete."""
    out = recipe.output
    with os_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "run.json").unlink(missing_ok=True)
        if recipe.lora:
            model.save_pretrained(out / "adapter")
            model = merged(model, recipe, tokenizer, out / "adapter")
        model.to(getattr(torch, recipe.save_dtype)).save_pretrained(out)
        tokenizer.save_pretrained(out)
        image = recipe.image
        processor = {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": image.size_px, "width": image.size_px},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(image.mean),
            "image_std": list(image.std),
            "do_convert_rgb": True,
        }
        save_text(out / "preprocessor_config.json", json.dumps(processor, indent=1))
        save_contract(out, Contract(image=image, template=find_template(recipe.template)))
        save_text(out / "run.json", json.dumps(run, indent=1))
