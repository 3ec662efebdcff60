"""Somebody else's readers and validators of the report's formats, each told by name; one that is not installed says what would bring it.

    for validator in VALIDATORS:
        if not validator.lacks():
            problems = validator.problems(data)         # [] is good

And `identifiers_in(data, words)`: which words can be found in a file's bytes, however they are packed or encoded. Knows no case.
"""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TIMEOUT_S = 120
_DEBIAN = {"dcmdump": "dcmtk", "dsrdump": "dcmtk", "dciodvfy": "dicom3tools", "pdftotext": "poppler-utils", "qpdf": "qpdf"}


@dataclass(frozen=True)
class Validator:
    """One reader of one kind of export ("pdf", "md", "fhir", "dicom", "sr"). `needs` is a Python module or a program."""

    name: str
    kind: str
    needs: str
    problems: Callable[[bytes], list[str]]

    def lacks(self) -> str:
        """What to install, or nothing."""
        if self.needs in _DEBIAN:
            return "" if shutil.which(self.needs) else f"apt-get install {_DEBIAN[self.needs]}"
        return "" if importlib.util.find_spec(self.needs.split(".")[0]) else f"pip install {self.needs}"


def run_program(command: Sequence[str], data: bytes, suffix: str) -> subprocess.CompletedProcess[str]:
    """Run `command` with a file of `data` as its last argument."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"export{suffix}"
        path.write_bytes(data)
        return subprocess.run([*command, str(path)], capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False)


def _exit_problems(command: Sequence[str], data: bytes, suffix: str, bad: str = r"^(?:E|F|Error|Syntax Error)\b.*") -> list[str]:
    done = run_program(command, data, suffix)
    found = re.findall(bad, done.stderr + "\n" + done.stdout, re.MULTILINE)
    return found or ([f"exit code {done.returncode}"] if done.returncode else [])


def check_dcmdump(data: bytes) -> list[str]:
    """dcmtk parses every element."""
    return _exit_problems(["dcmdump", "-q"], data, ".dcm")


def check_dsrdump(data: bytes) -> list[str]:
    """dcmtk understands the structured report; its VR checker knows no UTF-8 and says so as a warning."""
    return _exit_problems(["dsrdump"], data, ".dcm")


def check_dciodvfy(data: bytes) -> list[str]:
    """dicom3tools compares with the object's definition (PS3.3): every Error counts, warnings do not."""
    done = run_program(["dciodvfy", "-new"], data, ".dcm")
    return re.findall(r"^Error.*", done.stderr + "\n" + done.stdout, re.MULTILINE)


def check_qpdf(data: bytes) -> list[str]:
    """The PDF's structure and streams."""
    return _exit_problems(["qpdf", "--check"], data, ".pdf", r"^WARNING.*")


def pdf_text(data: bytes) -> str:
    """What poppler reads."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.pdf"
        path.write_bytes(data)
        command = ["pdftotext", "-enc", "UTF-8", "-layout", str(path), "-"]
        return subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=True).stdout.decode()


def check_pdftotext(data: bytes) -> list[str]:
    """Every page says that a machine took part and, of a draft, that it is one."""
    pages = pdf_text(data).split("\f")[:-1]
    marks = ("AI-assisted", "never replaces a clinician", *(("DRAFT",) if "DRAFT" in pages[0] else ()))
    return [f"page {number} lacks {mark}" for number, page in enumerate(pages, 1) for mark in marks if mark not in page]


def check_pypdf(data: bytes) -> list[str]:
    """A second reader of the PDF: pages, fonts embedded, text."""
    from pypdf import PdfReader

    reader = PdfReader(io.BytesIO(data), strict=True)
    bare = [str(font["/BaseFont"]) for page in reader.pages for font in _fonts(page) if not _embedded(font)]
    return [f"{font} is not embedded" for font in bare] + ([] if any(page.extract_text() for page in reader.pages) else ["no text"])


def _fonts(page: object) -> list[dict[str, object]]:
    resources = page["/Resources"]  # type: ignore[index]
    return [font.get_object() for font in resources.get("/Font", {}).values()]


def _embedded(font: dict[str, object]) -> bool:
    children = font.get("/DescendantFonts", [font])
    return all("/FontFile2" in child.get_object()["/FontDescriptor"] for child in children)  # type: ignore[attr-defined]


def check_pydicom(data: bytes) -> list[str]:
    """Read back strictly: a value that breaks its VR raises here."""
    import pydicom
    from pydicom import config

    before = config.settings.reading_validation_mode
    config.settings.reading_validation_mode = config.RAISE
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        count = sum(1 for element in dataset.iterall() if str(element) is not None)
    finally:
        config.settings.reading_validation_mode = before
    return [] if count else ["no elements"]


def sr_texts(data: bytes) -> list[tuple[str, str]]:
    """(concept, text) of every text of a structured report, read by highdicom's own content classes."""
    import pydicom
    from highdicom.sr import ContainerContentItem, ContentSequence, TextContentItem

    root = ContainerContentItem.from_dataset(pydicom.dcmread(io.BytesIO(data)))

    def walk(items: ContentSequence) -> Iterator[tuple[str, str]]:
        for item in items:
            if isinstance(item, TextContentItem):
                yield item.name.meaning, item.value
            if "ContentSequence" in item:
                yield from walk(ContentSequence.from_sequence(item.ContentSequence))

    return list(walk(ContentSequence.from_sequence(root.ContentSequence)))


def check_highdicom(data: bytes) -> list[str]:
    """highdicom reads the tree, and the three sections are in it."""
    names = {name for name, _ in sr_texts(data)}
    return [f"no {name}" for name in ("Finding", "Impression", "Recommendation", "AI assistance") if name not in names]


def check_fhir_resources(data: bytes) -> list[str]:
    """The R4B models of fhir.resources read it and write the same again; the narrative is well-formed XHTML without active parts."""
    import json

    from fhir.resources.R4B.diagnosticreport import DiagnosticReport
    from pydantic import ValidationError

    try:
        again = json.loads(DiagnosticReport.model_validate_json(data).model_dump_json())
    except ValidationError as error:
        return [str(one["msg"]) for one in error.errors()]
    resource = json.loads(data)
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(resource["text"]["div"]).iter()}
    problems = [] if again == resource else ["reading and writing changes it"]
    return problems + [f"<{tag}> in the narrative" for tag in tags - {"div", "h1", "h2", "p", "b", "br", "ul", "li"}]


def check_markdown(data: bytes) -> list[str]:
    """CommonMark with tables, strikethrough and autolinks on: no HTML, link, image, code or table may come out of it."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"linkify": False}).enable(["table", "strikethrough"]).parse(data.decode())
    flat = [token for block in tokens for token in (block, *(block.children or ()))]
    forbidden = ("html", "link", "image", "code", "fence", "table", "s_open", "hr")
    return [f"{token.type}: {token.content[:40]}" for token in flat if token.type.startswith(forbidden)]


VALIDATORS: tuple[Validator, ...] = (
    Validator("pypdf", "pdf", "pypdf", check_pypdf),
    Validator("pdftotext", "pdf", "pdftotext", check_pdftotext),
    Validator("qpdf --check", "pdf", "qpdf", check_qpdf),
    Validator("markdown-it-py", "md", "markdown_it", check_markdown),
    Validator("fhir.resources R4B", "fhir", "fhir.resources", check_fhir_resources),
    Validator("pydicom, strict", "dicom", "pydicom", check_pydicom),
    Validator("dcmdump", "dicom", "dcmdump", check_dcmdump),
    Validator("dciodvfy", "dicom", "dciodvfy", check_dciodvfy),
    Validator("pydicom, strict", "sr", "pydicom", check_pydicom),
    Validator("highdicom", "sr", "highdicom", check_highdicom),
    Validator("dcmdump", "sr", "dcmdump", check_dcmdump),
    Validator("dsrdump", "sr", "dsrdump", check_dsrdump),
    Validator("dciodvfy", "sr", "dciodvfy", check_dciodvfy),
)


def inner_bytes(data: bytes) -> Iterator[bytes]:
    """The file, and what is packed in it: inflated streams, a PDF's text as a reader extracts it, and its metadata."""
    yield data
    for match in re.finditer(rb"stream\r?\n", data):
        inflater = zlib.decompressobj()
        try:
            yield inflater.decompress(data[match.end() :], 1 << 26)
        except zlib.error:
            continue
    start, end = data.find(b"%PDF-"), data.rfind(b"%%EOF")
    if start >= 0:
        from pypdf import PdfReader

        reader = PdfReader(io.BytesIO(data[start : end + 6]))
        yield "\n".join(page.extract_text() for page in reader.pages).encode()
        yield repr(reader.metadata).encode()


def identifiers_in(data: bytes, words: Sequence[str]) -> list[str]:
    """The words found anywhere in `data`, in UTF-8, Latin-1 or UTF-16, whatever their case."""
    pieces = [piece.lower() for piece in inner_bytes(data)]
    encodings = ("utf-8", "latin-1", "utf-16-le", "utf-16-be")
    needles = {word: {word.lower().encode(encoding, "ignore") for encoding in encodings} for word in words}
    return [word for word, forms in needles.items() if any(form in piece for form in forms if form for piece in pieces)]
