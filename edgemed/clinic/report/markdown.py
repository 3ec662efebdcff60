"""The report as Markdown (CommonMark): readable as it is, and safe to render, since no text from outside keeps a meaning as markup.

    text = export_markdown(export)

Knows nothing of consent: it lays out contents.py's Contents.
"""

from __future__ import annotations

import re

from edgemed.clinic.report.contents import Contents, Say, Turn, build_contents, say_in, seen_text, utc_text
from edgemed.clinic.report.export import Export
from edgemed.clinic.report.headings import Translate, same

# Every character with which CommonMark or its usual extensions begin something; each may be escaped by a backslash.
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~$&^])")
_LINE_START = re.compile(r"^( *)([#+=>-]|\d{1,9}(?=[.)]))")
_LINK = re.compile(r"(?i)(https?|ftp|mailto|www)(?=[:.])")


def escape(text: str) -> str:
    """`text` as Markdown that shows exactly it, line by line."""
    return "\\\n".join(_escape_line(line) for line in text.split("\n"))


def _escape_line(line: str) -> str:
    if not line.strip():
        return "&nbsp;"
    line = _SPECIAL.sub(r"\\\1", line)
    line = re.sub(r"@", "&#64;", _LINK.sub(lambda word: f"{word[1][0]}&#{ord(word[1][1])};{word[1][2:]}", line))
    start = _LINE_START.match(line)
    if start:
        rest = line[start.end() :]
        line = f"{start[1]}\\{start[2]}{rest}" if not start[2].isdigit() else f"{start[1]}{start[2]}\\{rest}"
    spaces = len(line) - len(line.lstrip(" "))
    return "&nbsp;" * spaces + line.lstrip(" ")


def export_markdown(export: Export, translate: Translate = same) -> str:
    """The whole report as Markdown, ending with a line feed."""
    contents, say = build_contents(export, translate), say_in(export, translate)
    blocks = [f"# {escape(contents.title)}", f"**{escape(contents.status_text)}**", f"> {escape(contents.advice)}"]
    blocks += [_facts(contents, say)]
    for section in contents.sections:
        body = escape(section.text) if section.written else f"*{escape(section.text)}*"
        blocks += [f"## {escape(section.title)}", body]
    blocks += _signature(contents, say) + _images(contents, say)
    blocks += [f"## {escape(say('ai_title'))}", _list([escape(line) for line in contents.ai_lines])]
    blocks += _conversation(contents, say)
    return "\n\n".join(block for block in blocks if block) + "\n"


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _row(label: str, value: str) -> str:
    return f"{escape(label)}: {escape(value)}"


def _facts(contents: Contents, say: Say) -> str:
    rows = [_row(label, value) for label, value in contents.patient_rows] or [escape(say("withheld"))]
    rows += [_row(say("institution"), contents.institution)] if contents.institution else []
    rows += [_row(say("version"), f"{contents.version} ({contents.reference})"), _row(say("as_of"), utc_text(contents.as_of))]
    return _list(rows)


def _signature(contents: Contents, say: Say) -> list[str]:
    if contents.signed_at is None:
        return [f"**{escape(contents.status_text)}**"]
    return [_list([_row(say("signed_by"), contents.signed_by), _row(say("signed_at"), utc_text(contents.signed_at))])]


def _images(contents: Contents, say: Say) -> list[str]:
    if not contents.images:
        return []
    lines = []
    for image in contents.images:
        lines.append(escape(f"{image.title}: {image.facts}; {image.view}"))
        if image.file_sha256:
            lines[-1] += "\\\n  " + _row(say("file_hash"), image.file_sha256)
    return [f"## {escape(say('images'))}", _list(lines)]


def _conversation(contents: Contents, say: Say) -> list[str]:
    if not contents.turns:
        return []
    blocks = [f"## {escape(say('conversation'))}"]
    for turn in contents.turns:
        blocks += _turn(turn, say)
    return blocks


def _turn(turn: Turn, say: Say) -> list[str]:
    title = say("question") if turn.role == "user" else say("answer")
    lines = [escape(seen_text(seen, say)) for seen in turn.seen]
    lines += [f"*{escape(note)}*" for note in turn.notes]
    if turn.role == "assistant":
        lines.append(escape(f"{turn.model.name} ({turn.model.quant}), {turn.model.sha256}" if turn.model else say("no_model")))
    return [f"### {escape(title)}", escape(turn.text) if turn.text.strip() else "", _list(lines)]
