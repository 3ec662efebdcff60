"""`edgemed data`: data sets before training: what is wrong with them, and where their images come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from edgemed.cli.options import (
    FiguresFor,
    FiguresLimit,
    FiguresOut,
    HubSet,
    HubSetOut,
    Jobs,
    Json,
    MaxRowTokens,
    Mirror,
    Quiet,
    RetryGone,
    Revision,
    SourceSets,
    Splits,
    Template,
    TokenizerOf,
    UrlList,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.data.check import CheckReport

app = typer.Typer(help="Data sets before training.", no_args_is_help=True, rich_markup_mode=None)
# How many figures that are not there a person is told of; all stand in the report.
_NAMED = 5


@app.command("check")
def check(
    sets: SourceSets,
    split: Splits = None,
    model: TokenizerOf = None,
    template: Template = None,
    max_tokens: MaxRowTokens = 2048,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every row and decode every image: missing and broken ones, answers, lengths, leakage between splits by pixels.

    Exit code 1 where something should be looked at before training.
    """
    out = Output(json=json, quiet=quiet)
    with out.progress() as bar:
        report = _check_sets(sets, split or ["train"], out, bar)
        labels, label_problems = _check_labels(report, model, template, max_tokens, bar) if model else ({}, [])
    out.table("", ("split", "rows", "closed", "open", "unknown", "images", "same pixels", "tokens", "answer tokens"), _rows(report, labels))
    problems = report.problems + label_problems
    for problem in problems:
        out.text(problem)
    if not problems:
        out.text("Nothing to object to.")
    leaks = [{"splits": [leak.first, leak.second], "images": leak.pairs} for leak in report.leaks]
    splits = [s.to_json() | {"labels": labels.get(s.source.title)} for s in report.splits]
    out.result({"splits": splits, "leaks": leaks, "problems": problems})
    if problems:
        raise typer.Exit(1)


def _check_sets(sets: list[str], splits: list[str], out: Output, bar: Any) -> CheckReport:
    """Every set with the split that it names, or with every one that it has; a set that has none of them is an error."""
    from edgemed.core.errors import DatasetError, InputError
    from edgemed.data import parse_dataset
    from edgemed.data.check import CheckReport, SplitSource, check_split

    found = []
    for named in (parse_dataset(text, "") for text in sets):
        if named.part:
            raise InputError(f"Expected whole splits to check, found a part of {named.name}.", "Leave out what follows the @.")
        errors = []
        wanted = [named.split] if named.split else splits
        for split in wanted:
            try:
                found.append(check_split(SplitSource(named.name, named.path, split), bar))
            except DatasetError as error:
                errors.append(error)
        if len(errors) == len(wanted):
            raise errors[0]
        for missing in errors:
            out.warn(missing.message)
    return CheckReport.of(found)


def _check_labels(
    report: CheckReport, model: Any, template: str | None, max_tokens: int, bar: Any
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Lengths by split, and what is wrong with them."""
    from edgemed.finetune import require_extra

    require_extra()
    from edgemed.finetune.labels import Labeller

    labeller = Labeller(model, template)
    found = {s.source.title: labeller.check(s.samples, max_tokens, bar) for s in report.splits}
    problems = [f"{title}: {problem}" for title, labels in found.items() for problem in labels.problems]
    return {title: labels.to_json() for title, labels in found.items()}, problems


def _rows(report: CheckReport, labels: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for s in report.splits:
        kinds = s.answer_types
        found = labels.get(s.source.title)
        lengths = [f"{found[key]['median']} to {found[key]['longest']}" if found else "" for key in ("tokens", "answer_tokens")]
        counts = (len(s.samples), kinds["closed"], kinds["open"], kinds["unknown"], s.images, s.same_pixels)
        rows.append((s.source.title, *map(str, counts), *lengths))
    return rows


@app.command("fetch-pmc")
def fetch_pmc(
    urls: UrlList,
    target: FiguresOut,
    wanted_by: FiguresFor = None,
    limit: FiguresLimit = None,
    jobs: Jobs = 4,
    mirror: Mirror = None,
    retry_gone: RetryGone = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch LLaVA-Med's figures from PubMed Central's article packages; run it again to go on.

    Each archive is deleted once its figures are out. What is gone stands in fetch-report.json beside the figures. Exit code 1 where
    something could not be reached and should be tried again.
    """
    from edgemed.core.units import format_bytes, format_duration
    from edgemed.data.pmc import REPORT_NAME, FetchSettings, fetch, missing_of, read_url_list, wanted_ids

    out = Output(json=json, quiet=quiet)
    plan = read_url_list(urls, wanted_ids(wanted_by) if wanted_by else None, limit)
    if plan.bad_lines:
        out.warn(f"{len(plan.bad_lines)} lines of {urls.name} cannot be used, the first: {plan.bad_lines[0]}")
    with out.progress() as bar:
        report = fetch(plan, target, FetchSettings(jobs=jobs, mirror=mirror, retry_gone=retry_gone), bar)
    out.table("", ("figures", "how many"), [(what, str(n)) for what, n in report.counts.items()])
    for line in missing_of(report, _NAMED):
        out.note(line)
    out.note(f"{format_bytes(report.downloaded_bytes)} of archives in {format_duration(report.elapsed_s)}. Report: {target / REPORT_NAME}")
    out.result({"counts": report.counts, "report": target / REPORT_NAME, "downloaded_bytes": report.downloaded_bytes})
    if report.failed:
        out.warn("Some archives could not be reached: run the same command again.")
        raise typer.Exit(1)


@app.command("pull")
def pull(repo: HubSet, target: HubSetOut, revision: Revision = "main", json: Json = False, quiet: Quiet = False) -> None:
    """Download a hub's export of a data set, to be read as slake=DIR, vqa-rad=DIR or pathvqa=DIR (datasets extra)."""
    from edgemed.data.export import pull_export

    out = Output(json=json, quiet=quiet)
    out.note(f"Downloading {repo} …")
    splits = pull_export(repo, revision, target)
    out.table("", ("split", "rows"), [(name, str(rows)) for name, rows in splits.items()])
    out.result({"repo": repo, "revision": revision, "folder": target, "splits": splits})
