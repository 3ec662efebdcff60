"""The scheduler over a fake model that records its batches: what is run together, what is shared, and what one failure costs."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from runtimes_pair import PATCHES, make_artifact
from scheduler_bench import AtOnce, Bench, image

from edgemed.core.conversation import Turn
from edgemed.core.errors import EngineError
from edgemed.core.manifest import Manifest
from runtimes.batches import drop_spill, lay_out
from runtimes.jobs import Job, Part, Slot
from runtimes.messages import EngineSettings, Failed, Finished, Request, Token
from runtimes.vision import Encoded, hash_image
from runtimes.wire import Embed, Stats, SubmitGroup, Tokenize


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tokens' texts are looked at as soon as they are drawn, or once the next batch is on its way."""
    monkeypatch.setattr(Bench, "ahead", request.param)
    return bool(request.param)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("scheduler")
    return make_artifact(folder).manifest


def test_answers_go_on_while_an_image_fills_in(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2, shared_prefill_tokens=4))
    bench.ask(1, "A", max_tokens=60)
    bench.run(steps=3)
    bench.llm.batches.clear()
    bench.ask(2, "B", [image(1)], max_tokens=3)
    bench.run()
    assert {id: end.reason for id, end in bench.ends().items()} == {1: "length", 2: "length"}
    during = [kind for kind, _ in bench.llm.batches[: 2 * PATCHES // 4]]
    assert during.count("rows") >= PATCHES // 4 - 1
    assert all(pair != ("rows", "rows") for pair in zip(during, during[1:], strict=False))
    assert all(count <= 4 for kind, parts in bench.llm.batches if kind == "rows" for count in parts.values())


def test_text_around_an_image_goes_in_its_batch(manifest: Manifest) -> None:
    bench, direct, apart = (Bench(manifest, EngineSettings(context_tokens=512)) for _ in range(3))
    bench.llm.token_rows = direct.llm.token_rows = lambda ids: np.repeat(np.asarray(ids, np.float32)[:, None], 4, 1)
    direct.llm.takes_rows = True
    for each in (bench, direct, apart):
        each.llm.batch_tokens = 256
        each.ask(1, "Before and after", [image(1)], max_tokens=1)
        each.run()
    assert [kind for kind, _ in bench.llm.batches] == ["rows"] and len(apart.llm.batches) == 3
    assert [kind for kind, _ in direct.llm.batches] == ["among"]
    assert bench.llm.values(0) == direct.llm.values(0) == apart.llm.values(0), "each cell is where it was, with its own row"


def test_rows_that_spill_over_whole_tiles_go_with_the_next_batch(manifest: Manifest) -> None:
    texts = ["What organ is it?", "Is it an adult?", "Where?", "What colour?"]
    different = {}
    for tile in (1, 32):
        bench = Bench(manifest, EngineSettings(context_tokens=512, slots=4))
        bench.llm.batch_tokens, bench.llm.tile_rows = 256, tile
        bench.llm.token_rows = lambda ids: np.repeat(np.asarray(ids, np.float32)[:, None], 4, 1)
        bench.scheduler.post(7, SubmitGroup(tuple(Request((Turn("user", text, 1),), (image(1),), max_tokens=3) for text in texts)))
        for _ in range(2):  # the image's rows come in between
            bench.run()
        [(_, replies)] = bench.sent
        assert [reply.finished.text for reply in replies] == ["xxx"] * 4
        different[tile] = [bench.llm.values(slot.index) for slot in bench.scheduler._slots], bench.llm.rows_run
    assert different[1][0] == different[32][0], "each cell is where it was, with its own row"
    whole, tiled = different[1][1], different[32][1]
    assert whole[0] % 32 and whole[1] % 32, "nothing would spill over"
    assert all(rows % 32 == 0 or rows % 32 > 16 for rows in tiled[:2]) and len(tiled) <= len(whole) + 1


def test_answers_and_most_of_a_tile_never_wait() -> None:
    def part(index: int, cells: int, answering: bool = False) -> Part:
        slot = Slot(index, next_token=5 if answering else None)
        return Part(slot, Job(index, 0.0), list(range(100 * index, 100 * index + cells)), True)

    def sizes(*parts: Part, tile: int = 8, others_wait: bool = False) -> list[tuple[int, bool]]:
        return [(len(p.cells), p.last) for p in drop_spill(parts, tile, others_wait)]

    assert sizes(part(1, 5), part(2, 7)) == [(5, True), (3, False)]
    assert sizes(part(1, 8), part(2, 2), part(3, 2)) == [(8, True)]
    assert sizes(part(1, 10)) == [(10, True)], "there would be a batch for two rows"
    assert sizes(part(1, 10), others_wait=True) == [(8, False)]
    assert sizes(part(1, 5), part(2, 8)) == [(5, True), (8, True)], "a tile that is mostly full"
    assert sizes(part(1, 5), part(2, 2)) == [(5, True), (2, True)], "not one whole tile"
    assert sizes(part(1, 5), part(2, 7), tile=1) == [(5, True), (7, True)]
    assert sizes(*(part(k, 1, answering=True) for k in range(9))) == [(1, True)] * 9
    answers = [part(k, 1, answering=True) for k in range(9)]
    assert sizes(*answers, part(9, 2)) == [(1, True)] * 9 + [(2, True)], "a prompt is not kept waiting by answers"
    assert sizes(*answers[:4], part(9, 6)) == [(1, True)] * 4 + [(4, False)]


def test_answers_that_fill_a_tile_do_not_keep_a_prompt_waiting(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=256, slots=65, kv_tokens=65 * 256))
    bench.llm.batch_tokens, bench.llm.tile_rows = 256, 64
    for id in range(1, 65):
        bench.ask(id, chr(33 + id), max_tokens=200)
    while not all(bench.tokens(id) for id in range(1, 65)):
        bench.run(1)
    bench.ask(99, chr(34), max_tokens=2)  # asked before, so that only its last cell is left to run
    bench.run(3)
    assert bench.tokens(99) == 2 and not bench.ends().keys() & set(range(1, 65))


def test_one_prompt_is_not_cut_while_others_wait_for_a_slot(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=1))
    bench.llm.tile_rows = 8
    for id in (1, 2):
        bench.ask(id, "?" * 10, max_tokens=1)
    bench.run()
    assert len(bench.llm.rows_run) == 2 and bench.llm.rows_run[0] % 8 in (1, 2, 3, 4)


def test_a_model_that_carries_a_state_begins_each_prompt_anew(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    bench.llm.reuses = False
    for first in (1, 3):
        for id in (first, first + 1):
            bench.ask(id, "the same question", max_tokens=3)
        bench.run()
    ends = bench.ends()
    assert [ends[id].usage.cached_tokens for id in (1, 2, 3, 4)] == [0] * 4 and [ends[id].text for id in (1, 2, 3, 4)] == ["xxx"] * 4
    assert all(cell not in bench.llm.cells[1] for cell in bench.llm.cells[0]), "no cell is of both"
    # A batch that fails cannot be run again in parts: the state has moved on.
    bench.llm.poisoned = {ord("~")}
    bench.ask(5, "good")
    bench.ask(6, "bad~")
    bench.run()
    assert isinstance(bench.ends()[5], Failed) and isinstance(bench.ends()[6], Failed)


def test_what_is_not_a_number_ends_its_request_and_empties_the_cache(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    bench.ask(1, "good", max_tokens=30)
    bench.run(steps=3)
    bench.llm.spoilt = {float(ord("~"))}
    bench.ask(2, "bad~")
    for _ in range(3):
        bench.scheduler.step()
    assert isinstance(bench.ends()[2], Failed) and "NaN" in bench.ends()[2].error.message
    assert type(bench.ends()[2].error) is EngineError, "what the parent can read without llama.cpp"
    bench.ask(3, "good too")
    bench.scheduler.step()
    assert bench.llm.wiped == 0 and bench.tokens(3) == 0, "it waits for the one that is being answered"
    bench.run()
    assert bench.llm.wiped == 1 and isinstance(bench.ends()[1], Finished) and bench.ends()[3].text == "x" * 10


def test_one_batch_serves_all_answers(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=3))
    for id in (1, 2, 3):
        bench.ask(id, f"{id}", max_tokens=20)
    bench.run()
    assert sum(parts == {0: 1, 1: 1, 2: 1} for _, parts in bench.llm.batches) >= 17


def test_only_the_request_at_fault_fails(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    bench.llm.poisoned = {ord("~")}
    bench.ask(1, "good")
    bench.ask(2, "bad~")
    bench.run()
    ends = bench.ends()
    assert isinstance(ends[1], Finished) and ends[1].text == "x" * 10
    assert isinstance(ends[2], Failed) and "code -1" in ends[2].error.message
    bench.ask(3, "good again")
    bench.run()
    assert isinstance(bench.ends()[3], Finished)


def test_an_image_that_cannot_be_encoded_fails_its_requests_only(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    bench.ask(1, "A", [image(13)])
    bench.ask(2, "B", [image(2)])
    bench.scheduler.post(3, Embed(image(2)))
    bench.run()
    ends = bench.ends()
    assert isinstance(ends[1], Failed) and isinstance(ends[2], Finished)
    assert ends[3].shape == (PATCHES, 4)
    assert bench.encoded == [hash_image(image(13).pixels), hash_image(image(2).pixels)]


def test_questions_about_one_image_wait_to_share_it(manifest: Manifest) -> None:
    shared = manifest.model_copy(update={"vision": manifest.vision.model_copy(update={"image_tokens": 5 * PATCHES})})
    bench = Bench(shared, EngineSettings(context_tokens=512, slots=3))
    rows = np.ones((5 * PATCHES, 4), np.float32)
    bench.scheduler._images = AtOnce(lambda key, pixels: bench.scheduler.post(0, Encoded(key, rows, 0.1)))
    for id in (1, 2, 3):
        bench.ask(id, f"question {id}", [image(1)], max_tokens=30)
    bench.run()
    ends = bench.ends()
    assert sum(count for kind, parts in bench.llm.batches if kind == "rows" for count in parts.values()) == 5 * PATCHES
    assert [ends[id].usage.cached_tokens >= 5 * PATCHES for id in (1, 2, 3)] == [False, True, True]


def test_what_questions_begin_with_alike_is_run_once(manifest: Manifest) -> None:
    texts = ["What organ is it?", "What organs?", "What colour?", "Where?", "Is it?"]
    shared = manifest.model_copy(update={"vision": manifest.vision.model_copy(update={"image_tokens": 5 * PATCHES})})
    bench = Bench(shared, EngineSettings(context_tokens=512, slots=5))
    bench.llm.batch_tokens = 256
    rows = np.ones((5 * PATCHES, 4), np.float32)
    bench.scheduler._images = AtOnce(lambda key, pixels: bench.scheduler.post(0, Encoded(key, rows, 0.1)))
    bench.scheduler.post(7, SubmitGroup(tuple(Request((Turn("user", text, 1),), (image(1),), max_tokens=1) for text in texts)))
    for _ in range(2):  # the image's rows come in between
        bench.run()
    [(_, replies)] = bench.sent
    assert [reply.finished.text for reply in replies] == ["x"] * 5
    prompts = [slot.cells for slot in bench.scheduler._slots]
    different = {tuple(cells[:n]) for cells in prompts for n in range(1, len(cells) + 1)}
    assert sum(bench.llm.rows_run) == len(different) < sum(map(len, prompts)) - 4 * 5 * PATCHES
    for slot, cells in zip(bench.scheduler._slots, prompts, strict=True):
        assert [value for value in bench.llm.values(slot.index) if value != 1] == [cell for cell in cells if cell >= 0 and cell != 1]


def test_a_failed_batch_with_shared_rows_is_run_again_in_parts(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=3))
    bench.llm.batch_tokens = 256
    decode, failures = bench.llm.decode_tokens, []

    def fail_once(tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]) -> int:
        if not failures and any(len(together) > 1 for together in sequences):
            decode(tokens[:3], positions[:3], sequences[:3], [])  # some of it got into the cache
            failures.append(len(sequences))
            return 1
        return decode(tokens, positions, sequences, outputs)

    monkeypatch.setattr(bench.llm, "decode_tokens", fail_once)
    for id, text in enumerate(("by", "as", "at"), 1):
        bench.ask(id, text, max_tokens=4)
    bench.run()
    assert failures and all(isinstance(end, Finished) and end.text == "xxxx" for end in bench.ends().values())
    for slot in bench.scheduler._slots:
        assert bench.llm.values(slot.index) == slot.cells and len(slot.places) == len(slot.cells)


def test_equal_cells_are_run_as_one_only_on_top_of_shared_ones() -> None:
    job = Job(1, 0.0)
    slots = [Slot(0), Slot(1), Slot(2)]
    slots[0].add([5, 6])
    slots[1].add([5, 6], slots[0].places)
    slots[2].add([5, 6])
    batch = lay_out([Part(slot, job, [7, 8 + slot.index % 2], True) for slot in slots])
    assert (batch.cells, batch.positions) == ([7, 8, 9, 7, 8], [2, 3, 3, 2, 3])
    assert batch.sequences == [[0, 1], [0], [1], [2], [2]] and batch.ends == [1, 2, 4]
    for slot, places in zip(slots, batch.places, strict=True):
        slot.add([7, 8 + slot.index % 2], places)
    assert [a == b for a, b in zip(slots[0].places, slots[1].places, strict=True)] == [True, True, True, False]
    assert not set(slots[0].places) & set(slots[2].places)


def test_scarce_cache_drops_idle_conversations_and_keeps_order(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=200, slots=3, kv_tokens=220))
    for id in range(1, 8):
        bench.ask(id, "q" * (20 * (id % 3) + 10) + str(id), max_tokens=50)
    bench.run()
    finished = [id for id, reply in bench.sent if isinstance(reply, Finished)]
    assert sorted(finished) == list(range(1, 8))
    assert sum(len(cells) for cells in bench.llm.cells.values()) <= 220 + 3 * 200  # shared cells are counted in each sequence here
    first = [next(i for i, (id, _) in enumerate(bench.sent) if id == wanted) for wanted in range(1, 8)]
    assert first == sorted(first)


def test_sharing_never_takes_more_than_the_cache_has(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=200, slots=2, kv_tokens=200))
    bench.ask(1, "same beginning, " + "a" * 80, max_tokens=40)
    bench.run()
    bench.ask(2, "same beginning, " + "b" * 80, max_tokens=40)
    bench.run()
    assert all(isinstance(end, Finished) for end in bench.ends().values())
    used = sum(len(slot.cells) for slot in bench.scheduler._slots)
    assert used - bench.ends()[2].usage.cached_tokens <= 200


def test_cancel_before_admission_and_during_an_answer(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512))
    bench.ask(1, "A", max_tokens=100)
    bench.ask(2, "B", max_tokens=100)
    bench.scheduler.cancel(2)
    bench.run(steps=4)
    drawn = bench.tokens(1)
    bench.scheduler.cancel(1)
    bench.run()
    assert (bench.ends()[1].reason, bench.ends()[2].reason) == ("cancelled", "cancelled")
    assert bench.tokens(1) == drawn and bench.ends()[1].usage.late_tokens == 0
    assert bench.tokens(2) == 0


def test_what_arrives_is_seen_before_an_answers_next_token(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(slots=1, context_tokens=200))
    bench.ask(1, "a", max_tokens=9)
    for _ in range(3):
        bench.scheduler.step()
    begun = bench.tokens(1)
    bench.scheduler.post(2, Stats())
    bench.scheduler.step()
    stats = bench.ends()[2]
    assert stats.busy == 1
    assert bench.tokens(1) <= begun + 1
    assert begun <= stats.total_tokens <= begun + 1  # ahead, a drawn token's text comes one batch later
    bench.run()
    assert bench.scheduler._draws == 0  # counted when it ended, not when somebody looked
    assert (bench.ends()[1].usage.new_tokens, bench.scheduler._stats().total_tokens) == (9, 9)


def test_the_loop_goes_on_after_an_answer_that_was_alone(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(slots=1, context_tokens=200))
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    bench.scheduler._groups._send = lambda id, reply: ended.put(id) if isinstance(reply, Finished) else None
    threading.Thread(target=bench.scheduler.run, daemon=True).start()
    for id in (1, 2):
        bench.ask(id, "a", max_tokens=5)
        assert ended.get(timeout=30) == id
        time.sleep(0.05)  # the loop has nothing to do, and waits


def test_tokenize_replies_at_once(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512))
    bench.scheduler.post(1, Tokenize((7, 8)))
    bench.scheduler.step()
    assert bench.sent == [(1, [7, 8])]


def test_a_stop_string_ends_an_answer_and_the_cache_keeps_count(manifest: Manifest, ahead: bool) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=256, slots=2))
    bench.ask(1, "A", max_tokens=60, stop="xxx")
    bench.ask(2, "B", max_tokens=30)
    bench.run()
    ends = bench.ends()
    assert (ends[1].reason, ends[1].text, ends[2].reason) == ("stop", "", "length")
    assert (bench.tokens(1), bench.tokens(2)) == (3, 30) == (ends[1].usage.new_tokens, ends[2].usage.new_tokens)
    assert [reply.index for id, reply in bench.sent if id == 2 and isinstance(reply, Token)] == list(range(30))
    assert bench.scheduler._stats().total_tokens == 33
    for slot in bench.scheduler._slots:  # what the slot believes is what the model holds
        assert bench.llm.values(slot.index) == slot.cells
    bench.ask(3, "A", max_tokens=5)
    bench.run()
    assert bench.ends()[3].reason == "length"


def test_a_failed_batch_does_not_cost_the_other_its_answer(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=256, slots=2))
    bench.ask(1, "A", max_tokens=60, stop="xxx")
    bench.ask(2, "B", max_tokens=30)
    decode, failures = bench.llm.decode_tokens, []

    def fail_once(tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]) -> int:
        if bench.tokens(1) == 2 and len(sequences) == 2 and not failures:
            failures.append(1)
            decode(tokens[:1], positions[:1], sequences[:1], [])  # half of it got into the cache
            return 1
        return decode(tokens, positions, sequences, outputs)

    monkeypatch.setattr(bench.llm, "decode_tokens", fail_once)
    bench.run()
    assert failures and {id: end.reason for id, end in bench.ends().items()} == {1: "stop", 2: "length"}
    bench.ask(3, "A", max_tokens=5)
    bench.run()
    assert bench.ends()[3].reason == "length"
