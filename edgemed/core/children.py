"""Modules of ours in a Python process of their own.

    subprocess.Popen(own_command("runtimes.worker"), env=own_environment(), …)      # runs its main()

Not `-m`, which puts the current folder first, where a file of anybody's would be imported instead of a library; and not by PYTHONPATH,
as a folder's name may hold what divides it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[2])


def own_command(module: str, *arguments: object) -> list[str]:
    """Python with `module`'s main(), its `arguments` in sys.argv."""
    code = f"import sys; sys.path[:] = [{_ROOT!r}, *(p for p in sys.path if p)]; from {module} import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def own_environment() -> dict[str, str]:
    """This process's, without the empty parts of PYTHONPATH: they stand for the current folder."""
    env = dict(os.environ)
    if "PYTHONPATH" in env:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, env["PYTHONPATH"].split(os.pathsep)))
    return env
