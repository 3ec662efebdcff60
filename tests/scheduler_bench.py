"""A scheduler with a model that is none, for tests: what it was asked to compute, and what it sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from runtimes_pair import PATCHES, SIZE_PX

from edgemed.core.conversation import Turn
from edgemed.core.errors import EngineError
from edgemed.core.manifest import Manifest
from runtimes.libllama import NotANumberError
from runtimes.messages import EngineSettings, PreparedImage, Request, Token
from runtimes.scheduler import Scheduler
from runtimes.vision import Encoded, ImageQueue
from runtimes.wire import Submit

NEVER = 255


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell of the cache, which sequences may share."""

    value: float


class FakeModel:
    """Draws the token 'x' for ever. Keeps its own picture of the cache and fails where a real one would."""

    batch_tokens, max_outputs, vocab_size, width, bos = 64, 8, 300, 4, 1
    token_rows: Any = None
    takes_rows = False
    controls: tuple[str, ...] = ()
    reuses = True
    tile_rows = 1

    def __init__(self, kv_tokens: int) -> None:
        self.kv_tokens = kv_tokens
        self.cells: dict[int, list[Cell]] = {}
        self.rows_run: list[int] = []
        self.batches: list[tuple[str, dict[int, int]]] = []
        self.poisoned: set[int] = set()
        self.spoilt: set[float] = set()
        self.wiped = 0

    def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    def piece(self, token: int, special: bool = False) -> bytes:
        return bytes([token])

    def is_end(self, token: int) -> bool:
        return token == NEVER

    def is_control(self, token: int) -> bool:
        return False

    def sample(self, sampler: object, index: int) -> int:
        assert index in self.outputs
        if self.spoilt & {value for sequence in self.last_sequences[index] for value in self.values(sequence)}:
            raise NotANumberError("Expected numbers, found NaN.")
        return ord("x")

    def logits(self, index: int) -> np.ndarray:
        return np.zeros(self.vocab_size, np.float32)

    def wipe(self) -> None:
        assert not any(self.cells.values())
        self.wiped += 1

    def decode_tokens(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> int:
        return self._run("text", tokens, positions, sequences, outputs)

    def _run(
        self, kind: str, values: Sequence[float], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> int:
        assert 0 < len(values) <= self.batch_tokens
        if self.poisoned & set(values):
            return -1
        self.outputs, self.last_sequences = set(outputs), [list(together) for together in sequences]
        for value, position, together in zip(values, positions, sequences, strict=True):
            self._put(together, position, value)
        every = [sequence for together in sequences for sequence in together]
        self.batches.append((kind, {s: every.count(s) for s in set(every)}))
        self.rows_run.append(len(values))
        return 0

    def decode_token(self, token: int, position: int, sequence: int) -> int:
        return self.decode_tokens([token], [position], [[sequence]], [0])

    def decode_rows(
        self, rows: Sequence[np.ndarray], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]
    ) -> int:
        return self._run("rows", [float(row[0]) for part in rows for row in part], positions, sequences, outputs)

    def decode_among(
        self,
        tokens: Sequence[int],
        images: Sequence[tuple[int, np.ndarray]],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        outputs: Sequence[int],
    ) -> int:
        values = list(map(float, tokens))
        for first, rows in images:
            values[first : first + len(rows)] = rows[:, 0].tolist()
        return self._run("among", values, positions, sequences, outputs)

    def _put(self, sequences: Sequence[int], position: int, value: float) -> None:
        cell = Cell(value)
        before = self.cells.setdefault(sequences[0], [])[:]
        for sequence in sequences:
            cells = self.cells.setdefault(sequence, [])
            assert position == len(cells), "positions must follow one another"
            assert all(mine is theirs for mine, theirs in zip(cells, before, strict=True)), (
                "a row for several needs all cells before it in common"
            )
            cells.append(cell)

    def values(self, sequence: int) -> list[float]:
        return [cell.value for cell in self.cells[sequence]]

    def forget(self, sequence: int, start: int) -> None:
        self.cells[sequence] = self.cells.get(sequence, [])[:start]

    def share(self, source: int, target: int, stop: int) -> None:
        assert not self.cells.get(target)
        self.cells[target] = self.cells[source][:stop]


class AtOnce(ImageQueue):
    """Images that are encoded as soon as they come, without a thread."""

    def __init__(self, encode: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self.encode = encode

    def submit(self, key: str, pixels: bytes) -> None:
        self.encode(key, pixels)


class Bench:
    """A scheduler with its fake model, and what it sent."""

    ahead = False

    def __init__(self, manifest: Manifest, settings: EngineSettings) -> None:
        self.llm = FakeModel(settings.kv_tokens or settings.slots * settings.context_tokens)
        self.sent: list[tuple[int, Any]] = []
        self.beats = 0
        self.encoded: list[str] = []
        model: Any = self.llm
        self.scheduler = Scheduler(model, AtOnce(self.encode), manifest, settings, self.send, self.ahead)

    def send(self, id: int, reply: object) -> None:
        if reply is None:
            self.beats += 1
        else:
            self.sent.append((id, reply))

    def encode(self, key: str, pixels: bytes) -> None:
        self.encoded.append(key)
        if pixels[0] == 13:
            self.scheduler.post(0, Encoded(key, None, 0.1, EngineError("no such image")))
        else:
            self.scheduler.post(0, Encoded(key, np.full((PATCHES, 4), pixels[0], np.float32), 0.1))

    def ask(self, id: int, text: str, images: Sequence[PreparedImage] = (), max_tokens: int = 10, stop: str = "") -> None:
        stops = (stop,) if stop else ()
        request = Request(turns=(Turn("user", text, len(images)),), images=tuple(images), max_tokens=max_tokens, stop=stops)
        self.scheduler.post(id, Submit(request))

    def run(self, steps: int = 10_000) -> None:
        self.scheduler.step()
        while steps > 0 and self.scheduler._has_work():
            steps -= 1
            self.scheduler.step()

    def ends(self) -> dict[int, Any]:
        return {id: reply for id, reply in self.sent if not isinstance(reply, Token)}

    def tokens(self, id: int) -> int:
        return sum(isinstance(reply, Token) for i, reply in self.sent if i == id)


def image(value: int) -> PreparedImage:
    return PreparedImage(bytes([value]) * (SIZE_PX * SIZE_PX * 3), SIZE_PX)
