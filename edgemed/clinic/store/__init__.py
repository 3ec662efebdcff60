"""Cases in one encrypted file: what a stolen laptop does not give away.

    store = CaseStore.create(store_path(), passphrase, actor="Dr. A")     # or open, or restore
    case = store.create_case("wrist, left")
    store.add_image(case.id, "wrist.png", data, facts)                    # on disk when it returns
    store.audit.verify()

    store          | vault.py: made, opened, locked, backed up, settings; cases.py, images.py, messages.py, reports.py, search.py
    what is below  | access.py: the lock and the change with its audit entry; database.py: SQLCipher; schema.py; rows.py; layout.py
    the log        | audit.py: verify and append; chain.py: the hashes
    the passphrase | keys.py: Argon2id and the sealed key; tries.py: how often it was wrong; filelock.py: one program at a time
    a backup       | backup.py
    the process    | harden.py: no core dumps

Ids are random; nothing in clear is written anywhere, temporary files included. Every method raises the errors of edgemed/core/errors.py:
StoreError (locked, damaged, in use, no such case), PassphraseError, AuditError, ResourceError (disk full). Knows no DICOM, no model and
no screen.
"""

from __future__ import annotations

from edgemed.clinic.store.access import Means
from edgemed.clinic.store.audit import AuditLog
from edgemed.clinic.store.cases import Cases
from edgemed.clinic.store.harden import harden_process
from edgemed.clinic.store.images import Images, SeriesFile
from edgemed.clinic.store.keys import KdfCost
from edgemed.clinic.store.messages import Messages
from edgemed.clinic.store.reports import Reports


class CaseStore(Cases, Images, Messages, Reports):
    """The case store. Usable from several threads; see vault.py for its life."""


__all__ = ["AuditLog", "CaseStore", "KdfCost", "Means", "SeriesFile", "harden_process"]
