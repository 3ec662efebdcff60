"""The clinic's side: cases and their store, DICOM, reports, the audit log. Imports core only; knows no model, no screen, no command.

    records.py   the values that the parts below and the screens hand one another
    store/       cases in an encrypted file, backup, audit log
    imaging/     DICOM and plain images: reading hostile files, windows, identifiers, what the model sees
    report/      findings, impression, recommendation: draft, sign-off, export
"""
