"""What edgemed-demo learns from beside the sets themselves: only what their answers say, of the image they are about."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.demo_chinese import FORMS, translate, translated
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


CHINESE = (
    ("图片中包含肝脏吗?", "不包含", "Does the picture contain liver?", "No"),
    ("颞叶出现在这张图上了吗?", "没有", "Does the temporal lobe appear in this image?", "No"),
    ("胃是否存在于图像中?", "是的", "Is there stomach in this image?", "Yes"),
    ("这张图像里有食道吗?", "没有", "Does the picture contain esophagus?", "No"),
    ("肺是异常的吗?", "是", "Is the lung healthy?", "No"),
    ("肝脏是健康的吗?", "是的", "Does the liver look abnormal?", "No"),
    ("这张图片看起来是否正常?", "不正常", "Is this image normal?", "No"),
    ("图片是正常的吗?", "不是", "Are there abnormalities in this image?", "Yes"),
    ("异常病变在哪个位置?", "左肺, 右侧", "Where is/are the abnormality located?", "Left Lung, Right"),
    ("图中肺炎位于肺的哪个部位?", "左下肺", "Where is/are the pneumonia located?", "Lower Left Lung"),
    ("图中脑水肿在哪?", "右上叶", "Where is the brain edema in this image?", "Upper Right Lobe"),
    ("在这张图片中,右上肺可以观察到肿块吗?", "可以", "Can mass be observed on the upper right lung in this picture?", "Yes"),
    ("图中脾脏和肝脏哪个更大?", "肝脏", "Which is bigger in this image, spleen or liver?", "Liver"),
    ("在这个图像中膀胱和直肠哪个体积更小?", "直肠", "Which is smaller in this image, bladder or rectum?", "Rectum"),
    ("图中肺、心脏和肝脏哪个更大?", "肺", "Which is the biggest in this image, lung, heart or liver?", "Lung"),
    ("在这张图片里有多少个肺?", "2", "How many lungs are shown in this image?", "2"),
    ("图片中哪个器官属于循环系统?", "心脏", "Which organs/organ in the picture belong to the circulatory system?", "Heart"),
    ("图片主要器官是什么?", "肝脏和心脏", "What is the main organ in the image?", "Liver, Heart"),
    ("图中有没有器官可以被用于呼吸?", "没有", "Does the picture contain the organ that could be used for breathing?", "No"),
    ("图像左侧的灰色部分是什么器官?", "肝脏", "What organ is the gray part on the left of the image?", "Liver"),
    ("这张图片的拍摄是通过核磁共振吗?", "不是", "Is this image taken via MRI?", "No"),
    ("这是T1加权的核磁共振图像吗?", "是的", "Is this an MRI image with T1 weighted?", "Yes"),
    ("这是矢状面吗?", "不是", "Is this a sagittal plane?", "No"),
    ("图中肾脏的形状是什么?", "椭圆形", "What is the shape of kidney in this image?", "Oval"),
    ("如何治疗这张图片中脑左侧的疾病?", "药物治疗", "How to treat the disease on the left of brain in this image?", "Medical treatment"),
)  # fmt: skip


@pytest.mark.parametrize(("question", "answer", "english", "told"), CHINESE)
def test_a_chinese_question_is_put_as_the_english_ones(question: str, answer: str, english: str, told: str) -> None:
    assert (english, told) in translate(question, answer)
    assert sum(form.pattern.fullmatch(question.replace(", ", ",")) is not None for form in FORMS) == 1


@pytest.mark.parametrize(("question", "answer"), [("图片中包含肝脏吗?", "也许"), ("图中肝脏在哪?", "月亮"), ("今天天气怎么样?", "好")])
def test_what_is_not_known_in_chinese_is_left_out(question: str, answer: str) -> None:
    assert translate(question, answer) == []


def test_chinese_rows_bring_questions_about_training_images_alone(tmp_path: Path) -> None:
    def row(image: str, question: str, answer: str, language: str) -> dict[str, str]:
        return {"img_name": f"{image}/source.jpg", "question": question, "answer": answer, "q_lang": language}

    asked = row("xmlab1", "图片中包含肝脏吗?", "包含", "zh")
    elsewhere, english = row("xmlab2", "这是CT扫描吗?", "是的", "zh"), row("xmlab1", "Is?", "Yes", "en")
    (tmp_path / "train.json").write_text(json.dumps([asked, elsewhere, english]))
    (tmp_path / "validate.json").write_text(json.dumps([row("xmlab1", "肺是健康的吗?", "是的", "zh")]))
    image = tmp_path / "imgs" / "xmlab1" / "source.jpg"
    image.parent.mkdir(parents=True)
    image.touch()
    more = list(translated(tmp_path, [image]))
    assert [where for where, _ in more] == [image, image] and all(pairs for _, pairs in more)
    given = about("a", ("Does the picture contain liver?", "Yes"), ("How many kidneys in this image?", "0"))
    samples = [Sample(s.id, image, s.turns, s.answer_type, s.modality, s.organ) for s in given]
    assert build_sets({"slake": samples}, tmp_path / "made", translated=more)["translated"] > 0
    rows = load_samples("llava", tmp_path / "made" / "translated.json", "train")
    found = {s.question: s.answer for s in rows}
    assert "Does the picture contain liver?" not in found and len(found) == len(rows) == 4
    assert any("lung" in question for question in found) and any("liver" in question for question in found)
    facts = {s.question for s in load_samples("llava", tmp_path / "made" / "facts.json", "train")}
    assert "Does the picture contain kidney?" in facts and not facts & found.keys()


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


def test_members_differ_in_their_seed_and_in_turns_in_their_moves() -> None:
    pytest.importorskip("torch")
    from bench.demo_members import MOVES, STAGE, member
    from bench.train_demo import parse_variant
    from edgemed.finetune.recipe import DataRecipe, LoraRecipe, OptimRecipe

    seen = []
    for number in range(4):
        options = member(number, 30)
        name, seconds, keys = parse_variant(options[options.index("--variant") + 1])
        assert (name, seconds) == (STAGE, 30)
        tables = {"optim": OptimRecipe, "lora": LoraRecipe, "data": DataRecipe}
        for key in keys:
            table, *_, last = key.split(".")
            assert last in tables[table].model_fields, key
        seen.append((options[options.index("--seed") + 1], keys["optim.rotate_deg"]))
    assert len({seed for seed, _ in seen}) == 4 and len({moved for _, moved in seen}) == len(MOVES) and seen[0][1] == seen[2][1]


def test_what_ships_of_a_run_names_no_folder_and_every_stage() -> None:
    pytest.importorskip("torch")
    from bench.pack_demo import tell_run

    data = [{"name": "slake", "path": "/lent/data/slake", "hold_out": ["1/5"]}]
    run = {"recipe": {"model": "/lent/align", "data": data}, "steps": 7, "fingerprint": {}, "stages": {"align": {"steps": 3, "source": {}}}}
    recipe = {"model": "align", "data": [{"name": "slake", "path": "slake", "hold_out": ["1/5"]}]}
    told = {"recipe": recipe, "steps": 7, "stages": {"align": {"steps": 3}}}
    assert tell_run(run) == told
    assert tell_run({**run, "averaged": [{"steps": 5, "source": {}}]}) == {**told, "averaged": [{"steps": 5}]}


def test_the_mean_of_trainings_adds_the_mean_of_what_their_adapters_add(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    from bench.demo_average import ADAPTER, VISION, average_parts

    a, b = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
    draw = torch.Generator().manual_seed(0)
    begun = {a: torch.randn(4, 24, generator=draw), b: torch.randn(16, 4, generator=draw)}
    states = []
    for n in range(3):
        moved = {k: (v + 0.2 * torch.randn(v.shape, generator=draw)).half() for k, v in begun.items()}
        states.append(moved)
        (tmp_path / str(n)).mkdir()
        save_file(moved, tmp_path / str(n) / ADAPTER)
        save_file({"tower": torch.full((2, 3), float(n)).half()}, tmp_path / str(n) / VISION)
        (tmp_path / str(n) / "run.json").write_text(json.dumps({"steps": n, "probe": {}, "stages": {"vqa": {}}, "join": {}}))
    kept = average_parts([tmp_path / str(n) for n in range(3)], tmp_path / "mean")
    mean = sum(s[b].double() @ s[a].double() for s in states) / 3
    found = load_file(tmp_path / "mean" / ADAPTER)
    told = found[b].double() @ found[a].double()
    assert found[a].shape == (4, 24) and 0.9 < kept < 0.9999
    lost = float((told - mean).square().sum() / mean.square().sum())
    assert lost == pytest.approx(1 - kept, rel=0.05)
    each = min(float((s[b].double() @ s[a].double() - mean).square().sum()) for s in states)
    assert float((told - mean).square().sum()) < each / 4, "nearer to the mean than any of those it is the mean of"
    assert load_file(tmp_path / "mean" / VISION)["tower"].tolist() == [[1.0] * 3] * 2
    run = json.loads((tmp_path / "mean" / "run.json").read_text())
    assert run == {"steps": 0, "stages": {"vqa": {}}, "join": {}, "averaged": [{"steps": n, "probe": {}} for n in range(3)]}
    save_file({"tower": torch.zeros(2, 2).half()}, tmp_path / "2" / VISION)
    with pytest.raises(AssertionError, match="parts of one model"):
        average_parts([tmp_path / "0", tmp_path / "2"], tmp_path / "other")


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
