"""Conversation templates: the one place that turns turns into text, for training and for the runtime.

    segments = render(TEMPLATES["v1"], [Turn("user", "What is shown?", images=1)])
    # [Text("A chat … USER: "), ImageSlot(0), Text("\\nWhat is shown? ASSISTANT:")]

Texts that follow one another are tokenised in one piece (`split_chunks`), without special tokens added; a BOS comes first where
`template.bos` says so. That is LLaVA's rule (the prompt is split at images and nowhere else), and it is what training
(edgemed/finetune) and the engine (runtimes) both do, so that the ids agree. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from edgemed.core.errors import InputError
from edgemed.core.model import Frozen

IMAGE_MARKER = "<image>"


class ConversationTemplate(Frozen):
    """A chat format, spelled out so that a manifest can carry it.

    One round is `user_prefix + text + user_suffix + assistant_prefix + answer_prefix + answer + answer_suffix`; generation
    starts after `assistant_prefix`. The image stands before the text (`image_first`, followed by `image_separator`) or after it
    (preceded by the separator), wrapped in `image_prefix`/`image_suffix`.
    """

    name: str
    bos: bool
    system: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    answer_prefix: str = ""
    answer_suffix: str
    image_first: bool = True
    image_separator: str = "\n"
    image_prefix: str = ""
    image_suffix: str = ""
    # Text at which generation stops, beside the model's own end-of-text tokens.
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    # Strings that a tokenizer reads as control tokens; in a person's text they are broken up, so that nobody types a turn's end:
    # by a blank behind their first character, which therefore another character must follow.
    control: tuple[Annotated[str, Field(pattern=r"^\S\S")], ...] = ()
    # Removed from the start of an answer (LLaVA-Med v1.0 writes its own role).
    answer_label: str = ""


@dataclass(frozen=True)
class Turn:
    """One message. `images` counts the images that belong to it, in the order they are handed over."""

    role: Literal["user", "assistant"]
    text: str
    images: int = 0


@dataclass(frozen=True)
class Text:
    """A piece of text. `answer` marks what a model is trained to produce."""

    text: str
    answer: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """The place of image number `index`."""

    index: int


Segment = Text | ImageSlot

_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def _vicuna(name: str, system: str, end: str, bos: bool) -> ConversationTemplate:
    return ConversationTemplate(
        name=name,
        bos=bos,
        system=f"{system} ",
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        answer_prefix=" ",
        answer_suffix=end,
        stop=(end, "USER:"),
        control=(end,),
    )


# Strings as published; sources in ../shared/reference/checkpoint-formats.md, sections b to d (SEED, LLaVA-Med, TinyLLaVA_Factory).
_ALL = (
    _vicuna("v1", _USER, "</s>", True),
    _vicuna("llava_v1", _HUMAN, "</s>", True),
    _vicuna("phi", _USER, "<|endoftext|>", False),
    _vicuna("v1_im_end", _USER, "<|im_end|>", False),
    ConversationTemplate(
        # llava-hf's own chat template: as v1 without a system line and without an end after an answer. A model that is trained
        # with it never learns to end (the runtime stops it by what its base learned): fine-tuning should pick v1.
        name="hf_llava",
        bos=True,
        system="",
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        answer_prefix=" ",
        answer_suffix=" ",
        stop=("</s>", "USER:"),
        control=("</s>",),
    ),
    ConversationTemplate(
        name="mistral_instruct",
        bos=True,
        system="",
        user_prefix="[INST] ",
        user_suffix=" [/INST]",
        assistant_prefix="",
        answer_prefix=" ",
        answer_suffix=" </s>",
        stop=("</s>", "[INST]"),
        control=("</s>", "[INST]", "[/INST]"),
    ),
    ConversationTemplate(
        name="plain",  # alignment: a caption after the image, no question
        bos=True,
        system="",
        user_prefix="",
        user_suffix="",
        assistant_prefix="",
        answer_suffix="\n",
        image_separator="",
        stop=("\n",),
    ),
    ConversationTemplate(
        name="llava_v0",
        bos=True,
        system=f"{_HUMAN}###",
        user_prefix="Human: ",
        user_suffix="###",
        assistant_prefix="Assistant:",
        answer_prefix=" ",
        answer_suffix="###",
        stop=("###",),
        control=("###", "</s>"),
    ),
    ConversationTemplate(
        name="simple",  # LLaVA-Med v1.0: image after the question, between trained marker tokens; the model writes its own role
        bos=True,
        system=f"{_HUMAN}###Human: Hi!###Assistant: Hi there!  How can I help you today?\n###",
        user_prefix="Human: ",
        user_suffix="###",
        assistant_prefix="",
        answer_prefix="Assistant: ",
        answer_suffix="###",
        image_first=False,
        image_prefix="<im_start>",
        image_suffix="<im_end>",
        stop=("###",),
        control=("###", "</s>", "<im_start>", "<im_end>", "<im_patch>"),
        answer_label="Assistant:",
    ),
    ConversationTemplate(
        name="chatml",
        bos=False,
        system="",
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>\n",
        assistant_prefix="<|im_start|>assistant\n",
        answer_suffix="<|im_end|>\n",
        stop=("<|im_end|>",),
        control=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    ),
)
TEMPLATES: dict[str, ConversationTemplate] = {t.name: t for t in _ALL}


def find_template(name: str) -> ConversationTemplate:
    """The template called `name`. Raises InputError."""
    if name not in TEMPLATES:
        raise InputError(f"Expected a conversation template out of {', '.join(TEMPLATES)}, found '{name}'.", "Pass one of them.")
    return TEMPLATES[name]


def clean_text(template: ConversationTemplate, text: str) -> str:
    """A person's text with control strings and image markers broken up by a blank, so that they stay text."""
    for control in (*template.control, IMAGE_MARKER):
        while control in text:  # again: one broken up may leave another, as in "####"
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text.strip()


def render(template: ConversationTemplate, turns: Sequence[Turn]) -> list[Segment]:
    """Turns → segments; adjacent text is merged, and answers are kept apart and marked, so that a loss can find them.

    The last turn is the user's (generation starts after the segments) or the assistant's (a training example). Raises InputError
    where turns do not alternate, starting with the user.
    """
    out: list[Segment] = []
    image = 0
    _add(out, template.system)
    for position, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[position % 2]:
            raise InputError(
                f"Expected turns of user and assistant in alternation, found '{turn.role}' at {position}.", "Start with the user."
            )
        if turn.role == "assistant":
            _add(out, template.answer_prefix + clean_text(template, turn.text) + template.answer_suffix, answer=True)
            continue
        _add(out, template.user_prefix)
        text = clean_text(template, turn.text)
        if not template.image_first:
            _add(out, text)
        for _ in range(turn.images):
            if not template.image_first:
                _add(out, template.image_separator)
            _add(out, template.image_prefix)
            out.append(ImageSlot(image))
            _add(out, template.image_suffix)
            if template.image_first:
                _add(out, template.image_separator)
            image += 1
        if template.image_first:
            _add(out, text)
        _add(out, template.user_suffix + template.assistant_prefix)
    return out


def _add(out: list[Segment], text: str, answer: bool = False) -> None:
    if not text:
        return
    last = out[-1] if out else None
    if isinstance(last, Text) and not last.answer and not answer:
        out[-1] = Text(last.text + text)
    else:
        out.append(Text(text, answer))


def split_chunks(segments: Sequence[Text | ImageSlot | int]) -> list[tuple[Text, ...] | ImageSlot | int]:
    """Texts that follow one another put together: a chunk's texts are tokenised as one string. Images and bare token ids stay."""
    out: list[tuple[Text, ...] | ImageSlot | int] = []
    texts: list[Text] = []
    for segment in segments:
        if isinstance(segment, Text):
            texts.append(segment)
            continue
        if texts:
            out.append(tuple(texts))
            texts = []
        out.append(segment)
    return [*out, tuple(texts)] if texts else out


def clean_answer(template: ConversationTemplate, text: str) -> str:
    """A generated answer as a person reads it: without its role label, surrounding blanks and stop strings."""
    for stop in template.stop:
        text = text.split(stop, 1)[0]
    text = text.strip()
    return text.removeprefix(template.answer_label).strip() if template.answer_label else text


def to_jinja(template: ConversationTemplate) -> str:
    """The template as Jinja over `messages`, for the GGUF's `tokenizer.chat_template` and for HF tokenizers.

    A message's image markers are part of its content there (llama.cpp puts its own marker in), so only the text around is made.
    """
    t = {
        k: _jinja_text(getattr(template, k))
        for k in ("system", "user_prefix", "user_suffix", "assistant_prefix", "answer_prefix", "answer_suffix")
    }
    return (
        f"{{{{ {t['system']} }}}}"
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {t['user_prefix']} + message['content'] + {t['user_suffix']} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {t['assistant_prefix']} + {t['answer_prefix']} + message['content'] + {t['answer_suffix']} }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {t['assistant_prefix']} }}}}{{% endif %}}"
    )


def _jinja_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
