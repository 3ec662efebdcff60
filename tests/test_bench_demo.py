"""What edgemed-demo learns from beside the sets themselves: only what their answers say, of the image they are about."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.demo_facts import agreement, derive, diseases_in, organs_in
from bench.demo_sets import build_sets
from edgemed.data import Sample, load_samples
from edgemed.data.rows import literal_type


def about(image: str, *pairs: tuple[str, str], modality: str = "CT", organ: str = "Abdomen") -> list[Sample]:
    return [
        Sample.single(f"{image}-{n}", Path(image), question, answer, literal_type(answer), modality, organ)
        for n, (question, answer) in enumerate(pairs)
    ]


def test_organs_are_read_from_every_form() -> None:
    samples = about(
        "a.jpg",
        ("Does the picture contain liver?", "Yes"),
        ("How many kidneys in this image?", "0"),
        ("Where is the spleen in this image?", "Not seen"),
        ("What color is the left lung in the picture?", "Black"),
        ("What is the rightmost organ in this image?", "Large Bowel"),
        ("Is there a heart in the image?", "No"),
        ("Where is the heart?", "Center"),
        ("Does the picture contain abnormality?", "Yes"),
    )
    assert organs_in(samples) == {"liver": True, "kidney": False, "spleen": False, "lung": True, "large bowel": True}
    pairs = derive(samples, random.Random(0))
    assert ("Does the picture contain kidney?", "No") in pairs and ("How many kidneys in this image?", "0") in pairs
    assert not any("heart" in question for question, _ in pairs), "its answers contradict each other"


def test_a_list_of_diseases_answers_for_each() -> None:
    lists = ("What diseases are included in the picture?", "Atelectasis"), ("Where is/are the abnormality located?", "Lower Left Lung")
    xray = about("x.jpg", *lists, modality="X-Ray", organ="Lung")
    assert diseases_in(xray) == {"atelectasis"}
    pairs = dict(derive(xray, random.Random(0)))
    assert pairs["Can atelectasis be observed on the lower left lung in this picture?"] == "Yes"
    assert pairs["Which organ is abnormal, heart or lung?"] == "Lung" and pairs["Are there abnormalities in this image?"] == "Yes"
    assert sum(question.startswith("Can ") and answer == "No" for question, answer in pairs.items()) == 6
    none = about("y.jpg", ("What diseases are included in the picture?", "None"), ("Does the picture contain liver?", "Yes"))
    assert diseases_in(none) == frozenset()
    health = {
        ("Is the liver healthy?", "Yes"),
        ("Does the liver look abnormal?", "No"),
        ("Is the liver abnormal?", "No"),
        ("Does the liver look normal?", "Yes"),
    }
    found = {pair for seed in range(30) for pair in derive(none, random.Random(seed))}
    assert {pair for pair in found if "normal" in pair[0] and "liver" in pair[0] or "healthy" in pair[0]} == health
    assert ("Does this image look normal?", "Yes") in found
    misspelt = about("m.jpg", ("What diseases are included in the picture?", "Noudle"), modality="X-Ray", organ="Lung")
    assert not any(question.startswith("Can ") for question, _ in derive(misspelt, random.Random(0)))
    assert diseases_in(about("z.jpg", ("Is the lung healthy?", "No"))) is None


def test_agreement_counts_an_answer_against_the_others_only() -> None:
    right = about("a.jpg", ("Does the picture contain liver?", "Yes"), ("Where is the liver?", "Left"))
    wrong = about("b.jpg", ("Does the picture contain liver?", "No"), ("Where is the liver?", "Left"))
    alone = about("c.jpg", ("Does the picture contain liver?", "Yes"))
    counts = agreement([*right, *wrong, *alone])["does the picture contain …?"]
    assert (counts[True], counts[False]) == (1, 1)


def test_the_made_sets_are_read_back_and_repeat_no_question(tmp_path: Path) -> None:
    image = tmp_path / "slake" / "xmlab1" / "source.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    pairs = ("Does the picture contain liver?", "Yes"), ("Where is the spleen?", "Not seen"), ("What modality is used?", "CT")
    samples = [Sample(s.id, image, s.turns, s.answer_type, s.modality, s.organ) for s in about("a", *pairs)]
    counts = build_sets({"slake": samples}, tmp_path / "made")
    facts = load_samples("llava", tmp_path / "made" / "facts.json", "train")
    assert counts["facts"] == len(facts) > 0 and all(s.image is not None and s.image.resolve() == image for s in facts)
    assert not {s.question.lower() for s in facts} & {question.lower() for question, _ in pairs}
    assert ("Does the picture contain spleen?", "No") in {(s.question, s.answer) for s in facts}
    captions = load_samples("llava", tmp_path / "made" / "captions.json", "train")
    assert [s.answer for s in captions] == ["A CT image of the abdomen. It shows the liver."]
    assert len(load_samples("llava", tmp_path / "made" / "conversations.json", "train")) == counts["conversations"] == 2


def test_the_best_variant_is_chosen_by_what_was_kept_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from bench.demo_rounds import DEVELOP, VARIANTS, choose, score_of, variant, visible_gpus

    def probe(closed: float, pathvqa_open: float) -> dict[str, dict[str, float]]:
        return {name: {"closed": closed, "open": pathvqa_open if "path" in name else 50.0} for name in DEVELOP}

    for name, scores in (("plain", probe(60, 90)), ("facts", probe(61, 0)), ("moved", probe(99, 99))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"probe": {"rounded": scores}}))
    assert choose(tmp_path, ["plain", "facts"]) == "facts"
    told = json.loads((tmp_path / "choice.json").read_text())
    assert told["best"] == "facts" and told["scores"] == {"plain": 57.5, "facts": 58.25} and score_of(probe(61, 0)) == 58.25
    assert variant("slake", 30, "final") == ["--facts", "--variant", "final:30,data.0.repeat=6"] and "plain" in VARIANTS
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert visible_gpus(1) == ["4"]
    with pytest.raises(SystemExit, match="Expected 3 GPUs"):
        visible_gpus(3)


def test_what_ships_of_a_run_names_no_folder_and_every_stage() -> None:
    pytest.importorskip("torch")
    from bench.pack_demo import tell_run

    data = [{"name": "slake", "path": "/lent/data/slake", "hold_out": ["1/5"]}]
    run = {"recipe": {"model": "/lent/align", "data": data}, "steps": 7, "fingerprint": {}, "stages": {"align": {"steps": 3, "source": {}}}}
    recipe = {"model": "align", "data": [{"name": "slake", "path": "slake", "hold_out": ["1/5"]}]}
    assert tell_run(run) == {"recipe": recipe, "steps": 7, "stages": {"align": {"steps": 3}}}


def test_what_a_model_was_trained_on_is_read_from_all_of_its_stages(tmp_path: Path) -> None:
    from bench.eval_table import trained_on

    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A lung."}]
    rows = [{"id": str(n), "image": f"{n}.jpg", "conversations": talk} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for n in range(40):
        (tmp_path / f"{n}.jpg").touch()

    def stage(name: str, *held: str) -> dict[str, object]:
        return {"recipe": {"data": [{"name": name, "split": "train", "hold_out": list(held)}]}}

    places = {"llava": tmp_path / "rows.json"}
    held = {s.id for s in trained_on(stage("llava", "1/5"), places)}
    assert 0 < len(held) < 40
    assert {s.id for s in trained_on({**stage("llava", "1/5"), "stages": {"align": stage("llava")}}, places)} == {str(n) for n in range(40)}
    assert trained_on(stage("pathvqa"), places) == []
