"""Raised deep, formatted once: every error becomes `Error: sentence`, a hint, and an exit code.

0 success · 1 error · 2 usage (the option parser's own) · 130 interrupted · 143 and 129 ended by SIGTERM and SIGHUP.
A traceback shows only under EDGEMED_DEBUG=1.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from edgemed.cli.signals import Ended
from edgemed.core.errors import EdgemedError
from edgemed.core.files import describe_os_error
from edgemed.core.text import printable

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def report_error(error: BaseException) -> int:
    """Tell a person about `error` on stderr; the exit code."""
    if os.environ.get("EDGEMED_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, Ended):
        with suppress(OSError):  # the terminal may be what went away
            print(f"Ended from outside ({error.name}).", file=sys.stderr)
        return error.exit_code
    message, hint = describe_error(error)
    print(f"Error: {printable(message)}", file=sys.stderr)
    if hint:
        print(f"Hint: {printable(hint)}", file=sys.stderr)
    return EXIT_ERROR


def describe_error(error: BaseException) -> tuple[str, str]:
    """One sentence and a hint."""
    if isinstance(error, EdgemedError):
        return error.message, error.hint
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # a file of ours is told by its name, lower down
        return "The disk is full where the output goes.", "Free some space, or send it elsewhere."
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and error.filename:
        described = describe_os_error(error, Path(os.fsdecode(error.filename)))
        return described.message, described.hint
    if isinstance(error, MemoryError):
        return "The machine has too little memory for this.", "Close other programs or use a smaller model."
    what = " ".join(str(error).split()) or "no message"
    return (
        f"Something unforeseen happened ({type(error).__name__}: {what}).",
        "Run it again with EDGEMED_DEBUG=1 and report what it prints.",
    )
