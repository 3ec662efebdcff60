"""What the layouts say about images and conversations: ImagePreparation and ConversationTemplate.

Behaviour comes from preprocessor_config.json, `image_aspect_ratio` and tables by architecture; a person's choice goes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from pydantic import ValidationError

from converters.checkpoint import TokenizerSpec, TowerSpec
from edgemed.core.conversation import TEMPLATES, ConversationTemplate, find_template, to_jinja
from edgemed.core.errors import CheckpointError, InputError, UnsupportedError
from edgemed.core.images import ImagePreparation, Mode

Three = tuple[float, float, float]
# Published processors' normalisation, where no preprocessor_config.json says otherwise.
_MEAN: dict[str, Three] = {"clip": (0.48145466, 0.4578275, 0.40821073), "siglip": (0.5, 0.5, 0.5)}
_STD: dict[str, Three] = {"clip": (0.26862954, 0.26130258, 0.27577711), "siglip": (0.5, 0.5, 0.5)}
_BICUBIC = 3


def build_preparation(
    tower: TowerSpec, preprocessor: Mapping[str, Any], aspect: str | None, image_mode: str | None
) -> tuple[ImagePreparation, tuple[str, ...]]:
    """The preparation, and sentences on what differs from the source's.

    aspect: the layout's `image_aspect_ratio` ("pad", or "square" or nothing for the processor alone).
    image_mode: a person's choice of pad, stretch or crop.
    """
    if image_mode is not None and image_mode not in get_args(Mode):
        raise InputError(f"Expected an image mode out of {', '.join(get_args(Mode))}, found '{image_mode}'.", "Pass one of them.")
    mean, std = _three(preprocessor, "image_mean", _MEAN[tower.kind]), _three(preprocessor, "image_std", _STD[tower.kind])
    own, notes = _own_mode(tower, preprocessor)
    if aspect not in (None, "pad", "square"):
        raise UnsupportedError(
            f"Expected an image aspect of pad or square, found '{aspect}'.", "Models that cut images into tiles do not convert."
        )
    mode = cast(Mode, image_mode or ("pad" if aspect == "pad" else own))
    # int(), not round(): LLaVA's tuple(int(x * 255) for x in image_mean)
    colour = tuple(min(255, max(0, int(value * 255))) for value in mean)
    facts = {"size_px": tower.image_size_px, "mode": mode, "pad_colour": colour, "mean": mean, "std": std}
    try:
        return ImagePreparation.model_validate(facts), notes
    except ValidationError as error:
        where, what = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise CheckpointError(
            f"Expected a usable image preparation, found {where}: {what}.", "Check preprocessor_config.json and config.json."
        ) from error


def _three(preprocessor: Mapping[str, Any], key: str, default: Three) -> Three:
    value = preprocessor.get(key) or default
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(_is_number(v) for v in value):
        raise CheckpointError(f"Expected three numbers for {key} in preprocessor_config.json, found {value!r}.", "Check the file.")
    return float(value[0]), float(value[1]), float(value[2])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _own_mode(tower: TowerSpec, preprocessor: Mapping[str, Any]) -> tuple[Mode, tuple[str, ...]]:
    notes = []
    if preprocessor.get("resample", _BICUBIC) != _BICUBIC:
        notes.append(f"The source resizes with filter {preprocessor['resample']}; images are resized bicubically here.")
    if preprocessor.get("do_pad"):
        return "pad", tuple(notes)
    size = preprocessor.get("size")
    short = size.get("shortest_edge") if isinstance(size, dict) else size
    if tower.kind == "siglip" or (isinstance(size, dict) and short is None) or preprocessor.get("do_center_crop") is False:
        return "stretch", tuple(notes)
    if isinstance(short, int) and short != tower.image_size_px:
        notes.append(f"The source resizes the short edge to {short} px before cropping; here it becomes {tower.image_size_px} px.")
    return "crop", tuple(notes)


def choose_template(
    asked: str | None, jinja: str | None, default: str | None, tokenizer: TokenizerSpec
) -> tuple[ConversationTemplate, tuple[str, ...]]:
    """A person's choice, else the known template that the source carries as Jinja, else the layout's own.

    Its BOS goes where the tokenizer adds none (v1 with Qwen2 or StableLM): training code leaves that to the tokenizer.
    """
    template, notes = _choose_template(asked, jinja, default)
    return (template if tokenizer.add_bos else template.model_copy(update={"bos": False})), notes


def _choose_template(asked: str | None, jinja: str | None, default: str | None) -> tuple[ConversationTemplate, tuple[str, ...]]:
    if asked is not None:
        return find_template(asked), ()
    for template in TEMPLATES.values():
        if jinja is not None and jinja == to_jinja(template):
            return template, ()
    if default is None:
        raise InputError(
            "Expected a conversation template for this source, found none that is known.", f"Name one of: {', '.join(TEMPLATES)}."
        )
    return TEMPLATES[default], (f"The conversation template '{default}' was taken by the checkpoint's layout; another can be named.",)
