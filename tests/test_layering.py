"""Who may import whom: the house's table, checked on every import statement of every module, inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room: (rooms it may import, third-party modules at the top of a file, third-party modules inside functions only)
TABLE: dict[str, tuple[set[str], set[str], set[str]]] = {
    "edgemed.core": (set(), {"pydantic", "numpy", "PIL", "tomli"}, set()),
    "edgemed.hub": ({"core"}, {"huggingface_hub"}, set()),
    "edgemed.data": ({"core"}, {"numpy", "PIL"}, {"datasets", "huggingface_hub"}),
    "edgemed.finetune": (
        {"core", "data", "report"},
        {"pydantic", "numpy", "PIL", "tomli", "torch", "transformers", "accelerate", "peft", "safetensors"},
        set(),
    ),
    "converters": ({"core", "data"}, {"gguf", "safetensors", "numpy", "pydantic"}, {"torch", "transformers"}),
    "runtimes": ({"core"}, {"llama_cpp", "numpy", "psutil", "gguf", "pydantic", "tomli"}, {"pynvml", "jinja2"}),
    "bench": (
        {"core", "data", "report", "converters", "runtimes", "clinic", "evaluation"},
        {"psutil", "numpy", "PIL", "pydantic", "gguf"},
        {"pynvml", "transformers", "torch", "bitsandbytes", "safetensors", "pydicom"},
    ),
    "edgemed.evaluation": (
        {"core", "data", "report", "runtimes"},
        {"numpy", "psutil", "pydantic", "tomli"},
        {"openai", "torch", "transformers", "PIL"},
    ),
    "edgemed.report": ({"core"}, {"rich", "numpy"}, {"matplotlib"}),
    "edgemed.clinic": ({"core"}, {"numpy", "PIL"}, {"pydicom", "highdicom", "sqlcipher3", "argon2", "cryptography", "fpdf", "uharfbuzz"}),
    "edgemed.tui": ({"core", "clinic", "runtimes"}, {"textual", "textual_image", "rich", "PIL", "numpy"}, {"bidi", "arabic_reshaper"}),
    "edgemed.cli": (
        {"core", "hub", "data", "finetune", "converters", "runtimes", "bench", "evaluation", "report", "clinic", "tui"},
        {"typer"},
        {"rich", "PIL"},
    ),
    "edgemed": ({"cli"}, set(), set()),
}
# A room that is only rooms: `edgemed/__init__.py` and `edgemed/__main__.py` lie in "edgemed" itself.
PACKAGES = ("edgemed", "converters", "runtimes", "bench")
# What single files use beyond their room: programs that are run by hand, and a module that is imported inside functions only.
SCRIPTS: dict[str, tuple[set[str], set[str]]] = {
    "converters/kernels.py": (set(), {"numba"}),
    "edgemed/tui/catalogues.py": (set(), {"babel"}),
    "bench/demo_average.py": (set(), {"torch", "safetensors"}),
    "bench/demo_logits.py": (set(), {"torch", "transformers"}),
    "bench/chat_tmux.py": (set(), {"rich", "pydicom"}),
    "bench/report_sample.py": ({"clinic"}, {"pydicom"}),
    "bench/report_check.py": ({"clinic"}, {"pydicom"}),
    "bench/report_validators.py": (set(), {"pydicom", "highdicom", "fhir", "pypdf", "markdown_it"}),
    "bench/feature_cache.py": ({"finetune"}, {"torch", "transformers"}),
    "bench/finetune_gpu.py": ({"finetune"}, {"torch", "transformers"}),
    "bench/demo_parts.py": (set(), {"torch", "safetensors", "gguf", "peft"}),
    "bench/train_demo.py": ({"finetune"}, {"torch", "transformers", "safetensors", "tokenizers", "gguf", "peft"}),
}


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def room_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] != "edgemed":
        return parts[0]
    return ".".join(parts[:2]) if len(parts) > 1 and not parts[1].startswith("__") else "edgemed"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, module: str, is_package: bool) -> list[tuple[str, bool, int]]:
    """(module, inside a function or under TYPE_CHECKING, line) of every import."""
    found: list[tuple[str, bool, int]] = []

    def walk(node: ast.AST, lazy: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = True
            if isinstance(child, ast.Import):
                found.extend((alias.name, lazy, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parts = module.split(".")[: len(module.split(".")) - child.level + is_package]
                    base = ".".join([*parts, base] if base else parts)
                found.extend((f"{base}.{alias.name}", lazy, child.lineno) for alias in child.names)
            walk(child, inner)

    walk(tree, False)
    return found


def problems(path: Path) -> list[str]:
    module = module_name(path)
    room = room_of(module)
    ours, top, lazy_only = TABLE[room]
    extra = SCRIPTS.get(str(path.relative_to(ROOT)), (set(), set()))
    out = []
    for name, lazy, line in imports(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py"):
        root = name.split(".")[0]
        where = f"{path.relative_to(ROOT)}:{line}"
        if root in PACKAGES:
            target = room_of(name)
            if target != room and target.removeprefix("edgemed.") not in ours | extra[0]:
                out.append(f"{where}: {room} may not import {target}")
        elif root not in sys.stdlib_module_names | {"tomllib"} and root not in top | extra[1] and not (lazy and root in lazy_only):
            out.append(f"{where}: {room} may not import {root}{' at the top of a file' if root in lazy_only else ''}")
    return out


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    assert not problems(path)


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module_name(path)) for path in modules()} <= set(TABLE)


def test_core_rooms_never_meet() -> None:
    for room in ("edgemed.finetune", "converters", "runtimes"):
        assert not TABLE[room][0] & {"finetune", "converters", "runtimes"}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import runtimes.engine", "converters may not import runtimes"),
        ("def f():\n    from edgemed.finetune import stage", "converters may not import edgemed.finetune"),
        ("import torch", "converters may not import torch at the top of a file"),
        ("import requests", "converters may not import requests"),
    ],
)
def test_a_wrong_import_is_found(code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "converters" / "new.py"
    path.parent.mkdir()
    path.write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [p.split(": ", 1)[1] for p in problems(path)] == [why]


def test_a_lazy_torch_is_allowed_where_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "converters" / "new.py"
    path.parent.mkdir()
    path.write_text("def f():\n    import torch\n    return torch")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert not problems(path)


HEAVY = (
    "torch",
    "transformers",
    "textual",
    "fastapi",
    "llama_cpp",
    "numpy",
    "gguf",
    "huggingface_hub",
    "pydantic",
    "PIL",
    "numba",
    "rich.progress",
)


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, edgemed.cli.app; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
