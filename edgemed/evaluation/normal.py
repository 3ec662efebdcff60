r"""The word normalisation of the field's older metrics, quirks included, so that their published figures can be compared with.

    normalise_answer("The left, and one-sided.")     # "left and 1 sided"

Source: microsoft/LLaVA-Med, llava/eval/eval_metrics/glossary.py (its table of contractions is that of the VQA challenge's evaluation,
GT-Vision-Lab/VQA), as described in evaluation-protocol.md, 3.2. The quirks, all kept:

- a punctuation mark is deleted where a blank stands next to it anywhere in the text, or where a digit, a comma and a digit follow one
  another anywhere; otherwise it becomes a blank;
- periods that no digit follows are deleted, but only the first 32 of them;
- contractions are looked up in lower case, so that those written with a capital are never found.
"""

from __future__ import annotations

import re
from collections import Counter

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes re.UNICODE (32) where `re.sub` takes a count.
_MOST_PERIODS = 32
_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# What is written → what it becomes. Nearly all lose an apostrophe in writing; `_ODD` are those that do otherwise.
_WITHOUT_ANY = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd it'll ma'am "
    "mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd "
    "someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
    "wouldn't y'all you'd you'll you're you've"
).split()
_WITHOUT_ONE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've "
    "they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at"
).split()
_ODD = {"somebody'd": "somebodyd"}


def _drop_one(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {word.replace("'", ""): word for word in _WITHOUT_ANY} | {w: word for word in _WITHOUT_ONE for w in _drop_one(word)} | _ODD


def normalise_answer(text: str) -> str:
    """The words that older metrics compare, joined by single blanks."""
    joined = _NUMBER_COMMA.search(text) is not None
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    out = _PERIOD.sub("", out, count=_MOST_PERIODS)
    numbered = (_NUMBERS.get(word, word) for word in out.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES).replace(",", "")


def count_words(text: str) -> Counter[str]:
    """Lower-cased words between blanks, counted."""
    return Counter(text.lower().split())
