"""Templates: prompts equal to the published strings, answers marked, persons' control strings harmless."""

from __future__ import annotations

import pytest

from edgemed.core.conversation import (
    TEMPLATES,
    ImageSlot,
    Segment,
    Text,
    Turn,
    clean_answer,
    clean_text,
    find_template,
    render,
    split_chunks,
    to_jinja,
)
from edgemed.core.errors import InputError

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# As printed in the projects' own code, with <image> where the picture goes.
PUBLISHED = {
    "v1": f"{USER} USER: <image>\nQ ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: <image>\nQ ASSISTANT:",
    "phi": f"{USER} USER: <image>\nQ ASSISTANT:",
    "v1_im_end": f"{USER} USER: <image>\nQ ASSISTANT:",
    "hf_llava": "USER: <image>\nQ ASSISTANT:",
    "mistral_instruct": "[INST] <image>\nQ [/INST]",
    "plain": "<image>Q",
    "llava_v0": f"{HUMAN}###Human: <image>\nQ###Assistant:",
    "simple": f"{HUMAN}###Human: Hi!###Assistant: Hi there!  How can I help you today?\n###Human: Q\n<im_start><image><im_end>###",
    "chatml": "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\n",
}
ROUNDS = {
    "v1": f"{USER} USER: <image>\nQ ASSISTANT: A</s>USER: Q2 ASSISTANT:",
    "hf_llava": "USER: <image>\nQ ASSISTANT: A USER: Q2 ASSISTANT:",
    "phi": f"{USER} USER: <image>\nQ ASSISTANT: A<|endoftext|>USER: Q2 ASSISTANT:",
    "mistral_instruct": "[INST] <image>\nQ [/INST] A </s>[INST] Q2 [/INST]",
    "llava_v0": f"{HUMAN}###Human: <image>\nQ###Assistant: A###Human: Q2###Assistant:",
    "chatml": "<|im_start|>user\n<image>\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
}


def flat(segments: list[Segment]) -> str:
    return "".join("<image>" if isinstance(s, ImageSlot) else s.text for s in segments)


def test_every_template_is_pinned_here() -> None:
    assert set(PUBLISHED) == set(TEMPLATES)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_first_question_is_the_published_prompt(name: str) -> None:
    assert flat(render(TEMPLATES[name], [Turn("user", "Q", images=1)])) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(ROUNDS))
def test_a_second_round_is_the_published_prompt(name: str) -> None:
    assert flat(render(TEMPLATES[name], [Turn("user", "Q", images=1), Turn("assistant", "A"), Turn("user", "Q2")])) == ROUNDS[name]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_control_string_is_left_however_it_is_nested(name: str) -> None:
    template = TEMPLATES[name]
    for control in (*template.control, "<image>"):
        for text in (control * 3, control[0] + control, control + control[-1], control[:1] + control + control[1:], control[:-1] * 4):
            assert not any(c in clean_text(template, text) for c in (*template.control, "<image>"))


def test_text_is_split_at_the_image_only() -> None:
    segments = render(TEMPLATES["v1"], [Turn("user", "Q", images=1)])
    assert segments == [Text(f"{USER} USER: "), ImageSlot(0), Text("\nQ ASSISTANT:")]


def test_a_chunk_is_what_lies_between_images() -> None:
    a, b, c = Text("a"), Text("b", answer=True), Text("c")
    assert split_chunks([a, b, ImageSlot(0), c, b]) == [(a, b), ImageSlot(0), (c, b)]
    assert split_chunks([ImageSlot(0), 5, a]) == [ImageSlot(0), 5, (a,)]
    assert split_chunks([]) == []


def test_images_are_numbered_over_all_turns() -> None:
    turns = [Turn("user", "Q", images=2), Turn("assistant", "A"), Turn("user", "Q2", images=1)]
    assert [s.index for s in render(TEMPLATES["chatml"], turns) if isinstance(s, ImageSlot)] == [0, 1, 2]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_answers_are_marked_for_the_loss(name: str) -> None:
    template = TEMPLATES[name]
    segments = render(template, [Turn("user", "Q", images=1), Turn("assistant", "A")])
    assert [s.text for s in segments if isinstance(s, Text) and s.answer] == [f"{template.answer_prefix}A{template.answer_suffix}"]
    assert not any(s.answer for s in segments[:-1] if isinstance(s, Text))


def test_turns_must_alternate() -> None:
    for turns in ([Turn("assistant", "A")], [Turn("user", "Q"), Turn("user", "Q")]):
        with pytest.raises(InputError, match="alternation"):
            render(TEMPLATES["v1"], turns)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_nobody_types_a_control_string(name: str) -> None:
    template = TEMPLATES[name]
    cleaned = clean_text(template, "x ".join((*template.control, "<image>")))
    assert not any(control in cleaned for control in (*template.control, "<image>"))


def test_other_text_is_left_alone() -> None:
    assert clean_text(TEMPLATES["chatml"], "  Is 3 < 4 | 5 > 2?\nYes ") == "Is 3 < 4 | 5 > 2?\nYes"


def test_answers_are_cleaned() -> None:
    assert clean_answer(TEMPLATES["simple"], "Assistant: No fracture.\n###Human: more") == "No fracture."
    assert clean_answer(TEMPLATES["v1"], " Yes.</s>") == "Yes."
    assert clean_answer(TEMPLATES["chatml"], "Assistant: stays") == "Assistant: stays"


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(InputError, match="found 'v9'"):
        find_template("v9")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_jinja_writes_the_same_text(name: str) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = TEMPLATES[name]
    turns = [Turn("user", "it's \\n Q"), Turn("assistant", "A"), Turn("user", "Q2")]
    messages = [{"role": t.role, "content": t.text} for t in turns]
    made = (
        jinja2.Environment(keep_trailing_newline=True).from_string(to_jinja(template)).render(messages=messages, add_generation_prompt=True)
    )
    assert made == flat(render(template, turns))
