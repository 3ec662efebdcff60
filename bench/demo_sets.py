"""Descriptions, conversations and more questions for edgemed-demo's training, made from the answers of the question sets.

    build_sets(samples_by_set, Path("data/made"))        # captions.json, conversations.json, facts.json, translated.json: LLaVA's format

Figure captions are not at hand, so what an image's answered questions say of it is put into sentences: modality, plane, organs that are
there, findings. That is as much as those questions tell, in plain grammar; it is no radiologist's description. What else follows from
SLAKE's answers is asked in facts.json (demo_facts.py), what its Chinese rows ask beside the English ones in translated.json
(demo_chinese.py). The files name images relative to their own folder. Knows no model.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bench.demo_facts import Pair, derive
from edgemed.core.files import save_text
from edgemed.data import Sample

Row = dict[str, object]

REQUESTS = ("Describe this image.", "What does this image show?", "Describe the image briefly.", "Give a short description of this image.")
# Rounds after the description, and conversations an image.
ROUNDS, DRAWS = 5, 2
# Of a translated question.
WORDINGS = 2
_CONTAINED = re.compile(r"(?:does|do) the (?:picture|image) contain (?:an? |the )?(.+?)\s*\?", re.IGNORECASE)
_SHOWN = re.compile(r"(?:does|do) (?:this|the) image show (.+?)\s*\?", re.IGNORECASE)
_PRESENT = re.compile(r"(?:is|are) (.+?) present\s*\?", re.IGNORECASE)
_DISEASE = re.compile(r"what (?:diseases?|abnormalit)", re.IGNORECASE)
_PLACE = re.compile(r"where (?:is|are|is/are) the abnormalit", re.IGNORECASE)
_ANY_ABNORMAL = re.compile(r"(?:are there|is there|does the picture contain) (?:any )?abnormal", re.IGNORECASE)
_NAMES_IT = re.compile(r"what (?:is present|does this image show|is shown)\s*\?", re.IGNORECASE)


def describe_slake(samples: Sequence[Sample]) -> str:
    """One of SLAKE's images out of the answers to its questions."""
    first = samples[0]
    plane = next((s.answer.lower().replace("  ", " ") for s in samples if s.answer.lower().endswith("plane")), "")
    kind = f"{'An' if first.modality[:1] in 'MX' else 'A'} {first.modality} image of the {first.organ.replace('_', ' ').lower()}"
    sentences = [kind + (f" in the {plane}" if plane else "")]
    organs = _unique(found[1].lower() for s in samples if s.answer.lower() == "yes" and (found := _CONTAINED.search(s.question)))
    organs = [organ for organ in organs if "abnormal" not in organ]
    if organs:
        sentences.append("It shows the " + _list(organs))
    diseases = _unique(s.answer for s in samples if _DISEASE.search(s.question) and s.answer.lower() not in ("yes", "no", "none"))
    places = _unique(s.answer for s in samples if _PLACE.search(s.question))
    if diseases:
        sentences.append(f"Finding: {_list(diseases).lower()}" + (f" ({', '.join(places).lower()})" if places else ""))
    elif any(_ANY_ABNORMAL.search(s.question) and s.answer.lower() == "no" for s in samples):
        sentences.append("No abnormality is seen")
    return ". ".join(sentences) + "."


def describe_pathvqa(samples: Sequence[Sample]) -> str:
    """One of PathVQA's images, whose questions were made from a caption; empty where they tell nothing."""
    yes = [s for s in samples if s.answer.lower() == "yes"]
    shown = _unique(found[1] for s in yes if (found := _SHOWN.fullmatch(s.question.strip())))
    present = [found[1] for s in yes if (found := _PRESENT.fullmatch(s.question.strip()))]
    present += [s.answer for s in samples if _NAMES_IT.fullmatch(s.question.strip())]
    present = [p for p in _unique(present) if not any(p in s for s in shown)]
    sentences = [f"This image shows {shown[0]}"] if shown else []
    sentences += ["Present: " + _list(present)] if present else []
    return ". ".join(sentences) + "." if sentences else ""


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text.strip() for text in texts))


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


DESCRIBE = {"slake": describe_slake, "pathvqa": describe_pathvqa}


def build_sets(
    sets: Mapping[str, Sequence[Sample]], out: Path, seed: int = 0, translated: Iterable[tuple[Path, Sequence[Pair]]] = ()
) -> dict[str, int]:
    """Write the four files into `out`; rows of each. `translated`: of each further question on SLAKE, the image and its wordings."""
    # Each kind of question has its own draws, so that the other files stay what they are without it.
    draw, draw_facts, draw_wordings = random.Random(seed), random.Random(seed), random.Random(seed)
    more: dict[Path, list[Sequence[Pair]]] = {}
    for image, wordings in translated:
        more.setdefault(image, []).append(wordings)
    made: dict[str, list[Row]] = {"captions": [], "conversations": [], "facts": [], "translated": []}
    out.mkdir(parents=True, exist_ok=True)
    for name, samples in sets.items():
        for image, group in _by_image(samples).items():
            where = os.path.relpath(image, out)
            text = DESCRIBE[name](group) if name in DESCRIBE else ""
            key = f"{name}-{image.parent.name}-{image.stem}"
            if text:
                made["captions"].append(_row(key, where, [(draw.choice(REQUESTS), text)]))
            for number in range(DRAWS):
                rounds = [(draw.choice(REQUESTS), text)] if text else []
                rounds += [(s.question, s.answer) for s in draw.sample(group, min(ROUNDS, len(group)))]
                made["conversations"].append(_row(f"{key}-{number}", where, rounds))
            if name == "slake":
                asked = {sample.question.lower().strip() for sample in group}
                new = _unasked(_some(more.get(image, ()), draw_wordings), asked)
                made["translated"] += [_row(f"{key}-translated-{number}", where, [pair]) for number, pair in enumerate(new)]
                told = [Sample.single("", image, q, a, "open", group[0].modality, group[0].organ) for q, a in new]
                facts = _unasked(derive([*group, *told], draw_facts), asked)
                made["facts"] += [_row(f"{key}-fact-{number}", where, [pair]) for number, pair in enumerate(facts)]
    for file, rows in made.items():
        save_text(out / f"{file}.json", json.dumps(rows, ensure_ascii=False))
    return {file: len(rows) for file, rows in made.items()}


def _some(questions: Iterable[Sequence[Pair]], draw: random.Random) -> Iterator[Pair]:
    for wordings in questions:
        yield from draw.sample(wordings, min(WORDINGS, len(wordings)))


def _unasked(pairs: Iterable[Pair], asked: set[str]) -> list[Pair]:
    """Those of `pairs` whose question was not asked yet, and is now."""
    new = []
    for question, answer in pairs:
        if question.lower() not in asked:
            asked.add(question.lower())
            new.append((question, answer))
    return new


def _by_image(samples: Sequence[Sample]) -> dict[Path, list[Sample]]:
    groups: dict[Path, list[Sample]] = {}
    for sample in samples:
        if sample.image and sample.answer.strip():
            groups.setdefault(sample.image, []).append(sample)
    return groups


def _row(key: str, image: str, rounds: Sequence[tuple[str, str]]) -> Row:
    messages = []
    for number, (question, answer) in enumerate(rounds):
        messages.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": key, "image": image, "conversations": messages}
