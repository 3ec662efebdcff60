"""From tokens' bytes to text that may be shown: whole characters only, and never a part of a stop string.

    text = TextStream(stop=("USER:",))
    text.push(b" No\\xc3")      # " No"
    text.push(b"\\xa9US")       # "é"       ("US" may become a stop string)
    text.push(b"ER: what")      # ""        and text.stopped is True; text.text is " Noé"

Knows no tokens. The drawing itself is llama.cpp's (libllama.Sampler).
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class TextStream:
    """Text that grows by pieces of UTF-8."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[str] = []
        self._held = ""
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was let out."""
        return "".join(self._shown)

    def push(self, piece: bytes) -> str:
        """Add bytes; returns the text that they let out. Nothing comes out after a stop string."""
        return self._take(self._decoder.decode(piece))

    def flush(self) -> str:
        """The answer has ended: returns what was still held back; an incomplete character becomes U+FFFD."""
        out = self._take(self._decoder.decode(b"", final=True))
        if self.stopped:
            return out
        rest, self._held = self._held, ""
        self._shown.append(rest)
        return out + rest

    def _take(self, new: str) -> str:
        if self.stopped:
            return ""
        self._held += new
        at = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            keep = at
        else:
            keep = len(self._held) - max((_overlap(self._held, s) for s in self._stop), default=0)
        out, self._held = self._held[:keep], "" if self.stopped else self._held[keep:]
        self._shown.append(out)
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Natural logarithm of softmax(logits)[token]."""
    top = float(logits.max())
    return float(logits[token]) - top - math.log(float(np.exp(logits - top, dtype=np.float32).sum(dtype=np.float64)))
