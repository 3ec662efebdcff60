"""Judged conversation: LLaVA-Med's protocol to the letter, the fair variant, and judges that misbehave, on a server of this machine."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_fixture import DOMAINS, make_files, make_row, save_lines
from openai_server import OpenAiServer
from PIL import Image
from runtimes_pair import make_artifact

from edgemed.cli import run as run_cli
from edgemed.core.errors import DatasetError, EndpointError, InputError
from edgemed.evaluation.judge.cost import estimate_cost, measure_cost, parse_price
from edgemed.evaluation.judge.fair import compare_fairly
from edgemed.evaluation.judge.judges import EndpointJudge, EngineJudge
from edgemed.evaluation.judge.protocol import INSTRUCTION, PROTOCOLS, ReplyError, build_messages, parse_reply, read_scores
from edgemed.evaluation.judge.questions import Item, load_items
from edgemed.evaluation.judge.run import Plan, build_asks, review, score_lines, scores_of
from edgemed.evaluation.judge.summary import summarise
from runtimes.fake import FakeEngine, Script, fake_artifact

V15 = PROTOCOLS["v1.5"]


def number_of(body: dict[str, Any]) -> int:
    match = re.search(r"What is shown in (\d+)\?", body["messages"][1]["content"])
    assert match
    return int(match[1])


def judge_by_number(body: dict[str, Any]) -> str:
    """Two scores that depend on the question and on who stands where."""
    n, first = number_of(body), "[Assistant 1]\nReference" in body["messages"][1]["content"]
    return f"{n % 9 + 1} {(n * 7) % 9 + 1}\nBecause of {n}." if first else f"{(n * 5) % 9 + 1} {n % 9 + 1}\nThe other way."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAiServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with OpenAiServer(judge_by_number) as server:
        yield server


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    return load_items(*make_files(tmp_path), V15)


# -- the protocol -------------------------------------------------------------------------------------------------------


def test_the_prompt_is_llava_meds_letter_for_letter() -> None:
    row = {"fig_label": "Fig. 1", "fig_caption": "A chest.", "in_text_mention": [{"tokens": "it's", "entities": []}]}
    system, user = build_messages(row, "What?\n<image>", "First.", "Second.", "Rate them.")
    assert system == {"role": "system", "content": "'You are a helpful and precise assistant for checking the quality of the answer."}
    assert user["role"] == "user"
    assert user["content"] == (
        "[Context]\nFigure Caption:\nFig. 1: A chest.\n\nFigure Context:\n\t- [{'tokens': \"it's\", 'entities': []}]\n\n"
        "[Question]\nWhat?\n<image>\n\n[Assistant 1]\nFirst.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nSecond.\n\n[End of Assistant 2]\n\n[System]\nRate them.\n\n"
    )


def test_the_versions_differ_in_the_images_marker(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    assert load_items(*files, V15)[0].question == "What is shown in 1?\n<image>"
    assert load_items(*files, PROTOCOLS["v1.0"])[0].question == "What is shown in 1?"


def test_the_reference_stands_first_and_second_when_exchanged(items: list[Item]) -> None:
    plain, swapped = build_asks(items[:1], INSTRUCTION, both_orders=True)
    assert "[Assistant 1]\nReference 1" in plain.messages[1]["content"] and "[Assistant 2]\nAnswer 1." in plain.messages[1]["content"]
    assert "[Assistant 1]\nAnswer 1." in swapped.messages[1]["content"] and "[Assistant 2]\nReference 1" in swapped.messages[1]["content"]
    assert [ask.swapped for ask in build_asks(items, INSTRUCTION, both_orders=False)] == [False] * len(items)


@pytest.mark.parametrize(("reply", "scores"), [("8 9", (8, 9)), ("8.5 7\nWhy", (8.5, 7)), ("10 1\n\n", (10, 1)), ("85 90", (85, 90))])
def test_a_score_line_is_read(reply: str, scores: tuple[float, float]) -> None:
    assert parse_reply(reply) == scores


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("", "nothing"),
        ("Both did well.", "3 word"),
        ("8", "1 word"),
        ("8 ", "not two numbers"),
        ("8, 9", "not two numbers"),
        ("8  9", "3 word"),
        ("\n8 9", "1 word"),
        ("Scores: 8 9", "3 word"),
        ("eight nine", "not two numbers"),
        ("nan 9", "not finite"),
        ("8 inf", "not finite"),
    ],
)
def test_what_is_no_score_line_is_told(reply: str, says: str) -> None:
    with pytest.raises(ReplyError, match=re.escape(says)):
        parse_reply(reply)


def test_a_reference_of_0_cannot_be_divided_by() -> None:
    assert read_scores("8 0", swapped=False) == (8, 0)
    for reply, swapped in (("0 8", False), ("8 0", True)):
        with pytest.raises(ReplyError, match="score of 0"):
            read_scores(reply, swapped)


def test_the_table_equals_an_independent_derivation(tmp_path: Path) -> None:
    """Against the same sums done another way, from the lines that LLaVA-Med's own script would read."""
    rng = random.Random(1)
    items = load_items(*make_files(tmp_path, 193), V15)
    scores = {item.id: (float(rng.randint(1, 10)), float(rng.randint(1, 10))) for item in items}
    table = summarise(items, scores)
    order = ["chest_xray", "mri", "histology", "gross", "ct_scan"]
    columns: dict[str, list[tuple[float, float]]] = {}
    for number, pair in enumerate(scores.values(), 1):
        row = make_row(number)
        domain = next((name for name in order if row["domain"][name]), None)
        for name in (row["type"], domain, "overall"):
            columns.setdefault(str(name), []).append(pair)
    columns.pop("None", None)
    assert set(table) == set(columns) and list(table)[-1] == "overall"
    for name, pairs in columns.items():
        first, second = zip(*pairs, strict=True)
        assert table[name].gpt4_score == pytest.approx(sum(first) / len(first), abs=1e-12)
        assert table[name].pred_score == pytest.approx(sum(second) / len(second), abs=1e-12)
        assert table[name].pred_relative_score == pytest.approx(100 * sum(b / a for a, b in pairs) / len(pairs), abs=1e-9)
        assert table[name].data_size == len(pairs)


def test_it_is_a_mean_of_ratios_and_not_a_ratio_of_means(items: list[Item]) -> None:
    overall = summarise(items[:2], {items[0].id: (2.0, 4.0), items[1].id: (8.0, 4.0)})["overall"]
    assert overall.pred_relative_score == 125.0 and overall.pred_score / overall.gpt4_score == 0.8


# -- pairing ------------------------------------------------------------------------------------------------------------


def test_answers_are_paired_by_id_whatever_their_order(tmp_path: Path) -> None:
    questions, answers = make_files(tmp_path)
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(reversed(lines)) + "\n\n")
    assert [item.answer for item in load_items(questions, answers, V15)] == [f"Answer {n}." for n in range(1, 13)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows[:-2], r"2 without an answer \(11, 12\)"),
        (lambda rows: [*rows, {"question_id": 99, "text": "x"}], r"1 that are not asked there \(99\)"),
        (lambda rows: [*rows, rows[0]], "found 1 again in line 13"),
        (lambda rows: [*rows[:-1], {"question_id": 12}], "Expected text in line 12"),
        (lambda rows: [*rows[:-1], {"question_id": 12, "text": ["a", "b"]}], "found list"),
        (lambda rows: [*rows[:-1], {"question_id": 12, "text": None}], "found NoneType"),
        (lambda rows: [], "found an empty file"),
    ],
)
def test_answers_that_do_not_belong_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    questions, answers = make_files(tmp_path)
    save_lines(answers, change([json.loads(line) for line in answers.read_text().splitlines()]))
    with pytest.raises(DatasetError, match=says):
        load_items(questions, answers, V15)


def test_broken_questions_are_refused(tmp_path: Path) -> None:
    questions, answers = make_files(tmp_path, 2)
    row = make_row(1)
    for text, says in [
        (json.dumps(row) + "\n{broken", "Expected JSON in line 2"),
        ("[1]\n", "found list"),
        (json.dumps({k: v for k, v in row.items() if k != "fig_caption"}), "Expected fig_caption in line 1"),
        (json.dumps(row | {"domain": "mri"}) + "\n" + json.dumps(make_row(2)), "Expected an object as 'domain' of 1"),
        ("\udcff", "Expected JSON in line 1"),
    ]:
        questions.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(DatasetError, match=says):
            load_items(questions, answers, V15)
    with pytest.raises(DatasetError, match="found none"):
        load_items(tmp_path / "none.jsonl", answers, V15)


def test_a_number_is_an_answer_and_a_question_may_have_no_domain(tmp_path: Path) -> None:
    row = make_row(1) | {"domain": dict.fromkeys(DOMAINS, False)}
    (item,) = load_items(save_lines(tmp_path / "q", [row]), save_lines(tmp_path / "a", [{"question_id": "1", "text": 2}]), V15)
    assert (item.answer, item.domain) == ("2", None)
    assert list(summarise([item], {"1": (5.0, 5.0)})) == ["conversation", "overall"]


# -- judges that misbehave ----------------------------------------------------------------------------------------------


def ask_all(server: OpenAiServer, items: list[Item], folder: Path, retries: int = 3, **plan: Any) -> list[Any]:
    judge = EndpointJudge("m", server.url, retries=retries)
    return review(items, judge, INSTRUCTION, folder, Plan(**plan), {"protocol": "v1.5"})


@pytest.mark.parametrize("fault", ["prose", "half", "empty", "comma", "null", "no choices", "html", "torn", "hang up", 429, 500, 503])
def test_a_fault_that_passes_is_tried_again(server: OpenAiServer, items: list[Item], tmp_path: Path, fault: int | str) -> None:
    server.faults = [fault]
    reviews = ask_all(server, items[:1], tmp_path / "out", parallel=1)
    assert [r.scores for r in reviews] == [(2.0, 8.0)] and len(server.requests) == 2


@pytest.mark.parametrize(
    ("fault", "why"),
    [("prose", "7 word"), ("half", "1 word"), ("empty", "nothing"), ("no choices", "no message"), (400, "refused this question")],
)
def test_a_reply_that_stays_useless_is_kept_and_named(
    server: OpenAiServer, items: list[Item], tmp_path: Path, fault: int | str, why: str
) -> None:
    server.faults = [fault] * 3
    reviews = ask_all(server, items, tmp_path / "out", parallel=1)
    assert reviews[0].scores is None and why in reviews[0].why and reviews[0].attempts == 3
    assert all(r.scores for r in reviews[1:]) and len(scores_of(reviews, swapped=False)) == 11
    assert len(score_lines(items, reviews, "gpt_eval").splitlines()) == 11
    again = ask_all(server, items, tmp_path / "out", parallel=1)  # what had no scores is asked for once more, the rest is not
    assert all(r.scores for r in again) and len(server.requests) == 3 + 11 + 1


@pytest.mark.parametrize(("status", "says"), [(401, "does not accept the key"), (403, "does not accept the key"), (404, "a model 'm'")])
def test_what_no_question_can_change_ends_the_run(server: OpenAiServer, items: list[Item], tmp_path: Path, status: int, says: str) -> None:
    server.faults = [status] * 100
    with pytest.raises(EndpointError, match=says):
        ask_all(server, items, tmp_path / "out", parallel=1)
    assert len(server.requests) == 1


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_judge_that_dies_midway_leaves_what_it_said(server: OpenAiServer, items: list[Item], tmp_path: Path, parallel: int) -> None:
    whole = ask_all(server, items, tmp_path / "whole", parallel=parallel, both_orders=True)
    server.requests.clear()
    server.die_after = 7
    with pytest.raises(EndpointError, match="gives no answer") as caught:
        ask_all(server, items, tmp_path / "out", retries=0, parallel=parallel, both_orders=True)
    assert "run the same command again" in caught.value.hint
    kept = (tmp_path / "out/reviews.jsonl").read_text().splitlines()[1:]
    assert len(kept) == 7
    server.die_after = None
    server.requests.clear()
    assert ask_all(server, items, tmp_path / "out", parallel=parallel, both_orders=True) == whole
    assert len(server.requests) == 24 - 7
    assert (tmp_path / "out/reviews.jsonl").read_bytes() == (tmp_path / "whole/reviews.jsonl").read_bytes()


def test_a_line_that_a_kill_cut_off_is_dropped(server: OpenAiServer, items: list[Item], tmp_path: Path) -> None:
    ask_all(server, items, tmp_path / "out")
    path = tmp_path / "out/reviews.jsonl"
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        ask_all(server, items, tmp_path / "out")
        assert path.read_bytes() == whole


def test_killed_and_resumed_the_files_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, with SIGKILL while the judge thinks about its sixth question."""
    questions, answers = make_files(tmp_path)
    thinking, go_on = threading.Event(), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        if number_of(body) == 6 and not go_on.is_set():
            thinking.set()
            go_on.wait(60)
        return judge_by_number(body)

    with OpenAiServer(answer) as server:
        command = ["judge", str(questions), str(answers), "--judge", "m", "--endpoint", server.url, "--parallel", "1", "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen([sys.executable, "-m", "edgemed", *command, "--out", str(tmp_path / "out")], env=environment)
        assert thinking.wait(60)
        process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        process.wait()
        go_on.set()
        assert len((tmp_path / "out/reviews.jsonl").read_text().splitlines()) == 1 + 5
        assert run_cli([*command, "--out", str(tmp_path / "out")]) == 0
        assert run_cli([*command, "--out", str(tmp_path / "whole")]) == 0
    for name in ("reviews.jsonl", "scores.jsonl", "summary.json", "summary.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_journal_of_something_else_is_refused(server: OpenAiServer, items: list[Item], tmp_path: Path) -> None:
    ask_all(server, items[:2], tmp_path / "out")
    before = (tmp_path / "out/reviews.jsonl").read_bytes()
    judge = EndpointJudge("other", server.url)
    for arguments, says in [
        ((items, judge, INSTRUCTION), "of the judge 'other', found 'm'"),
        ((items, EndpointJudge("m", server.url), "Rate."), "instruction sha256"),
        (([Item(**{**vars(items[0]), "answer": "changed"})], EndpointJudge("m", server.url), INSTRUCTION), "another prompt for 1"),
    ]:
        with pytest.raises(InputError, match=says):
            review(*arguments, tmp_path / "out", Plan(), {"protocol": "v1.5"})
    (tmp_path / "out/reviews.jsonl").write_bytes(before + b'{"a": 1}\n')
    with pytest.raises(DatasetError, match="Expected reviews"):
        ask_all(server, items, tmp_path / "out")


def test_a_smaller_run_keeps_what_a_larger_one_asked(server: OpenAiServer, items: list[Item], tmp_path: Path) -> None:
    ask_all(server, items, tmp_path / "out", both_orders=True)
    server.requests.clear()
    assert len(ask_all(server, items[:3], tmp_path / "out")) == 3
    assert len(ask_all(server, items, tmp_path / "out", both_orders=True)) == 24 and not server.requests


def test_the_key_is_sent_and_a_server_of_ones_own_needs_none(
    server: OpenAiServer, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_all(server, items[:1], tmp_path / "a")
    assert server.keys == ["Bearer secret"] and server.requests[0]["temperature"] == 0 and "max_tokens" not in server.requests[0]
    monkeypatch.delenv("OPENAI_API_KEY")
    ask_all(server, items[:1], tmp_path / "b")
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        EndpointJudge("m", None)


# -- the fair variant ---------------------------------------------------------------------------------------------------


def test_only_what_both_orders_say_is_won(items: list[Item]) -> None:
    forward = {"1": (5.0, 8.0), "2": (5.0, 8.0), "3": (9.0, 4.0), "4": (6.0, 6.0)}
    swapped = {"1": (6.0, 7.0), "2": (8.0, 5.0), "3": (8.0, 4.0), "4": (6.0, 7.0), "5": (1.0, 1.0)}
    fair = compare_fairly(items, forward, swapped)
    assert fair is not None
    assert (fair.questions, fair.images, fair.won.value, fair.lost.value, fair.tied.value) == (4, 2, 25.0, 25.0, 50.0)
    assert fair.contradicted.value == 25.0
    reference, model = (5.5 + 6.5 + 8.5 + 6) / 4, (7.5 + 6.5 + 4 + 6.5) / 4
    assert (fair.reference_score.value, fair.model_score.value) == pytest.approx((reference, model))
    assert fair.ratio_of_means.value == pytest.approx(100 * model / reference)
    ratios = [(8 / 5 + 7 / 6) / 2, (8 / 5 + 5 / 8) / 2, (4 / 9 + 4 / 8) / 2, (1 + 7 / 6) / 2]
    assert fair.mean_of_ratios.value == pytest.approx(100 * sum(ratios) / 4)


def test_a_judge_that_likes_the_first_place_shows(items: list[Item]) -> None:
    fair = compare_fairly(items, {i.id: (8.0, 5.0) for i in items}, {i.id: (5.0, 8.0) for i in items})
    assert fair is not None
    assert (fair.place_bias.value, fair.contradicted.value, fair.tied.value, fair.model_score.value) == (3.0, 100.0, 100.0, 6.5)
    assert (fair.tied.low, fair.tied.high) == (100.0, 100.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 samples of 40 independent questions, won with probability 0.3: a 95 % interval must hold 30 % in about 190 of them."""
    rows = [make_row(n) | {"pair_id": f"p{n}"} for n in range(1, 41)]
    answers = [{"question_id": r["question_id"], "text": "x"} for r in rows]
    items = load_items(save_lines(tmp_path / "q", rows), save_lines(tmp_path / "a", answers), V15)
    monkeypatch.setattr("edgemed.evaluation.judge.fair.DRAWS", 1000)
    rng, held = random.Random(3), 0
    for _ in range(200):
        scores = {item.id: (5.0, 8.0) if rng.random() < 0.3 else (5.0, 2.0) for item in items}
        won = compare_fairly(items, scores, scores)
        assert won is not None and won.won.low is not None and won.won.high is not None
        held += won.won.low <= 30.0 <= won.won.high
    assert 178 <= held <= 199


def test_without_both_orders_there_is_nothing_fair(items: list[Item]) -> None:
    assert compare_fairly(items, {"1": (5.0, 5.0)}, {}) is None
    one = compare_fairly(items, {"1": (5.0, 6.0)}, {"1": (5.0, 6.0)})
    assert one is not None and one.won.low is None


# -- cost ---------------------------------------------------------------------------------------------------------------


def test_cost_before_and_after(server: OpenAiServer, items: list[Item], tmp_path: Path) -> None:
    price = parse_price("30, 60")
    asks = build_asks(items, INSTRUCTION, both_orders=True)
    before = estimate_cost(asks, price)
    letters = sum(len(m["content"]) for ask in asks for m in ask.messages)
    assert before.asks == 24 and letters / 4 < (before.prompt_tokens or 0) < letters / 2
    after = measure_cost(ask_all(server, items, tmp_path / "a"), price)
    assert (after.prompt_tokens, after.new_tokens, after.dollars) == (1200, 120, pytest.approx(1200 * 30e-6 + 120 * 60e-6))
    server.usage = False
    assert measure_cost(ask_all(server, items, tmp_path / "b"), price).dollars is None
    for text in ("30", "a,b", "-1,2"):
        with pytest.raises(InputError, match="--price"):
            parse_price(text)


# -- offline ------------------------------------------------------------------------------------------------------------


def test_our_own_engine_judges_and_is_asked_once(items: list[Item], tmp_path: Path) -> None:
    engine: Any = FakeCollected(Script(("8 6\nWhy not.", "Both are fine."), tokens_per_s=1e9))
    reviews = review(items[:2], EngineJudge(engine, "judge.gguf", 64), INSTRUCTION, tmp_path, Plan(parallel=1), {})
    assert reviews[0].scores == (8.0, 6.0) and reviews[0].reply == "8 6\nWhy not."
    assert reviews[1].scores is None and reviews[1].attempts == 1 and "3 word" in reviews[1].why
    assert engine.requests[0].max_tokens == 64 and "[Assistant 2]\nAnswer 1." in engine.requests[0].turns[0].text


def test_a_question_too_long_for_the_judge_is_named(items: list[Item], tmp_path: Path) -> None:
    engine: Any = FakeCollected(Script(("8 6",), tokens_per_s=1e9), fake_artifact(context_length=30))
    (found,) = review(items[:1], EngineJudge(engine, "judge.gguf", 64), INSTRUCTION, tmp_path, Plan(parallel=1), {})
    assert found.scores is None and "too long for the judge" in found.why


class FakeCollected(FakeEngine):
    """The fake engine with `ask`, as the real one has it."""

    def ask(self, turns: Any, **options: Any) -> Any:
        from runtimes.engine import Engine

        return Engine.ask(self, turns, **options)  # type: ignore[arg-type]


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = run_cli([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        return code, json.loads(said.out) if said.out else None, said.err

    return call


def test_the_command_writes_what_llava_meds_summary_reads(server: OpenAiServer, tmp_path: Path, say: Any) -> None:
    files = make_files(tmp_path)
    code, result, _ = say("judge", *files, "--judge", "m", "--endpoint", server.url, "--out", tmp_path / "out", "--both-orders")
    assert code == 0 and result["instruction"] == "built in" and result["fair"]["questions"] == 12 and result["unscored"] == []
    lines = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert [list(line)[-4:] for line in lines] == [["question", "ans1", "ans2", "gpt_eval"]] * 12
    pairs = [tuple(float(x) for x in line["gpt_eval"].split("\n")[0].split(" ")) for line in lines]
    overall = result["table"]["overall"]
    assert overall["pred_relative_score"] == pytest.approx(100 * sum(b / a for a, b in pairs) / 12)
    assert json.loads((tmp_path / "out/summary.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}
    assert "| overall |" in (tmp_path / "out/summary.md").read_text()


def test_an_instruction_from_a_file_is_sent_as_it_is(server: OpenAiServer, tmp_path: Path, say: Any) -> None:
    files = make_files(tmp_path, 1)
    path = tmp_path / "instruction.txt"
    path.write_text("Rate both.\n  Two numbers.\n")
    code, result, _ = say("judge", *files, "--judge", "m", "--endpoint", server.url, "--out", tmp_path / "o", "--instruction", path)
    assert code == 0 and result["instruction"] == "file"
    assert server.requests[0]["messages"][1]["content"].endswith("[System]\nRate both.\n  Two numbers.\n\n")


def test_estimate_asks_nobody(server: OpenAiServer, tmp_path: Path, say: Any) -> None:
    files = make_files(tmp_path)
    code, result, _ = say("judge", *files, "--out", tmp_path / "out", "--estimate", "--price", "30,60", "--limit", 5)
    assert code == 0 and result["estimate"]["asks"] == 5 and result["estimate"]["dollars"] > 0
    assert not server.requests and not (tmp_path / "out").exists()


def test_useless_replies_are_warned_of_and_all_useless_is_an_error(server: OpenAiServer, tmp_path: Path, say: Any) -> None:
    files = make_files(tmp_path, 3)
    arguments = ("judge", *files, "--judge", "m", "--endpoint", server.url, "--attempts", 1, "--parallel", 1, "--out", tmp_path / "out")
    server.faults = ["prose"] * 3
    code, result, errors = say(*arguments)
    assert code == 1 and result is None and "found none in 3 replies" in errors
    server.faults = ["half"]
    code, result, errors = say(*arguments)
    assert code == 0 and "No scores for 1: a first line of 1 word(s)" in errors and "1 of 3 replies" in errors
    assert result["unscored"] == [{"question_id": "1", "swapped": False, "why": "a first line of 1 word(s) where two scores belong"}]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "either --judge NAME or --gguf FILE"),
        (("--judge", "m", "--gguf", "x.gguf"), "either --judge NAME or --gguf FILE"),
        (("--judge", "m", "--protocol", "v2"), "--protocol v1.5 or v1.0, found 'v2'"),
        (("--judge", "m", "--price", "free"), "--price PROMPT,REPLY"),
        (("--judge", "m", "--instruction", "/no/such"), "Expected a file"),
        (("--gguf", "/no/such.gguf"), "Expected a file"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path: Path, say: Any, options: tuple[str, ...], says: str) -> None:
    code, result, errors = say("judge", *make_files(tmp_path, 1), "--out", tmp_path / "o", *options)
    assert code == 1 and result is None and says in errors and "unforeseen" not in errors


# -- a model of ours answers first --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_artifact(folder)
    return folder


def make_images(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), (40 * number, 90, 200)).save(folder / f"p{number}.jpg")
    return folder


def test_a_converted_model_answers_and_is_judged(
    server: OpenAiServer, tiny: Path, tmp_path: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemed.evaluation.judge.answers.MAX_TOKENS", 4)  # a random model does not end by itself
    questions, _ = make_files(tmp_path)
    images = make_images(tmp_path / "images")
    arguments = ("judge", questions, "--model", tiny, "--image-folder", images, "--judge", "m", "--endpoint", server.url)
    code, result, _ = say(*arguments, "--out", tmp_path / "out")
    assert code == 0 and result["table"]["overall"]["data_size"] == 12
    path = tmp_path / "out/answers.jsonl"
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["question_id"] for row in rows] == [str(n) for n in range(1, 13)]
    assert rows[0]["prompt"] == "What is shown in 1?" and rows[0]["model_id"] == "model" and rows[0]["metadata"]["tokens_generated"] > 0
    # Killed in its sixth answer, and gone on from there: the same bytes.
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]) + b'{"question_id": "6", "te')
    assert say(*arguments, "--out", tmp_path / "out")[0] == 0 and path.read_bytes() == whole
    path.write_bytes(whole.replace(b"manifest_sha256", b"somebody_elses_"))
    code, _, errors = say(*arguments, "--out", tmp_path / "out")
    assert code == 1 and "found those of another" in errors


def test_what_answering_lacks_is_told(tiny: Path, tmp_path: Path, say: Any) -> None:
    questions, _ = make_files(tmp_path)
    code, _, errors = say("judge", questions, "--judge", "m", "--out", tmp_path / "out")
    assert code == 1 and "Expected ANSWERS, or --model DIR with --image-folder DIR" in errors
    images = make_images(tmp_path / "images", 2)
    code, _, errors = say("judge", questions, "--model", tiny, "--image-folder", images, "--judge", "m", "--out", tmp_path / "out")
    assert code == 1 and "p2.jpg, found none (7 of 12 questions lack theirs)" in errors


def test_a_limit_takes_the_first_questions_and_their_answers(tmp_path: Path) -> None:
    questions, answers = make_files(tmp_path)
    assert [item.id for item in load_items(questions, answers, V15, limit=2)] == ["1", "2"]
    save_lines(answers, [{"question_id": 1, "text": "x"}, {"question_id": 2, "text": "y"}])
    assert [item.answer for item in load_items(questions, answers, V15, limit=2)] == ["x", "y"]
    with pytest.raises(DatasetError, match="10 without an answer"):
        load_items(questions, answers, V15)


def test_judge_and_questions_are_looked_at_before_anything_is_answered(tmp_path: Path, say: Any) -> None:
    questions, _ = make_files(tmp_path)
    ours = ("--model", tmp_path / "no-model", "--image-folder", tmp_path, "--out", tmp_path / "out")
    code, _, errors = say("judge", questions, *ours, "--gguf", tmp_path / "no-judge.gguf")
    assert code == 1 and "no-judge.gguf" in errors and "no-model" not in errors
    questions.write_text(json.dumps({k: v for k, v in json.loads(questions.read_text().splitlines()[0]).items() if "fig" not in k}))
    code, _, errors = say("judge", questions, *ours, "--judge", "m")
    assert code == 1 and "fig" in errors and "no-model" not in errors and not (tmp_path / "out").exists()
