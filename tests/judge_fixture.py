"""Questions in LLaVA-Med's layout, made up for tests (its own are not ours to ship), and answers to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOMAINS = ("chest_xray", "mri", "ct_scan", "histology", "gross")


def make_row(number: int) -> dict[str, Any]:
    return {
        "question_id": number,
        "image": f"p{number // 3}.jpg",
        "pair_id": f"p{number // 3}",
        "text": f"What is shown in {number}?\n<image>",
        "gpt4_answer": f"Reference {number}: a 'quoted' – text.",
        "fig_caption": f"Caption {number}.",
        "in_text_mention": [{"tokens": "it's here", "entities": [{"type": "ENTITY", "entity_id": 1, "start_tok": 0, "end_tok": 2}]}],
        "domain": {name: (number >> place) % 2 == 1 for place, name in enumerate(DOMAINS)},
        "type": "conversation" if number % 4 else "detailed_description",
        "fig_label": f"Figure {number}",
    }


def save_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_files(folder: Path, count: int = 12) -> tuple[Path, Path]:
    """(questions, answers)."""
    rows = [make_row(n) for n in range(1, count + 1)]
    answers = [{"question_id": r["question_id"], "prompt": r["text"], "text": f"Answer {r['question_id']}."} for r in rows]
    return save_lines(folder / "questions.jsonl", rows), save_lines(folder / "answers.jsonl", answers)
