"""A case's images as a person counts them: an image that was attached by itself, or a series, which is one thing of many files.

    for group in group_images(store.list_images(case_id)):
        shown = middle_of(group)
    for image in images_to_tell(images, messages): ...       # what a report lists

Knows neither store nor screen.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgemed.clinic.records import CaseImage, Message

Group = tuple[CaseImage, ...]


def group_images(images: Sequence[CaseImage]) -> list[Group]:
    """The images in groups, in the order in which the first of each came; the files of a series by their place."""
    groups: dict[str, list[CaseImage]] = {}
    for image in images:
        groups.setdefault(group_id(image), []).append(image)
    return [tuple(sorted(group, key=_place)) for group in groups.values()]


def group_id(image: CaseImage) -> str:
    """The same for all files of a series."""
    return image.facts.series.id if image.facts.series else image.id


def _place(image: CaseImage) -> int:
    return image.facts.series.place if image.facts.series else 0


def middle_of(group: Group) -> CaseImage:
    """The image that stands for a group: a series' ends show little."""
    return group[(len(group) - 1) // 2]


def images_to_tell(images: Sequence[CaseImage], messages: Sequence[Message]) -> list[CaseImage]:
    """What a report lists: single images, and of a series those that were asked about, or where none was, the one in its middle."""
    seen = {one.image_id for message in messages for one in message.images}
    out: list[CaseImage] = []
    for group in group_images(images):
        asked = [image for image in group if image.id in seen]
        out += list(group) if len(group) == 1 else asked or [middle_of(group)]
    return out
