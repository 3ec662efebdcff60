"""More questions about SLAKE's images, whose answers follow from those that are given.

    rows = derive(samples)                                # of one image: (question, answer) pairs
    python -m bench.demo_facts ../shared/data/slake       # how often such answers agree with given ones that were left out

A set of eleven questions an image says more than it asks: "Where is the liver? Left." also answers "Does the picture contain liver?",
and a list of the diseases in a picture answers for each disease whether it is there. The forms of questions are those of SLAKE's
training split. Knows no model.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from edgemed.data import Sample, load_named, parse_dataset

Pair = tuple[str, str]

ORGANS = frozenset(
    ["lung", "heart", "liver", "spleen", "kidney", "stomach", "colon", "rectum", "bladder", "esophagus", "trachea", "brain", "eyes"]
    + ["mandible", "larynx", "parotid", "duodenum", "small bowel", "large bowel", "spinal cord", "temporal lobe", "brain stem"]
)
_SAME = {"kidneys": "kidney", "lungs": "lung", "eye": "eyes", "brian": "brain", "temporal lobes": "temporal lobe"}
_CONTAINED = (
    r"does the picture contain (.+?)\?",
    r"does the (.+?) (?:appear|exist) in (?:the|this) (?:image|picture)\?",
    r"(?:is|are|are/is|is/are) there (.+?) in (?:the|this) (?:image|picture)\?",
)
_COUNTED = (r"how many (?:existing )?(.+?) (?:(?:are shown|are there|have existed|existed) )?in this image\?",)
_PLACED = (r"where is (?:the )?(.+?)(?: existing)?(?: in this image)?\?", r"which place does the (.+?) locate in this image\?")
_COLOURED = (r"what colou?r (?:is|are|does|do) (?:the )?(.+?)(?: show)? in the picture\?",)
_NAMED = (
    r"what is the main organ in the image\?",
    r"what is the (?:largest|leftmost|rightmost|center) organ.*",
    r"what is the organ (?:on|located).*",
    r"what organ is the .+ part .*",
    r"which organs/organ (?:is part of|in the picture belong to).*",
)
_ASKED_CONTAINED = ("Does the picture contain {}?", "Is there {} in this image?", "Does the {} appear in this image?")

_LISTED = re.compile(r"what diseases are included in the picture\?")
_LOCATED = re.compile(r"where (?:is/are|is|are) the abnormalit(?:y|ies)(?: located)?(?: in this (?:image|picture))?\?")
_REGION = re.compile(r"(?:(?:lower|upper) )?(?:left|right) lung")
_REGIONS = ("left lung", "right lung", "lower left lung", "lower right lung", "upper left lung", "upper right lung")
_CHEST = ("atelectasis", "pneumonia", "pneumothorax", "mass", "nodule", "effusion", "infiltration")
# Whose organ a disease is, by a word of its name.
_HOLDERS = {"lung": ("lung", "pulmonary", "pleural", *_CHEST), "heart": ("cardiomegaly",), "liver": ("liver",), "brain": ("brain",)}
_ASKED_HEALTH = (
    ("Is the {} healthy?", "No", "Yes"),
    ("Does the {} look abnormal?", "Yes", "No"),
    ("Is the {} abnormal?", "Yes", "No"),
    ("Does the {} look normal?", "No", "Yes"),
)
_ASKED_ANY = (("Are there abnormalities in this image?", "Yes", "No"), ("Does this image look normal?", "No", "Yes"))


def derive(samples: Sequence[Sample], draw: random.Random) -> list[Pair]:
    """Questions and answers that follow from those about one image."""
    return [*_about_organs(samples, draw), *_about_diseases(samples, draw)]


def organs_in(samples: Iterable[Sample]) -> dict[str, bool]:
    """Which organs are in the image and which are not, as far as the answers tell; those they contradict each other on are left out."""
    told: dict[str, set[bool]] = {}
    for sample in samples:
        for name, there in _presence(sample.question.lower().strip(), sample.answer.lower().strip()):
            told.setdefault(name, set()).add(there)
    return {name: there.pop() for name, there in told.items() if len(there) == 1}


def _presence(question: str, answer: str) -> Iterator[tuple[str, bool]]:
    if (name := _organ_in(_CONTAINED, question)) and answer in ("yes", "no"):
        yield name, answer == "yes"
    if (name := _organ_in(_COUNTED, question)) and answer.isdigit():
        yield name, answer != "0"
    if name := _organ_in(_PLACED, question):
        yield name, answer != "not seen"
    if name := _organ_in(_COLOURED, question):
        yield name, True
    if any(re.fullmatch(form, question) for form in _NAMED):
        yield from ((name, True) for part in answer.split(",") if (name := _organ(part)))


def _organ_in(forms: Sequence[str], question: str) -> str | None:
    found = next((m for form in forms if (m := re.fullmatch(form, question))), None)
    return _organ(found[1]) if found else None


def _organ(text: str) -> str | None:
    name = re.sub(r"^(?:an? |the )?(?:left |right )?", "", text.strip().lower())
    name = _SAME.get(name, name)
    return name if name in ORGANS else None


def _about_organs(samples: Sequence[Sample], draw: random.Random) -> Iterator[Pair]:
    for name, there in organs_in(samples).items():
        # Each in SLAKE's usual form and in one of the others.
        for form in (_ASKED_CONTAINED[0], draw.choice(_ASKED_CONTAINED[1:])):
            yield form.format(name), "Yes" if there else "No"
        if not there and name in ("kidney", "lung"):
            yield f"How many {name}s in this image?", "0"


def diseases_in(samples: Iterable[Sample]) -> frozenset[str] | None:
    """The diseases in the image, in small letters; None where no answer lists them."""
    lists = {s.answer.lower() for s in samples if _LISTED.fullmatch(s.question.lower().strip())}
    if len(lists) != 1:
        return None
    return frozenset(part.strip() for part in lists.pop().split(",")) - {"none", ""}


def _about_diseases(samples: Sequence[Sample], draw: random.Random) -> Iterator[Pair]:
    listed = diseases_in(samples)
    if listed is None:
        return
    for form, ill, well in _ASKED_ANY:
        yield form, ill if listed else well
    hurt = {organ for organ, words in _HOLDERS.items() if any(word in disease for disease in listed for word in words)}
    there = {name for name, seen in organs_in(samples).items() if seen} & _HOLDERS.keys()
    for organ in sorted(hurt | (there if not listed else set())):
        form, ill, well = draw.choice(_ASKED_HEALTH)
        yield form.format(organ), ill if organ in hurt else well
    if samples[0].modality != "X-Ray" or samples[0].organ.lower() != "lung":
        return
    if chest := hurt & {"lung", "heart"}:
        yield "Which organ is abnormal, heart or lung?", "Both" if len(chest) == 2 else chest.pop().capitalize()
    places = {s.answer.lower().strip() for s in samples if _LOCATED.fullmatch(s.question.lower().strip())}
    if not all(any(word in disease for words in _HOLDERS.values() for word in words) for disease in listed):
        return  # one that is not known, or misspelt, may be any of those below
    for disease in _CHEST:
        named = any(disease in name for name in listed)
        if not named:
            yield f"Can {disease} be observed on the {draw.choice(_REGIONS)} in this picture?", "No"
        elif len(listed) == 1 and len(places) == 1 and _REGION.fullmatch(place := next(iter(places))):
            yield f"Can {disease} be observed on the {place} in this picture?", "Yes"
            yield f"What disease is/are shown on the {place}?", next(iter(listed)).title()


def agreement(samples: Sequence[Sample]) -> dict[str, Counter[bool]]:
    """By form of question: of the answers that are given, how many follow from the image's others and are the same."""
    images: dict[Path | None, list[Sample]] = {}
    for sample in samples:
        images.setdefault(sample.image, []).append(sample)
    out: dict[str, Counter[bool]] = {}
    for group in images.values():
        for sample in group:
            rest = [s for s in group if s is not sample]
            # Several draws, for all forms to come up.
            pairs = {q.lower(): a for seed in range(8) for q, a in derive(rest, random.Random(seed))} if rest else {}
            if (answer := pairs.get(sample.question.lower().strip())) is not None:
                form = re.sub("|".join(sorted(ORGANS, key=len, reverse=True)), "…", sample.question.lower())
                out.setdefault(form, Counter())[answer.lower() == sample.answer.lower().strip()] += 1
    return out


if __name__ == "__main__":
    rows = load_named(parse_dataset(f"slake={sys.argv[1]}", "train"))
    found = agreement(rows)
    for form, counts in sorted(found.items(), key=lambda item: -item[1].total()):
        print(f"{counts[True]:5} of {counts.total():5}  {form}")
    print(sum(c[True] for c in found.values()), "of", sum(c.total() for c in found.values()), "agree; rows that are derived:", end=" ")
    groups: dict[Path | None, list[Sample]] = {}
    for row in rows:
        groups.setdefault(row.image, []).append(row)
    print(sum(len(derive(group, random.Random(0))) for group in groups.values()), "about", len(groups), "images")
