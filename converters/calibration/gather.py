"""What flows into every linear layer while medical questions are answered, and how much each value matters to the answer.

    calibration = gather(checkpoint, samples, record, progress=…)
    calibration.moments["blk.0.attn_q.weight"].covariance          # float32 [inputs, inputs]

A rounding error ΔW changes a layer's output at token t by ΔW·x_t, and the divergence of the answers' distribution by about
½ Σ_t (g_tᵀ ΔW x_t)², where g_t is the gradient of the log-probability of answer tokens that the model itself drew (Fisher's
information). So x is summed as Σ_t |g_t|² x_t x_tᵀ: 256 image tokens weigh what they move in the answer, not what they number.
The reference answer is read along (teacher forcing); its tokens' positions are where divergence counts. Needs the `train` extra.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.calibration.moments import Calibration, Moments
from converters.calibration.reference import Reference, build_reference
from converters.calibration.tokens import IMAGE, build_encoder, encode_turns
from converters.checkpoint import Checkpoint
from edgemed.core.errors import CheckpointError, DatasetError
from edgemed.core.images import load_image, normalise, prepare
from edgemed.core.manifest import CalibrationRecord
from edgemed.data import Sample, hash_samples

# Questions about one image that share a copy of it, and the tokens that such a sequence may have.
PACK, MAX_TOKENS = 8, 1536
# Wider inputs keep their mean squares only: a covariance of 8192² floats takes 256 MiB.
MAX_COVARIANCE = 6144
SAMPLES = 256
SEED = 0

# Called with (questions done, questions to do).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pack:
    """Questions about one image behind one copy of it. `tails` are (ids, whether part of an answer); positions follow `head`."""

    image: Path | None
    head: tuple[int, ...]
    tails: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]


def draw_samples(samples: Sequence[Sample], count: int = SAMPLES) -> list[Sample]:
    """About `count` samples (at most), the same every time: images in a drawn order, up to PACK questions of each."""
    by_image: dict[Path | None, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    draw = random.Random(SEED)
    groups = list(by_image.values())
    draw.shuffle(groups)
    drawn: list[Sample] = []
    while groups and len(drawn) < count:
        rest = []
        for group in groups:
            draw.shuffle(group)
            drawn += group[:PACK]
            rest += [group[PACK:]] if len(group) > PACK else []
        groups = rest
    return drawn[:count]


def pack_samples(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[Pack]:
    """Samples as token ids, those of one image and one beginning together. Raises DatasetError where none fits."""
    encode = build_encoder(checkpoint.tokenizer)
    limit = min(MAX_TOKENS, checkpoint.llm.context_length)
    heads: dict[tuple[Path | None, tuple[int, ...]], list[Any]] = {}
    for sample in samples:
        ids, answers = encode_turns(encode, checkpoint, sample.turns)
        shared = len(ids) - ids[::-1].index(IMAGE) if IMAGE in ids else 0
        if len(ids) + checkpoint.tower.image_tokens <= limit and any(answers[max(shared, 1) :]):
            heads.setdefault((sample.image, tuple(ids[:shared])), []).append((tuple(ids[shared:]), tuple(answers[shared:])))
    packs = [Pack(image, head, tuple(part)) for (image, head), tails in heads.items() for part in _split(head, tails, checkpoint, limit)]
    if not packs:
        raise DatasetError(f"Expected questions of at most {limit} tokens, found none among {len(samples)}.", "Choose another data set.")
    return packs


def _split(head: tuple[int, ...], tails: list[Any], checkpoint: Checkpoint, limit: int) -> Iterator[list[Any]]:
    """Tails in lots that fit a sequence; without a shared head each is alone."""
    if not head:
        yield from ([tail] for tail in tails)
        return
    used = len(head) + checkpoint.tower.image_tokens
    lot: list[Any] = []
    length = used
    for tail in tails:
        if lot and (len(lot) == PACK or length + len(tail[0]) > limit):
            yield lot
            lot, length = [], used
        lot.append(tail)
        length += len(tail[0])
    yield lot


@dataclass(frozen=True)
class Batch:
    """A pack as tensors: ids [tokens] with IMAGE for every row of the image, mask, positions, and where answers are predicted."""

    ids: Any
    mask: Any
    positions: Any
    keep: Any
    # What the reference answer has there.
    targets: Any


def build_batch(pack: Pack, image_tokens: int) -> Batch:
    """The sequence of a pack: each question sees the head and itself only."""
    import torch

    head = [i for token in pack.head for i in ([IMAGE] * image_tokens if token == IMAGE else [token])]
    ids, question, positions, keep, targets = list(head), [0] * len(head), list(range(len(head))), [], []
    for number, (tail, answers) in enumerate(pack.tails, start=1):
        start = len(ids)
        for i, (token, answer) in enumerate(zip(tail, answers, strict=True)):
            if answer and (i or head):
                keep.append(start + i - 1 if i else len(head) - 1)
                targets.append(token)
        ids += tail
        question += [number] * len(tail)
        positions += range(len(head), len(head) + len(tail))
    q = torch.tensor(question)
    mask = torch.tril((q[:, None] == q[None, :]) | (q == 0)[None, :])
    return Batch(torch.tensor(ids), mask[None, None], torch.tensor([positions]), torch.tensor(keep), torch.tensor(targets))


def load_values(pack: Pack, checkpoint: Checkpoint) -> Any:
    """The pack's image, normalised, [1, 3, S, S], or None. Raises ImageError."""
    import torch

    if pack.image is None:
        return None
    return torch.from_numpy(normalise(prepare(load_image(pack.image), checkpoint.image), checkpoint.image)[None])


def run_pack(reference: Reference, batch: Batch, values: Any, embeds: Any = None) -> Any:
    """Logits [len(keep), vocab] of a batch; `embeds` are its tokens' rows where the caller made them."""
    import torch

    text = reference.embed(batch.ids.clamp_min(0)) if embeds is None else embeds
    if values is not None:
        rows = reference.image_rows(values)[0]
        text = torch.index_put(text, ((batch.ids == IMAGE).nonzero()[:, 0],), rows)
    return reference.logits(text[None], batch.keep, batch.mask, batch.positions)[0]


class _Sums:
    """Hooks on every linear layer that add up its moments."""

    def __init__(self, reference: Reference) -> None:
        self.moments: dict[str, Moments] = {}
        self.handles = []
        for name, module in reference.modules.items():
            if name != "token_embd.weight":
                self.handles.append(module.register_forward_hook(self._hook(name)))
        if "output.weight" not in reference.modules:  # tied: the embedding is the output matrix, too
            self.handles.append(reference.llm.get_output_embeddings().register_forward_hook(self._hook("token_embd.weight")))

    def _hook(self, name: str) -> Callable[[Any, Any, Any], None]:
        def forward(module: Any, inputs: Any, output: Any) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda gradient: self._add(name, x, gradient.flatten(0, -2)))

        return forward

    def _add(self, name: str, x: Any, g: Any) -> None:
        import torch

        squares = g.square()
        weighted = squares.sum(1, keepdim=True).sqrt() * x
        wide = x.shape[1] > MAX_COVARIANCE
        sums = self.moments.get(name)
        if sums is None:
            size = x.shape[1]
            sums = self.moments[name] = Moments(np.zeros(size if wide else (size, size), np.float32), np.zeros(g.shape[1], np.float32))
        covariance = torch.from_numpy(sums.covariance)
        if wide:
            covariance += weighted.square().sum(0)
        else:
            covariance.addmm_(weighted.T, weighted)
        sums.outputs += squares.sum(0).numpy()

    def add_embedding(self, ids: Any, gradient: Any, vocab: int) -> None:
        """The input side of the embedding: `gradient` at the rows of `ids`."""
        sums = self.moments.get("token_embd.weight")
        width = gradient.shape[1]
        if sums is None:
            sums = self.moments["token_embd.weight"] = Moments(np.zeros(width, np.float32), np.zeros(vocab, np.float32))
        if sums.columns is None or sums.rows is None:
            sums.columns, sums.rows = np.zeros(width, np.float32), np.zeros(vocab, np.float32)
        sums.columns += gradient.square().sum(0).numpy()
        np.add.at(sums.rows, ids.numpy(), gradient.square().sum(1).numpy())

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def gather(
    checkpoint: Checkpoint, samples: Sequence[Sample], dataset: str, split: str, progress: Progress | None = None, reference: Any = None
) -> Calibration:
    """Run the samples through the checkpoint in transformers. Raises MissingExtraError, DatasetError, ImageError."""
    begun = time.monotonic()
    reference = reference or build_reference(checkpoint)
    packs = pack_samples(checkpoint, samples)
    total = sum(len(pack.tails) for pack in packs)
    sums = _Sums(reference)
    done = positions = 0
    try:
        for pack in packs:
            positions += _add_pack(checkpoint, reference, sums, pack, seed=done)
            done += len(pack.tails)
            if progress:
                progress(done, total)
    finally:
        sums.close()
    record = CalibrationRecord(
        dataset=dataset,
        split=split,
        samples=total,
        samples_sha256=hash_samples(samples),
        positions=positions,
        elapsed_s=round(time.monotonic() - begun, 3),
    )
    return Calibration(sums.moments, record)


def _add_pack(checkpoint: Checkpoint, reference: Reference, sums: _Sums, pack: Pack, seed: int) -> int:
    """Add one pack's moments; returns its answer positions."""
    import torch

    batch = build_batch(pack, checkpoint.tower.image_tokens)
    values = load_values(pack, checkpoint)
    embeds = reference.embed(batch.ids.clamp_min(0)).requires_grad_(True)
    if values is not None:
        values.requires_grad_(True)  # so that gradients reach the tower's layers
    with torch.enable_grad():
        logits = run_pack(reference, batch, values, embeds)
        if not logits.isfinite().all():
            raise CheckpointError(
                f"Expected finite logits from {checkpoint.path} on training questions, found others.", "Use an undamaged checkpoint."
            )
        # Fisher's information asks for tokens drawn from the model, not for the right ones; the draw is the same each time.
        generator = torch.Generator().manual_seed(SEED + seed)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        logits.log_softmax(-1).gather(1, drawn).sum().backward()
    text = batch.ids != IMAGE
    sums.add_embedding(batch.ids[text], embeds.grad[text], checkpoint.llm.vocab_size)
    return len(batch.keep)
