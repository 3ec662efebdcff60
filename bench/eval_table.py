"""The table of docs/accuracy.md: every quant of a model by three protocols, with the blank image, calibration and the referral rule.

    python -m bench.eval_table ARTIFACT… --slake PATH --vqa-rad PATH [--out DIR] [--page docs/accuracy.md]

Answers are kept under --out and not asked again, so that the command goes on where it was cut and rewrites the page for nothing once it
is through. VQA-RAD is a fifth of its images, told apart by a hash of their names. A set with images that edgemed-demo was trained on, as
far as edgemed/demo/run.json tells, says so in its heading.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.core.files import save_text
from edgemed.core.manifest import Artifact, load_artifact
from edgemed.data import DatasetName, Sample, load_named, load_samples
from edgemed.data.splits import BY_FOLDER, leave_out
from edgemed.evaluation.leakage import Leak, find_leaks
from edgemed.evaluation.looks import View
from edgemed.evaluation.results import Result, build_result
from edgemed.evaluation.runner import run
from edgemed.evaluation.targets import EngineTarget

VIEWS: tuple[View, ...] = ("shown", "blank")
DEMO_RUN = Path(__file__).parents[1] / "edgemed" / "demo" / "run.json"


@dataclass(frozen=True)
class Row:
    """One artifact's result."""

    name: str
    bits: int
    result: Result


@dataclass(frozen=True)
class Section:
    """One set with every artifact's result on it."""

    dataset: DatasetName
    samples: list[Sample]
    leak: Leak
    rows: list[Row]


def load_sections(slake: Path, vqa_rad: Path) -> list[Section]:
    """The two splits, and what of them edgemed-demo was trained on."""
    tested = [DatasetName("slake", slake, "validate"), DatasetName("vqa-rad", vqa_rad, "all", (1, 5))]
    trained = trained_on(json.loads(DEMO_RUN.read_text()), {"slake": slake, "vqa-rad": vqa_rad})
    sections = []
    for dataset in tested:
        samples = load_named(dataset)
        sections.append(Section(dataset, samples, find_leaks(samples, trained), []))
    return sections


def trained_on(run: Mapping[str, Any], places: Mapping[str, Path]) -> list[Sample]:
    """What a run.json and those of the stages before it name, of the sets that lie somewhere."""
    rows = []
    for data in run["recipe"]["data"]:
        if data["name"] in places:
            samples = load_samples(data["name"], places[data["name"]], data["split"])
            rows += leave_out(samples, data.get("hold_out", ()), data["name"] in BY_FOLDER)
    return rows + [row for stage in run.get("stages", {}).values() for row in trained_on(stage, places)]


def ask(artifact: Artifact, sections: Sequence[Section], out: Path, threads: int | None) -> None:
    """One artifact on every set."""
    manifest = artifact.manifest
    with EngineTarget(artifact, threads=threads, workers=None) as target:
        for section in sections:
            replies = {}
            for view in VIEWS:
                folder = out / artifact.folder.name / f"{section.dataset.name}-{section.dataset.split}" / view
                replies[view] = run(target, section.samples, view, folder, progress)
            shown, blank = replies["shown"], replies["blank"]
            texts, scores = [r.text for r in shown], [r.score for r in shown]
            result = build_result(section.samples, texts, scores, {"blank": [r.text for r in blank]}, [r.error for r in shown])
            section.rows.append(Row(f"{manifest.name}, {manifest.llm.quant}", manifest.bits, result))


def progress(done: int, total: int) -> None:
    """A line on stderr at every tenth."""
    if done * 10 // total != (done - 1) * 10 // total:
        print(f"{done} of {total}", file=sys.stderr, flush=True)


def page(sections: Sequence[Section]) -> str:
    """The whole page."""
    head = [
        "# Accuracy\n",
        "<!-- Made by `python -m bench.eval_table`; run it again instead of editing this page. -->\n",
        "Greedy answers of the converted files themselves, through the engine. In brackets: 95 % bootstrap intervals over images. The "
        "protocols are described in `edgemed/evaluation/protocols.py`; *medmoe* and *llavamed-v1* are the field's own, kept with their "
        "faults so that published figures can be compared with. Nothing here is a clinical validation.\n",
    ]
    return "\n".join([*head, *(describe(section) for section in sections)])


def describe(section: Section) -> str:
    """One set: protocols, the blank image, confidence."""
    leak, first = section.leak, section.rows[0].result
    lines = [f"## {section.dataset.name}, {section.dataset.label}: {len(section.samples)} questions, {leak.of_images} images\n"]
    if leak.images:
        lines.append(
            f"**These figures mean nothing for edgemed-demo**: {leak.images} of the {leak.of_images} images are in what it was trained on, "
            f"with {leak.questions} of the {leak.of_questions} questions. They show the command, not the model.\n"
        )
    else:
        lines.append("No image of it is in what edgemed-demo was trained on, by the hash of the pixels.\n")
    lines.append(f"Split: SHA-256 `{first.samples_sha256}`.\n")
    columns = ("files", "protocol", "closed accuracy", "open recall", "… with a blank image, closed", "… open")
    lines += _table(columns, [line for row in section.rows for line in _protocols(row)])
    lines += _table(("files", "same answer with a blank image", "exact match, closed", "exact match, open"), map(_looks, section.rows))
    surest, rule = "accuracy of the surest 100, 80, 50 %", "answered by the 10 % rule"
    columns = ("files", "calibration error", "kept map", surest, rule, "wrong among them")
    lines += _table(columns, map(_sure, section.rows))
    return "\n".join(lines)


def _table(columns: Sequence[str], rows: object) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in rows]  # type: ignore[attr-defined]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *body, ""]


def _protocols(row: Row) -> list[tuple[str, ...]]:
    # A blank image is shown by the strict protocol alone: the others add nothing to what it says.
    out = []
    for name, table in row.result.protocols.items():
        blank = row.result.looks["blank"].strict if name == "strict" else {}
        cells = [str(t.get(key, "")) for t in (table, blank) for key in ("closed accuracy", "open recall")]
        out.append((f"{row.bits} bits ({row.name})", name, *cells))
    return out


def _looks(row: Row) -> tuple[str, ...]:
    strict = row.result.protocols["strict"]
    cells = [str(strict.get(f"{kind} exact match", "")) for kind in ("closed", "open")]
    return f"{row.bits} bits", str(row.result.looks["blank"].same), *cells


def _sure(row: Row) -> tuple[str, ...]:
    report = row.result.confidence
    if report is None:
        return f"{row.bits} bits", "–", "–", "–", "–", "–"
    curve, r = dict(report.curve), report.referral
    errors = ", ".join(f"{name} {value:.3f}" for name, value in report.ece.items())
    wrong = "–" if r.wrong_percent is None else f"{r.wrong_percent:.1f} % ({r.low:.1f}–{r.high:.1f})"
    accuracies = ", ".join(f"{curve[c]:.1f}" for c in (1.0, 0.8, 0.5))
    return f"{row.bits} bits", errors, report.method, accuracies, f"{r.answered} of {r.asked}", wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--slake", type=Path, required=True)
    parser.add_argument("--vqa-rad", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("eval-table"), help="where answers are kept")
    parser.add_argument("--page", type=Path, default=Path("docs/accuracy.md"))
    parser.add_argument("--threads", type=int, help="fewer than the cores where other programs are running")
    args = parser.parse_args()
    sections = load_sections(args.slake, args.vqa_rad)
    for folder in args.artifacts:
        ask(load_artifact(folder), sections, args.out, args.threads)
        save_text(args.page, page(sections))  # as soon as there is something to read
        print(f"Written: {args.page} after {folder.name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
