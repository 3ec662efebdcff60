"""Pulling a repository with the real client from a hub on this machine: whole, cut, corrupt, refused, resumed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, HubServer

import edgemed.hub.repo as repo_module
from edgemed.core.errors import HubError, ResourceError
from edgemed.core.registry import HubSource, is_pulled
from edgemed.hub import pull as hub_pull
from edgemed.hub import verify_pulled
from edgemed.hub.repo import is_whole, pull_repo, read_record, wanted_files

WEIGHTS = random.Random(0).randbytes(300_000)
FILES = {
    "config.json": b'{"architectures": ["LlavaForConditionalGeneration"]}',
    "tokenizer.model": b"\x0a\x07spm",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "mm_projector.bin": b"projector",
    "tf_model.h5": b"h5",
    ".gitattributes": b"",
    "README.md": b"card",
}
WANTED = {"config.json", "tokenizer.model", "model.safetensors", "mm_projector.bin", "README.md"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(repo_module, "RETRY_WAIT_S", 0.0)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    # The client keeps whole chunks of a cut body only; its own 10 MB would be more than these files.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    with HubServer({"me/model": dict(FILES)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def source(revision: str = COMMIT, repo: str = "me/model") -> HubSource:
    return HubSource(kind="hub", repo=repo, revision=revision, revision_basis="" if revision == "unverified" else "test")


def pull(revision: str = COMMIT, repo: str = "me/model") -> Path:
    return pull_repo(source(revision, repo), lambda what, done, total: None)


def names_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def test_pull_brings_what_a_conversion_needs(hub: HubServer) -> None:
    seen: dict[str, list[int]] = {}
    folder = pull_repo(source(), lambda what, done, total: seen.setdefault(what, []).append(done))
    assert names_in(folder) == WANTED | {"source.json"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert seen["model.safetensors"][-1] == len(WEIGHTS)
    assert read_record(source()).commit == COMMIT
    assert is_pulled(source()) and verify_pulled(source())


def test_an_unverified_revision_takes_main_and_records_the_commit(hub: HubServer) -> None:
    folder = pull("unverified")
    assert json.loads((folder / "source.json").read_text())["commit"] == COMMIT


def test_a_cut_connection_is_resumed_where_it_broke(hub: HubServer) -> None:
    hub.cut_after = 100_000
    folder = pull()
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [r for method, path, r in hub.requests if path.startswith("/cdn") and path.endswith("model.safetensors")]
    assert ranges[0] is None and ranges[1] == "bytes=100000-"


def test_an_interrupted_pull_goes_on_in_the_next_run(hub: HubServer) -> None:
    hub.cut_after, hub.cut_always = 0, True
    with pytest.raises(HubError, match="cut the download"):
        pull()
    assert not is_pulled(source())
    hub.cut_after = 50_000
    hub.cut_always = False
    part = next(source().local_path.glob(".model.safetensors.*.part"))
    part.write_bytes(WEIGHTS[:200_000])
    hub.requests.clear()
    folder = pull()
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [r for _, path, r in hub.requests if path.startswith("/cdn") and path.endswith("model.safetensors")]
    assert ranges == ["bytes=200000-", "bytes=250000-"]
    assert names_in(folder) == WANTED | {"source.json"}


def test_parts_that_nothing_goes_on_with_are_removed(hub: HubServer) -> None:
    folder = source().local_path
    (folder / "sub").mkdir(parents=True)
    for name in (".model.safetensors.ffffffffffff.part", "sub/.gone.json.ffffffffffff.part", ".source.json.x.part"):
        (folder / name).write_bytes(b"of another commit, or of a record that was being written")
    hub.cut_after, hub.cut_always = 0, True
    with pytest.raises(HubError, match="cut the download"):
        pull()
    assert {p.name.split(".")[-2] for p in folder.rglob("*.part")} == {COMMIT[:12]}


def test_a_file_that_went_missing_or_short_is_pulled_again(hub: HubServer) -> None:
    folder = pull()
    entry = SimpleNamespace(not_convertible="", sources=SimpleNamespace(parts=lambda: {"model": source()}))
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(b"short")):
        damage(folder / "model.safetensors")
        assert is_pulled(source()) and not is_whole(source())
        hub_pull(entry, lambda what, done, total: None)  # type: ignore[arg-type]
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS and is_whole(source())
    hub.requests.clear()
    hub_pull(entry, lambda what, done, total: None)  # type: ignore[arg-type]
    assert hub.requests == []


def test_what_is_there_of_a_part_needs_no_space(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source().local_path
    folder.mkdir(parents=True)
    (folder / f".model.safetensors.{COMMIT[:12]}.part").write_bytes(WEIGHTS[:290_000])
    monkeypatch.setattr(repo_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    assert (pull() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_token_stays_with_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull()
    assert any(path.startswith("/cdn") for _, path, _ in hub.requests) and hub.leaked_tokens == []


def test_other_bytes_under_the_right_name_are_refused_and_removed(hub: HubServer) -> None:
    hub.corrupt["model.safetensors"] = b"x" * len(WEIGHTS)
    with pytest.raises(HubError, match="published hash"):
        pull()
    assert not list(source().local_path.glob("*model.safetensors*"))
    assert not is_pulled(source())


def test_a_wrong_small_file_is_found_by_gits_hash(hub: HubServer) -> None:
    hub.corrupt["config.json"] = b"x" * len(FILES["config.json"])
    with pytest.raises(HubError, match=r"config\.json"):
        pull()


def test_a_complete_pull_asks_for_nothing_again(hub: HubServer) -> None:
    pull()
    hub.requests.clear()
    pull()
    assert [path for _, path, _ in hub.requests if "resolve" in path] == []


def test_verify_finds_a_changed_file(hub: HubServer) -> None:
    folder = pull()
    (folder / "model.safetensors").write_bytes(b"y" * len(WEIGHTS))
    with pytest.raises(HubError, match="as published"):
        verify_pulled(source())


@pytest.mark.parametrize(
    ("refuse", "revision", "repo", "says"),
    [
        (None, COMMIT, "me/other", "no model me/other"),
        (None, "f" * 40, "me/model", "not the pinned revision"),
        (403, COMMIT, "me/model", "answered 403"),
        (500, COMMIT, "me/model", "answered 500"),
    ],
)
def test_refusals_become_sentences(hub: HubServer, refuse: int | None, revision: str, repo: str, says: str) -> None:
    hub.refuse = refuse
    with pytest.raises(HubError, match=says):
        pull(revision, repo)


def test_an_unreachable_hub_becomes_a_sentence(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="could not be reached") as caught:
        pull()
    assert "pull again" in caught.value.hint


def test_too_little_disk_is_told_before_a_byte_is_fetched(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemed.hub.repo.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ResourceError, match="free at"):
        pull()
    assert [path for _, path, _ in hub.requests if "resolve" in path] == []


def test_a_listing_cannot_write_outside_its_folder(hub: HubServer) -> None:
    hub.repos["me/model"]["../evil.json"] = b"{}"
    with pytest.raises(HubError, match="plain listing"):
        pull()


def test_pickled_weights_come_only_where_a_folder_has_no_safetensors() -> None:
    names = ["a/pytorch_model.bin", "b/pytorch_model.bin", "b/model.safetensors", "a/optimizer.pt", "c/model.msgpack"]
    assert set(wanted_files(names)) == {"a/pytorch_model.bin", "b/model.safetensors"}
    assert wanted_files(["Stage3/a.json", "b.json"], ("Stage3/*",)) == ["Stage3/a.json"]
