"""The case report: drafted from the conversation, and exported as Markdown, PDF, FHIR R4 and DICOM, each marked as AI-assisted.

    question = draft_question(messages, facts, "fr")                  # ask the model this, then
    findings, impression, recommendation = parse_draft(answer, messages, "fr")
    export = Export.of(case, report, images, messages, identity, with_identity=False)     # no consent: nothing identifying leaves
    save_export(folder, export, ("pdf", "md", "fhir", "dicom", "sr"), pictures)

A report without a signature is exported as a draft: DRAFT on every page, `preliminary` in FHIR, PARTIAL and UNVERIFIED in DICOM. Every
exporter takes a gettext-like `translate`. Layers: headings and clean (words), contents (what is said; consent is decided there), one
module for each format, save (files). PDF needs fpdf2, DICOM pydicom and highdicom: the `clinic` extra. Knows neither the store nor the
screen: it is handed frozen records and returns bytes.
"""

from edgemed.clinic.report.contents import build_contents
from edgemed.clinic.report.dicom import export_dicom_pdf
from edgemed.clinic.report.draft import conversation_findings, draft_question, parse_draft
from edgemed.clinic.report.export import Export, Status, status_of
from edgemed.clinic.report.fhir import export_fhir
from edgemed.clinic.report.headings import HEADINGS, heading
from edgemed.clinic.report.markdown import export_markdown
from edgemed.clinic.report.pdf import export_pdf
from edgemed.clinic.report.save import KINDS, build_exports, export_name, save_export
from edgemed.clinic.report.sr import export_dicom_sr

__all__ = [
    "HEADINGS",
    "KINDS",
    "Export",
    "Status",
    "build_contents",
    "build_exports",
    "conversation_findings",
    "draft_question",
    "export_dicom_pdf",
    "export_dicom_sr",
    "export_fhir",
    "export_markdown",
    "export_name",
    "export_pdf",
    "heading",
    "parse_draft",
    "save_export",
    "status_of",
]
