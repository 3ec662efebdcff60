"""`python -m edgemed`, the same as the command `edgemed`."""

from __future__ import annotations

from edgemed.cli import main

main()
