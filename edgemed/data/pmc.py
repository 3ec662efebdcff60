"""The figures of LLaVA-Med's URL lists out of PubMed Central's article packages: some 3.6 TB of archives for 69 GB of images.

    plan = read_url_list(Path("llava_med_image_urls.jsonl"), only=wanted_ids(Path("llava_med_instruct_10k.json")))
    report = fetch(plan, Path("images"), FetchSettings(jobs=4))

A line is {"pmc_tar_url", "image_file_path", "pair_id"}; the figure becomes PAIR_ID.jpg. Each archive is downloaded (resumed where it was
cut), its figures are taken out and it is deleted, so that at most one archive a job lies on the disk. A killed or interrupted run goes on
where it stopped: figures that are there are not fetched again, what is gone (404), or is not in its archive, is not asked for again unless
`retry_gone` says so. `fetch-report.json` tells what is gone and why.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from edgemed.core.errors import DatasetError, HubError, ResourceError
from edgemed.core.filelock import FileLock
from edgemed.core.files import drop_cut_line, found_at, os_errors, save_text, whole_lines
from edgemed.data.archive import ArchiveDamaged, Limits, extract_figures
from edgemed.data.download import Stopped, discard, download
from edgemed.data.rows import read_rows

Progress = Callable[[str, int, int], None]
REPORT_NAME = "fetch-report.json"
STATE_NAME = "fetch-state.jsonl"
PACKAGES = "oa_package/"
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# What a figure is settled with: it is not asked for again.
GONE, ABSENT, UNUSABLE = "gone", "not in its archive", "unusable"


@dataclass(frozen=True)
class Archive:
    """One article's package and the figures wanted of it: (pair id, name in the archive)."""

    url: str
    figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """What a URL list asks for. `bad_lines` are lines that cannot be used, with the reason."""

    archives: tuple[Archive, ...]
    bad_lines: tuple[str, ...]


@dataclass(frozen=True)
class FetchSettings:
    """`mirror` stands for everything before `oa_package/` in the list's addresses, which PMC has moved before."""

    jobs: int = 4
    mirror: str | None = None
    retry_gone: bool = False
    limits: Limits = Limits()


@dataclass
class FetchReport:
    """How many figures are wanted, here before and new, and what is not here, by pair id with the reason."""

    wanted: int = 0
    here_before: int = 0
    new: int = 0
    downloaded_bytes: int = 0
    elapsed_s: float = 0.0
    settled: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    bad_lines: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Figures by what became of them."""
        kinds = [why.split(":")[0] for why in self.settled.values()]
        missing = {kind: kinds.count(kind) for kind in (GONE, ABSENT, UNUSABLE)}
        return {"wanted": self.wanted, "here before": self.here_before, "new": self.new, **missing, "to be tried again": len(self.failed)}


def wanted_ids(path: Path) -> set[str]:
    """The pair ids whose images a LLaVA file names (`image`, or `pair_id`). Raises DatasetError."""
    names = (str(row.get("image") or row.get("pair_id") or "") for row in read_rows(path))
    return {Path(name).stem if Path(name).suffix.lower() in (".jpg", ".jpeg", ".png") else Path(name).name for name in names if name}


def read_url_list(path: Path, only: set[str] | None = None, limit: int | None = None) -> Plan:
    """The list's archives in its order, with their figures; of `only` these, and the first `limit`. Raises DatasetError."""
    if not path.is_file():
        raise DatasetError(f"Expected a list of addresses at {path}, found {found_at(path, 'no such file')}.", "Check the path.")
    archives: dict[str, dict[str, str]] = {}
    bad: list[str] = []
    seen: set[str] = set()
    with os_errors(path), path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip() or (limit is not None and len(seen) >= limit):
                continue
            found = _parse(line)
            if isinstance(found, str):
                bad.append(f"line {number}: {found}")
                continue
            url, name, pair_id = found
            if pair_id in seen or (only is not None and pair_id not in only):
                continue
            seen.add(pair_id)
            archives.setdefault(url, {})[pair_id] = name
    if not archives:
        raise DatasetError(f"Expected figures to fetch in {path}, found none ({len(bad)} lines cannot be used).", "Check the list.")
    return Plan(tuple(Archive(url, tuple(figures.items())) for url, figures in archives.items()), tuple(bad))


def _parse(line: str) -> tuple[str, str, str] | str:
    """(address, name in the archive, pair id), or what is wrong."""
    try:
        row = json.loads(line)
        values = tuple(row[key] for key in ("pmc_tar_url", "image_file_path", "pair_id"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return f"expected pmc_tar_url, image_file_path and pair_id as JSON, found something else ({error!r:.80})"
    if not all(isinstance(value, str) for value in values):
        return "expected text in all three fields"
    url, name, pair_id = values
    if not _SAFE.fullmatch(pair_id):
        return f"expected a pair id of letters, digits, dots, dashes and underscores, found {pair_id!r:.80}"
    if not url.startswith(("http://", "https://")):
        return f"expected an http or https address, found {url!r:.80}"
    return url, name, pair_id


def fetch(plan: Plan, folder: Path, settings: FetchSettings, progress: Progress | None = None) -> FetchReport:
    """Fetch what is not there yet; also writes the report. Raises ResourceError (disk full, folder in use); network trouble is reported."""
    with os_errors(folder):
        (folder / ".archives").mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".archives" / ".lock", ResourceError(f"Another edgemed fetches into {folder}.", "Wait until it has ended.")):
        return _Fetch(plan, folder, settings, progress).run()


class _Fetch:
    """One run. Jobs download and unpack; only the thread that called `run` keeps count and writes state."""

    def __init__(self, plan: Plan, folder: Path, settings: FetchSettings, progress: Progress | None) -> None:
        self.plan, self.folder, self.settings, self.progress = plan, folder, settings, progress
        self.stop = Event()
        self.report = FetchReport(bad_lines=list(plan.bad_lines), wanted=sum(len(a.figures) for a in plan.archives))

    def run(self) -> FetchReport:
        begin = time.monotonic()
        state = self.folder / STATE_NAME
        drop_cut_line(state)
        todo = list(self._open())
        self._clear({archive.url for archive in todo})
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            left = iter(todo)
            running: dict[Future[_Result], Archive] = {}
            done = 0
            try:
                with os_errors(state), state.open("a", encoding="utf-8") as log:
                    for archive in islice(left, 2 * self.settings.jobs):
                        running[pool.submit(self._archive, archive)] = archive
                    while running:
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            self._note(running.pop(future), future.result(), log)
                            done += 1
                            for archive in islice(left, 1):
                                running[pool.submit(self._archive, archive)] = archive
                        if self.progress:
                            self.progress("Fetching archives", done, len(todo))
            finally:
                self.stop.set()  # an error or Ctrl-C: jobs end at their next piece, and keep what they have
                pool.shutdown(cancel_futures=True)
                self.report.elapsed_s = time.monotonic() - begin
                self._save()
        return self.report

    def _open(self) -> Iterator[Archive]:
        """Archives with the figures that are neither here nor settled."""
        with os_errors(self.folder):
            here = {path.stem for path in self.folder.glob("*.jpg")}
        settled = {} if self.settings.retry_gone else _read_state(self.folder / STATE_NAME)
        for archive in self.plan.archives:
            left = []
            for pair_id, name in archive.figures:
                if pair_id in here:
                    self.report.here_before += 1
                elif pair_id in settled:
                    self.report.settled[pair_id] = settled[pair_id]
                else:
                    left.append((pair_id, name))
            if left:
                yield Archive(archive.url, tuple(left))

    def _part(self, archive: Archive) -> Path:
        """Where an archive is downloaded to."""
        digest = hashlib.sha256(self._address(archive.url).encode()).hexdigest()
        return self.folder / ".archives" / f"{digest[:24]}.tar.gz.part"

    def _clear(self, wanted: set[str]) -> None:
        """Remove archives whose figures are all out: a run may be killed between the last of them and its archive."""
        with os_errors(self.folder):
            here = set((self.folder / ".archives").glob("*.part"))
        for archive in self.plan.archives if here else ():
            if archive.url not in wanted and (part := self._part(archive)) in here:
                discard(part)

    def _archive(self, archive: Archive) -> _Result:
        """In a job: download, take out, delete."""
        if self.stop.is_set():
            return _Result()
        url = self._address(archive.url)
        part = self._part(archive)
        ids = [pair_id for pair_id, _ in archive.figures]
        try:
            outcome = download(url, part, self.settings.limits.archive_bytes, self.stop)
            if outcome != "here":
                discard(part)
                why = GONE if outcome == "gone" else f"{UNUSABLE}: the archive is larger than {self.settings.limits.archive_bytes} bytes"
                return _Result(settled=dict.fromkeys(ids, why))
            return self._unpack(archive, part)
        except HubError as error:
            return _Result(failed=dict.fromkeys(ids, error.message))
        except Stopped:
            return _Result()

    def _unpack(self, archive: Archive, part: Path) -> _Result:
        size, ids = part.stat().st_size, [pair_id for pair_id, _ in archive.figures]
        wanted: dict[str, list[Path]] = {}
        for pair_id, name in archive.figures:
            wanted.setdefault(name, []).append(self.folder / f"{pair_id}.jpg")
        try:
            found = extract_figures(part, wanted, self.settings.limits)
        except ArchiveDamaged as error:
            # Figures that came out before the damage are whole; the next run downloads the archive anew.
            failed = {p: f"the archive is damaged ({error})" for p in ids if not (self.folder / f"{p}.jpg").is_file()}
            return _Result(new=len(ids) - len(failed), failed=failed, size_bytes=size)
        finally:
            discard(part)
        settled = {p: f"{UNUSABLE}: {found[name]}" for p, name in archive.figures if found.get(name)}
        settled |= {p: ABSENT for p, name in archive.figures if name not in found}
        return _Result(new=len(ids) - len(settled), settled=settled, size_bytes=size)

    def _address(self, url: str) -> str:
        if self.settings.mirror is None or PACKAGES not in url:
            return url
        return f"{self.settings.mirror.rstrip('/')}/{PACKAGES}{url.split(PACKAGES, 1)[1]}"

    def _note(self, archive: Archive, result: _Result, log: Any) -> None:
        self.report.new += result.new
        self.report.downloaded_bytes += result.size_bytes
        self.report.settled |= result.settled
        self.report.failed |= result.failed
        if result.settled:
            log.write(json.dumps({"url": archive.url, "settled": result.settled}) + "\n")
            log.flush()

    def _save(self) -> None:
        report = {"counts": self.report.counts, **asdict(self.report)}
        save_text(self.folder / REPORT_NAME, json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True)
class _Result:
    """What became of one archive's figures."""

    new: int = 0
    size_bytes: int = 0
    settled: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _read_state(path: Path) -> dict[str, str]:
    """What earlier runs settled."""
    settled: dict[str, str] = {}
    for line in whole_lines(path):
        try:
            settled |= json.loads(line)["settled"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # then it is asked for again
    return settled


def missing_of(report: FetchReport, limit: int) -> Sequence[str]:
    """The first few that are not here, with the reason."""
    return [f"{pair_id}: {why}" for pair_id, why in list({**report.settled, **report.failed}.items())[:limit]]
