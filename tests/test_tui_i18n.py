"""The catalogues are whole and current, the language is chosen as documented, and plural forms and key descriptions follow it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from babel.messages.catalog import Catalog

from edgemed.clinic.report import HEADINGS
from edgemed.core import advice
from edgemed.core.errors import InputError
from edgemed.tui import catalogues, i18n
from edgemed.tui.bidi import direction
from edgemed.tui.terminal import Graphics
from edgemed.tui.viewer import ImageView

# Words that another language writes as English does.
SAME_IN_BOTH = {("fr", "Version"), ("fr", "Patient"), ("fr", "Question"), ("fr", "Images"), ("fr", "Image")}


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


def test_key_descriptions_follow_the_language_and_come_back() -> None:
    view = ImageView(Graphics("halfblock"))

    def shown(key: str) -> str:
        return view._bindings.key_to_bindings[key][0].description

    i18n.set_language("fr")
    i18n.localise_bindings(view)
    assert shown("i") == "Inverser" and not view.has_class("-rtl")
    i18n.set_language("ar")
    i18n.localise_bindings(view)
    assert shown("i") == "عكس الألوان" and view.has_class("-rtl")
    i18n.set_language("en")
    i18n.localise_bindings(view)
    assert shown("i") == "Invert" and not view.has_class("-rtl")


def test_plural_forms_are_the_languages_own() -> None:
    i18n.set_language("ar")
    said = [i18n.ngettext("{count} image", "{count} images", n).format(count=n) for n in (0, 1, 2, 3, 11, 100)]
    assert said == ["لا صور", "صورة واحدة", "صورتان", "3 صور", "11 صورة", "100 صورة"]
    i18n.set_language("fr")
    assert i18n.ngettext("{count} image", "{count} images", 0) == "{count} image"  # French counts none as one


def test_a_missing_entry_shows_english_and_the_empty_text_no_header() -> None:
    i18n.set_language("sw")
    assert i18n._("Not in any catalogue") == "Not in any catalogue"
    assert i18n._("") == ""
    assert i18n.translator("pt").gettext("Findings") == "Achados"
    assert i18n.translator("xx").gettext("Findings") == "Findings"


@pytest.mark.parametrize("code", catalogues.translated_codes())
def test_advice_and_referral_are_translated_in_every_language(code: str) -> None:
    for sentence in (advice.ADVICE, advice.REFER, advice.NOT_CALIBRATED, *HEADINGS.values()):
        assert (code, sentence) in SAME_IN_BOTH or i18n.translator(code).gettext(sentence) != sentence


def test_arabic_runs_from_the_right_even_where_it_names_a_format() -> None:
    texts = [text for message in catalogues._messages(catalogues.load("ar")) for text in catalogues._texts(message)]
    arabic = [text for text in texts if any("\u0600" <= char <= "\u06ff" for char in text)]
    assert len(arabic) > 0.95 * len(texts)
    assert [text for text in arabic if direction(text, right_to_left=True) != "R"] == []
