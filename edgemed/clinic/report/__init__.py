"""The case report: drafted from the conversation, and exported as Markdown, PDF, FHIR R4 and DICOM, each marked as AI-assisted.

    question = draft_question(messages, facts, "fr")                  # ask the model this, then
    findings, impression, recommendation = parse_draft(answer, messages, "fr")
    export = Export(case, report, images, messages, identity=None)    # None: no consent, nothing identifying leaves
    save_export(folder, export, ("pdf", "md", "fhir", "dicom", "sr"), pictures)

A report without a signature is exported as a draft: DRAFT on every page, `preliminary` in FHIR, PARTIAL and UNVERIFIED in DICOM. Every
exporter takes a gettext-like `translate`. Layers: headings and clean (words), contents (what is said; consent is decided there), one
module for each format, save (files). PDF needs fpdf2, DICOM pydicom and highdicom: the `clinic` extra. Knows neither the store nor the
screen: it is handed frozen records and returns bytes.
"""

from edgemed.clinic.report.contents import Export, Status, build_contents, status_of
from edgemed.clinic.report.draft import conversation_findings, draft_question, parse_draft
from edgemed.clinic.report.headings import HEADINGS, heading
from edgemed.clinic.report.markdown import export_markdown
from edgemed.clinic.report.pdf import export_pdf

__all__ = [
    "HEADINGS",
    "Export",
    "Status",
    "build_contents",
    "conversation_findings",
    "draft_question",
    "export_markdown",
    "export_pdf",
    "heading",
    "parse_draft",
    "status_of",
]
