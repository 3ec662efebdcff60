"""Where edgemed keeps its files on a machine. Knows no formats, creates nothing by itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def data_dir() -> Path:
    """Pulled models and converted artifacts: `EDGEMED_HOME`, else the platform's place for user data."""
    home = os.environ.get("EDGEMED_HOME")
    if home:
        return Path(home).expanduser()
    # An empty variable is one that is not set (XDG Base Directory Specification).
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "edgemed"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "edgemed"


def sources_dir() -> Path:
    """Downloaded checkpoints, one folder a model."""
    return data_dir() / "sources"


def artifacts_dir() -> Path:
    """Converted folders, one a model and quant."""
    return data_dir() / "artifacts"


def checkpoints_dir() -> Path:
    """Checkpoints written for fine-tuning, one folder a model."""
    return data_dir() / "checkpoints"


def cache_dir() -> Path:
    """Things that can be made again: which files were already hashed, which runtime was already probed."""
    return data_dir() / "cache"


def store_path() -> Path:
    """The clinic's cases: an encrypted file, with its key file and its lock beside it."""
    return data_dir() / "cases" / "cases.db"
