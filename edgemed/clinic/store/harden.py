"""No image of this process on disk when it crashes: what it holds in memory is a patient's.

    harden_process()      # once, at the start of a program that opens a store

Does not keep memory out of swap: SQLCipher locks its own pages, Python's cannot be. Encrypt the swap, or have none.
"""

from __future__ import annotations

import sys

_PR_SET_DUMPABLE = 4  # linux/prctl.h
_NO_HANDLER_BYTES = 1


def forbid_core_files() -> None:
    """No core file of this process or its children (the engine, the decoder), where the platform has such a limit.

    On Linux the limit is one byte: too short for a file, and the one value that a crash handler's pipe is not opened for either (0 does
    not keep a handler from reading the whole process; fs/coredump.c).
    """
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (_NO_HANDLER_BYTES if sys.platform == "linux" and hard != 0 else 0, hard))


def harden_process() -> bool:
    """`forbid_core_files`, and on Linux no dump through a crash handler (which ignores that limit) and no debugger of the same user.

    False where the system let this process stay dumpable.
    """
    forbid_core_files()
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    return int(ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)) == 0
