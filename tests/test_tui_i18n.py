"""The catalogues are whole and current, the language is chosen as documented, and plural forms and key descriptions follow it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from babel.messages.catalog import Catalog

from edgemed.core.errors import InputError
from edgemed.tui import catalogues, i18n


@pytest.fixture(autouse=True)
def english_again() -> Iterator[None]:
    yield
    i18n.set_language("en")


def test_the_catalogues_hold_every_string_of_the_source_and_nothing_else() -> None:
    assert catalogues.check() == []


def test_the_check_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert i18n.main(["--check"]) == 0
    assert "whole and current" in capsys.readouterr().out
    assert i18n.main([]) == 2


@pytest.mark.parametrize(
    ("option", "setting", "environ", "code"),
    [
        ("fr", "sw", {"LANG": "pt_BR.UTF-8"}, "fr"),
        (None, "sw", {"LANG": "pt_BR.UTF-8"}, "sw"),
        (None, None, {"LANGUAGE": "de:ar:fr", "LANG": "pt_BR.UTF-8"}, "ar"),
        (None, None, {"LC_ALL": "fr_CA.UTF-8", "LANG": "pt_PT"}, "fr"),
        (None, None, {"LC_ALL": "de_DE.UTF-8", "LANG": "pt_PT"}, "en"),
        (None, None, {"LC_MESSAGES": "sw_KE", "LANG": "pt_PT"}, "sw"),
        (None, None, {"LANG": "ar_EG.UTF-8@euro"}, "ar"),
        (None, "xx", {"LANG": "C.UTF-8"}, "en"),
        ("PT-br", None, {}, "pt"),
    ],
)
def test_the_option_comes_before_the_setting_before_the_environment(
    option: str | None, setting: str | None, environ: dict[str, str], code: str
) -> None:
    assert i18n.choose_language(option, setting, environ) == code


def test_an_unknown_language_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="en, fr, sw, pt, ar, found 'tlh'"):
        i18n.choose_language("tlh", None, {})
    with pytest.raises(InputError, match="'tlh'"):
        i18n.set_language("tlh")


def catalogue(entries: dict[str | tuple[str, str], str | tuple[str, ...]], locale: str = "fr") -> Catalog:
    made = Catalog(locale=locale)
    for key, text in entries.items():
        made.add(key, text)
    return made


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ({"Hello": ""}, "is not translated"),
        ({"Hello {name}": "Bonjour {nom}"}, "has the placeholders"),
        ({"Hello {name}": "Bonjour"}, "has the placeholders"),
        ({"{a:.1f} MB": "{a} Mo"}, "has the placeholders"),
        ({("{n} case", "{n} cases"): ("{n} cas", "")}, "is not translated"),
        ({"Name: ": "Nom :"}, "begins or ends with a space"),
    ],
)
def test_a_faulty_entry_is_found(entries: dict[str | tuple[str, str], str | tuple[str, ...]], fault: str) -> None:
    wanted = {(key,) if isinstance(key, str) else key for key in entries}
    problems = catalogues.check_catalogue("fr", wanted, catalogue(entries))
    assert any(fault in problem for problem in problems)


def test_missing_superfluous_and_fuzzy_entries_are_found() -> None:
    made = catalogue({"Old": "Vieux"})
    made.add("Maybe", "Peut-être", flags={"fuzzy"})
    problems = "\n".join(catalogues.check_catalogue("fr", {("New",), ("Maybe",)}, made))
    assert "'New' is missing" in problems
    assert "'Old' is in no source file" in problems
    assert "'Maybe' is fuzzy" in problems
    assert "edgemed.mo is not what edgemed.po says" in problems


def test_a_plural_may_say_one_and_two_in_words() -> None:
    forms = ("لا صور", "صورة واحدة", "صورتان", "{count} صور", "{count} صورة", "{count} صورة")
    made = catalogue({("{count} image", "{count} images"): forms}, "ar")
    assert not [p for p in catalogues.check_catalogue("ar", {("{count} image", "{count} images")}, made) if "placeholders" in p]
