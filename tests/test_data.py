"""Readers of data sets on small files in their native layouts, and on the real ones where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from edgemed.core.errors import DatasetError
from edgemed.data import hash_samples, load_samples


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
