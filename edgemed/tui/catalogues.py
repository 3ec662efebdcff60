"""The catalogues' upkeep: strings out of the source, into the .po files, and from those the .mo files that the program reads.

    python -m edgemed.tui.i18n --update      # or --check

Strings are what `_("…")`, `N_("…")` and `ngettext("…", "…", n)` are given in SOURCES, and the constants in CONSTANTS (sentences that a
layer below owns and the screens show through `_`). Translations stay with their English text; where that changes, the entry is empty
until someone translates it: nothing is guessed. Needs Babel, so only `main` in i18n.py and tests import this module.
"""

from __future__ import annotations

import ast
import gettext
import io
import re
from collections.abc import Iterable
from pathlib import Path
from string import Formatter

from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_file
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from edgemed.core.files import save_bytes
from edgemed.tui.i18n import DOMAIN, LANGUAGES, LOCALES, SOURCE

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("edgemed/tui", "edgemed/clinic/report")
# Sentences of other rooms that the screens or the report show through `_`: file, names at its top level (a text, or texts within).
CONSTANTS: dict[str, tuple[str, ...]] = {
    "edgemed/core/advice.py": ("ADVICE", "REFER", "NOT_CALIBRATED"),
    "edgemed/clinic/report/headings.py": ("HEADINGS",),
}
KEYWORDS = {"_": None, "N_": None, "gettext": None, "translate": None, "ngettext": (1, 2)}
# These change with every run or Babel release and say nothing: left out, so that an unchanged catalogue is an unchanged file.
_RESTLESS_HEADERS = re.compile(rb'^"(POT-Creation-Date|PO-Revision-Date|Generated-By|Report-Msgid-Bugs-To|Last-Translator)[^\n]*\n', re.M)

# A text, or its singular and plural.
Id = tuple[str, ...]


def po_path(code: str) -> Path:
    return LOCALES / code / "LC_MESSAGES" / f"{DOMAIN}.po"


def mo_path(code: str) -> Path:
    return po_path(code).with_suffix(".mo")


def translated_codes() -> list[str]:
    return [code for code in LANGUAGES if code != SOURCE]


def extract() -> Catalog:
    """Every string to translate, with the files that show it."""
    template = Catalog(project="edgemed", version="1", fuzzy=False)
    for path in sorted(path for source in SOURCES for path in (ROOT / source).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        for line, message, comments, _context in extract_from_file("python", path, KEYWORDS, ("Translators:",)):
            if message:
                template.add(message if isinstance(message, str) else tuple(message), locations=[(where, line)], auto_comments=comments)
    for where, names in CONSTANTS.items():
        for line, text in _constants(ROOT / where, names):
            template.add(text, locations=[(where, line)])
    return template


def _constants(path: Path, names: Iterable[str]) -> list[tuple[int, str]]:
    """The texts in the values that are assigned to `names` at the top level of a file (a dict's keys are no texts to show)."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value is not None and any(isinstance(target, ast.Name) and target.id in names for target in targets):
            parts: list[ast.expr | None] = list(value.values) if isinstance(value, ast.Dict) else [value]
            found += [
                (leaf.lineno, leaf.value)
                for part in parts
                if part is not None
                for leaf in ast.walk(part)
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
            ]
    return found


def load(code: str) -> Catalog:
    """A language's .po file; an empty catalogue where there is none yet."""
    if not po_path(code).exists():
        return Catalog(locale=code, project="edgemed", version="1", fuzzy=False)
    with po_path(code).open("rb") as file:
        return read_po(file, locale=code)


def update() -> None:
    """Merge the source's strings into every .po file, and write the .mo files whose content changed."""
    template = extract()
    for code in translated_codes():
        catalogue = load(code)
        catalogue.update(template, no_fuzzy_matching=True)
        catalogue.obsolete.clear()
        catalogue.fuzzy = False
        _save_po(code, catalogue)
        fresh = load(code)
        if not mo_path(code).exists() or _read_mo(code) != _entries(fresh):
            compiled = io.BytesIO()
            write_mo(compiled, fresh)
            save_bytes(mo_path(code), compiled.getvalue())


def _save_po(code: str, catalogue: Catalog) -> None:
    text = io.BytesIO()
    write_po(text, catalogue, width=120, sort_output=True, ignore_obsolete=True, include_lineno=False)
    save_bytes(po_path(code), _RESTLESS_HEADERS.sub(b"", text.getvalue()))


def _entries(catalogue: Catalog) -> dict[str | tuple[str, int], str]:
    """What gettext would find: a text, or (singular, form) for plurals."""
    entries: dict[str | tuple[str, int], str] = {}
    for message in _messages(catalogue):
        if message.pluralizable:
            entries.update({(_id(message)[0], form): text for form, text in enumerate(_texts(message))})
        else:
            entries[_id(message)[0]] = _texts(message)[0]
    return {key: text for key, text in entries.items() if text}


def _read_mo(code: str) -> dict[str | tuple[str, int], str]:
    if not mo_path(code).exists():
        return {}
    with mo_path(code).open("rb") as file:
        # The standard library keeps what it read in `_catalog`; there is no public way to list a .mo file's entries.
        catalogue: dict[str | tuple[str, int], str] = dict(gettext.GNUTranslations(file)._catalog)  # type: ignore[attr-defined]
    catalogue.pop("", None)
    return catalogue


def _messages(catalogue: Catalog) -> list[Message]:
    return [message for message in catalogue if message.id]


def _id(message: Message) -> Id:
    return (message.id,) if isinstance(message.id, str) else tuple(message.id)


def _texts(message: Message) -> tuple[str, ...]:
    return (message.string,) if isinstance(message.string, str) else tuple(message.string or ())


def check() -> list[str]:
    """What is wrong with the catalogues, one sentence each: missing, superfluous, fuzzy, empty, other placeholders, old .mo."""
    wanted = {_id(message) for message in _messages(extract())}
    return [problem for code in translated_codes() for problem in check_catalogue(code, wanted, load(code))]


def check_catalogue(code: str, wanted: set[Id], catalogue: Catalog) -> list[str]:
    """The problems of one language's catalogue against the texts that the source has."""
    have = {_id(message) for message in _messages(catalogue)}
    problems = [f"{code}: {text[0]!r} is missing" for text in sorted(wanted - have)]
    problems += [f"{code}: {text[0]!r} is in no source file" for text in sorted(have - wanted)]
    for message in _messages(catalogue):
        problems += [f"{code}: {_id(message)[0]!r} {problem}" for problem in _faults(message, catalogue.num_plurals)]
    if _read_mo(code) != _entries(catalogue):
        problems.append(f"{code}: {DOMAIN}.mo is not what {DOMAIN}.po says: run python -m edgemed.tui.i18n --update")
    return problems


def _faults(message: Message, plural_forms: int) -> list[str]:
    ids, texts = _id(message), _texts(message)
    faults = ["is fuzzy"] if message.fuzzy else []
    if (message.pluralizable and len(texts) != plural_forms) or not all(text.strip() for text in texts):
        return [*faults, "is not translated"]
    expected = placeholders(ids[-1])
    for text in texts:
        # A form for exactly one or two things may say the number in a word.
        if not (placeholders(text) == expected or (message.pluralizable and placeholders(text) == expected - {"count"})):
            faults.append(f"has the placeholders {sorted(expected)}, its translation {sorted(placeholders(text))}")
        if (text[:1].isspace(), text[-1:].isspace()) != (ids[0][:1].isspace(), ids[0][-1:].isspace()):
            faults.append("begins or ends with a space, its translation does not (or the other way round)")
    return faults


def placeholders(text: str) -> set[str]:
    """The names within braces, each with its conversion and format: `{count}`, `{size:.1f}`. A text that is no format has none."""
    try:
        return {f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}" for _, name, spec, conversion in
                Formatter().parse(text) if name is not None}  # fmt: skip
    except ValueError:
        return set()
