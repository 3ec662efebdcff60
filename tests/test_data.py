"""Readers of data sets on small files in their native layouts, and on the real ones where they are at hand."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from edgemed.core.errors import DatasetError, HubError, MissingExtraError
from edgemed.core.paths import cache_dir
from edgemed.data import hash_samples, load_samples
from edgemed.data.export import pull_export


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    row = {"img_name": "xmlab1/source.jpg", "answer_type": "CLOSED", "question": "Normal?", "answer": "Yes", "q_lang": "en", "qid": 7}
    rows = [row, {**row, "q_lang": "zh", "qid": 8}, {**row, "qid": 9, "answer_type": "OPEN", "answer": "Liver"}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    save_image(tmp_path / "imgs/xmlab1/source.jpg")
    return tmp_path


def test_slake_keeps_english_rows(slake: Path) -> None:
    samples = load_samples("slake", slake)
    assert [(s.id, s.question, s.answer, s.answer_type) for s in samples] == [
        ("slake-7", "Normal?", "Yes", "closed"),
        ("slake-9", "Normal?", "Liver", "open"),
    ]
    assert samples[0].turns[0].images == 1


def test_vqa_rad_splits_by_phrase_type_and_reads_numbers(tmp_path: Path) -> None:
    row = {"qid": "0", "phrase_type": "freeform", "image_name": "a.jpg", "question": "How many?", "answer": 2, "answer_type": "CLOSED "}
    (tmp_path / "VQA_RAD Dataset Public.json").write_text(json.dumps([row, {**row, "qid": "1", "phrase_type": "test_para"}]))
    save_image(tmp_path / "VQA_RAD Image Folder/a.jpg")
    assert [s.id for s in load_samples("vqa-rad", tmp_path)] == ["vqa-rad-0"]
    assert [s.id for s in load_samples("vqa-rad", tmp_path, "test")] == ["vqa-rad-1"]
    (sample,) = load_samples("vqa-rad", tmp_path, "train")
    assert (sample.answer, sample.answer_type) == ("2", "closed")


def test_answers_that_are_lists_and_what_a_set_says_of_itself(slake: Path) -> None:
    rows = json.loads((slake / "train.json").read_text())
    rows[0] |= {"answer": ["CT", 2], "answer_type": "ESSAY", "modality": "CT", "location": "Lung"}
    (slake / "train.json").write_text(json.dumps(rows))
    sample = load_samples("slake", slake)[0]
    assert (sample.answer, sample.answer_type, sample.native_type) == ("CT, 2", "unknown", "ESSAY")
    assert (sample.modality, sample.organ) == ("CT", "Lung")


@pytest.mark.parametrize("key", ["conversations", "conversatons"])
@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>"])
def test_llava_conversations(tmp_path: Path, key: str, text: str) -> None:
    rounds = [{"from": "human", "value": text}, {"from": "gpt", "value": "A lung."}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "image": "a.png", key: rounds}]))
    save_image(tmp_path / "images/a.png")
    (sample,) = load_samples("llava", tmp_path)
    assert (sample.turns[0].text, sample.turns[0].images, sample.answer) == ("What?", 1, "A lung.")


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}], "Expected 1 <image>"),
        ([{"from": "gpt", "value": "<image>"}, {"from": "human", "value": "x"}], "Expected a message from 'human'"),
        ([{"from": "human", "value": "<image>"}], "Expected pairs"),
        (["human", "gpt"], "Expected a message from 'human'"),
    ],
)
def test_llava_refuses_broken_rows(tmp_path: Path, rounds: list[dict[str, str]], message: str) -> None:
    (tmp_path / "train.json").write_text(json.dumps([{"id": 1, "image": "a.png", "conversations": rounds}]))
    save_image(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=message):
        load_samples("llava", tmp_path)


def test_what_is_missing_is_named(slake: Path, tmp_path: Path) -> None:
    for args, message in [
        (("nope", slake), "Expected a data set out of"),
        (("slake", tmp_path / "none"), "found nothing"),
        (("slake", slake, "validate"), "Expected the file"),
    ]:
        with pytest.raises(DatasetError, match=message):
            load_samples(*args)  # type: ignore[arg-type]
    (slake / "imgs/xmlab1/source.jpg").unlink()
    with pytest.raises(DatasetError, match="2 of 2 rows"):
        load_samples("slake", slake)


def test_a_field_that_is_missing_is_named(slake: Path) -> None:
    (slake / "train.json").write_text(json.dumps([{"q_lang": "en", "qid": 1}]))
    with pytest.raises(DatasetError, match="'img_name' in row 0"):
        load_samples("slake", slake)


def test_hash_follows_the_texts(slake: Path) -> None:
    samples = load_samples("slake", slake)
    assert hash_samples(samples) == hash_samples(load_samples("slake", slake)) != hash_samples(samples[:1])


def test_the_real_sets(shared: Path) -> None:
    data = shared / "data"
    counts = {
        "slake train": len(load_samples("slake", data / "slake", "train")),
        "slake validate": len(load_samples("slake", data / "slake", "validate")),
        "vqa-rad all": len(load_samples("vqa-rad", data / "vqa-rad", "all")),
        "pathvqa train": len(load_samples("pathvqa", data / "pathvqa", "train")),
    }
    assert counts == {"slake train": 4919, "slake validate": 1053, "vqa-rad all": 1819, "pathvqa train": 19654}


def test_figure_captions_are_asked_for_in_varied_words(tmp_path: Path) -> None:
    rows = [{"pair_id": f"{i}_F1", "fig_label": "F1", "fig_caption": f"Caption {i}", "in_text_mention": []} for i in range(20)]
    (tmp_path / "instruct").mkdir()
    (tmp_path / "instruct" / "instruct_fig_captions.json").write_text(json.dumps({"ct_scan": rows[:8], "mri": rows[8:]}))
    for i in range(20):
        save_image(tmp_path / f"images/{i}_F1.jpg")
    samples = load_samples("captions", tmp_path / "instruct")
    assert [(s.id, s.answer) for s in samples] == [(f"{i}_F1", f"Caption {i}") for i in range(20)]
    assert len({s.question for s in samples}) > 3 and {s.turns[0].images for s in samples} == {1}
    assert [s.question for s in load_samples("captions", tmp_path / "instruct")] == [s.question for s in samples]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_of_ones_own(tmp_path: Path, separator: str) -> None:
    lines = [
        ("Image", "question", "Answer", "split"),
        ("a.png", '"Is it, or is it not?"', "No.", "train"),
        ("a.png", "Where?", '"left; lower, lobe"', "train"),
        ("a.png", "Where?", "right", "val"),
    ]
    text = "\ufeff" + "\r\n".join(separator.join(line) for line in lines)
    (tmp_path / "table.csv").write_bytes(text.encode())
    save_image(tmp_path / "images/a.png")
    samples = load_samples("csv", tmp_path / "table.csv")
    assert [(s.id, s.question, s.answer, s.answer_type) for s in samples] == [
        ("2", "Is it, or is it not?", "No.", "closed"),
        ("3", "Where?", "left; lower, lobe", "open"),
    ]
    assert len(load_samples("csv", tmp_path / "table.csv", "validate")) == 1


def test_a_table_of_captions_and_tables_that_are_none(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    (tmp_path / "train.csv").write_text("image,caption\na.png,A lung.\n")
    (sample,) = load_samples("csv", tmp_path)
    assert sample.answer == "A lung." and sample.question
    for text, message in [
        ("picture,text\na.png,x\n", "Expected the columns image, question and answer"),
        ("image,question,answer\na.png,What?,\n", "in line 2"),
        ('image,question,answer\na.png,"What?,x\n', "Expected a CSV table"),
        ("image,question,answer\na.png,What?,x\nb.png\n", "in line 3"),
        ("image,question,answer\na.png,What, then?,x\n", "Expected 3 cells in row 2 .* found 4"),
    ]:
        (tmp_path / "train.csv").write_text(text)
        with pytest.raises(DatasetError, match=message):
            load_samples("csv", tmp_path)
    (tmp_path / "train.csv").write_bytes("image,question,answer\na.png,Où?,x\n".encode("latin-1"))
    with pytest.raises(DatasetError, match="Expected UTF-8"):
        load_samples("csv", tmp_path)


def test_images_beside_the_folder_and_rows_as_lines(tmp_path: Path) -> None:
    """LLaVA-Med's data/ has alignment/, instruct/ and images/ side by side."""
    save_image(tmp_path / "images/1_F1.jpg")
    (tmp_path / "alignment").mkdir()
    rounds = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x\u2028y"}]
    line = json.dumps({"id": "1", "pair_id": "1_F1", "image": "1_F1.jpg", "conversatons": rounds}, ensure_ascii=False)
    (tmp_path / "alignment" / "500k.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    samples = load_samples("llava", tmp_path / "alignment" / "500k.jsonl")
    assert [s.image for s in samples] == [tmp_path / "images/1_F1.jpg"] * 2 and samples[0].answer == "x\u2028y"


def test_answers_that_are_numbers_or_lists_become_text(slake: Path) -> None:
    rows = json.loads((slake / "train.json").read_text())
    rows[0]["answer"], rows[2]["answer"] = ["Liver", "Spleen"], 3
    (slake / "train.json").write_text(json.dumps(rows))
    assert [s.answer for s in load_samples("slake", slake)] == ["Liver, Spleen", "3"]
    rows[0]["answer"] = None
    (slake / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DatasetError, match=r"answer: null"):
        load_samples("slake", slake)


def test_a_share_of_missing_images_may_be_left_out(slake: Path) -> None:
    rows = json.loads((slake / "train.json").read_text())
    (slake / "train.json").write_text(json.dumps([*rows, {**rows[0], "qid": 10, "img_name": "xmlab2/source.jpg"}]))
    with pytest.raises(DatasetError, match="1 of 3 rows"):
        load_samples("slake", slake, max_missing=0.3)
    assert [s.id for s in load_samples("slake", slake, max_missing=0.34)] == ["slake-7", "slake-9"]


def test_splits_go_by_the_names_that_others_give_them(slake: Path) -> None:
    (slake / "train.json").rename(slake / "validation.json")
    assert len(load_samples("slake", slake, "validate")) == 2


@pytest.fixture
def export_rows() -> dict[str, list[object]]:
    images = []
    for i in range(3):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (i, 0, 0)).save(out, "PNG")
        images.append({"bytes": out.getvalue(), "path": None})
    return {"image": [*images, images[0]], "question": ["a?", "b?", "c?", "d?"], "answer": ["yes", "No", "lung", "2"]}


@pytest.mark.parametrize("layout", ["parquet", "parquet in data", "saved splits", "saved split"])
def test_hub_exports(tmp_path: Path, export_rows: dict[str, list[object]], layout: str) -> None:
    datasets = pytest.importorskip("datasets", reason="hub exports need the datasets extra")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(export_rows, features=features)
    folder = tmp_path / "export"
    if layout.startswith("parquet"):
        inner = folder / "data" if layout.endswith("data") else folder
        inner.mkdir(parents=True)
        rows.to_parquet(inner / "validation-00000-of-00001.parquet")
    else:
        (datasets.DatasetDict(validation=rows) if layout.endswith("splits") else rows).save_to_disk(folder)
    samples = load_samples("vqa-rad", folder, "validate")
    assert [(s.question, s.answer, s.answer_type) for s in samples] == [
        ("a?", "yes", "closed"), ("b?", "No", "closed"), ("c?", "lung", "open"), ("d?", "2", "open"),
    ]  # fmt: skip
    paths = [s.image for s in samples]
    assert len(set(paths)) == 3 and paths[0] == paths[3] and len({s.id for s in samples}) == 4
    assert all(path and path.is_relative_to(cache_dir()) for path in paths)
    with Image.open(paths[1] or "") as image:
        assert image.getpixel((0, 0)) == (1, 0, 0)
    if layout != "saved split":
        with pytest.raises(DatasetError, match="Expected the split 'test'"):
            load_samples("vqa-rad", folder, "test")


def test_an_export_is_pulled_whole_or_not_at_all(
    tmp_path: Path, export_rows: dict[str, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="hub exports need the datasets extra")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(export_rows, features=features)
    (tmp_path / "hub").mkdir()
    rows.to_parquet(tmp_path / "hub" / "train.parquet")
    assert pull_export(str(tmp_path / "hub"), "main", tmp_path / "out") == {"train": 4}
    assert len(load_samples("pathvqa", tmp_path / "out")) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out"]
    with pytest.raises(DatasetError, match="Expected nothing at"):
        pull_export(str(tmp_path / "hub"), "main", tmp_path / "out")
    with pytest.raises(HubError, match="Expected the data set"):
        pull_export(str(tmp_path / "nothing"), "main", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub", "out"]


def test_without_the_extra_an_export_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError) as caught:
        load_samples("slake", tmp_path)
    assert "[datasets]" in caught.value.hint
