"""Ask a judge about every question, in one order or both, and keep every reply.

    reviews = review(items, judge, instruction, folder, Plan(both_orders=True, parallel=4))
    scores = scores_of(reviews, swapped=False)

A reply without two scores is asked for again where that can help, and else kept with the reason: it counts nowhere and is named.
A judge that is gone ends the run with its error; what it said until then is in the journal, and the next run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.core.errors import EdgemedError, InputError
from edgemed.evaluation.judge.journal import Journal, Key, Review, open_journal
from edgemed.evaluation.judge.judges import Judge, Reply
from edgemed.evaluation.judge.protocol import Message, ReplyError, build_messages, hash_instruction, read_scores
from edgemed.evaluation.judge.questions import Item


@dataclass(frozen=True)
class Plan:
    """How to ask. `attempts` is how often one question is asked at most until its reply holds two scores."""

    both_orders: bool = False
    parallel: int = 4
    attempts: int = 3


@dataclass(frozen=True)
class Ask:
    """One question in one order."""

    id: str
    swapped: bool
    messages: tuple[Message, ...]

    @property
    def key(self) -> Key:
        return self.id, self.swapped

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()


def build_asks(items: Sequence[Item], instruction: str, both_orders: bool) -> list[Ask]:
    """In the questions' order, the protocol's order of answers (the reference first) before the exchanged one."""
    asks = []
    for item in items:
        for swapped in (False, True) if both_orders else (False,):
            first, second = (item.answer, item.reference) if swapped else (item.reference, item.answer)
            asks.append(Ask(item.id, swapped, tuple(build_messages(item.row, item.question, first, second, instruction))))
    return asks


def review(
    items: Sequence[Item],
    judge: Judge,
    instruction: str,
    folder: Path,
    plan: Plan,
    header: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> list[Review]:
    """All reviews, in order; those that `folder` holds already are not asked for again unless they had no scores.

    Raises InputError (the folder holds something else), EndpointError, EngineError.
    """
    asks = build_asks(items, instruction, plan.both_orders)
    about = {"judge": judge.name, "instruction_sha256": hash_instruction(instruction)} | dict(header)
    with open_journal(folder, about) as journal:
        todo = [ask for ask in asks if _is_open(journal, ask, judge)]
        _ask_all(todo, judge, plan, journal, lambda done: progress(len(asks) - len(todo) + done, len(asks)) if progress else None)
        journal.settle([ask.key for ask in asks])
        return [journal.kept[ask.key] for ask in asks]


def _is_open(journal: Journal, ask: Ask, judge: Judge) -> bool:
    kept = journal.kept.get(ask.key)
    if kept is None:
        return True
    if kept.prompt_sha256 != ask.prompt_sha256:
        raise InputError(
            f"Expected the earlier reviews to be about the same answers, found another prompt for {ask.id}.",
            "Choose another folder with --out.",
        )
    return kept.scores is None and judge.asks_again


def _ask_all(asks: Sequence[Ask], judge: Judge, plan: Plan, journal: Journal, progress: Callable[[int], None]) -> None:
    stop = threading.Event()

    def work(ask: Ask) -> None:
        if stop.is_set():
            return
        try:
            journal.add(ask_once(ask, judge, plan.attempts))
        except EdgemedError:
            stop.set()  # before another thread takes the next question
            raise

    pool = ThreadPoolExecutor(plan.parallel, thread_name_prefix="judge")
    try:
        for done, future in enumerate(as_completed([pool.submit(work, ask) for ask in asks]), 1):
            future.result()
            progress(done)
    finally:
        # After an error or Ctrl-C nothing new is asked; what is under way is waited for, and kept.
        stop.set()
        pool.shutdown(cancel_futures=True)


def ask_once(ask: Ask, judge: Judge, attempts: int) -> Review:
    """Ask until there are two scores, at most `attempts` times (once where the reply would be the same)."""
    tokens: list[Reply] = []
    why = ""
    for attempt in range(1, (attempts if judge.asks_again else 1) + 1):
        reply = judge.ask(ask.messages)
        tokens.append(reply)
        try:
            if reply.failure:
                raise ReplyError(reply.failure)
            scores = read_scores(reply.text, ask.swapped)
        except ReplyError as error:
            why = str(error)
            continue
        return _review(ask, reply, scores, "", attempt, tokens)
    return _review(ask, reply, None, why, attempt, tokens)


def _review(ask: Ask, reply: Reply, scores: tuple[float, float] | None, why: str, attempts: int, all_replies: Sequence[Reply]) -> Review:
    prompt, new = ([getattr(r, name) for r in all_replies] for name in ("prompt_tokens", "new_tokens"))
    return Review(ask.id, ask.swapped, ask.prompt_sha256, reply.text, scores, why, attempts, _sum(prompt), _sum(new))


def _sum(counts: Sequence[int | None]) -> int | None:
    told = [count for count in counts if count is not None]
    return sum(told) if told else None


def scores_of(reviews: Sequence[Review], swapped: bool) -> dict[str, tuple[float, float]]:
    """Question → (reference's, model's) of one order."""
    return {r.question_id: r.scores for r in reviews if r.swapped == swapped and r.scores is not None}


def score_lines(items: Sequence[Item], reviews: Sequence[Review], reply_key: str) -> str:
    """LLaVA-Med's scores file, as its script writes it: the question's own fields, question, ans1, ans2 and the reply; one order only."""
    replies = {r.question_id: r.reply for r in reviews if not r.swapped and r.scores is not None}
    rows = [
        {**item.row, "question": item.question, "ans1": item.reference, "ans2": item.answer, reply_key: replies[item.id]}
        for item in items
        if item.id in replies
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
