"""A case store in memory with a clock and ids that are always the same: what snapshots of screens are made with.

It has the functions of edgemed.clinic.store.CaseStore that screens use; test_tui_flow.py runs the same screens on the real one.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from edgemed.clinic.records import AuditEntry, Case, CaseImage, ImageFacts, Message, PatientIdentity, Report, View
from edgemed.core.errors import PassphraseError, StoreError

START = datetime(2026, 3, 2, 8, 30, tzinfo=timezone.utc)


class MemoryAudit:
    def __init__(self) -> None:
        self.lines: list[AuditEntry] = []

    def append(self, action: str, subject: str = "", model_sha256: str = "", detail: dict[str, str] | None = None) -> AuditEntry:
        self.lines.append(AuditEntry(len(self.lines) + 1, START, "tester", action, subject, model_sha256, detail or {}))
        return self.lines[-1]


class MemoryStore:
    def __init__(self, path: Path, passphrase: str, actor: str) -> None:
        self.path, self.actor, self._passphrase, self.locked = path, actor, passphrase, False
        self._ids, self._ticks = itertools.count(1), itertools.count()
        self._cases: dict[str, Case] = {}
        self._identities: dict[str, PatientIdentity] = {}
        self._images: dict[str, tuple[CaseImage, bytes]] = {}
        self._messages: list[Message] = []
        self._reports: list[Report] = []
        self._settings: dict[str, str] = {}
        self.audit = MemoryAudit()

    _disk: dict[Path, MemoryStore] = {}

    @classmethod
    def create(cls, path: Path, passphrase: str, actor: str) -> MemoryStore:
        if len(passphrase) < 8:
            raise PassphraseError("Expected a passphrase of at least 8 characters, found a shorter one.", "Choose a longer one.")
        cls._disk[path] = cls(path, passphrase, actor)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return cls._disk[path]

    @classmethod
    def open(cls, path: Path, passphrase: str, actor: str) -> MemoryStore:
        store = cls._disk.get(path)
        if store is None:
            raise StoreError(f"Expected a case store at {path}, found none.", "Make one.")
        store.unlock(passphrase)
        return store

    def _id(self) -> str:
        return f"{next(self._ids):032x}"

    def _now(self) -> datetime:
        return START + timedelta(minutes=next(self._ticks))

    def lock(self) -> None:
        self.locked = True

    def unlock(self, passphrase: str) -> None:
        if passphrase != self._passphrase:
            raise PassphraseError("The passphrase is wrong.", "Try again in 2 s.")
        self.locked = False

    def _check(self) -> None:
        if self.locked:
            raise StoreError("The store is locked.", "Unlock it.")

    def create_case(self, label: str, identity: PatientIdentity | None = None) -> Case:
        self._check()
        now = self._now()
        case = Case(self._id(), label, now, now)
        self._cases[case.id] = case
        self._identities[case.id] = identity or PatientIdentity()
        return case

    def rename_case(self, id: str, label: str) -> None:
        self._cases[id] = replace(self._cases[id], label=label)

    def delete_case(self, id: str) -> None:
        del self._cases[id]

    def list_cases(self, search: str = "", limit: int = 200) -> list[Case]:
        self._check()
        found = [self.load_case(case.id) for case in self._cases.values() if search.lower() in case.label.lower()]
        return sorted(found, key=lambda case: case.changed, reverse=True)[:limit]

    def load_case(self, id: str) -> Case:
        self._check()
        images = sum(image.case_id == id for image, _ in self._images.values())
        messages = sum(message.case_id == id for message in self._messages)
        report = self.load_report(id)
        return replace(self._cases[id], images=images, messages=messages, signed=bool(report and report.signed_by))

    def load_identity(self, id: str) -> PatientIdentity:
        return self._identities[id]

    def save_identity(self, id: str, identity: PatientIdentity) -> None:
        self._identities[id] = identity

    def add_image(self, case_id: str, name: str, data: bytes, facts: ImageFacts, view: View = View()) -> CaseImage:  # noqa: B008
        self._check()
        image = CaseImage(self._id(), case_id, name, self._now(), hashlib.sha256(data).hexdigest(), len(data), facts, view)
        self._images[image.id] = (image, data)
        self._touch(case_id)
        return image

    def list_images(self, case_id: str) -> list[CaseImage]:
        self._check()
        return [image for image, _ in self._images.values() if image.case_id == case_id]

    def read_image(self, image_id: str) -> bytes:
        self._check()
        return self._images[image_id][1]

    def save_view(self, image_id: str, view: View) -> None:
        image, data = self._images[image_id]
        self._images[image_id] = (replace(image, view=view), data)

    def add_message(self, case_id: str, role: Any, text: str, images: Any = (), **more: Any) -> Message:
        self._check()
        message = Message(self._id(), case_id, role, text, self._now(), tuple(images), **more)
        self._messages.append(message)
        self._touch(case_id)
        return message

    def list_messages(self, case_id: str) -> list[Message]:
        self._check()
        return [message for message in self._messages if message.case_id == case_id]

    def load_report(self, case_id: str) -> Report | None:
        return next((report for report in reversed(self._reports) if report.case_id == case_id), None)

    def save_report(self, report: Report) -> Report:
        old = self.load_report(report.case_id)
        version = 1 if old is None else old.version + bool(old.signed_by)
        kept = replace(report, version=version, signed_by="", signed_at=None)
        self._reports = [r for r in self._reports if (r.case_id, r.version) != (kept.case_id, kept.version)] + [kept]
        return kept

    def sign_report(self, case_id: str, name: str) -> Report:
        report = self.load_report(case_id)
        if report is None:
            raise StoreError("Expected a report to sign, found none.", "Draft one.")
        self._reports[self._reports.index(report)] = replace(report, signed_by=name, signed_at=self._now())
        return self._reports[-1]

    def get_setting(self, key: str, default: str = "") -> str:
        return self._settings.get(key, default)

    def set_setting(self, key: str, value: str) -> None:
        self._settings[key] = value

    def _touch(self, case_id: str) -> None:
        self._cases[case_id] = replace(self._cases[case_id], changed=self._now())
