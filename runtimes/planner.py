"""Which settings a model is loaded with on a device: the best that fit, and why, in plain sentences.

    plan = make_plan(shape, target, Wish(users=2), tensor_bytes)      # raises ResourceError where nothing fits
    plan.settings, plan.reasons, plan.estimate
    for plan in list_plans(shape, target, wish, tensor_bytes): ...    # and what to try next if loading fails all the same

Begins with what suits the device and gives up one thing after another, the cheapest first, until the estimate fits; what a person
asked for is never given up. Loads nothing: the device need not be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from edgemed.core.errors import InputError, ResourceError
from edgemed.core.units import format_bytes
from runtimes.dense import BATCH_TOKENS, MICRO_BATCH
from runtimes.devices import Profile
from runtimes.estimate import Estimate, Host, TensorBytes, estimate_memory
from runtimes.graph import CPU, GPU
from runtimes.messages import EngineSettings
from runtimes.shape import PairShape, tower_flash_attention

# Kept for question and answer beside an image where the context shrinks.
LEAST_TEXT_TOKENS = 256
MICRO_BATCHES = (512, 256, 128)
MOST_USERS = 256
KvType = Literal["f16", "q8_0"]
_BUILD = "A first token would come sooner on such a GPU after: python -m runtimes.dense"


@dataclass(frozen=True)
class Wish:
    """What a person asks for; None leaves the choice to the plan. `context_tokens` is one conversation's."""

    users: int = 1
    context_tokens: int | None = None
    kv_type: KvType | None = None
    micro_batch: int | None = None
    gpu_layers: int | None = None
    tower: Literal["gpu", "cpu"] | None = None
    # Room that the questions at hand need, where no context is asked for.
    least_context_tokens: int = 0


@dataclass(frozen=True)
class Target:
    """A device with what it can give. Budgets in bytes; None: not known, and not checked. Unified: one budget, for both."""

    profile: Profile
    host: Host
    gpu_bytes: int | None
    cpu_bytes: int | None

    def lacks(self, estimate: Estimate) -> tuple[int, int, str] | None:
        """(needed, there, of what) of the budget that is broken, or None where all are kept."""
        gpu, cpu = estimate.dynamic_bytes(GPU), estimate.dynamic_bytes(CPU)
        own, main = f"the memory of {self.profile.title}", "main memory"
        checks = [(gpu + cpu, self.gpu_bytes, own)] if self.profile.unified else [(gpu, self.gpu_bytes, own), (cpu, self.cpu_bytes, main)]
        return next(((need, there, of) for need, there, of in checks if there is not None and need > there), None)


@dataclass(frozen=True)
class Plan:
    """Settings that fit, what they take, and why they were chosen."""

    target: Target
    settings: EngineSettings
    estimate: Estimate
    reasons: tuple[str, ...]
    # What was given up last, or how it begins.
    step: str = ""


@dataclass(frozen=True)
class _Step:
    """A way to need less, and what is said about it."""

    settings: EngineSettings
    said: str


def make_plan(shape: PairShape, target: Target, wish: Wish, tensor_bytes: TensorBytes) -> Plan:
    """The best that fits. Raises InputError for a wish that no device can meet, ResourceError where nothing fits."""
    return next(list_plans(shape, target, wish, tensor_bytes))


def list_plans(shape: PairShape, target: Target, wish: Wish, tensor_bytes: TensorBytes) -> Iterator[Plan]:
    """All that fit, the best first, each needing less than the one before. Raises as make_plan does, at the first."""
    _check(shape, wish)

    @cache
    def estimate(settings: EngineSettings) -> Estimate:
        return estimate_memory(shape, settings, target.host, tensor_bytes)

    steps: list[_Step] = []
    reasons: list[str] = []  # why each step down was taken
    fitted = False
    advice: list[str] = []
    for step in _ladder(shape, target, wish, estimate):
        reasons += [_because(step.said, target, estimate(steps[-1].settings))] if steps else []
        steps.append(step)
        found = estimate(step.settings)
        advice = [_BUILD] if len(steps) == 1 and _would_gain(step.settings, shape, target, wish, estimate) else []
        if target.lacks(found) is None:
            fitted = True
            said = (steps[0].said, *reasons, *_choices(step.settings, shape), *advice, _summary(target, found))
            yield Plan(target, step.settings, found, said, step.said)
    if not fitted:
        raise _nothing_fits(shape, target, wish, steps, estimate)


def _check(shape: PairShape, wish: Wish) -> None:
    most = shape.llm.context_length
    if not 1 <= wish.users <= MOST_USERS:
        raise InputError(f"Expected 1 to {MOST_USERS} users, found {wish.users}.", "Ask for fewer with --users.")
    if wish.context_tokens is not None and not shape.image_tokens < wish.context_tokens <= most:
        expected = f"more than {shape.image_tokens} tokens (an image) and at most {most}"
        raise InputError(f"Expected a context of {expected} for {shape.name}, found {wish.context_tokens}.", "Change --context.")
    if wish.kv_type == "q8_0" and not _can_quantise(shape):
        raise InputError(
            f"Expected heads of whole blocks of 32 for a cache in q8_0, found {shape.llm.head_dim} in {shape.name}.", "Use --kv f16."
        )


def _can_quantise(shape: PairShape) -> bool:
    return shape.llm.head_dim % 32 == 0


# -- the ladder -------------------------------------------------------------------------------------------------------


def _ladder(shape: PairShape, target: Target, wish: Wish, estimate: Callable[[EngineSettings], Estimate]) -> Iterator[_Step]:
    """From what suits the device down to the least; each step keeps the ones before it."""
    suited, gpu = target.profile.settings, target.host.gpu
    context = min(wish.context_tokens or max(suited.context_tokens, wish.least_context_tokens), shape.llm.context_length)
    settings = EngineSettings(
        context_tokens=context,
        slots=wish.users,
        micro_batch=wish.micro_batch or suited.micro_batch,
        batch_tokens=max(512, wish.micro_batch or suited.micro_batch, wish.users),
        kv_type=wish.kv_type or suited.kv_type,
        gpu_layers=(-1 if wish.gpu_layers is None else wish.gpu_layers) if gpu else 0,
        tower=wish.tower or ("gpu" if gpu else "cpu"),
        flash_attention="on",
        vision_flash_attention=suited.vision_flash_attention,
    )
    beginning = _beginning(settings, shape, target, wish)
    if target.host.dense == "built" and shape.suits_dense_prompts and settings.gpu_layers < 0:
        yield _Step(_with_dense_prompts(settings, wish), beginning)
        yield _Step(settings, "Long prompts are multiplied with the weights as they are, which takes longer on such a GPU")
    else:
        yield _Step(settings, beginning)
    if wish.micro_batch is None:
        for size in MICRO_BATCHES:
            if size < settings.micro_batch:
                settings = replace(settings, micro_batch=size)
                yield _Step(settings, f"The micro-batch is {size} tokens, which fills prompts in more slowly")
    if wish.kv_type is None and settings.kv_type == "f16" and _can_quantise(shape):
        settings = replace(settings, kv_type="q8_0")
        yield _Step(settings, "The key-value cache is kept in q8_0, half of f16 at hardly any loss")
    if gpu:
        for step in _off_the_gpu(settings, shape, target, wish, estimate):
            settings = step.settings
            yield step
    else:
        settings = replace(settings, repack=False)
        yield _Step(settings, "Weights are not repacked for speed, which saves their second copy")
    if wish.context_tokens is None:
        least = max(shape.image_tokens + LEAST_TEXT_TOKENS, wish.least_context_tokens)
        while settings.context_tokens // 2 >= least:
            settings = replace(settings, context_tokens=settings.context_tokens // 2)
            yield _Step(settings, f"A conversation has {settings.context_tokens} tokens")


def _with_dense_prompts(settings: EngineSettings, wish: Wish) -> EngineSettings:
    micro_batch = wish.micro_batch or max(MICRO_BATCH, settings.micro_batch)
    return replace(settings, dense_prompts=True, micro_batch=micro_batch, batch_tokens=max(BATCH_TOKENS, settings.batch_tokens))


def _off_the_gpu(
    settings: EngineSettings, shape: PairShape, target: Target, wish: Wish, estimate: Callable[[EngineSettings], Estimate]
) -> Iterator[_Step]:
    """The tower's attention, the tower, then as many layers as must."""
    if not tower_flash_attention(settings.vision_flash_attention, shape.tower.head_dim, settings.tower == "gpu"):
        settings = replace(settings, vision_flash_attention="on")
        yield _Step(settings, "The tower computes attention in tiles (flash attention), which needs less room")
    if target.profile.unified:
        return  # what leaves the GPU stays in the same memory
    if wish.tower is None:
        settings = replace(settings, tower="cpu")
        yield _Step(settings, "The vision tower is computed by the CPU, so that an image takes longer")
    if wish.gpu_layers is None:
        fitting = _most_layers(settings, shape, target, estimate)
        for layers in sorted({fitting, fitting // 2, 0}, reverse=True):
            settings = replace(settings, gpu_layers=layers)
            yield _Step(settings, f"{layers} of {shape.llm.layers + 1} layers are on the GPU, the rest on the CPU, which is slower")


def _most_layers(settings: EngineSettings, shape: PairShape, target: Target, estimate: Callable[[EngineSettings], Estimate]) -> int:
    """The largest number of layers whose part of the GPU fits, by halving."""
    fits, too_many = 0, shape.llm.layers + 1
    while too_many - fits > 1:
        layers = (fits + too_many) // 2
        if target.gpu_bytes is None or estimate(replace(settings, gpu_layers=layers)).dynamic_bytes(GPU) <= target.gpu_bytes:
            fits = layers
        else:
            too_many = layers
    return fits


# -- words ------------------------------------------------------------------------------------------------------------


def _beginning(settings: EngineSettings, shape: PairShape, target: Target, wish: Wish) -> str:
    asked = "as asked" if wish.context_tokens is not None else "as suits the device"
    if settings.context_tokens == shape.llm.context_length and wish.context_tokens is None:
        asked = "all that the model was trained on"
    room = settings.context_tokens - shape.image_tokens
    users = "1 user" if settings.slots == 1 else f"{settings.slots} users at once"
    return (
        f"{target.profile.title}: {users} with {settings.context_tokens} tokens each, {asked}: "
        f"an image takes {shape.image_tokens}, which leaves {room} for text."
    )


def _would_gain(
    settings: EngineSettings, shape: PairShape, target: Target, wish: Wish, estimate: Callable[[EngineSettings], Estimate]
) -> bool:
    """Whether dense prompts would be planned if their library were built."""
    possible = target.host.dense == "not built" and shape.suits_dense_prompts and settings.gpu_layers < 0
    return possible and target.lacks(estimate(_with_dense_prompts(settings, wish))) is None


def _choices(settings: EngineSettings, shape: PairShape) -> Iterator[str]:
    yield (
        f"So: a cache in {settings.kv_type} for {settings.slots} × {settings.context_tokens} tokens, micro-batches of "
        f"{settings.micro_batch}, {_layers(settings, shape)}, the vision tower on the {str(settings.tower).upper()}."
    )
    yield "Flash attention is on: without it the compute buffer grows with context times micro-batch."
    if settings.dense_prompts:
        yield "Long prompts are multiplied as dense BF16 matrices, which is quicker on such a GPU."


def _layers(settings: EngineSettings, shape: PairShape) -> str:
    if settings.gpu_layers == 0:
        return "all layers on the CPU"
    if settings.gpu_layers < 0 or settings.gpu_layers > shape.llm.layers:
        return "all layers on the GPU"
    return f"{settings.gpu_layers} of {shape.llm.layers + 1} layers on the GPU"


def _because(said: str, target: Target, previous: Estimate) -> str:
    lack = target.lacks(previous)
    if lack is None:
        return f"{said}."
    need, there, of = lack
    return f"{said}: before that, {format_bytes(need)} of {of} were needed, and {format_bytes(there)} are there."


def _summary(target: Target, estimate: Estimate) -> str:
    gpu, cpu = estimate.dynamic_bytes(GPU), estimate.dynamic_bytes(CPU)
    if target.profile.unified:
        return f"At its peak it takes {format_bytes(gpu + cpu)} of {_of(target.gpu_bytes)}, which CPU and GPU share."
    parts = [f"{format_bytes(gpu)} of {_of(target.gpu_bytes)} on the GPU"] if gpu else []
    parts.append(f"{format_bytes(cpu)} of {_of(target.cpu_bytes)} in main memory")
    return f"At its peak it takes {' and '.join(parts)}."


def _of(budget: int | None) -> str:
    return "an unknown amount" if budget is None else f"the {format_bytes(budget)} that can be had"


def _nothing_fits(
    shape: PairShape, target: Target, wish: Wish, steps: list[_Step], estimate: Callable[[EngineSettings], Estimate]
) -> ResourceError:
    """The least that would be needed, and what to change."""
    lacks = [(lack, step) for step in steps if (lack := target.lacks(estimate(step.settings))) is not None]
    (need, there, where), step = min(lacks, key=lambda found: found[0][0] - found[0][1])
    message = (
        f"Expected at least {format_bytes(need)} of {where} for {shape.name} with {wish.users} × {step.settings.context_tokens} tokens, "
        f"found {format_bytes(there)}."
    )
    return ResourceError(message, _advice(shape, target, wish, step.settings, estimate))


def _advice(shape: PairShape, target: Target, wish: Wish, settings: EngineSettings, estimate: Callable[[EngineSettings], Estimate]) -> str:
    """What would help, tried by estimate: fewer users, a smaller context, fewer bits, another device."""
    found: list[str] = []
    users = wish.users
    while users > 1 and target.lacks(estimate(replace(settings, slots=users))) is not None:
        users //= 2
    if users < wish.users and target.lacks(estimate(replace(settings, slots=users))) is None:
        found.append(f"use --users {users}")
    least = shape.image_tokens + LEAST_TEXT_TOKENS
    if wish.context_tokens is not None and least < wish.context_tokens:
        if target.lacks(estimate(replace(settings, context_tokens=least))) is None:
            found.append(f"use a smaller --context, down to {least}")
    bits = 8 * shape.llm.weight_bytes / max(1, sum(_values(t.shape) for t in shape.llm.tensors.values()))
    if bits > 6:
        found.append("convert the model again with --bits 4")
    found.append("choose --device cpu" if target.host.gpu else "close other programs or use a smaller model")
    text = ", or ".join(found) + "."
    return text[0].upper() + text[1:]


def _values(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
