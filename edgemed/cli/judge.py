"""`edgemed judge`: conversation judged by another model, LLaVA-Med's way and a fair way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.cli.options import (
    Attempts,
    BothOrders,
    Context,
    Endpoint,
    EstimateOnly,
    Gguf,
    ImageFolder,
    Instruction,
    Json,
    JudgedAnswers,
    JudgedModel,
    JudgedQuestions,
    JudgeName,
    JudgeOut,
    JudgeProtocol,
    Limit,
    MaxTokens,
    Parallel,
    Prices,
    Quiet,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.evaluation.judge.cost import Cost, Price
    from edgemed.evaluation.judge.judges import Judge
    from edgemed.evaluation.judge.protocol import Protocol
    from edgemed.evaluation.judge.questions import Item
    from edgemed.evaluation.judge.render import Outcome

JUDGE_CONTEXT_TOKENS = 8192


def judge(
    questions: JudgedQuestions,
    answers: JudgedAnswers = None,
    out_dir: JudgeOut = Path("judged"),
    model: JudgedModel = None,
    image_folder: ImageFolder = None,
    judge: JudgeName = None,
    endpoint: Endpoint = None,
    gguf: Gguf = None,
    instruction: Instruction = None,
    protocol: JudgeProtocol = "v1.5",
    both_orders: BothOrders = False,
    limit: Limit = None,
    parallel: Parallel = 4,
    attempts: Attempts = 3,
    price: Prices = None,
    estimate: EstimateOnly = False,
    max_tokens: MaxTokens = 512,
    context: Context = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have another model score answers against reference answers: LLaVA-Med's protocol, and with --both-orders a fair one.

    An endpoint is sent questions, captions and answers, and no image. With --gguf nothing leaves this machine.
    """
    from edgemed.evaluation.judge.cost import estimate_cost, parse_price
    from edgemed.evaluation.judge.questions import check_questions, load_items
    from edgemed.evaluation.judge.run import Plan, build_asks

    out = Output(json=json, quiet=quiet)
    rules, told = find_protocol(protocol), read_instruction(instruction)
    dollars = parse_price(price) if price is not None else None
    if not estimate:
        check_judge(judge, gguf)
    if answers is None:
        check_questions(questions, rules, limit)
    told_answers = answers or answer_first(questions, model, image_folder, out_dir, limit, out)
    items = load_items(questions, told_answers, rules, limit)
    expected = estimate_cost(build_asks(items, told, both_orders), dollars)
    out.note(f"Expected: {describe_cost(expected)}.")
    if estimate:
        out.text(describe_cost(expected))
        out.result({"estimate": asdict(expected)})
        return
    with open_judge(judge, endpoint, gguf, context, max_tokens, out) as somebody:
        plan = Plan(both_orders, 1 if gguf else parallel, attempts)
        outcome = _run(items, somebody, rules, told, instruction, out_dir, plan, dollars, out)
    _show(outcome, out_dir, out)


def answer_first(questions: Path, model: Path | None, images: Path | None, folder: Path, limit: int | None, out: Output) -> Path:
    """Answers of a model of ours, in the output folder. Raises InputError, and what asking raises."""
    from edgemed.cli.compose import engine_settings, require_artifact
    from edgemed.core.errors import InputError
    from edgemed.evaluation.judge.answers import answer_questions
    from runtimes.engine import Engine

    if model is None or images is None:
        raise InputError(
            "Expected ANSWERS, or --model DIR with --image-folder DIR, found neither.", "Name the answers or who is to answer."
        )
    artifact = require_artifact(model, out)
    path = folder / "answers.jsonl"
    with Engine.open(artifact, engine_settings(artifact)) as engine, out.progress() as bar:
        answer_questions(engine, questions, images, path, limit, partial(bar, "Answering"))
    return path


def find_protocol(name: str) -> Protocol:
    """By name. Raises InputError."""
    from edgemed.core.errors import InputError
    from edgemed.evaluation.judge.protocol import PROTOCOLS

    if name not in PROTOCOLS:
        raise InputError(f"Expected --protocol {' or '.join(PROTOCOLS)}, found '{name}'.", "Pass one of them.")
    return PROTOCOLS[name]


def read_instruction(path: Path | None) -> str:
    """The file's text, without the line break that editors put at its end; ours without a file. Raises InputError."""
    from edgemed.core.errors import InputError
    from edgemed.core.files import os_errors
    from edgemed.evaluation.judge.protocol import INSTRUCTION

    if path is None:
        return INSTRUCTION
    try:
        with os_errors(path):
            text = path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected text in {path}, found other bytes.", "Save it as UTF-8.") from error
    if not text.strip():
        raise InputError(f"Expected an instruction in {path}, found an empty file.", "Leave --instruction out, or fill it.")
    return text


def describe_cost(cost: Cost) -> str:
    """One line."""
    told = [f"{cost.asks} request(s)"]
    if cost.prompt_tokens is not None and cost.new_tokens is not None:
        told.append(f"{cost.prompt_tokens} tokens of prompts and {cost.new_tokens} of replies")
    if cost.dollars is not None:
        told.append(f"{cost.dollars:.2f} dollars")
    return ", ".join(told)


def check_judge(name: str | None, gguf: Path | None) -> None:
    """That there is one judge, and its file where it has one, before anything is answered. Raises InputError, ArtifactError."""
    from edgemed.core.errors import InputError

    if (name is None) == (gguf is None):
        raise InputError("Expected either --judge NAME or --gguf FILE.", "For example: --judge gpt-4, or --gguf judge.gguf")
    if gguf is not None:
        from runtimes import libllama
        from runtimes.gguf_header import read_header

        read_header(gguf, libllama.tensor_bytes)


@contextmanager
def open_judge(
    name: str | None, endpoint: str | None, gguf: Path | None, context: int | None, max_tokens: int, out: Output
) -> Iterator[Judge]:
    """The endpoint's judge or the offline one. Raises InputError, MissingExtraError, and what loading raises."""
    from edgemed.evaluation.judge.judges import EndpointJudge, EngineJudge

    check_judge(name, gguf)
    if name is not None:
        judge = EndpointJudge(name, endpoint)
        out.note(f"Questions, captions and answers go to {judge.address}; images do not.")
        yield judge
        return
    from edgemed.evaluation.judge.protocol import SYSTEM
    from runtimes.messages import EngineSettings
    from runtimes.textmodel import open_text_model

    assert gguf is not None
    with open_text_model(gguf, SYSTEM, EngineSettings(context_tokens=context or JUDGE_CONTEXT_TOKENS)) as engine:
        yield EngineJudge(engine, gguf.name, max_tokens)


def _run(
    items: Sequence[Item],
    somebody: Judge,
    rules: Protocol,
    told: str,
    file: Path | None,
    folder: Path,
    plan: Any,
    price: Price | None,
    out: Output,
) -> Outcome:
    from edgemed.evaluation.judge.cost import measure_cost
    from edgemed.evaluation.judge.fair import compare_fairly
    from edgemed.evaluation.judge.protocol import hash_instruction
    from edgemed.evaluation.judge.render import Outcome
    from edgemed.evaluation.judge.run import review, scores_of
    from edgemed.evaluation.judge.summary import summarise

    with out.progress() as bar:
        reviews = review(items, somebody, told, folder, plan, {"protocol": rules.name}, partial(bar, "Judging"))
    forward, swapped = scores_of(reviews, False), scores_of(reviews, True)
    digest = hash_instruction(told)
    kind = "built in" if file is None else "published" if digest == rules.published_sha256 else "file"
    table, fair = summarise(items, forward), compare_fairly(items, forward, swapped) if plan.both_orders else None
    outcome = Outcome(somebody.name, rules.name, kind, digest, table, fair, reviews, measure_cost(reviews, price))
    _save(items, outcome, rules, folder)
    return outcome


def _save(items: Sequence[Item], outcome: Outcome, rules: Protocol, folder: Path) -> None:
    from json import dumps

    from edgemed.core.files import save_text
    from edgemed.evaluation.judge.render import document, markdown
    from edgemed.evaluation.judge.run import score_lines

    save_text(folder / "scores.jsonl", score_lines(items, outcome.reviews, rules.reply_key))
    save_text(folder / "summary.json", dumps(document(outcome), indent=1) + "\n")
    save_text(folder / "summary.md", markdown(outcome))


def _show(outcome: Outcome, folder: Path, out: Output) -> None:
    from edgemed.core.errors import EndpointError
    from edgemed.evaluation.judge.render import FAIR_COLUMNS, TABLE_COLUMNS, document, fair_rows, out_of_range, table_rows, unscored

    lost = unscored(outcome.reviews)
    for row in lost[:5]:
        out.warn(f"No scores for {row['question_id']}: {row['why']}.")
    if lost:
        out.warn(f"{len(lost)} of {len(outcome.reviews)} replies hold no scores and count nowhere; all are named in {folder}/summary.md.")
    if outside := out_of_range(outcome.reviews):
        out.warn(f"{outside} replies have a score outside 1 to 10; they count, as in LLaVA-Med's script.")
    if not outcome.table:
        raise EndpointError(
            f"Expected scores from {outcome.judge}, found none in {len(lost)} replies.", f"Read them in {folder}/reviews.jsonl."
        )
    out.table(f"Judged by {outcome.judge} (instruction: {outcome.instruction})", TABLE_COLUMNS, table_rows(outcome))
    if outcome.fair:
        out.table("", FAIR_COLUMNS, fair_rows(outcome.fair))
    out.note(f"Used: {describe_cost(outcome.cost)}. Written to {folder}.")
    out.result(document(outcome) | {"folder": folder})
