"""HF's Trainer, taught what a stage needs: a rate a part, answers' loss, smaller micro-batches when memory ends, whole checkpoints.

A step's loss is the sum over its answer tokens divided by their number, whatever the number of processes, micro-batches and pieces
of micro-batches; so neither of them moves the loss curve beyond rounding. Knows no recipe's file and no data set.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from edgemed.core.errors import CheckpointError, RecipeError, ResourceError
from edgemed.core.files import save_text
from edgemed.finetune.augment import normalise_pixels
from edgemed.finetune.callbacks import Clock
from edgemed.finetune.examples import IGNORE
from edgemed.finetune.features import take_images, tower_input
from edgemed.finetune.model import PARTS, part_of, rates
from edgemed.finetune.recipe import Recipe
from edgemed.finetune.sampling import StepSampler
from edgemed.finetune.workspace import Workspace, writing

WEIGHTS_NAME = "trainable.safetensors"
CLOCK_NAME = "clock.json"
PIECES_NAME = "pieces.json"
# Weight, and the two moments of AdamW, in float32.
BYTES_PER_TRAINED = 12
# Of a batch: what has a row an image, not a row a conversation; and what the model is not fed.
PER_IMAGE = ("pixels", "features", "order")
NAMES = ("names", "broken", "first")
Batch = dict[str, Any]


class StageTrainer(Trainer):
    """Trainer for one stage; see the module."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(self, recipe: Recipe, workspace: Workspace, sampler: StepSampler, image_id: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A loss that is divided by the whole step's tokens must not be divided by the number of micro-batches again.
        self.model_accepts_loss_kwargs = True
        self.recipe, self.workspace, self.sampler, self.image_id = recipe, workspace, sampler, image_id
        self.clock = Clock(shared=recipe.optim.max_minutes is not None)
        self.add_callback(self.clock)
        self.losses: deque[float] = deque(maxlen=1)
        self.pieces = _load_pieces(workspace)
        self._step: list[tuple[Batch, torch.Tensor]] = []
        self._staging = False

    # ---- what learns, how fast, in which order

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
            optim = self.recipe.optim

            def factor(step: int) -> float:
                done = step / num_training_steps
                if optim.max_minutes:
                    done = max(done, self.clock.spent_s / (60 * optim.max_minutes))
                if done < optim.warmup_ratio:
                    return min(1.0, max(done, 1 / num_training_steps) / optim.warmup_ratio)
                return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self.sampler

    # ---- one step

    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None) -> Any:
        """Cross entropy of the answers; logits are made from the first answer's position on only."""
        self._count_broken(inputs)
        first = inputs["first"]
        inputs = {k: v for k, v in inputs.items() if k not in NAMES}
        moved = self.recipe.optim if model.training else None
        labels, shown = inputs.pop("labels"), tower_input(inputs, lambda pixels: normalise_pixels(pixels, self.recipe.image, moved))
        if shown is not None:
            inputs["pixel_values"] = shown
        if inputs["attention_mask"].dim() == 2:
            # Padded on the right: no answer sees padding anyway, and attention without a mask has a faster kernel.
            del inputs["attention_mask"]
        keep = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        # No cache of keys and values: it would be filled for nothing, and each block compiled for the state it finds it in.
        outputs = model(**inputs, logits_to_keep=keep, use_cache=False)
        logits, wanted = outputs.logits.float(), labels[:, first:]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORE, reduction="sum")
        # Gradients are averaged over the processes; the tokens were counted over all of them.
        count = (wanted != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        return (total / count, outputs) if return_outputs else total / count

    def _count_broken(self, batch: Batch) -> None:
        files = [name for row in batch.get("broken", []) for name in row]
        if files:
            self.train_dataset.broken.add(files)

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        """One micro-batch, in as many pieces as memory asks for. Raises ResourceError where not even one row fits."""
        todo, done = [inputs], self._step
        while True:
            try:
                for batch in todo:
                    done = [*done, (batch, self._in_pieces(model, batch, num_items_in_batch))]
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                message = str(error).splitlines()[0]
            # Outside of the handler, whose traceback keeps the step's activations. What this step has added up so far is undone.
            self._halve(max(batch["input_ids"].shape[0] for batch in todo), message)
            todo, done = [*(batch for batch, _ in self._step), inputs], []
            model.zero_grad()
        self._step = done
        return done[-1][1]

    def _in_pieces(self, model: Any, batch: Batch, items: torch.Tensor | int | None) -> torch.Tensor:
        losses = [super(StageTrainer, self).training_step(model, piece, items) for piece in split(batch, self.pieces, self.image_id)]
        return torch.stack(losses).sum()

    def _halve(self, rows: int, message: str) -> None:
        """Twice as many pieces from now on, also after a restart."""
        if self.pieces >= rows:
            raise ResourceError(
                f"Expected memory for one row of this recipe, found none left ({message}).",
                "Lower max_tokens, set optim.gradient_checkpointing, or train a LoRA, with base_bits = 4 if need be.",
            )
        self.pieces *= 2
        save_text(self.workspace.trainer / PIECES_NAME, json.dumps(self.pieces))
        if self.accelerator.num_processes > 1:
            # The others wait in a collective that this process will not reach: all have to start again.
            raise ResourceError(
                f"Expected memory for a micro-batch on each device, found none left ({message}).",
                "Run the command again (torchrun --max-restarts=3 does): it goes on from the last checkpoint with half the micro-batch.",
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _clip_grad_norm(self, model: Any) -> Any:
        """Called once a step, before the optimizer: here a loss that is no number is found while the weights are still good."""
        norm = super()._clip_grad_norm(model)
        losses = torch.stack([loss for _, loss in self._step])
        gradient = torch.as_tensor(0.0 if norm is None else norm).detach()
        if hasattr(gradient, "full_tensor"):  # sharded
            gradient = gradient.full_tensor()
        check = torch.stack([losses.sum(), gradient.to(losses)])
        self.losses.append(float(check[0]))
        if not torch.isfinite(check).all():
            self._refuse_nan(losses)
        self._step = []
        return norm

    def _refuse_nan(self, losses: torch.Tensor) -> None:
        bad = [batch for (batch, _), loss in zip(self._step, losses, strict=True) if not torch.isfinite(loss)]
        rows = [name for batch in bad or [batch for batch, _ in self._step] for names in batch.get("names", []) for name in names]
        raise RecipeError(
            f"Expected a finite {'loss' if bad else 'gradient'} at step {self.state.global_step + 1}, found none on the rows"
            f" {', '.join(rows[:32])}{' …' if len(rows) > 32 else ''}.",
            "Look at these rows with edgemed data check, or lower the learning rates.",
        )

    # ---- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.workspace.staging if self._staging else self.workspace.trainer)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if self.args.should_save:
            self.workspace.require_space(trained * BYTES_PER_TRAINED, "a checkpoint")
        self._staging = True
        try:
            with writing(self.workspace.staging / name, (SafetensorError, RuntimeError)):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    save_text(self.workspace.staging / name / CLOCK_NAME, json.dumps(self.clock.spent_s))
                    self.workspace.commit(name)
        finally:
            self._staging = False
            if self.args.should_save:
                self.workspace.discard()
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """What learns, in float32. What is frozen comes back from where training began; FSDP has a format of its own."""
        if not self.args.should_save or self.is_fsdp_enabled:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {n: p.detach().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(state, folder / WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.clock.restore(json.loads((folder / CLOCK_NAME).read_text()))
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        try:
            state = load_file(folder / WEIGHTS_NAME)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Expected weights in {folder / WEIGHTS_NAME}, found none ({error}).", "Remove this checkpoint."
            ) from error
        learning = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if state.keys() != learning.keys():
            name = min(state.keys() ^ learning.keys())
            raise CheckpointError(f"Expected the parameters that learn in {folder}, found a difference at {name}.", "Train again.")
        with torch.no_grad():
            for key, parameter in learning.items():
                parameter.copy_(state[key])


def split(batch: Batch, pieces: int, image_id: int) -> Iterator[Batch]:
    """The batch's rows in up to `pieces` batches, each with its own images."""
    ids = batch["input_ids"]
    rows = ids.shape[0]
    if pieces == 1 or rows == 1:
        yield batch
        return
    images = [0, *(ids == image_id).any(1).long().cumsum(0).tolist()]
    bounds = sorted({rows * i // min(pieces, rows) for i in range(min(pieces, rows) + 1)})
    for start, stop in zip(bounds, bounds[1:], strict=False):
        piece = {k: v if k == "first" else v[start:stop] for k, v in batch.items() if k not in PER_IMAGE}
        yield piece | take_images(batch, images[start], images[stop])


# What CUDA's libraries say where they found no memory for a workspace of their own; the second says so for other faults, too.
_LIBRARIES = ("ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR", "CUBLAS_STATUS_NOT_INITIALIZED")
_WORKSPACE_BYTES = 512 << 20


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return True
    full = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < _WORKSPACE_BYTES
    return full and any(name in str(error) for name in _LIBRARIES)


def _load_pieces(workspace: Workspace) -> int:
    path = workspace.trainer / PIECES_NAME
    return int(json.loads(path.read_text())) if path.is_file() else 1
