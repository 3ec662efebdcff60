"""From the conversation to a draft: the prompt that asks a model for one, and the reading of whatever it answers.

    question = draft_question(messages, [image.facts for image in images], "fr")
    findings, impression, recommendation = parse_draft(answer, messages, "fr")

A small model does not follow a format. So headings are recognised in any case, numbered, as Markdown, in five languages or as JSON; and
where there are none, the findings are the conversation's own questions and answers (said to be such), the impression is the model's
text, and the recommendation says that the clinician has to write it. Nothing is invented: every word is the model's, the conversation's
or one of the fixed sentences. Knows no engine and no template; whether a draft is right, only the clinician knows.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence

from edgemed.clinic.records import ImageFacts, Message
from edgemed.clinic.report.clean import clean_line, clean_text
from edgemed.clinic.report.headings import SECTION_KEYS, SECTION_WORDS, SectionKey, Translate, base_language, heading, same

# The conversation's share of the prompt: what a context of 2048 tokens holds beside an image's 576 and the answer. Newest turns stay.
MOST_CONVERSATION_CHARS = 2400
MOST_ANSWER_CHARS = 600
_LANGUAGE_NAMES = {"en": "English", "fr": "French", "sw": "Swahili", "pt": "Portuguese", "ar": "Arabic"}
_ASKED = {
    "findings": "what the images show",
    "impression": "what it most likely means, and how sure that is",
    "recommendation": "what should be done next",
}


def pairs_of(messages: Sequence[Message]) -> list[tuple[Message, Message]]:
    """The conversation's questions with their answers; a question without an answer, or whose answer failed, is left out."""
    pairs: list[tuple[Message, Message]] = []
    question: Message | None = None
    for message in messages:
        if message.role == "user":
            question = message
        elif question is not None and message.state != "failed" and message.text.strip():
            # An answer that was asked for again replaces the one before it.
            pairs = [pair for pair in pairs if pair[0] is not question] + [(question, message)]
    return pairs


def draft_question(messages: Sequence[Message], facts: Sequence[ImageFacts], language: str = "en") -> str:
    """The prompt for a draft in `language`. It holds the conversation and what identifies nobody, never a description or a name."""
    base = base_language(language)
    words = {key: heading(key, language) for key in SECTION_KEYS}
    wanted = [f"{words[key]}: <{_ASKED[key]}>" for key in SECTION_KEYS]
    lines = ["Write the draft of a radiology report from the image and this conversation."]
    lines += [f"Images: {'; '.join(map(_facts_line, facts))}."] if facts else []
    lines += ["", *_conversation_lines(messages), ""]
    lines += [f"Write in {_LANGUAGE_NAMES[base]}. " if base in _LANGUAGE_NAMES and base != "en" else ""]
    lines[-1] += "State only what the conversation or the image supports. Use exactly these three headings:"
    return "\n".join([*lines, *wanted])


def _facts_line(facts: ImageFacts) -> str:
    words = [clean_line(word, 64) for word in (facts.modality, facts.body_part, facts.view_position, facts.laterality) if word.strip()]
    return " ".join([*words, f"({facts.frames} frames)"] if facts.frames > 1 else words) or "image"


def _conversation_lines(messages: Sequence[Message]) -> list[str]:
    lines: list[str] = []
    room = MOST_CONVERSATION_CHARS
    for question, answer in reversed(pairs_of(messages)):
        pair = [f"Q: {clean_line(question.text, MOST_ANSWER_CHARS)}", f"A: {clean_line(answer.text, MOST_ANSWER_CHARS)}"]
        room -= sum(map(len, pair))
        if room < 0:
            break
        lines = pair + lines
    return lines or ["(no question was answered)"]


def parse_draft(text: str, messages: Sequence[Message], language: str = "en", translate: Translate = same) -> tuple[str, str, str]:
    """(findings, impression, recommendation) of a model's answer, never failing."""
    text = _without_echo(clean_text(text).strip())
    found = _read_json(text) or _read_headings(text)
    incomplete = heading("incomplete", language, translate)
    if not found:
        return conversation_findings(messages, language, translate) or incomplete, text or incomplete, incomplete
    findings = found.get("findings") or conversation_findings(messages, language, translate) or incomplete
    return findings, found.get("impression") or incomplete, found.get("recommendation") or incomplete


def conversation_findings(messages: Sequence[Message], language: str = "en", translate: Translate = same) -> str:
    """The conversation as findings, marked as that; empty where nothing was answered."""
    lines = [heading("from_conversation", language, translate)]
    for question, answer in pairs_of(messages):
        notes = [heading("stopped", language, translate)] if answer.state == "stopped" else []
        notes += [heading("refer", language, translate)] if answer.verdict == "refer" else []
        lines.append(f"- {heading('question', language, translate)}: {clean_line(question.text, 2000)}")
        lines.append(f"  {heading('answer', language, translate)}: {' '.join([clean_line(answer.text, 4000), *notes])}")
    return "\n".join(lines) if len(lines) > 1 else ""


def _without_echo(text: str) -> str:
    """The answer of a model that first repeats the prompt: what follows the prompt's last line, which may be nothing."""
    marks = [f"<{asked}>" for asked in _ASKED.values()]
    # One mark alone is a section that the model left open, in an answer of its own.
    return text.rpartition(marks[-1])[2].strip() if all(mark in text for mark in marks) else text


def _section_of(word: str) -> SectionKey | None:
    return _WORDS.get(" ".join(word.casefold().split()))


def _unaccented(word: str) -> str:
    return "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))


_WORDS: dict[str, SectionKey] = {
    spelled.casefold(): key
    for words in SECTION_WORDS.values()
    for key in SECTION_KEYS
    for word in (*words[key], key)
    for spelled in (word, _unaccented(word))
}
_ANY_WORD = "|".join(re.escape(word).replace(r"\ ", r"\s+") for word in sorted(_WORDS, key=len, reverse=True))
# What may stand before and after a heading's word: Markdown's marks, a number, a bracket.
# Repetitions are bounded, so that a text of nothing but spaces or stars is read in no more time than any other.
_BEFORE = r"(?:[#>*_\-• ]|\(?\d{1,2}[.)]){0,16}"
_AFTER = r"[*_ ]{0,8}(?:\([^()\n]{0,40}\))?[*_ ]{0,8}"
# A heading is alone on its line, or a colon follows; with a colon it may also follow the end of a sentence on the same line.
_HEADING = re.compile(
    rf"(?:^{_BEFORE}|(?<=[.!?;؟])[ *_]{{1,8}})(?P<word>{_ANY_WORD}){_AFTER}(?:[:：][*_ ]{{0,8}}|[-–—] |(?=\n|\Z))",
    re.IGNORECASE | re.MULTILINE,
)
_PLACEHOLDER = re.compile(r"<[^<>\n]{0,80}>|\[[^\[\]\n]{0,80}\]|" + "|".join(re.escape(asked) for asked in _ASKED.values()), re.IGNORECASE)


def _read_headings(text: str) -> dict[SectionKey, str]:
    found: dict[SectionKey, list[str]] = {}
    marks = list(_HEADING.finditer(text))
    if not marks:
        return {}
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    preamble = _body(text[: marks[0].start()])
    for mark, end in zip(marks, ends, strict=True):
        key = _section_of(mark["word"])
        body = _body(text[mark.end() : end])
        if key is not None and body:
            found.setdefault(key, []).append(body)
    # "Here is the report:" announces; any other words before the first heading are kept, since they may be findings.
    if preamble and not preamble.endswith((":", "：")) and found:
        found["findings"] = [preamble, *found.get("findings", [])]
    return {key: "\n".join(dict.fromkeys(bodies)) for key, bodies in found.items()}


def _body(text: str) -> str:
    """A section's text without Markdown's fences and rules; empty where it only repeats what the prompt asked for."""
    lines = [line for line in text.strip().split("\n") if not re.fullmatch(r"\s*(?:```\w*|[-*_=]{3,}|#+)\s*", line)]
    body = "\n".join(lines).strip().removeprefix("**").removesuffix("**").strip()
    return "" if _PLACEHOLDER.fullmatch(body.rstrip(".")) or not re.search(r"\w", body) else body


def _read_json(text: str) -> dict[SectionKey, str]:
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        return {}
    try:
        value = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    pairs = ((_section_of(str(key)), "\n".join(_json_lines(part)).strip()) for key, part in value.items())
    return {key: body for key, body in pairs if key is not None and body}


def _json_lines(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (part for part in value if isinstance(part, str))
