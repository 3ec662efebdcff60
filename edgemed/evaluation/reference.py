"""The same questions through transformers: what the converted artifact is compared with, and how a checkpoint is scored on a GPU.

    edgemed eval --reference CHECKPOINT --dataset slake=PATH
    python -m edgemed.evaluation.reference CHECKPOINT --dataset slake=PATH --split validate [--blank]

Reads a folder that `edgemed finetune` wrote (with `edgemed.json`). Greedy, batched, bf16 on a GPU and fp32 on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.core.contract import CONTRACT_NAME, checkpoint_errors, count_image_tokens, load_contract, require_llava
from edgemed.core.conversation import clean_answer, render, split_chunks
from edgemed.core.errors import CheckpointError
from edgemed.core.images import normalise, prepare
from edgemed.data import Sample, load_samples
from edgemed.evaluation.looks import View, show
from edgemed.evaluation.metrics import score
from edgemed.evaluation.targets import MAX_TOKENS, Reply


class Reference:
    """A checkpoint in transformers with its own preparation and template."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoTokenizer, LlavaForConditionalGeneration

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        contract = load_contract(folder)
        if contract is None:
            raise CheckpointError(f"Expected {CONTRACT_NAME} in {folder}, found none.", "Name a checkpoint that `edgemed finetune` wrote.")
        self.image, self.template = contract.image, contract.template
        require_llava(folder)
        with checkpoint_errors(folder):
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(self.device).eval()
        if self.template.bos and self.tokenizer.bos_token_id is None:
            raise CheckpointError(f"Expected a BOS token in the tokenizer of {folder}, found none.", "Copy the checkpoint again.")
        config = self.model.config
        tower = config.vision_config
        self.image_tokens = count_image_tokens(tower.image_size, tower.patch_size, tower.model_type, config.vision_feature_select_strategy)

    def prompt(self, sample: Sample) -> list[int]:
        """Token ids up to where the answer begins."""
        ids: list[int] = [self.tokenizer.bos_token_id] if self.template.bos else []
        for chunk in split_chunks(render(self.template, sample.turns[:-1])):
            if isinstance(chunk, tuple):
                ids += self.tokenizer("".join(text.text for text in chunk), add_special_tokens=False)["input_ids"]
            else:
                ids += [self.model.config.image_token_id] * self.image_tokens
        return ids

    def answers(self, samples: Sequence[Sample], blank: bool = False, batch_size: int = 128, max_tokens: int = 24) -> Iterator[str]:
        """Greedy answers, in order. `blank` replaces every image by the padding colour."""
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            shown = [self.pixels(show(s.image, "blank" if blank else "shown")) if s.image else None for s in part]
            yield from self.batch(part, shown, max_tokens)

    def batch(self, samples: Sequence[Sample], pixels: Sequence[Any], max_tokens: int) -> list[str]:
        """Greedy answers of one padded batch; `pixels` are prepared images, uint8 [size, size, 3], None for a sample without one."""
        torch = self.torch
        prompts = [self.prompt(s) for s in samples]
        length = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        images = [normalise(p, self.image) for p in pixels if p is not None]
        shown = {"pixel_values": torch.from_numpy(np.stack(images)).to(self.device, self.model.dtype)} if images else {}
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            **shown,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=self._end_ids(),
            pad_token_id=pad,
        )
        texts = self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=False)
        return [clean_answer(self.template, t) for t in texts]

    def pixels(self, picture: Any) -> Any:
        """A picture as the tower is to see it, uint8 [size, size, 3]; None is the padding colour."""
        if picture is None:
            return np.broadcast_to(np.array(self.image.pad_colour, np.uint8), (self.image.size_px, self.image.size_px, 3))
        return prepare(picture, self.image)

    def _end_ids(self) -> list[int]:
        stops = [self.tokenizer.convert_tokens_to_ids(s) for s in self.template.stop]
        return [i for i in {self.tokenizer.eos_token_id, *stops} if isinstance(i, int)]


class ReferenceTarget:
    """A checkpoint as the runner asks it: the questions about one image in one batch."""

    parallel = 1

    def __init__(self, folder: Path, max_tokens: int = MAX_TOKENS) -> None:
        self._reference, self._max_tokens = Reference(folder), max_tokens
        self.name = f"{folder.resolve().name}-transformers"
        weights = sorted((p.name, p.stat().st_size) for p in folder.glob("*.safetensors"))
        self.identity = hashlib.sha256(repr((self.name, weights, max_tokens, self._reference.device)).encode()).hexdigest()

    def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
        """Answers in order. Raises ImageError."""
        start = time.monotonic()
        path = samples[0].image
        pixels = self._reference.pixels(show(path, view, donor)) if path else None
        texts = self._reference.batch(samples, [pixels] * len(samples), self._max_tokens)
        elapsed_s = (time.monotonic() - start) / len(samples)
        return [Reply(text, elapsed_s=elapsed_s) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dataset", required=True, help="NAME=PATH")
    parser.add_argument("--split", default="validate")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--blank", action="store_true")
    args = parser.parse_args()
    name, _, path = args.dataset.partition("=")
    samples = load_samples(name, Path(path), args.split)[: args.limit]
    answers = list(Reference(args.checkpoint).answers(samples, args.blank))
    scores = score((s.answer_type, a, s.answer) for s, a in zip(samples, answers, strict=True))
    print(json.dumps({"checkpoint": args.checkpoint.name, "dataset": name, "split": args.split, "blank": args.blank, **asdict(scores)}))


if __name__ == "__main__":
    main()
