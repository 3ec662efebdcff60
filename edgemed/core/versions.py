"""Versions of packages, for what is written beside results."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str:
    """The installed package's version; "not installed as a package" where code runs from a folder. Never raises."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"
