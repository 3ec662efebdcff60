"""The runner with a target that needs no model: order, resumption after every kind of cut, what is refused, and what is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgemed.core.errors import DatasetError, EngineDiedError, InputError, ResourceError
from edgemed.data import DatasetName, Sample, load_named, parse_dataset
from edgemed.data.splits import take_part
from edgemed.evaluation.leakage import find_leaks
from edgemed.evaluation.looks import View, show, swap_images
from edgemed.evaluation.predictions import load_predictions, pair
from edgemed.evaluation.results import build_result
from edgemed.evaluation.runner import JOURNAL_NAME, PREDICTIONS_NAME, TIMED_NAME, group_samples, run
from edgemed.evaluation.targets import Reply


class Parrot:
    """Answers with the view, the question's id and how many were asked with it; stops after `limit` groups."""

    name = "parrot"
    parallel = 1

    def __init__(self, limit: int = 1000, identity: str = "i") -> None:
        self.limit, self.identity = limit, identity
        self.asked: list[list[str]] = []

    def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
        if len(self.asked) == self.limit:
            raise EngineDiedError("stopped")
        assert len({s.image for s in samples}) == 1
        self.asked.append([s.id for s in samples])
        return [Reply(f"{view} {s.id} of {len(samples)}", 3, 0.5, elapsed_s=len(self.asked)) for s in samples]


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    for k in range(4):
        Image.fromarray(np.full((6, 8, 3), 20 * k, np.uint8)).save(tmp_path / f"{k}.png")
    # Images take turns, as in VQA-RAD, so that groups are not runs of rows.
    return [Sample.single(f"s-{k}", tmp_path / f"{k % 4}.png", f"Q{k}?", "Yes", "closed" if k % 2 else "open") for k in range(12)]


def test_questions_are_asked_by_image_and_answered_in_order(samples: list[Sample], tmp_path: Path) -> None:
    target = Parrot()
    replies = run(target, samples, "mirrored", tmp_path / "out")
    assert [r.text for r in replies] == [f"mirrored s-{k} of 3" for k in range(12)]
    assert target.asked[0] == ["s-0", "s-4", "s-8"]
    rows = [json.loads(line) for line in (tmp_path / "out" / PREDICTIONS_NAME).read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [s.id for s in samples]
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"} and len(rows[0]["answer_id"]) == 22
    timed = json.loads((tmp_path / "out" / TIMED_NAME).read_text().splitlines()[0])
    assert {"inference_time", "tokens_generated", "memory_usage"} <= set(timed["metadata"])


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("cut", [0, 1, 30, 200])
def test_a_run_that_was_cut_ends_with_the_same_file(samples: list[Sample], tmp_path: Path, groups: int, cut: int) -> None:
    run(Parrot(), samples, folder=tmp_path / "whole")
    with pytest.raises(EngineDiedError):
        run(Parrot(limit=groups), samples, folder=tmp_path / "cut")
    journal = tmp_path / "cut" / JOURNAL_NAME
    data = journal.read_bytes()
    journal.write_bytes(data[: max(0, len(data) - cut)])
    again = Parrot()
    run(again, samples, folder=tmp_path / "cut")
    assert (tmp_path / "cut" / PREDICTIONS_NAME).read_bytes() == (tmp_path / "whole" / PREDICTIONS_NAME).read_bytes()
    lost = groups > 0 and cut > 1  # a line that lacks nothing but its end is whole
    assert len(again.asked) == 4 - groups + lost, "only what is not whole in the journal is asked again"


def test_groups_that_are_answered_out_of_order_end_in_order(samples: list[Sample], tmp_path: Path) -> None:
    """Four groups at once, each held back until the one after it is answered."""
    done = [threading.Event() for _ in range(5)]
    done[4].set()

    class Slow(Parrot):
        parallel = 4

        def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
            number = int(samples[0].id.removeprefix("s-"))
            assert done[number + 1].wait(60)
            replies = super().answer(samples, view, donor)
            done[number].set()
            return replies

    replies = run(Slow(), samples, folder=tmp_path / "slow")
    assert [r.text for r in replies] == [r.text for r in run(Parrot(), samples, folder=tmp_path / "plain")]
    assert (tmp_path / "slow" / PREDICTIONS_NAME).read_bytes() == (tmp_path / "plain" / PREDICTIONS_NAME).read_bytes()


def test_large_groups_are_asked_first(samples: list[Sample], tmp_path: Path) -> None:
    """So that no engine is left with a long one when the others have ended."""
    parrot, some = Parrot(), [s for s in samples if s.id not in ("s-0", "s-4", "s-3")]
    replies = run(parrot, some, folder=tmp_path)
    assert parrot.asked == [["s-1", "s-5", "s-9"], ["s-2", "s-6", "s-10"], ["s-7", "s-11"], ["s-8"]]
    assert [reply.text.split()[1] for reply in replies] == [s.id for s in some]


def test_a_finished_run_asks_nothing(samples: list[Sample], tmp_path: Path) -> None:
    run(Parrot(), samples, folder=tmp_path)
    again = Parrot()
    assert len(run(again, samples, folder=tmp_path)) == 12 and again.asked == []


@pytest.mark.parametrize("what", ["model", "questions", "view", "images"])
def test_another_runs_folder_is_refused(samples: list[Sample], tmp_path: Path, what: str) -> None:
    run(Parrot(), samples, folder=tmp_path / "out")
    target = Parrot(identity="j") if what == "model" else Parrot()
    asked = samples[:-1] if what == "questions" else samples
    if what == "images":
        assert samples[0].image is not None
        samples[0].image.write_bytes(samples[0].image.read_bytes() + b" ")
    with pytest.raises(InputError, match="found another"):
        run(target, asked, "blank" if what == "view" else "shown", tmp_path / "out")


def test_an_id_that_comes_twice_is_named(samples: list[Sample]) -> None:
    with pytest.raises(DatasetError, match="found s-0 more than once"):
        run(Parrot(), [*samples, samples[0]])


def test_predictions_pair_by_id(samples: list[Sample], tmp_path: Path) -> None:
    run(Parrot(), samples, folder=tmp_path)
    lines = (tmp_path / PREDICTIONS_NAME).read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join(reversed(lines)) + "\n\n")
    assert [row.question_id for row in pair(samples, load_predictions(mixed))] == [s.id for s in samples]
    bare = [{"question_id": k, "text": "x"} for k in range(12)]
    mixed.write_text("\n".join(map(json.dumps, bare)))
    assert len(pair(samples, load_predictions(mixed))) == 12, "a set's own bare ids"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question_id": "s-0", "text": "x"}'], "11 without one"),
        ([json.dumps({"question_id": f"s-{k}", "text": "x"}) for k in range(13)], "1 for other questions"),
        ([json.dumps({"question_id": f"t-{k}", "text": "x"}) for k in range(12)], r"other questions \(t-0, t-1"),
        (['{"question_id": "s-0", "text": "x"}'] * 2, "found s-0 more than once"),
        (['{"question_id": "s-0"}'], "question_id and text in line 1"),
        (['{"question_id": "s-0", "text": 3}'], "question_id and text in line 1"),
        (["[1]"], "question_id and text in line 1"),
        (["The answer is yes."], "a JSON object in line 1"),
        (["\udcff"], "a JSON object in line 1"),
    ],
)
def test_files_that_do_not_fit_are_refused(samples: list[Sample], tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=message):
        pair(samples, load_predictions(path))


def test_images_that_should_change_an_answer(samples: list[Sample]) -> None:
    paths = [s.image for s in samples if s.image]
    donors = swap_images(paths)
    assert len(donors) == 4 and all(donor != path for path, donor in donors.items())
    assert swap_images(paths[:1]) == {paths[0]: paths[0]}
    picture = np.zeros((6, 8, 3), np.uint8)
    picture[:, 0] = 255
    Image.fromarray(picture).save(paths[0])
    mirrored = show(paths[0], "mirrored")
    assert mirrored is not None and (np.asarray(mirrored) == picture[:, ::-1]).all()
    assert show(paths[0], "blank") is None
    swapped = show(paths[0], "swapped", donors[paths[0]])
    assert swapped is not None and (np.asarray(swapped) == 40).all()
    assert [group.donor for group in group_samples(samples)] == [donors[p] for p in paths[:4]]


def test_the_share_of_answers_that_stay_is_told(samples: list[Sample]) -> None:
    told = [replace(s, modality="CT" if k < 6 else "", native_type="CLOSED") for k, s in enumerate(samples)]
    told[0] = replace(told[0], answer_type="unknown", native_type="ESSAY")
    result = build_result(told, ["Yes"] * 12, [None] * 12, {"blank": ["yes."] * 9 + ["No"] * 3}, ["too long"] + [""] * 11)
    assert result.looks["blank"].same.percent == 75.0 and result.looks["blank"].same.n == 12
    assert result.unknown == {"ESSAY": ["s-0"]} and result.failed == {"too long": ["s-0"]}
    assert set(result.by_modality) == {"CT", "not told"} and result.by_organ == {}
    assert result.confidence is None and result.scores.closed == 100.0 and result.scores.open_n == 5


def test_leaks_are_found_by_pixels(samples: list[Sample], tmp_path: Path) -> None:
    with Image.open(tmp_path / "2.png") as copied:
        copied.save(tmp_path / "renamed.bmp")
    training = [Sample.single("t", tmp_path / "renamed.bmp", "?", "a", "open")]
    leak = find_leaks(samples, training)
    assert (leak.images, leak.of_images, leak.questions, leak.of_questions) == (1, 4, 3, 12)
    assert leak.examples == ("s-2", "s-6", "s-10")
    assert find_leaks(samples[:2], training).images == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("slake=a/b", DatasetName("slake", Path("a/b"), "validate")),
        ("slake:test=a=b", DatasetName("slake", Path("a=b"), "test")),
        ("vqa-rad:all@1/5=x", DatasetName("vqa-rad", Path("x"), "all", (1, 5))),
        ("vqa-rad@2/3=C:/x@y", DatasetName("vqa-rad", Path("C:/x@y"), "validate", (2, 3))),
    ],
)
def test_sets_are_named_with_split_and_part(text: str, named: DatasetName) -> None:
    assert parse_dataset(text, "validate") == named


@pytest.mark.parametrize("text", ["slake", "=x", "slake=", "slake@=x", "slake@0/5=x", "slake@6/5=x", "slake:=x"])
def test_a_name_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="Expected"):
        parse_dataset(text, "validate")


def test_parts_share_no_image_and_lose_no_question(samples: list[Sample]) -> None:
    parts = [take_part(samples, k, 3) for k in (1, 2, 3)]
    assert sorted(s.id for part in parts for s in part) == sorted(s.id for s in samples)
    images = [{s.image for s in part} for part in parts]
    assert all(not a & b for k, a in enumerate(images) for b in images[k + 1 :])


def test_a_fifth_of_the_real_vqa_rad(shared: Path) -> None:
    named = parse_dataset(f"vqa-rad:all@1/5={shared / 'data' / 'vqa-rad'}", "train")
    fifth, everything = load_named(named), load_named(replace(named, part=None))
    assert 0.15 < len(fifth) / len(everything) < 0.25
    assert {s.organ for s in everything} == {"HEAD", "CHEST", "ABD"} and named.label == "all@1/5"


def test_two_evaluations_into_one_folder_are_one_too_many(samples: list[Sample], tmp_path: Path) -> None:
    class Second(Parrot):
        def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
            if not self.asked:
                with pytest.raises(ResourceError, match="found another program that writes into it"):
                    run(Parrot(), every, "shown", tmp_path / "out")
            return super().answer(samples, view, donor)

    every = samples
    assert len(run(Second(), samples, "shown", tmp_path / "out")) == 12
    assert len(run(Parrot(), samples, "shown", tmp_path / "out")) == 12, "the lock ended with the run"
