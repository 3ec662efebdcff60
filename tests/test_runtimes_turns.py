"""Whose turn it is: groups and other requests, images that wait to be encoded, and signs of life."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from runtimes_pair import PATCHES, make_artifact
from scheduler_bench import AtOnce, Bench, image

from edgemed.core.conversation import Text, Turn
from edgemed.core.errors import EngineError
from edgemed.core.manifest import Manifest
from runtimes.messages import Collected, EngineSettings, Failed, PreparedImage, Request
from runtimes.vision import Encoded, ImageQueue, hash_image
from runtimes.wire import Evaluate, Stats, SubmitGroup


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tokens' texts are looked at as soon as they are drawn, or once the next batch is on its way."""
    monkeypatch.setattr(Bench, "ahead", request.param)
    return bool(request.param)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("scheduler")
    return make_artifact(folder).manifest


def test_what_is_late_of_a_group_is_nobody_elses(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    keys: list[str] = []
    bench.scheduler._images = AtOnce(lambda key, pixels: keys.append(key))

    def request(*images: PreparedImage) -> Request:
        return Request((Turn("user", "a", images=len(images)),), images, max_tokens=2)

    for id, images in ((1, (image(1), image(2))), (2, (image(3),))):
        bench.scheduler.post(id, SubmitGroup((request(*images),)))
    bench.scheduler.step()
    for key in keys[:2]:
        bench.scheduler.post(0, Encoded(key, None, 0.1, EngineError("no memory")))
        bench.scheduler.step()
    bench.scheduler.post(0, Encoded(keys[2], np.full((PATCHES, 4), 3, np.float32), 0.1))
    bench.run()
    [[failed], [answered]] = [reply for _, reply in bench.sent]
    assert isinstance(failed, EngineError) and answered.finished.text == "xx"


def test_groups_and_requests_take_turns(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=3))
    group = SubmitGroup(tuple(Request((Turn("user", text),), max_tokens=8) for text in ("One?", "Two?")))
    bench.ask(1, "A", max_tokens=20)
    bench.run(steps=3)
    bench.scheduler.post(2, group)
    bench.ask(3, "B", max_tokens=20)
    bench.ask(4, "C", [image(1)], max_tokens=20)
    bench.scheduler.post(5, group)
    for id in range(10, 90):  # somebody always asks
        bench.ask(id, "more", max_tokens=20)
        bench.scheduler.step()
    first = list(dict.fromkeys(id for id, _ in bench.sent))
    assert first[:6] == [1, 2, 3, 4, 5, 10]
    assert [isinstance(reply, Collected) for id in (2, 5) for reply in bench.ends()[id]] == [True] * 4
    beside = [{id for id, _ in bench.sent[:place]} for place, (id, _) in enumerate(bench.sent) if id in (2, 5)]
    assert beside == [{1}, {1, 2, 3, 4}], "nothing is begun beside a group"
    bench.run()
    assert set(bench.ends()) == {1, 2, 3, 4, 5, *range(10, 90)}


def test_a_group_does_not_depend_on_who_waits_behind_it(manifest: Manifest) -> None:
    texts, batches = ["What organ is it?", "Is it an adult?", "Where?"], []
    for others in (0, 3):
        bench = Bench(manifest, EngineSettings(context_tokens=512, slots=4))
        bench.llm.tile_rows = 32
        bench.scheduler.post(1, SubmitGroup(tuple(Request((Turn("user", text),), max_tokens=5) for text in texts)))
        for id in range(2, 2 + others):
            bench.ask(id, "Behind it?")
        while 1 not in bench.ends():
            bench.scheduler.step()
        batches.append(bench.llm.batches)
    assert batches[0] == batches[1]


def test_who_waits_behind_a_group_can_be_cancelled(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    bench.scheduler._images = ImageQueue()
    bench.ask(1, "A", max_tokens=30)
    bench.run(steps=3)
    bench.scheduler.post(2, SubmitGroup((Request((Turn("user", "B"),), max_tokens=30),)))
    bench.ask(3, "C", [image(1)])
    bench.scheduler.step()
    assert bench.scheduler._stats().queued == 2
    bench.scheduler.cancel(3)
    bench.scheduler.step()
    assert bench.ends()[3].reason == "cancelled" and not bench.scheduler._images._waiting and 1 not in bench.ends()
    bench.run()
    assert set(bench.ends()) == {1, 2, 3} and not bench.scheduler._jobs


def test_images_that_nobody_wants_any_more_are_not_encoded(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    images = bench.scheduler._images = ImageQueue()
    rows = np.ones((PATCHES, 4), np.float32)
    keys = [hash_image(image(value).pixels) for value in range(4)]
    bench.ask(1, "A", [image(0)])
    bench.run()
    assert images.take()[0] == keys[0], "the first is being encoded from here on"
    for id, values in ((2, [1]), (3, [1, 2]), (4, [2]), (5, [3])):
        bench.ask(id, f"{id}", [image(value) for value in values])
    for id in (1, 3, 4):
        bench.scheduler.cancel(id)
    bench.run()
    assert [end.reason for end in bench.ends().values()] == ["cancelled"] * 3
    assert list(images._waiting) == [keys[1], keys[3]], "the second is still wanted"
    bench.ask(6, "6", [image(2), image(0)])  # what has just been dropped, and what is being encoded for nobody
    bench.run()
    assert list(images._waiting) == [keys[1], keys[3], keys[2]]
    bench.scheduler.post(0, Encoded(keys[0], rows, 0.1))
    for key in (keys[1], keys[3], keys[2]):
        assert images.take()[0] == key
        bench.scheduler.post(0, Encoded(key, rows, 0.1))
    bench.run()
    assert [bench.ends()[id].reason for id in (2, 5, 6)] == ["length"] * 3
    assert not bench.scheduler._encoding and not bench.scheduler._jobs


def test_a_request_that_failed_wants_no_more_images(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512))
    images = bench.scheduler._images = ImageQueue()
    bench.ask(1, "Two", [image(1), image(2)])
    bench.run()
    bench.scheduler.post(0, Encoded(images.take()[0], None, 0.1, EngineError("no such image")))
    bench.run()
    assert isinstance(bench.ends()[1], Failed) and not images._waiting and not bench.scheduler._encoding


def test_what_takes_long_gives_signs_of_life(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    monkeypatch.setattr("runtimes.scheduler.BEAT_S", 0.0)
    bench.scheduler.post(1, SubmitGroup((Request((Turn("user", "A group is silent"),), max_tokens=20),)))
    bench.run()
    assert bench.beats >= len(bench.llm.batches) > 20 and len(bench.sent) == 1
    bench.beats, bench.llm.batches = 0, []
    bench.scheduler.post(2, Evaluate((Text("and so is an evaluation, which is all one step" * 5),), (), all_positions=True))
    bench.scheduler.step()
    assert bench.beats >= len(bench.llm.batches) > 20 and len(bench.sent) == 2
    bench.beats, bench.scheduler._images = 0, ImageQueue()
    bench.ask(3, "The tower hangs", [image(1)])
    bench.scheduler.post(4, Stats())
    bench.scheduler.step()
    assert bench.beats == 0 and len(bench.sent) == 3, "what asks for figures now and then does not hide it"
    bench.scheduler.post(0, Encoded(bench.scheduler._images.take()[0], None, 0.1, EngineError("no memory")))
    bench.scheduler.step()
    assert bench.beats == 1
    monkeypatch.setattr("runtimes.scheduler.BEAT_S", 1000.0)
    bench.ask(5, "Not at every batch")
    bench.beats = 0
    bench.run()
    assert bench.beats == 0


def test_a_groups_batches_do_not_depend_on_which_image_came_first(manifest: Manifest) -> None:
    batches = []
    for first in (0, 1):
        bench = Bench(manifest, EngineSettings(context_tokens=512, slots=3))
        images = bench.scheduler._images = ImageQueue()
        requests = [Request((Turn("user", f"{n}", 1),), (image(n),), max_tokens=2) for n in range(2)]
        bench.scheduler.post(1, SubmitGroup((*requests, Request((Turn("user", "none"),), max_tokens=2))))
        bench.run()
        taken = [images.take(0), images.take(0)]
        for number in (first, 1 - first):
            assert not bench.llm.batches and not bench.scheduler._has_work(), "it waits for all of its images"
            bench.scheduler.post(0, Encoded(taken[number][0], np.full((PATCHES, 4), number, np.float32), 0.1))
            bench.run()
        assert len(bench.sent) == 1
        batches.append(bench.llm.batches)
    assert batches[0] == batches[1]


def test_a_groups_images_go_before_those_of_requests_behind_it(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512))
    images = bench.scheduler._images = ImageQueue()
    bench.ask(1, "before", max_tokens=20)
    bench.run(steps=2)
    bench.scheduler.post(2, SubmitGroup((Request((Turn("user", "in it", 1),), (image(3),), max_tokens=1),)))
    for id, value in ((3, 1), (4, 2), (5, 3)):
        bench.ask(id, "behind it", [image(value)])
    bench.run()
    assert list(images._waiting) == [hash_image(image(value).pixels) for value in (3, 1, 2)]


def test_a_group_that_nobody_waits_for_is_cancelled(manifest: Manifest) -> None:
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2))
    group = SubmitGroup(tuple(Request((Turn("user", f"long {n}"),), max_tokens=200) for n in range(2)))
    for id in (1, 2):
        bench.scheduler.post(id, group)
    bench.ask(3, "behind them", max_tokens=2)
    bench.run(steps=3)
    bench.scheduler.cancel(2)  # in line
    bench.run(steps=3)
    bench.scheduler.cancel(1)  # open
    bench.run()
    replies = dict(bench.sent)
    assert [reply.finished.reason for reply in replies[1]] == ["cancelled"] * 2 and 2 not in replies
    assert bench.ends()[3].reason == "length" and not bench.scheduler._jobs


def test_a_tower_that_hangs_is_not_hidden_by_others_answers(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.scheduler.BEAT_S", 0.0)
    bench = Bench(manifest, EngineSettings(context_tokens=512, slots=2, silence_limit_s=0.05))
    images = bench.scheduler._images = ImageQueue()
    bench.ask(1, "with one", [image(1)])
    bench.ask(2, "without one", max_tokens=3)
    bench.run()
    assert bench.beats
    images.take(0)
    time.sleep(0.1)
    bench.beats = 0
    bench.ask(3, "without one", max_tokens=3)
    bench.run()
    assert not bench.beats and bench.ends()[3].reason == "length"
    images.done()
    bench.ask(4, "without one", max_tokens=3)
    bench.run()
    assert bench.beats
