"""Atomic writes, errors of the system as sentences, errors that travel between processes, numbers for people, paths."""

from __future__ import annotations

import errno
import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemed.core import errors, paths, units
from edgemed.core.errors import EdgemedError, InputError, MissingExtraError, ResourceError
from edgemed.core.files import atomic_path, describe_os_error, found_at, os_errors, real_path, save_text, sha256_file


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.txt"
    save_text(target, "one")
    with pytest.raises(ValueError, match="stop"), atomic_path(target) as part:
        part.write_text("half")
        raise ValueError("stop")
    assert target.read_text() == "one" and [p.name for p in target.parent.iterdir()] == ["x.txt"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="disk is full") as caught, atomic_path(tmp_path / "x") as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "another folder" in caught.value.hint and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind", "says"),
    [
        (errno.ENOSPC, ResourceError, "disk is full"),
        (errno.EDQUOT, ResourceError, "disk is full"),
        (errno.EACCES, ResourceError, "not permitted"),
        (errno.EROFS, ResourceError, "not permitted"),
        (errno.ENOENT, InputError, "found none"),
        (errno.ENOTDIR, InputError, "found none"),
        (errno.EIO, ResourceError, "refused"),
    ],
)
def test_system_errors_become_ours(number: int, kind: type[EdgemedError], says: str) -> None:
    error = describe_os_error(OSError(number, "text"), Path("/x"))
    assert type(error) is kind and says in error.message and "/x" in error.message and error.hint


@pytest.mark.skipif(os.name != "posix", reason="links that lead in a circle")
def test_what_stands_in_a_places_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("gone")
    os.mkfifo(tmp_path / "pipe")
    names = ("file", "folder", "circle", "nowhere", "pipe", "nothing")
    assert [found_at(tmp_path / name) for name in names] == [
        *("a file", "a folder", "links that lead in a circle", "a link that leads nowhere"),
        *("something that is neither file nor folder", "none"),
    ]
    assert real_path(tmp_path / "circle" / "x") == tmp_path / "circle" / "x"  # where Path.resolve raises RuntimeError

    def told(path: Path, do: Callable[[Path], object]) -> str:
        with pytest.raises(InputError) as caught, os_errors(path):
            do(path)
        return caught.value.message.replace(str(tmp_path), ".")

    def make(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    assert told(tmp_path / "folder", Path.read_bytes) == "Expected a file at ./folder, found a folder."
    assert told(tmp_path / "circle", Path.read_bytes) == "Expected a file or folder at ./circle, found links that lead in a circle."
    assert told(tmp_path / "nowhere", Path.read_bytes) == "Expected a file or folder at ./nowhere, found a link that leads nowhere."
    assert told(tmp_path / "a" / "b", Path.read_bytes) == "Expected a file or folder at ./a/b, found none."
    assert told(tmp_path / "file" / "x", Path.read_bytes) == "Expected a folder at ./file, found a file."
    for name, found in (("file", "a file"), ("circle", "links that lead in a circle"), ("nowhere", "a link that leads nowhere")):
        assert told(tmp_path / name, make) == told(tmp_path / name / "x", make) == f"Expected a folder at ./{name}, found {found}."


def test_other_errors_pass_the_border(tmp_path: Path) -> None:
    with pytest.raises(KeyError), os_errors(tmp_path):
        raise KeyError("x")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


TREE = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EdgemedError)]


@pytest.mark.parametrize("kind", TREE, ids=lambda c: c.__name__)
def test_errors_travel_between_processes(kind: type[EdgemedError]) -> None:
    error = pickle.loads(pickle.dumps(kind("Expected a, found b.", "Do c.")))
    assert type(error) is kind and (error.message, error.hint) == ("Expected a, found b.", "Do c.") and str(error) == "Expected a, found b."


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = errors.__doc__ or ""
    assert all(kind.__name__ in drawn for kind in TREE)


def test_a_missing_extra_names_what_to_install() -> None:
    assert MissingExtraError.of("Fine-tuning", "train").hint == "Run: pip install 'edgemed[train]'"


def test_numbers_for_people() -> None:
    assert [units.format_bytes(n) for n in (12, 1_500, 905_000_000, 1_610_000_000)] == ["12 B", "1.5 kB", "905.0 MB", "1.61 GB"]
    assert [units.format_duration(s) for s in (0.85, 12.34, 245)] == ["850 ms", "12.3 s", "4 min 05 s"]


def test_edgemed_home_moves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))
    assert {p.parent for p in (paths.sources_dir(), paths.artifacts_dir(), paths.cache_dir())} == {tmp_path}
    monkeypatch.delenv("EDGEMED_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert paths.data_dir() == tmp_path / "xdg" / "edgemed"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", "")  # as if it were not set
    assert paths.data_dir() == tmp_path / ".local" / "share" / "edgemed"
    monkeypatch.setenv("EDGEMED_HOME", "~/there")
    assert paths.data_dir() == tmp_path / "there"
