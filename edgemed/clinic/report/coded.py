"""The codes that FHIR and DICOM share: DICOM's own (PS3.16) for the report's sections, as the International Patient Summary uses them.

Knows what the codes mean and no format.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgemed.clinic.report.headings import SectionKey

DCM_URI = "http://dicom.nema.org/resources/ontology/DCM"
LOINC_URI = "http://loinc.org"
# (code, meaning). TID 2000: a container for each heading, and in it text with the concept in the singular.
SECTION_CONTAINERS: Mapping[SectionKey, tuple[str, str]] = {
    "findings": ("121070", "Findings"),
    "impression": ("121072", "Impressions"),
    "recommendation": ("121074", "Recommendations"),
}
SECTION_TEXTS: Mapping[SectionKey, tuple[str, str]] = {
    "findings": ("121071", "Finding"),
    "impression": ("121073", "Impression"),
    "recommendation": ("121075", "Recommendation"),
}
REPORT = ("18748-4", "Diagnostic imaging study")
LANGUAGES: Mapping[str, str] = {"en": "English", "fr": "French", "sw": "Swahili", "pt": "Portuguese", "ar": "Arabic"}
