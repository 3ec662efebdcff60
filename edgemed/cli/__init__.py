"""The command line, the only room that prints. `edgemed --help` imports no model code: each command imports what it needs.

    edgemed demo                                    convert, verify, ask and measure the embedded model
    edgemed ask "Is there a fracture?" --image x.png

`run` is `main` without the exit, for tests. Registered commands are in app.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from edgemed.cli.errors import EXIT_INTERRUPTED, report_error
from edgemed.cli.signals import Ended, heed_signals


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code."""
    from edgemed.cli.app import app

    try:
        app(args=list(arguments), prog_name="edgemed")
    except Ended as end:
        return report_error(end)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:  # the option parser has caught Ctrl-C and says nothing
            return report_error(KeyboardInterrupt())
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (Exception, KeyboardInterrupt) as error:  # the one place where errors become sentences
        return report_error(error)
    return 0


def main() -> None:
    """The console script."""
    heed_signals()
    sys.exit(run(sys.argv[1:]))
