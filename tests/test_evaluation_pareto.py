"""Accuracy against memory and speed: results read, fronts, fit, choice, the picture's labels, and published figures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgemed.cli import run
from edgemed.core.errors import InputError
from edgemed.evaluation.pareto import build_panels, choose, find_front, fit_log
from edgemed.evaluation.published import PATH, load_published
from edgemed.evaluation.result_files import Cost, Results, Score, load_results
from edgemed.report.labels import Box, place_labels


def measured(model: str, gb: float, speed: float, **more: Any) -> dict[str, Any]:
    row = {"artifact": f"/somewhere/{model}", "seed_static_bytes": int(gb * 9e8), "seed_dynamic_bytes": int(gb * 1e9)}
    return row | {"seen_bytes": int(gb * 1.1e9), "decode_tokens_per_s": speed, "emulated": "", "timeline": []} | more


def scored(model: str, closed: float, opened: float, **more: Any) -> dict[str, Any]:
    def measure(percent: float, n: int) -> dict[str, Any]:
        return {"percent": percent, "n": n, "low": percent - 3, "high": percent + 3}

    strict = {"closed accuracy": measure(closed, 400), "open recall": measure(opened, 600), "open exact match": measure(1, 600)}
    old = {"closed accuracy": measure(closed + 5, 400), "open recall": measure(opened + 5, 600)}
    row = {"artifact": f"/elsewhere/{model}", "dataset": "slake", "split": "validate", "blank": False}
    return row | {"protocols": {"strict": strict, "medmoe": old}} | more


def save(path: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(json.dumps({"results": rows} | more))
    return path


MODELS = {
    "big": (15.0, 20.0, 85.0, 83.0),
    "small-16bit": (3.2, 40.0, 80.0, 82.0),
    "small-4bit": (1.2, 90.0, 79.0, 81.5),
    "odd": (4.0, 30.0, 70.0, 60.0),
}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    bench = save(tmp_path / "bench.json", [measured(m, gb, v) for m, (gb, v, _, _) in MODELS.items()], device="gpu")
    return [bench, save(tmp_path / "eval.json", [scored(m, c, o) for m, (_, _, c, o) in MODELS.items()], schema_version=2)]


# -- reading ------------------------------------------------------------------------------------------------------------


def test_scores_and_measurements_are_joined_by_the_artifacts_name(files: list[Path]) -> None:
    panels, notes = build_panels(load_results(files), "strict", ["closed", "open"])
    assert [p.title for p in panels] == ["slake validate, closed, strict", "slake validate, open, strict"] and not notes
    assert {(c.name, c.cost.dynamic_bytes, c.score.percent, c.score.low) for c in panels[0].candidates} == {
        (m, int(gb * 1e9), c, c - 3) for m, (gb, _, c, _) in MODELS.items()
    }
    old, _ = build_panels(load_results(files), "medmoe", ["closed"])
    assert [c.score.percent for c in old[0].candidates] == [90.0, 85.0, 84.0, 75.0]


def test_the_first_schema_and_a_log_before_it_are_read(tmp_path: Path) -> None:
    answers = [{"answer_type": "closed", "points": p} for p in (1.0, 0.0, 1.0, 1.0)] + [{"answer_type": "unknown", "points": None}]
    row = {"artifact": "/m/tiny", "dataset": "slake", "split": "validate", "blank": False, "answers": answers}
    row["scores"] = {"closed": 75.0, "closed_n": 4, "open": None, "open_n": 0}
    (tmp_path / "eval.json").write_text("a note\n" + json.dumps({"results": [row]}) + "\n")
    (score,) = load_results([tmp_path / "eval.json"]).scores
    assert (score.model, score.protocol, score.metric, score.percent, score.questions) == ("tiny", "strict", "closed", 75.0, 4)
    deviation = math.sqrt((3 * 25**2 + 75**2) / 3)
    assert score.low == pytest.approx(75 - 1.96 * deviation / 2) and score.high == 100.0


def test_a_saved_trace_is_a_measurement(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(measured("tiny", 1.0, 9.0) | {"artifact": "tiny", "device": "cpu"}, indent=1))
    (cost,) = load_results([tmp_path / "trace.json"]).costs
    assert (cost.model, cost.device, cost.needed_bytes) == ("tiny", "cpu", 1_100_000_000)


def test_what_is_of_no_use_is_named(tmp_path: Path, files: list[Path]) -> None:
    rows = [scored("blanked", 60, 40, blank=True), {"artifact": "x", "else": 1}, scored("bad", 1, 1, protocols={"strict": {"closed": "?"}})]
    broken = {k: v for k, v in measured("half", 1, 1).items() if k != "seed_dynamic_bytes"}
    found = load_results([*files, save(tmp_path / "more.json", [*rows, broken, measured("alone", 1, 1), scored("lonely", 1, 1)])])
    said = "\n".join(found.notes)
    for part in ("result 1 is a control", "result 2 is neither", "result 3 cannot be read", "result 4 cannot be read: KeyError"):
        assert part in said
    _, notes = build_panels(found, "strict", ["closed"])
    assert notes == ["lonely has a score but no measurement: left out", "alone has a measurement but no score: left out"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expected a JSON document"),
        ("no json", "Expected a JSON document"),
        ("[1]", "Expected a JSON document"),
        ('{"results": []}', "Expected results"),
        ('{"results": 5}', "Expected a list of results"),
        ('{"results": [7]}', "cannot be read"),
        ('{"schema_version": 3, "results": []}', "schema 2 or below"),
        ('{"schema_version": "new", "results": []}', "schema 2 or below"),
    ],
)
def test_files_without_results_are_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=says):
        load_results([tmp_path / "x.json"])


def test_two_figures_for_one_thing_are_refused(tmp_path: Path, files: list[Path]) -> None:
    assert len(load_results([*files, *files]).scores) == 16
    with pytest.raises(InputError, match="one result for big, slake, validate, strict, closed, found two"):
        load_results([*files, save(tmp_path / "again.json", [scored("big", 1, 1)])])
    with pytest.raises(InputError, match="found none"):
        load_results([tmp_path / "none.json"])


def test_nothing_that_fits_together_is_an_error(files: list[Path]) -> None:
    found = load_results(files)
    with pytest.raises(InputError, match="found medmoe, strict"):
        build_panels(found, "lenient", ["closed"])
    with pytest.raises(InputError, match="no model with both"):
        build_panels(Results(found.scores, (), ()), "strict", ["closed"])


# -- the comparison -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [False, True])
def test_the_front_equals_its_definition(more: bool) -> None:
    rng = random.Random(2)
    for _ in range(200):
        points = [(float(rng.randint(1, 6)), float(rng.randint(1, 6))) for _ in range(rng.randint(1, 12))]
        front = find_front(points, more)
        for mine, on in zip(points, front, strict=True):
            better = [p for p in points if (p[0] >= mine[0] if more else p[0] <= mine[0]) and p[1] >= mine[1] and p != mine]
            assert on is (not better)


def test_the_fronts_of_a_panel(files: list[Path]) -> None:
    panels, _ = build_panels(load_results(files), "strict", ["closed"])
    assert {c.name for c in panels[0].candidates if c.on_memory_front} == {"big", "small-16bit", "small-4bit"}
    assert {c.name for c in panels[0].candidates if c.on_speed_front} == {"big", "small-16bit", "small-4bit"}


def test_the_fit_finds_a_known_curve_and_wants_three_places() -> None:
    fit = fit_log([(x, 60 + 7 * math.log(x)) for x in (0.5, 1.0, 4.0, 15.0)])
    assert fit is not None
    assert (fit.intercept, fit.slope, fit.r2, fit.points) == (pytest.approx(60), pytest.approx(7), pytest.approx(1), 4)
    assert fit.at(math.e) == pytest.approx(67)
    # By hand: ln x = 0, 1, 2 and y = 1, 3, 2 give slope 0.5, intercept 1.5, R² 0.25.
    other = fit_log([(1.0, 1.0), (math.e, 3.0), (math.e**2, 2.0)])
    assert other is not None and (other.slope, other.intercept, other.r2) == pytest.approx((0.5, 1.5, 0.25))
    assert fit_log([(1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (0.0, 9.0)]) is None


def test_the_best_for_a_budget(files: list[Path]) -> None:
    (panel,), _ = build_panels(load_results(files), "strict", ["closed"])
    free = choose(panel, None, 0.0)
    assert free.best is not None and free.best.name == "big" and [c.name for c in free.as_good] == ["small-4bit", "small-16bit"]
    small = choose(panel, 4_000_000_000, 0.0)
    assert small.best is not None and small.best.name == "small-16bit" and [c.name for c in small.as_good] == ["small-4bit"]
    assert dict(small.left_out) == {"big": "needs 16.50 GB of 4.00 GB", "odd": "needs 4.40 GB of 4.00 GB"}
    quick = choose(panel, 4_000_000_000, 60.0)
    assert quick.best is not None and quick.best.name == "small-4bit" and not quick.as_good
    assert choose(panel, 1000, 0.0).best is None


def test_of_equals_the_smaller_is_the_best() -> None:
    def pair(name: str, size: int) -> tuple[Score, Cost]:
        return Score(name, "s", "v", "strict", "closed", 80.0, None, None, 9), Cost(name, "cpu", size, size, None, 5.0, False)

    a, b = pair("a", 200), pair("b", 100)
    (panel,), _ = build_panels(Results((a[0], b[0]), (a[1], b[1]), ()), "strict", ["closed"])
    choice = choose(panel, None, 0.0)
    assert choice.best is not None and choice.best.name == "b" and [c.name for c in choice.as_good] == ["a"]


def test_a_measurement_made_on_the_device_itself_counts_alone(tmp_path: Path, files: list[Path]) -> None:
    there = save(tmp_path / "there.json", [measured("small-4bit", 0.9, 5.0)], device="jetson")
    (panel,), _ = build_panels(load_results([*files, there]), "strict", ["closed"])
    choice = choose(panel, 1_500_000_000, 0.0, "jetson")
    assert choice.best is not None and (choice.best.cost.device, choice.best.cost.decode_tokens_per_s) == ("jetson", 5.0)
    assert not choice.as_good


# -- published figures --------------------------------------------------------------------------------------------------


def test_published_figures_have_sources_and_agree_with_what_is_claimed() -> None:
    published = load_published()
    memory = {m.model: m for m in published.memory}
    base = memory["LLaVA-Med"]
    assert base.static_gb is not None
    for model, dynamic, static in (("TinyLLaVA-Med-FQ4", 89, 90), ("LLaVA-Med-Q4", 65, 67)):
        quantised = memory[model]
        assert quantised.static_gb is not None
        assert round(100 * (1 - quantised.dynamic_gb / base.dynamic_gb)) == dynamic
        assert round(100 * (1 - quantised.static_gb / base.static_gb)) == static
    assert {(p.model, p.percent) for p in published.points("slake", "closed")} == {("LLaVA-Med", 85.34), ("TinyLLaVA-Med", 70.7)}
    assert {p.model for p in published.memory_only("slake", "open")} == {"LLaVA-Med-Q4", "TinyLLaVA-Med-FQ4", "TinyLLaVA-Med"}
    assert all(len(p.sources) >= 1 for p in published.points("vqa-rad", "closed")) and published.missing


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("schema_version = 1", "schema_version = 9", "schema_version"),
        ("dynamic_gb = 1.68", "dynamic_gb = -1.68", "memory.2.dynamic_gb"),
        ('source = "icip2024"', 'source = "nowhere"', "nowhere"),
        ("percent = 64.54", "percent = 64.54\nguess = 1", "accuracy.0.guess"),
        ("[[memory]]", "[[memory", "Expected TOML"),
    ],
)
def test_a_file_of_ones_own_is_checked(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = PATH.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=says):
        load_published(tmp_path / "mine.toml")


# -- the picture --------------------------------------------------------------------------------------------------------


def test_labels_lie_on_nothing_where_there_is_room() -> None:
    rng = random.Random(4)
    frame = Box(0, 0, 800, 500)
    for _ in range(50):
        anchors = [(rng.uniform(30, 770), rng.uniform(30, 470)) for _ in range(12)]
        sizes = [(rng.uniform(40, 120), 12.0) for _ in anchors]
        points = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
        boxes = [
            Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2)
            for (x, y), (w, h) in zip(place_labels(anchors, sizes, points, frame), sizes, strict=True)
        ]
        for number, box in enumerate(boxes):
            assert all(box.covers(other) == 0 for other in [*points, *boxes[:number]])
            assert frame.covers(box) == pytest.approx(box.area)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Box], Any, Box]]:
    """(label boxes, obstacles, frame) of each panel that is drawn."""
    seen: list[tuple[list[Box], Any, Box]] = []

    def watched(anchors: Any, sizes: Any, obstacles: Any, frame: Box) -> Any:
        centres = place_labels(anchors, sizes, obstacles, frame)
        boxes = [Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for (x, y), (w, h) in zip(centres, sizes, strict=True)]
        seen.append((boxes, obstacles, frame))
        return centres

    monkeypatch.setattr("edgemed.report.scatter.place_labels", watched)
    return seen


def test_the_command_draws_writes_and_advises(
    tmp_path: Path, files: list[Path], placed: list[tuple[list[Box], Any, Box]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    names = ("pareto.png", "pareto.svg", "pareto.json", "pareto.md")
    command = ["pareto", *map(str, files), "--out", str(out), "--with-published", "--budget", "4GB", "--json"]
    assert run(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(placed) == 4 and all(len(boxes) >= 4 for boxes, _, _ in placed)
    for boxes, obstacles, frame in placed:
        for number, box in enumerate(boxes):
            assert all(box.covers(other) == 0 for other in [*obstacles, *boxes[:number]])
            assert frame.covers(box) == pytest.approx(box.area)
    with Image.open(out / "pareto.png") as picture:
        assert picture.size[0] > 1500 and picture.size[1] > 1000
    assert result["panels"][0]["choice"]["best"]["score"]["model"] == "small-16bit"
    assert json.loads((out / "pareto.json").read_text(encoding="utf-8")) == {k: v for k, v in result.items() if k != "files"}
    page = (out / "pareto.md").read_text(encoding="utf-8")
    for part in (
        "| small-4bit | 79.0 % | 76.0 to 82.0 % | 400 | 1.20 GB |",
        "Best for a budget of 4.00 GB: small-16bit",
        "Not at hand, bhi2024",
    ):
        assert part in page
    before = [(out / name).read_bytes() for name in names]
    assert run(command) == 0
    assert [(out / name).read_bytes() for name in names] == before


def test_one_model_alone_is_drawn_without_a_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [save(tmp_path / "b.json", [measured("one", 1, 9)], device="cpu"), save(tmp_path / "e.json", [scored("one", 80, 70)])]
    assert run(["pareto", *map(str, files), "--out", str(tmp_path / "out"), "--metric", "open", "--json"]) == 0
    (panel,) = json.loads(capsys.readouterr().out)["panels"]
    assert panel["memory_fit"] is None and panel["metric"] == "open" and panel["candidates"][0]["on_memory_front"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--metric", "both"], "--metric closed or open"),
        (["--device", "toaster"], "found 'toaster'"),
        (["--budget", "much"], "Expected a size"),
        (["--published", "/no/such.toml"], "Expected a file"),
        (["--protocol", "none"], "protocol 'none'"),
    ],
)
def test_wrong_options_are_one_sentence(
    tmp_path: Path, files: list[Path], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["pareto", *map(str, files), "--out", str(tmp_path / "out"), *options]) == 1
    said = capsys.readouterr()
    assert says in said.err and "unforeseen" not in said.err and not (tmp_path / "out").exists()


def test_models_that_were_asked_different_numbers_of_questions_are_told_apart(files: list[Path], tmp_path: Path) -> None:
    assert not load_results(files).notes
    few = {"percent": 100.0, "n": 1, "low": None, "high": None}
    row = scored("few", 90, 90) | {"protocols": {"strict": {"closed accuracy": few}}}
    notes = load_results([*files, save(tmp_path / "few.json", [row])]).notes
    assert notes == ("slake validate, closed: models were asked different numbers of questions (1, 400) and cannot be compared",)
