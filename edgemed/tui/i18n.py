"""The language of the screens: gettext catalogues beside this file, English as the source, switched while the program runs.

    from edgemed.tui.i18n import N_, _, ngettext, set_language
    set_language(choose_language(option, setting))    # --language, then the user's setting, then LANGUAGE, LC_ALL, LC_MESSAGES, LANG
    _("Case list")                                    # looked up when called: call it where text is shown, never at import
    BINDINGS = [Binding("n", "new", N_("New case"))]  # marked for the catalogues at import, shown through localise_bindings(widget)
    _("Signed by {name}").format(name=name)           # placeholders are named, so that a translation may move them
    ngettext("{count} image", "{count} images", n).format(count=n)

    python -m edgemed.tui.i18n --check     # are the catalogues whole and the .mo files current?
    python -m edgemed.tui.i18n --update    # extract, merge into the .po files, write the .mo files (needs Babel, the dev extra)

Changing the language changes what `_` returns from then on; text that is on the screen already stays until its widget is composed or
updated again. A missing entry shows the English text. Error sentences (core/errors.py) come from the layers below and are English.
How right-to-left text is shown is edgemed/tui/bidi.py's business. Knows no screen.
"""

from __future__ import annotations

import gettext as gettext_module
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.core.errors import InputError

if TYPE_CHECKING:
    from textual.dom import DOMNode

DOMAIN = "edgemed"
LOCALES = Path(__file__).parent / "locales"
SOURCE = "en"


@dataclass(frozen=True)
class Language:
    """A language of the screens: its ISO 639 code, its name in itself (for the settings screen), and whether it runs right to left."""

    code: str
    name: str
    right_to_left: bool = False


LANGUAGES: dict[str, Language] = {
    language.code: language
    for language in (
        Language("en", "English"),
        Language("fr", "Français"),
        Language("sw", "Kiswahili"),
        Language("pt", "Português"),
        Language("ar", "العربية", right_to_left=True),
    )
}


class _Current:
    """The one language of this process's screens (a terminal program has one person in front of it)."""

    language = LANGUAGES[SOURCE]
    translations: gettext_module.NullTranslations = gettext_module.NullTranslations()


def set_language(code: str) -> Language:
    """Show everything in `code` from now on. Raises InputError for a language that there is no catalogue for."""
    language = LANGUAGES.get(code)
    if language is None:
        raise InputError(f"Expected a language among {', '.join(LANGUAGES)}, found {code!r}.", "Choose one with --language.")
    _Current.translations = _load(code)
    _Current.language = language
    return language


def language() -> Language:
    """The language that is shown now."""
    return _Current.language


def choose_language(option: str | None = None, setting: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """The code to show: the command's option (InputError if unknown), the user's setting, the environment's locale, else English."""
    if option:
        code = _code_of(option)
        if code is None:
            raise InputError(f"Expected a language among {', '.join(LANGUAGES)}, found {option!r}.", "Choose one with --language.")
        return code
    env = os.environ if environ is None else environ
    for wish in (setting or "", *env.get("LANGUAGE", "").split(":"), *_locale(env)):
        code = _code_of(wish)
        if code is not None:
            return code
    return SOURCE


def _locale(environ: Mapping[str, str]) -> tuple[str, ...]:
    # As POSIX orders them: the first that is set decides, even if it names a language that we do not have.
    return next(((environ[name],) for name in ("LC_ALL", "LC_MESSAGES", "LANG") if environ.get(name)), ())


def _code_of(wish: str) -> str | None:
    """`pt_BR.UTF-8`, `pt-br` and `pt` are all pt. None for what is not in LANGUAGES."""
    code = wish.split(".")[0].split("@")[0].replace("-", "_").split("_")[0].lower()
    return code if code in LANGUAGES else None


@lru_cache(maxsize=len(LANGUAGES))
def _load(code: str) -> gettext_module.NullTranslations:
    if code == SOURCE:
        return gettext_module.NullTranslations()
    return gettext_module.translation(DOMAIN, LOCALES, [code])


def gettext(message: str) -> str:
    """`message` in the current language. The empty text stays empty (a catalogue's own header hides under it)."""
    return _Current.translations.gettext(message) if message else ""


_ = gettext


def ngettext(singular: str, plural: str, count: int) -> str:
    """The form of the current language for `count` things; Arabic has six of them."""
    return _Current.translations.ngettext(singular, plural, count)


def N_(message: str) -> str:
    """Marks `message` for the catalogues and returns it as it is; whoever shows it calls `_` on it."""
    return message


def translator(code: str) -> gettext_module.NullTranslations:
    """A language's catalogue apart from the screens': a report may be written in another language than the program is used in."""
    return _load(code if code in LANGUAGES else SOURCE)


def localise_bindings(node: DOMNode) -> None:
    """Show the key descriptions of `node` (marked with N_) in the current language. Call on mount; again after a change of language.

    An app, screen or widget in a language that runs right to left gets the class -rtl, for its style sheet.
    The English originals are read from the class each time, so that a second call is no translation of a translation.
    """
    node.set_class(language().right_to_left, "-rtl")
    english = type(node)._merge_bindings().key_to_bindings
    node._bindings.key_to_bindings = {
        key: [replace(binding, description=gettext(binding.description)) for binding in bindings] for key, bindings in english.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """`--update` or `--check`; 0 when the catalogues are in order."""
    wish = sys.argv[1:] if arguments is None else arguments
    if wish not in (["--update"], ["--check"]):
        sys.stderr.write("usage: python -m edgemed.tui.i18n --update | --check\n")
        return 2
    from edgemed.tui import catalogues

    if wish == ["--update"]:
        catalogues.update()
    problems = catalogues.check()
    sys.stdout.write("".join(f"{problem}\n" for problem in problems) or "The catalogues are whole and current.\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
