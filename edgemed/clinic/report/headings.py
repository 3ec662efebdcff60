"""The words that the report itself writes, as English sources of the interface's catalogues.

    heading("findings")                              # "Findings"
    heading("findings", "fr", translate=_)           # what the catalogue of the terminal program says
    heading("findings", "fr")                        # without a catalogue: the three sections are known in five languages all the same

`HEADINGS` is what a catalogue has to hold. Knows no catalogue: a gettext-like callable is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

Translate = Callable[[str], str]
SectionKey = Literal["findings", "impression", "recommendation"]
SECTION_KEYS: tuple[SectionKey, ...] = ("findings", "impression", "recommendation")
RIGHT_TO_LEFT = frozenset({"ar", "fa", "he", "ur", "ps"})

HEADINGS: Mapping[str, str] = {
    "title": "Case report",
    "draft": "DRAFT – not signed",
    "signed": "Signed",
    "amended": "Signed, amended",
    "version": "Version",
    "findings": "Findings",
    "impression": "Impression",
    "recommendation": "Recommendation",
    "incomplete": "To be completed by the clinician.",
    "from_conversation": "Taken from the conversation, not written as findings by the model:",
    "question": "Question",
    "answer": "Answer",
    "patient": "Patient",
    "withheld": "The patient's identity is withheld.",
    "name": "Name",
    "patient_id": "Patient ID",
    "birth_date": "Date of birth",
    "sex": "Sex",
    "accession": "Accession number",
    "study_uid": "Study UID",
    "label": "Case",
    "institution": "Institution",
    "signed_by": "Signed by",
    "signed_at": "Signed on",
    "as_of": "As of",
    "images": "Images",
    "image": "Image",
    "views": "Views that produced the answers",
    "frame": "frame",
    "series": "image {place} of {length} in its series",
    "window": "window centre {centre}, width {width}",
    "own_window": "the file's own window",
    "inverted": "inverted",
    "masked": "masked areas: {count}",
    "not_listed": "an image that is no longer in the case",
    "pixels": "SHA-256 of the pixels shown to the model",
    "file_hash": "SHA-256 of the file",
    "no_picture": "The picture is left out: it may show identifying text that is not masked.",
    "conversation": "Conversation with the model",
    "stopped": "The answer was stopped before its end.",
    "failed": "The answer failed before its end.",
    "refer": "The model referred this question to a clinician.",
    "confidence": "Calibrated probability that the answer is right: {percent} % (calibrated on {calibration})",
    "ai_title": "AI assistance",
    "ai": "AI-assisted report.",
    "advice": "It advises and never replaces a clinician.",
    "drafted_by": "Drafted by",
    "answered_by": "Answered by",
    "edited": "Edited by a clinician after drafting.",
    "not_edited": "Not edited after drafting.",
    "by_hand": "Written by hand; no model drafted it.",
    "no_model": "no model recorded",
    "quant": "quantisation",
    "hash": "manifest SHA-256",
    "cut": "[{count} characters left out here]",
    "hidden": "[withheld]",
    "spelled": "Characters that the font of this file lacks are spelled out as [U+…].",
    "page": "Page {page} of {pages}",
}

# What a section is called, most usual word first: written in a prompt, and recognised in a model's answer whatever its language.
SECTION_WORDS: Mapping[str, Mapping[SectionKey, tuple[str, ...]]] = {
    "en": {
        "findings": ("Findings", "Finding", "Observations", "Imaging findings", "Radiological findings"),
        "impression": ("Impression", "Impressions", "Conclusion", "Conclusions", "Assessment", "Diagnosis", "Diagnostic impression"),
        "recommendation": ("Recommendation", "Recommendations", "Plan", "Suggested next steps", "Next steps"),
    },
    "fr": {
        "findings": ("Constatations", "Constats", "Résultats", "Observations", "Description"),
        "impression": ("Impression", "Impressions", "Conclusion", "Conclusions", "Diagnostic", "Synthèse"),
        "recommendation": ("Recommandation", "Recommandations", "Conduite à tenir", "Préconisations"),
    },
    "sw": {
        "findings": ("Matokeo", "Yaliyoonekana", "Uchunguzi"),
        "impression": ("Hitimisho", "Maoni", "Tathmini", "Muhtasari"),
        "recommendation": ("Pendekezo", "Mapendekezo", "Ushauri"),
    },
    "pt": {
        "findings": ("Achados", "Achado", "Resultados", "Observações", "Descrição"),
        "impression": ("Impressão", "Impressões", "Conclusão", "Conclusões", "Impressão diagnóstica", "Diagnóstico"),
        "recommendation": ("Recomendação", "Recomendações", "Conduta"),
    },
    "ar": {
        "findings": ("النتائج", "الموجودات", "المشاهدات", "الملاحظات"),
        "impression": ("الانطباع", "الخلاصة", "الاستنتاج", "التشخيص"),
        "recommendation": ("التوصية", "التوصيات"),
    },
}


def same(text: str) -> str:
    """The translation that changes nothing."""
    return text


def base_language(language: str) -> str:
    """`pt_BR.UTF-8` is `pt`; what names no language is English, the language of the sources."""
    found = re.match(r"[a-z]{2,3}(?![a-z])", language.lower())
    return found[0] if found else "en"


def is_right_to_left(language: str) -> bool:
    """Whether lines of this language begin at the right."""
    return base_language(language) in RIGHT_TO_LEFT


def heading(key: str, language: str = "en", translate: Translate = same) -> str:
    """The report's own word `key` as `translate` says it; sections without a translation fall back on this module's words."""
    source = HEADINGS[key]
    found = translate(source)
    words = SECTION_WORDS.get(base_language(language), {})
    for section in SECTION_KEYS:
        if key == section and found == source and section in words:
            return words[section][0]
    return found
