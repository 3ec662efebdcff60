"""What a judging will cost, before it is begun, and what it has cost.

    estimate = estimate_cost(asks, Price(30.0, 60.0))        # dollars a million tokens; None: tokens only

No price is known here: they change, and a server of one's own has none. Tokens are guessed from bytes on the high side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from edgemed.core.errors import InputError
from edgemed.evaluation.judge.journal import Review
from edgemed.evaluation.judge.run import Ask

# English has about 4 bytes a token; the context's lists of entities have fewer, so the guess is on the high side.
BYTES_PER_TOKEN = 3
# Two scores and a paragraph: a guess, not a limit.
REPLY_TOKENS = 300
_MILLION = 1e6


@dataclass(frozen=True)
class Price:
    """Dollars a million tokens, of prompts and of replies."""

    prompt: float
    reply: float


@dataclass(frozen=True)
class Cost:
    """Tokens, and dollars where a price was given; None where nothing tells."""

    asks: int
    prompt_tokens: int | None
    new_tokens: int | None
    dollars: float | None


def parse_price(text: str) -> Price:
    """'30,60' → Price(30.0, 60.0). Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*", text)
    if match is None:
        raise InputError(f"Expected --price PROMPT,REPLY in dollars a million tokens, found '{text}'.", "For example: --price 30,60")
    return Price(float(match[1]), float(match[2]))


def estimate_cost(asks: Sequence[Ask], price: Price | None) -> Cost:
    """Before: one reply a question."""
    prompt = sum(-(-sum(len(m["content"].encode("utf-8", "replace")) for m in ask.messages) // BYTES_PER_TOKEN) for ask in asks)
    return _cost(len(asks), prompt, len(asks) * REPLY_TOKENS, price)


def measure_cost(reviews: Sequence[Review], price: Price | None) -> Cost:
    """After: what the endpoint counted, repeats included; None if it left any out."""
    prompt, new = ([getattr(r, name) for r in reviews] for name in ("prompt_tokens", "new_tokens"))
    known = [None if None in counts else sum(counts) for counts in (prompt, new)]
    return _cost(sum(r.attempts for r in reviews), known[0], known[1], price)


def _cost(asks: int, prompt: int | None, new: int | None, price: Price | None) -> Cost:
    dollars = None
    if price is not None and prompt is not None and new is not None:
        dollars = (prompt * price.prompt + new * price.reply) / _MILLION
    return Cost(asks, prompt, new, dollars)
