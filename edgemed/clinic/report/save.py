"""The exports as files in a folder: all of them or none, under names that tell nothing of the patient.

    paths = save_export(folder, export, ("pdf", "md", "fhir", "dicom", "sr"), pictures, reference)

Everything is made before anything is written, and written beside its final name before anything gets it (core.files). The files are
readable by their owner alone where the system knows that. Knows no store; who exported what is the audit log's to record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from edgemed.clinic.report.dicom import export_dicom_pdf
from edgemed.clinic.report.export import Export, case_reference, status_of
from edgemed.clinic.report.fhir import export_fhir
from edgemed.clinic.report.headings import Translate, same
from edgemed.clinic.report.markdown import export_markdown
from edgemed.clinic.report.pdf import export_pdf
from edgemed.clinic.report.sr import export_dicom_sr
from edgemed.core.errors import InputError
from edgemed.core.files import atomic_path, os_errors

# kind: how its file's name ends.
KINDS: Mapping[str, str] = {"pdf": ".pdf", "md": ".md", "fhir": ".fhir.json", "dicom": ".pdf.dcm", "sr": ".sr.dcm"}


def export_name(export: Export, kind: str) -> str:
    """`edgemed-report-0123456789ab-v1-draft.pdf`: made from the case's random id, the version and the status."""
    return f"edgemed-report-{case_reference(export.case.id)}-v{export.report.version}-{status_of(export.report)}{KINDS[kind]}"


def build_exports(
    export: Export,
    kinds: Sequence[str],
    pictures: Sequence[Image.Image | None] = (),
    reference: bytes | None = None,
    translate: Translate = same,
) -> dict[str, bytes]:
    """The bytes of each kind, in the order asked for. InputError for a kind that is none, or for none at all."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        found = ", ".join(map(repr, unknown)) or "none"
        raise InputError(f"Expected kinds of export among {', '.join(KINDS)}, found {found}.", "For example: pdf,md,fhir.")
    pdf = export_pdf(export, pictures, translate) if {"pdf", "dicom"} & set(kinds) else b""
    makers: dict[str, Callable[[], bytes]] = {
        "pdf": lambda: pdf,
        "md": lambda: export_markdown(export, translate).encode(),
        "fhir": lambda: (json.dumps(export_fhir(export, translate), ensure_ascii=False, indent=2) + "\n").encode(),
        "dicom": lambda: export_dicom_pdf(export, pdf, reference, translate),
        "sr": lambda: export_dicom_sr(export, reference, translate),
    }
    return {kind: makers[kind]() for kind in dict.fromkeys(kinds)}


def save_export(
    folder: Path,
    export: Export,
    kinds: Sequence[str],
    pictures: Sequence[Image.Image | None] = (),
    reference: bytes | None = None,
    translate: Translate = same,
) -> list[Path]:
    """Write the exports into `folder` (made where it is not there) and return their paths; on an error while doing so none is new.

    The same case, version and status have the same names: a draft that is exported again replaces the one before it.
    """
    made = {folder / export_name(export, kind): data for kind, data in build_exports(export, kinds, pictures, reference, translate).items()}
    with ExitStack() as stack:
        parts = {path: stack.enter_context(atomic_path(path, 0o600)) for path in made}
        for path, data in made.items():
            with os_errors(path):
                parts[path].write_bytes(data)
    return list(made)
