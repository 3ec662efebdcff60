r"""Text from outside (a file name, a model's answer, a DICOM tag) made safe to show: a terminal obeys control characters.

    printable("a\x1b[2Jb")      # "a[2Jb"

Knows no terminal and no screen.
"""

from __future__ import annotations

# Control characters but tab and line feed, the C1 set, and the marks that turn the direction of the text around them (Unicode's
# bidirectional embeddings, overrides and isolates), with which a file name can be made to look like another.
_UNSAFE = {code: None for code in (*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """`text` without control characters; what is no Unicode (a path's odd bytes) is spelled out."""
    return text.translate(_UNSAFE).encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """`printable` text on one line: tabs and line breaks become single spaces."""
    return " ".join(printable(text).split())
