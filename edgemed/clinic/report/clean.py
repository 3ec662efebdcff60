"""Text from outside made fit for a report: nothing invisible that steers, nothing that XML, DICOM or a PDF refuses, and nothing withheld.

    clean_text("a\r\nb\x1b[2J\ufffe")                # "a\nb[2J"
    hide = Hider(withheld=identity, file_names=("DOE_JOHN.dcm",), mark="[withheld]")
    hide("Doe, John has a cough")                    # "[withheld], [withheld] has a cough"

Knows no format; each format escapes for itself. A Hider finds what it was told to look for and the usual spellings of it (parts of a
name, a date in other orders). Beyond it are a nickname or a wrong spelling that somebody typed, and a part of a name with fewer than
three letters, which is found inside the whole name alone: a patient called No must not take the no out of "no fracture".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import PurePath

from edgemed.clinic.records import PatientIdentity
from edgemed.core.text import printable

# Everything that ends a line somewhere becomes a line feed; the byte order mark shows nothing and is no part of a text.
_BREAKS = re.compile("\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
# Noncharacters: XML 1.0 forbids the last two of the first plane, and none of the others means anything between programs.
_LAST_TWO = "".join(chr(plane * 0x10000 + low) for plane in range(17) for low in (0xFFFE, 0xFFFF))
_NONCHARACTERS = re.compile(f"[\ufdd0-\ufdef\ufeff{_LAST_TWO}]")
# What has fewer letters and digits than this is too common a word, or number, to be taken out of a report.
_SHORTEST = 3
_DATE_ORDERS = (
    *("%Y-%m-%d", "%Y%m%d", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d/%m/%Y", "%d-%m-%Y", "%m/%d/%Y", "%m-%d-%Y"),
    *("%d.%m.%y", "%d/%m/%y"),
)
_BETWEEN = r"[\s^,_=]+"


def clean_text(text: str) -> str:
    """`text` composed (NFC), with line feeds as its only control characters, without trailing spaces and outer empty lines."""
    text = _NONCHARACTERS.sub("", _BREAKS.sub("\n", text).replace("\t", "    "))
    text = unicodedata.normalize("NFC", printable(text))
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def clean_line(text: str, most_chars: int = 200) -> str:
    """`clean_text` on one line, cut (with an ellipsis) at `most_chars`."""
    line = " ".join(clean_text(text).split())
    return line if len(line) <= most_chars else line[: most_chars - 1].rstrip() + "…"


def iso_date(text: str) -> str:
    """YYYY-MM-DD where `text` is a whole date (so, or as DICOM's YYYYMMDD), otherwise empty: a format with dates takes no other."""
    parts = re.fullmatch(r"(\d{4})-?(\d{2})-?(\d{2})", text.strip(), re.ASCII)
    try:
        return date(*map(int, parts.groups())).isoformat() if parts else ""
    except ValueError:
        return ""


class Hider:
    """Replaces by `mark` whatever would tell who the patient is. With nothing to hide it returns its text unchanged."""

    def __init__(self, withheld: PatientIdentity | None = None, file_names: Sequence[str] = (), mark: str = "[withheld]") -> None:
        words = {clean_line(word) for word in (*_identity_words(withheld), *_file_words(file_names))}
        words = {word for word in words if sum(map(str.isalnum, word)) >= _SHORTEST}
        # Longest first, so that a whole name is one mark and not one for each of its parts.
        spelled = [_pattern(word) for word in sorted(words, key=lambda word: (-len(word), word))]
        one = f"(?:{'|'.join(spelled)})"
        # Several in a row, such as the parts of a name, become one mark.
        self._pattern = re.compile(f"{one}(?:{_BETWEEN}{one})*", re.IGNORECASE) if spelled else None
        self._mark = mark

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda _: self._mark, text) if self._pattern else text


def _pattern(word: str) -> str:
    """The word between borders; the spaces, carets, commas and underscores inside it stand for one another."""
    parts = [re.escape(part) for part in re.split(_BETWEEN, word) if part]
    return rf"(?<!\w){_BETWEEN.join(parts)}(?!\w)" if parts else re.escape(word)


def _identity_words(identity: PatientIdentity | None) -> Iterator[str]:
    if identity is None:
        return
    yield from (identity.patient_id, identity.accession, identity.study_uid)
    parts = [part for part in re.split(r"[\s^,_=.]+", identity.name) if part]
    for words in (identity.name, " ".join(parts[:2]), " ".join(parts[1::-1]), *parts):
        yield words
        yield "".join(letter for letter in unicodedata.normalize("NFD", words) if not unicodedata.combining(letter))
    yield from _date_words(identity.birth_date)


def _date_words(text: str) -> Iterator[str]:
    yield text
    if not iso_date(text):
        return
    day = date.fromisoformat(iso_date(text))
    for order in _DATE_ORDERS:
        yield day.strftime(order)
    yield from (f"{day.day}.{day.month}.{day.year}", f"{day.day}/{day.month}/{day.year}", f"{day.month}/{day.day}/{day.year}")


def _file_words(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        path = PurePath(name.replace("\\", "/"))
        yield from (name, path.name)
        # A stem such as "wrist" is an ordinary word of a report; one that is put together, or has digits, is a name.
        if re.search(r"[\d_ ^,-]", path.stem):
            yield path.stem
