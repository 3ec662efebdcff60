"""One repository of a Hugging Face compatible hub, file by file, at one commit.

Sizes and hashes come from the hub's listing of that commit; bytes come through huggingface_hub's own transfer, which resumes a
cut connection. A part file is kept between runs, so that an interrupted pull goes on where it stopped; one of another commit is removed.
`source.json` is written last: a folder without it is not complete.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars

from edgemed.core.errors import EdgemedError, HubError, ResourceError
from edgemed.core.files import CHUNK_BYTES, PART_SUFFIX, os_errors, save_text
from edgemed.core.model import Frozen
from edgemed.core.registry import UNVERIFIED, HubSource
from edgemed.core.units import format_bytes

Progress = Callable[[str, int, int], None]

RECORD_NAME = "source.json"
ATTEMPTS = 4
# Seconds before the second attempt; doubled for each further one.
RETRY_WAIT_S = 1.0
_TEXT = (".json", ".jsonl", ".txt", ".model", ".jinja", ".tiktoken", ".md")
_PICKLED = ("pytorch_model", "adapter_model")


class RepoFile(Frozen):
    """A file of a commit. `sha256` is given for large files, `blob_sha1` (git's hash of the content) for the others."""

    name: str
    size_bytes: int
    sha256: str | None
    blob_sha1: str | None


class RepoRecord(Frozen):
    """source.json: what a pulled folder holds."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]


def pull_repo(source: HubSource, progress: Progress) -> Path:
    """Download what a conversion needs of a repository into `source.local_path`."""
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # retries are this module's to tell
    record = _list_repo(source)
    folder = source.local_path
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / ".lock"):  # a second pull waits, then finds the files in place
        _remove_unused_parts(record, folder)
        missing = [f for f in record.files if not (folder / f.name).is_file()]
        _check_space(folder, sum(max(0, f.size_bytes - _size(_part_path(record, folder / f.name))) for f in missing))
        for file in record.files:
            _pull_file(record, file, folder / file.name, progress)
        save_text(folder / RECORD_NAME, record.model_dump_json(indent=1) + "\n")
    return folder


def _remove_unused_parts(record: RepoRecord, folder: Path) -> None:
    """Parts that this commit does not go on with: of another one, of a file that is whole, of a record that a kill cut off."""
    used = {_part_path(record, folder / f.name) for f in record.files}
    with os_errors(folder):
        for part in folder.rglob(f".*{PART_SUFFIX}"):
            if part not in used:
                part.unlink(missing_ok=True)


def read_record(source: HubSource) -> RepoRecord:
    """source.json of a pulled repository."""
    path = source.local_path / RECORD_NAME
    with os_errors(path):
        raw = path.read_bytes()
    try:
        return RepoRecord.model_validate_json(raw)
    except ValueError as error:
        raise HubError(
            f"Expected a record of {source.repo} in {path}, found something else.", "Remove the folder and pull again."
        ) from error


def is_whole(source: HubSource) -> bool:
    """Whether every recorded file of a pulled repository is there with its size."""
    try:
        files = read_record(source).files
    except HubError:
        return False  # a record that cannot be read is written anew by pulling
    return all(_size(source.local_path / f.name) == f.size_bytes for f in files)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def verify_repo(source: HubSource) -> None:
    """Compare every file of a pulled repository with its recorded hash. Raises HubError."""
    for file in read_record(source).files:
        path = source.local_path / file.name
        if not path.is_file() or not _is_right(path, file):
            raise HubError(
                f"Expected {file.name} of {source.repo} as published, found another file at {path}.", "Remove it and pull again."
            )


def wanted_files(names: list[str], patterns: tuple[str, ...] = ()) -> list[str]:
    """What a conversion needs: configuration, tokenizer and weights; pickled weights only where a folder has no safetensors."""
    folders = {str(PurePosixPath(n).parent) for n in names if n.endswith(".safetensors")}
    wanted = []
    for name in names:
        path = PurePosixPath(name)
        if patterns and not any(fnmatch(name, p) for p in patterns):
            continue
        duplicate = path.name.startswith(_PICKLED) and str(path.parent) in folders
        if path.suffix in (*_TEXT, ".safetensors") or path.name == "LICENSE" or (path.suffix == ".bin" and not duplicate):
            wanted.append(name)
    return wanted


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _list_repo(source: HubSource) -> RepoRecord:
    revision = "main" if source.revision == UNVERIFIED else source.revision
    api = HfApi(endpoint=_endpoint())
    info = _retried(source.repo, lambda: api.model_info(source.repo, revision=revision, files_metadata=True))
    siblings = {s.rfilename: s for s in info.siblings or []}
    files = []
    for name in wanted_files(list(siblings), source.files):
        s = siblings[name]
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or s.size is None:
            raise HubError(f"Expected a plain listing of {source.repo}, found the file '{name}' in it.", "Check HF_ENDPOINT.")
        files.append(RepoFile(name=name, size_bytes=s.size, sha256=s.lfs.sha256 if s.lfs else None, blob_sha1=s.blob_id))
    if not files or info.sha is None:
        raise HubError(f"Expected a model's files in {source.repo}, found none.", "Check the name and the revision.")
    return RepoRecord(repo=source.repo, commit=info.sha, files=tuple(files))


def _check_space(folder: Path, needed: int) -> None:
    with os_errors(folder):
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"Expected {format_bytes(needed)} free at {folder}, found {format_bytes(free)}.", "Free some space or set EDGEMED_HOME."
        )


class _CountedFile(io.FileIO):
    """A part file that reports its length as it grows: the transfer's own bars differ between versions of its client."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "r+b" if path.exists() else "w+b")
        self.seek(0, os.SEEK_END)
        self._report = report

    def write(self, data: Any) -> int:
        written = 0
        view = memoryview(data)
        while written < len(view):  # a raw file may take less than it was given
            written += super().write(view[written:]) or 0
        self._report(self.tell())
        return written


def _pull_file(record: RepoRecord, file: RepoFile, target: Path, progress: Progress) -> None:
    if target.is_file() and _is_right(target, file):
        progress(file.name, file.size_bytes, file.size_bytes)
        return
    part = _part_path(record, target)
    url = hf_hub_url(record.repo, file.name, revision=record.commit, endpoint=_endpoint())
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _retried(record.repo, lambda: _transfer(url, part, file, progress))
        if not _is_right(part, file):
            part.unlink()
            raise HubError(
                f"Expected {file.name} of {record.repo} with its published hash, found other bytes.", "Pull again, or check HF_ENDPOINT."
            )
        part.replace(target)


def _part_path(record: RepoRecord, target: Path) -> Path:
    return target.with_name(f".{target.name}.{record.commit[:12]}{PART_SUFFIX}")


def _transfer(url: str, part: Path, file: RepoFile, progress: Progress) -> None:
    if part.exists() and part.stat().st_size > file.size_bytes:
        part.unlink()
    with _CountedFile(part, lambda done: progress(file.name, done, file.size_bytes)) as f:
        if f.tell() < file.size_bytes:
            http_get(url, f, resume_size=f.tell(), headers=build_hf_headers(), expected_size=file.size_bytes)


def _is_right(path: Path, file: RepoFile) -> bool:
    if path.stat().st_size != file.size_bytes:
        return False
    if file.sha256:
        return _digest(path, hashlib.sha256()) == file.sha256
    # Git names a blob by the SHA-1 of a header and its bytes.
    return not file.blob_sha1 or _digest(path, hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)) == file.blob_sha1


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as f:
        while piece := f.read(CHUNK_BYTES):
            digest.update(piece)
    return str(digest.hexdigest())


def _retried(repo: str, call: Callable[[], Any]) -> Any:
    """`call`, again where the network failed; a refusal by the hub is final. The border where its client's errors become ours."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except EdgemedError:
            raise
        except Exception as error:  # httpx's, requests' or the system's own, by the client's version: there is no common base
            if (
                isinstance(error, OSError)
                and error.errno is not None
                and not isinstance(error, ConnectionError | TimeoutError | HfHubHTTPError)
            ):
                raise  # the disk, not the network: os_errors describes it
            if _is_final(error) or attempt == ATTEMPTS - 1:
                raise _describe(error, repo) from error
            time.sleep(RETRY_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


def _is_final(error: Exception) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response is not None and 400 <= error.response.status_code < 500


def _describe(error: Exception, repo: str) -> HubError:
    if isinstance(error, GatedRepoError):
        return HubError(f"{repo} is only given to people whom its authors admitted.", "Ask for access on its page, then run: hf auth login")
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"The hub has {repo}, but not the pinned revision.", "Check HF_ENDPOINT, or report that models.toml is out of date."
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"The hub has no model {repo}, or shows it to its members only.", "Check HF_ENDPOINT, or run: hf auth login")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return HubError(f"The hub answered {error.response.status_code} for {repo}.", "Try again later.")
    where = _endpoint() or "the hub"
    return HubError(
        f"{where} could not be reached, or cut the download of {repo} ({type(error).__name__}).",
        "Check the network and pull again: it goes on.",
    )
