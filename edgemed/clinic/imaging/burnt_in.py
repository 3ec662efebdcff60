"""Warnings of text that may be burnt into the pixels."""

from __future__ import annotations

from edgemed.clinic.imaging.picture import Picture


def suspect_burnt_in(picture: Picture) -> tuple[str, ...]:
    """Sentences."""
    return ()
