"""What a judge is sent and how its reply is read, as LLaVA-Med does it.

    messages = build_messages(question, reference, answer, instruction)
    scores = parse_reply("8 9\\nBoth assistants …")          # (8.0, 9.0), or raises ReplyError

Blocks, positions and parsing follow microsoft/LLaVA-Med `llava/eval/eval_multimodal_chat_gpt_score.py` and `summarize_gpt_review.py`
(v1.5 at d406e3f; the seed's copies are the same). The instruction is a file of the user's; without one, a text of our own with the
same request is sent, and results say which it was. Knows no files and no network.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

# The apostrophe in front is the protocol's own.
SYSTEM = "'You are a helpful and precise assistant for checking the quality of the answer."
INSTRUCTION = """Two assistants have answered the question above, which somebody asked about an image. You do not see the image: its \
caption and the sentences that mention it stand in for it.
Judge how helpful, relevant, accurate and detailed each answer is, and give each assistant one overall score from 1 to 10; more is better.
Write nothing on the first line but the two scores, that of Assistant 1 and then that of Assistant 2, with one space between them. \
From the second line on, explain your scores. Do not favour an answer for the place it stands in."""
MARKER = "\n<image>"


@dataclass(frozen=True)
class Protocol:
    """A version's differences. `published_sha256` is of the instruction as that version's own script holds it; None: not at hand."""

    name: str
    reply_key: str
    drops_marker: bool
    published_sha256: str | None


PROTOCOLS = {
    "v1.5": Protocol("v1.5", "gpt_eval", False, "74f4b4031532c6c6f50e0d7c6a074680fe538a2e7799eaf98d5e8d116a6b06c0"),
    "v1.0": Protocol("v1.0", "result", True, None),
}


class ReplyError(ValueError):
    """A reply without a line of two scores; the text says what was found. Never leaves this package."""


def hash_instruction(instruction: str) -> str:
    """Hex SHA-256 of an instruction."""
    return hashlib.sha256(instruction.encode()).hexdigest()


def question_text(row: Mapping[str, Any], protocol: Protocol) -> str:
    """The question as the judge sees it: v1.0 cuts the image's marker off its end, v1.5 leaves it there."""
    text = str(row["text"])
    return text[: -len(MARKER)] if protocol.drops_marker and text.endswith(MARKER) else text


def build_messages(row: Mapping[str, Any], question: str, first: str, second: str, instruction: str) -> list[Message]:
    """System and user message. `row` holds fig_label, fig_caption and in_text_mention, which goes in as Python writes a list."""
    user = (
        f"[Context]\nFigure Caption:\n{row['fig_label']}: {row['fig_caption']}\n\n"
        f"Figure Context:\n\t- {row['in_text_mention']}\n\n"
        f"[Question]\n{question}\n\n"
        f"[Assistant 1]\n{first}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{second}\n\n[End of Assistant 2]\n\n"
        f"[System]\n{instruction}\n\n"
    )
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def parse_reply(text: str) -> tuple[float, float]:
    """The first line's two numbers, one blank between them, as LLaVA-Med splits it. Raises ReplyError.

    Where that script would stop (another number of words, no number), so does this. Numbers that are not finite are refused too; one
    outside 1 to 10 is taken, as it is there.
    """
    if not text:
        raise ReplyError("nothing")
    parts = text.split("\n")[0].split(" ")
    if len(parts) != 2:
        raise ReplyError(f"a first line of {len(parts)} word(s) where two scores belong")
    try:
        first, second = float(parts[0]), float(parts[1])
    except ValueError:
        raise ReplyError("a first line that is not two numbers") from None
    if not (math.isfinite(first) and math.isfinite(second)):
        raise ReplyError("a score that is not finite")
    return first, second


def read_scores(reply: str, swapped: bool) -> tuple[float, float]:
    """(the reference's score, the model's). Raises ReplyError, also for a reference's 0: LLaVA-Med's script would divide by it."""
    first, second = parse_reply(reply)
    reference, model = (second, first) if swapped else (first, second)
    if reference == 0:
        raise ReplyError("a score of 0 for the reference, which nothing can be divided by")
    return reference, model


def in_range(scores: tuple[float, float]) -> bool:
    """Whether both lie where the instruction wants them."""
    return all(1 <= score <= 10 for score in scores)
