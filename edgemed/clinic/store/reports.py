"""The reports of a case: a draft is overwritten as it is edited, a signed version stays as it is and a new one follows it."""

from __future__ import annotations

from dataclasses import replace

from edgemed.clinic.records import Report
from edgemed.clinic.store.access import Change
from edgemed.clinic.store.cases import mark_changed, require_case
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.rows import REPORT, read_report, report_row, storable
from edgemed.clinic.store.search import index_text
from edgemed.clinic.store.vault import Vault
from edgemed.core.errors import StoreError


class Reports(Vault):
    """The reports of a store."""

    def load_report(self, case_id: str) -> Report | None:
        """The newest version, or None."""
        with self._access.reading() as db:
            require_case(db, case_id)
            return _load_newest(db, case_id)

    def list_reports(self, case_id: str) -> list[Report]:
        """All versions, oldest first."""
        with self._access.reading() as db:
            require_case(db, case_id)
            rows = db.rows(f"SELECT {REPORT} FROM report WHERE case_id = ? ORDER BY version", (case_id,))
        return [read_report(row) for row in rows]

    def save_report(self, report: Report) -> Report:
        """Keep a draft; as it was kept. Over a signed version it becomes the next one; what signs is `sign_report` alone.

        StoreError where a newer version was saved since `report` was loaded. The same content again is no change.
        """
        with self._access.reading() as db:
            require_case(db, report.case_id)
            newest = _load_newest(db, report.case_id)
            draft = _as_draft(report, newest)
            if newest is not None and _content(draft) == _content(newest):
                return newest
            with self._access.changing() as change:
                _write(change, draft)
                _note(change, "report.saved", draft)
        return draft

    def sign_report(self, case_id: str, name: str) -> Report:
        """Sign the newest version with a name. StoreError where there is nothing to sign, or it is signed."""
        name = storable(name).strip()
        if not name:
            raise StoreError("Expected a name to sign the report with, found none.", "Type your name.")
        with self._access.changing() as change:
            report = _load_newest(change.db, case_id)
            if report is None or not (report.findings + report.impression + report.recommendation).strip():
                raise StoreError("Expected a report to sign, found none or an empty one.", "Draft or write it first.")
            if report.signed_by:
                raise StoreError(
                    f"Expected a draft, found version {report.version}, which is signed.", "Edit it: that makes a new version."
                )
            signed = replace(report, signed_by=name, signed_at=change.at)
            _write(change, signed)
            _note(change, "report.signed", signed)
        return signed


def _as_draft(report: Report, newest: Report | None) -> Report:
    """`report` unsigned, under the version that it would have. Says nothing about whether it differs."""
    version = 1 if newest is None else newest.version
    if newest is not None and report.version < newest.version:
        raise StoreError(
            f"Expected changes to version {newest.version} of the report, found some to version {report.version}.", "Load it again."
        )
    version += newest is not None and bool(newest.signed_by)
    return replace(
        report,
        version=version,
        findings=storable(report.findings),
        impression=storable(report.impression),
        recommendation=storable(report.recommendation),
        signed_by="",
        signed_at=None,
    )


def _content(report: Report) -> tuple[object, ...]:
    return report.findings, report.impression, report.recommendation, report.drafted_by, report.edited


def _load_newest(db: Database, case_id: str) -> Report | None:
    row = db.row(f"SELECT {REPORT} FROM report WHERE case_id = ? ORDER BY version DESC LIMIT 1", (case_id,))
    return None if row is None else read_report(row)


def report_id(report: Report) -> str:
    """How the audit log calls a version."""
    return f"{report.case_id}/{report.version}"


def _write(change: Change, report: Report) -> None:
    mark_changed(change, report.case_id)
    places = REPORT.split(", ")
    # An update and not a replacement, so that the table's own guard of signed versions sees it.
    updates = ", ".join(f"{name} = excluded.{name}" for name in places)
    sql = f"INSERT INTO report (id, {REPORT}) VALUES (?{', ?' * len(places)}) ON CONFLICT (id) DO UPDATE SET {updates}"
    change.db.run(sql, (report_id(report), *report_row(report)))
    index_text(change.db, report.case_id, "report", report_id(report), f"{report.findings}\n{report.impression}\n{report.recommendation}")


def _note(change: Change, action: str, report: Report) -> None:
    sha256 = report.drafted_by.sha256 if report.drafted_by else ""
    change.note(
        action, report_id(report), kind="report", case_id=report.case_id, model_sha256=sha256, detail={"version": str(report.version)}
    )
