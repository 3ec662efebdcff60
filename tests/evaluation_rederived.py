"""The field's metrics derived a second time from their description (evaluation-protocol.md, 3.2 to 3.7), by other means than the product's.

Nothing of edgemed.evaluation is used: characters are walked instead of patterns matched, multisets are lists, means are fractions.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
WORDS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = dict(zip(WORDS, (0, *range(11)), strict=True))
# A part of the table of contractions, spelled out: what the generated rows hold.
CONTRACTIONS = {
    "dont": "don't",
    "isnt": "isn't",
    "wont": "won't",
    "theyre": "they're",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "'ow'sat": "'ow's'at",
    "y'alld've": "y'all'd've",
    "oclock": "o'clock",
}


def normal(text: str) -> str:
    grouped = any(text[i].isdecimal() and text[i + 1] == "," and text[i + 2].isdecimal() for i in range(len(text) - 2))
    gone = {mark for mark in MARKS if grouped or any(pair in text for pair in (mark + " ", " " + mark))}
    kept = "".join("" if c in gone else " " if c in MARKS else c for c in text)
    out, dropped = "", 0
    for i, c in enumerate(kept):
        if c == "." and dropped < 32 and not kept[i + 1 : i + 2].isdecimal():
            dropped += 1
        else:
            out += c
    words = [str(NUMBERS.get(w, w)) for w in out.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def overlap(candidate: str, reference: str) -> tuple[float, float, float, float]:
    """(exact match, F1, precision, recall)."""
    c, r = normal(candidate).lower().split(), normal(reference).lower().split()
    exact = Fraction(len([w for w in set(r) if w in c]), len(c)) if c else Fraction(0)
    tp = len([w for w in c if w in r])
    if not c or not r or tp == 0:
        return float(exact), 0.0, 0.0, 0.0
    p, q = Fraction(tp, len(c)), Fraction(tp, tp + len([w for w in r if w not in c]))
    return float(exact), float(2 * p * q / (p + q)), float(p), float(q)


def bleu(candidate: str, reference: str, weights: tuple[float, ...], smooth: bool) -> float:
    c, r = candidate.split(), reference.split()
    if not any(w in r for w in c):
        return 0.0
    product = 1.0
    for n, weight in enumerate(weights, 1):
        have = [" ".join(c[i : i + n]) for i in range(len(c) - n + 1)]
        left = [" ".join(r[i : i + n]) for i in range(len(r) - n + 1)]
        hits = 0
        for gram in have:
            if gram in left:
                left.remove(gram)
                hits += 1
        total = max(len(have), 1)
        product *= (hits / total if hits else 0.1 / total if smooth else sys.float_info.min) ** weight
    return product * (1.0 if len(c) > len(r) else math.exp(1 - len(r) / len(c)))


def medmoe(kind: str, prediction: str, reference: str) -> dict[str, float]:
    p, g = prediction.lower(), reference.lower()
    exact, f1, precision, recall = overlap(p, g)
    if kind == "closed":
        return {"closed accuracy": float(p.find(g) >= 0), "closed f1": f1, "closed precision": precision, "closed recall": recall}
    out = {"open exact match": exact, "open f1": f1, "open precision": precision, "open recall": recall}
    return out | {f"open bleu-{n}": bleu(p, g, tuple(float(k == n) for k in range(1, 5)), True) for n in (1, 2, 3)}


def llavamed(kind: str, prediction: str, reference: str) -> dict[str, float]:
    p, g = normal(prediction.lower()), normal(reference.lower())
    if kind == "closed":
        return {"closed accuracy": float((p.find("yes") >= 0 or p.find("no") >= 0) and p.find(g) >= 0)}
    exact, f1, precision, recall = overlap(p, g)
    out = {"open exact match": exact, "open f1": f1, "open precision": precision, "open recall": recall}
    out |= {"open bleu": bleu(p, g, (0.25, 0.25, 0.25, 0.25), False)}
    return out | {f"open bleu-{n}": bleu(p, g, tuple(float(k == n) for k in range(1, 5)), False) for n in (1, 2, 3)}
