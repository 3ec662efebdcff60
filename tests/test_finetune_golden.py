"""Twenty steps of each stage on the tiny LLaVA: the losses are those that were stored, and frozen parts stay bit-identical.

python -m tests.test_finetune_golden        # writes golden_losses.json anew, after a change that is meant to move them
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the train extra")

from edgemed.finetune import run_stage  # noqa: E402
from edgemed.finetune.model import part_of  # noqa: E402
from tests.finetune_fixture import read_losses, save_data, save_model, write_recipe  # noqa: E402

GOLDEN = Path(__file__).parent / "golden_losses.json"
STEPS = 20
# stage → what the recipe adds, its rates, the parts that learn
CASES = {
    "align": ("", "llm_rate = 1e-3\ntower_rate = 1e-3", {"projector"}),
    "instruct": ("pack = 2", "llm_rate = 1e-3\ngroup_by_length = true", {"projector", "llm"}),
    "vqa": ("", "llm_rate = 1e-3\ntower_rate = 1e-3\nweight_decay = 0.01", {"projector", "llm", "tower"}),
    "vqa-lora": ("lora = { rank = 4, alpha = 8 }", "llm_rate = 1e-2", {"projector", "llm"}),
}


def weights(folder: Path) -> dict[str, Any]:
    from transformers import LlavaForConditionalGeneration

    return dict(LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict())


def run_case(case: str, root: Path) -> tuple[Path, Path]:
    """(the model that was begun with, what came out)."""
    extra, optim, _ = CASES[case]
    model, data = save_model(root / "model"), save_data(root / "data")
    config = write_recipe(root / f"{case}.toml", model, data, steps=STEPS, extra=extra, optim=optim)
    return model, run_stage(case.split("-")[0], config)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_stored_ones_and_frozen_parts_bit_identical(tmp_path: Path, case: str) -> None:
    model, out = run_case(case, tmp_path)
    losses = read_losses(out)
    assert len(losses) == STEPS and sum(losses[-3:]) < sum(losses[:3])
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[case], abs=1e-3)
    before, after = weights(model), weights(out)
    assert before.keys() == after.keys()
    assert {part_of(name) for name in before if not torch.equal(before[name], after[name])} == CASES[case][2]


if __name__ == "__main__":
    found = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = [round(loss, 6) for loss in read_losses(run_case(name, Path(folder))[1])]
            print(name, found[name][::5], file=sys.stderr)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
