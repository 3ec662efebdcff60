"""edgemed data fetch-pmc against a server on this machine: cut connections, 404s, resumed runs, hostile archives, a full disk."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from edgemed.cli.app import app
from edgemed.core.errors import DatasetError, ResourceError
from edgemed.core.filelock import FileLock
from edgemed.data import archive as archive_module
from edgemed.data import download as download_module
from edgemed.data import pmc
from edgemed.data.archive import ArchiveDamaged, Limits, extract_figures
from edgemed.data.pmc import FetchReport, FetchSettings, fetch, missing_of, read_url_list, wanted_ids
from tests.pmc_server import PmcServer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_module, "RETRY_WAIT_S", 0.001)
    monkeypatch.setattr(download_module, "LONGEST_WAIT_S", 0.01)


def jpeg(seed: int = 7) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def pack(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def article(number: int, figures: int = 2) -> bytes:
    text = member(f"PMC{number}/article.nxml", bytes(range(256)) * 40)
    return pack(text, *(member(f"PMC{number}/f{k}.jpg", jpeg(number * 10 + k)) for k in range(figures)))


def path_of(number: int) -> str:
    return f"oa_package/aa/PMC{number}.tar.gz"


@pytest.fixture
def server() -> Iterator[PmcServer]:
    with PmcServer({path_of(n): article(n) for n in range(4)}) as running:
        yield running


def write_list(folder: Path, server: PmcServer, articles: range = range(4), figures: int = 2) -> Path:
    rows = [
        {"pmc_tar_url": f"{server.url}/{path_of(n)}", "image_file_path": f"PMC{n}/f{k}.jpg", "pair_id": f"{n}_F{k}"}
        for n in articles
        for k in range(figures)
    ]
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(path: Path, out: Path, **settings: Any) -> FetchReport:
    return fetch(read_url_list(path), out, FetchSettings(jobs=2, **settings))


def figures_in(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob("*.jpg"))


def leftovers(out: Path) -> list[str]:
    return sorted(p.name for p in (out / ".archives").iterdir() if p.name != ".lock")


def test_figures_come_out_and_archives_go(tmp_path: Path, server: PmcServer) -> None:
    out = tmp_path / "images"
    report = run(write_list(tmp_path, server), out)
    assert figures_in(out) == [f"{n}_F{k}.jpg" for n in range(4) for k in range(2)]
    assert (out / "1_F1.jpg").read_bytes() == jpeg_in(server, 1, 1)
    assert leftovers(out) == [] and report.counts["new"] == 8 and report.downloaded_bytes == sum(map(len, server.files.values()))
    saved = json.loads((out / "fetch-report.json").read_text())
    assert saved["counts"] == report.counts and saved["failed"] == {}
    asked = len(server.requests)
    again = run(write_list(tmp_path, server), out)
    assert len(server.requests) == asked and again.counts["here before"] == 8 and again.counts["new"] == 0


def jpeg_in(server: PmcServer, number: int, figure: int) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(server.files[path_of(number)])) as tar:
        stream = tar.extractfile(f"PMC{number}/f{figure}.jpg")
        assert stream
        return stream.read()


def test_cut_connections_are_resumed(tmp_path: Path, server: PmcServer) -> None:
    server.cut[path_of(0)] = [700, 0, 300]
    server.status[path_of(1)] = [(503, {"Retry-After": "1"}), (429, {})]
    report = run(write_list(tmp_path, server), tmp_path / "images")
    assert report.counts["new"] == 8
    assert [asked for path, asked in server.requests if path == path_of(0)] == [None, "bytes=700-", "bytes=700-", "bytes=1000-"]
    assert server.count(path_of(1)) == 3


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_or_a_server_without_ranges_begins_anew(tmp_path: Path, server: PmcServer, ranges: bool) -> None:
    server.cut[path_of(0)] = [700]
    server.ranges = ranges
    server.status[path_of(0)] = []
    path = write_list(tmp_path, server, range(1))
    (part_of := tmp_path / "images" / ".archives").mkdir(parents=True)
    name = download_name(server, 0)
    (part_of / name).write_bytes(b"the beginning of another version")
    (part_of / f"{name}.etag").write_text('"another"')
    assert run(path, tmp_path / "images").counts["new"] == 2


def download_name(server: PmcServer, number: int) -> str:
    return f"{hashlib.sha256(f'{server.url}/{path_of(number)}'.encode()).hexdigest()[:24]}.tar.gz.part"


def test_an_archive_that_was_whole_when_the_run_was_killed_is_not_fetched_again(tmp_path: Path, server: PmcServer) -> None:
    (folder := tmp_path / "images" / ".archives").mkdir(parents=True)
    name, data = download_name(server, 0), server.files[path_of(0)]
    (folder / name).write_bytes(data)
    (folder / f"{name}.etag").write_text(f'"{hashlib.sha256(data).hexdigest()[:16]}"')
    assert run(write_list(tmp_path, server, range(1)), tmp_path / "images").counts["new"] == 2
    assert server.requests == [(path_of(0), f"bytes={len(data)}-")]


def test_what_is_gone_is_told_and_not_asked_for_again(tmp_path: Path, server: PmcServer) -> None:
    del server.files[path_of(2)]
    path, out = write_list(tmp_path, server, figures=3), tmp_path / "images"
    report = run(path, out)
    assert report.counts == {
        "wanted": 12, "here before": 0, "new": 6, "gone": 3, "not in its archive": 3, "unusable": 0, "to be tried again": 0,
    }  # fmt: skip
    assert report.settled["2_F0"] == "gone" and report.settled["0_F2"] == "not in its archive"
    asked = len(server.requests)
    assert run(path, out).counts == {**report.counts, "here before": 6, "new": 0} and len(server.requests) == asked
    server.files[path_of(2)] = article(2, 3)
    with (out / "fetch-state.jsonl").open("a") as f:
        f.write('{"url": "cut')
    assert run(path, out, retry_gone=True).counts["new"] == 3
    assert (out / "fetch-state.jsonl").read_text().count("cut") == 0


def test_what_cannot_be_reached_is_tried_again_by_the_next_run(tmp_path: Path, server: PmcServer) -> None:
    path, out = write_list(tmp_path, server), tmp_path / "images"
    server.status = {path_of(0): [(500, {})] * 5, path_of(1): [(403, {})]}
    server.cut[path_of(3)] = [100, *[0] * 5]
    report = run(path, out)
    assert report.counts["new"] == 2 and report.counts["to be tried again"] == 6
    assert "found HTTP 500 5 times" in report.failed["0_F0"] and "found HTTP 403" in report.failed["1_F0"]
    assert any("HTTP 500" in line for line in missing_of(report, 10))
    assert run(path, out).counts["new"] == 6
    assert [asked for p, asked in server.requests if p == path_of(3)][-1] == "bytes=100-"


def test_a_body_without_a_length_that_is_cut_is_a_damaged_archive(tmp_path: Path, server: PmcServer) -> None:
    server.lengths = False
    server.cut[path_of(0)] = [600]
    path, out = write_list(tmp_path, server, range(1)), tmp_path / "images"
    report = run(path, out)
    assert "archive is damaged" in report.failed["0_F0"] and leftovers(out) == []
    assert run(path, out).counts["new"] == 2


def test_an_archive_left_by_a_kill_after_its_last_figure_goes(tmp_path: Path, server: PmcServer) -> None:
    path, out = write_list(tmp_path, server, range(2)), tmp_path / "images"
    plan = read_url_list(path)
    run(path, out)
    part = pmc._Fetch(plan, out, FetchSettings(), None)._part(plan.archives[0])
    for left in (part, part.with_name(part.name + ".etag"), part.with_name("another-lists.tar.gz.part")):
        left.write_bytes(b"x")
    assert run(path, out).counts["here before"] == 4
    assert leftovers(out) == ["another-lists.tar.gz.part"]


def test_a_kill_while_an_archive_is_removed_leaves_nothing_for_good(
    tmp_path: Path, server: PmcServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write_list(tmp_path, server, range(1)), tmp_path / "images"
    unlink, removed = Path.unlink, []

    def killed_after_one(self: Path, missing_ok: bool = False) -> None:
        if self.exists() and ".tar.gz.part" in self.name and len(figures_in(out)) == 2:
            if removed:
                raise KeyboardInterrupt
            removed.append(self.name)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        run(path, out)
    monkeypatch.undo()
    assert len(removed) == 1 and len(leftovers(out)) == 1
    assert run(path, out).counts["here before"] == 2
    assert leftovers(out) == []


def test_a_killed_run_goes_on(tmp_path: Path, server: PmcServer) -> None:
    for n in range(4, 40):
        server.files[path_of(n)] = article(n)
    path, out = write_list(tmp_path, server, range(40)), tmp_path / "images"
    code = (
        "import sys; from pathlib import Path; from edgemed.data.pmc import *\n"
        "fetch(read_url_list(Path(sys.argv[1])), Path(sys.argv[2]), FetchSettings(jobs=2))"
    )
    for killed_at in (10, 30):
        process = subprocess.Popen([sys.executable, "-c", code, str(path), str(out)], cwd=ROOT)
        end = time.monotonic() + 120  # a bound for a machine that is stuck; nothing is measured
        while process.poll() is None and len(figures_in(out)) < killed_at and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        process.wait()
    before = len(figures_in(out))
    report = run(path, out)
    assert report.counts["here before"] == before > 0 and len(figures_in(out)) == 80
    for name in figures_in(out):
        Image.open(out / name).load()
    assert leftovers(out) == []


def test_lines_that_cannot_be_used_are_named_and_the_rest_is_fetched(tmp_path: Path, server: PmcServer) -> None:
    path = write_list(tmp_path, server)
    good = json.loads(path.read_text().splitlines()[0])
    bad = ["{", '{"pair_id": 1}', *(json.dumps({**good, **change}) for change in (
        {"pair_id": "../../etc/passwd"}, {"pair_id": 3}, {"pmc_tar_url": "file:///etc/passwd"}, {"pair_id": ".."},
    ))]  # fmt: skip
    path.write_text("\n".join([*bad, path.read_text()]))
    plan = read_url_list(path)
    assert len(plan.bad_lines) == 6 and plan.bad_lines[2].startswith("line 3: expected a pair id")
    assert sum(len(a.figures) for a in plan.archives) == 8
    assert [a.figures for a in read_url_list(path, only={"1_F0"}).archives] == [(("1_F0", "PMC1/f0.jpg"),)]
    assert sum(len(a.figures) for a in read_url_list(path, limit=3).archives) == 3
    with pytest.raises(DatasetError, match="found none"):
        read_url_list(path, only={"other"})
    with pytest.raises(DatasetError, match="no such file"):
        read_url_list(tmp_path / "other")


def test_only_what_a_file_names_and_from_a_mirror(tmp_path: Path, server: PmcServer) -> None:
    rows = [{"image": "1_F0.jpg"}, {"pair_id": "2_F1"}, {"image": None}]
    (tmp_path / "instruct.json").write_text(json.dumps(rows))
    only = wanted_ids(tmp_path / "instruct.json")
    assert only == {"1_F0", "2_F1"}
    path = write_list(tmp_path, server)
    path.write_text(path.read_text().replace(server.url, "https://ftp.example.invalid/pub"))
    fetch(read_url_list(path, only), tmp_path / "images", FetchSettings(mirror=f"{server.url}/"))
    assert figures_in(tmp_path / "images") == ["1_F0.jpg", "2_F1.jpg"]


def test_two_runs_on_one_folder_are_refused(tmp_path: Path, server: PmcServer) -> None:
    (tmp_path / ".archives").mkdir()
    with FileLock(tmp_path / ".archives" / ".lock", ResourceError("x")), pytest.raises(ResourceError, match="Another edgemed"):
        run(write_list(tmp_path, server), tmp_path)


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path: Path, server: PmcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path, data: bytes) -> None:
        raise ResourceError("The disk is full while writing x.")

    path, out = write_list(tmp_path, server), tmp_path / "images"
    monkeypatch.setattr(archive_module, "save_bytes", full)
    with pytest.raises(ResourceError, match="disk is full"):
        run(path, out)
    assert (out / "fetch-report.json").is_file()
    monkeypatch.undo()
    assert run(path, out).counts["new"] == 8


HOSTILE = {
    "a link": member("PMC1/f.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": member("PMC1/f.jpg", type=tarfile.LNKTYPE, linkname="PMC1/other.jpg"),
    "a device": member("PMC1/f.jpg", type=tarfile.CHRTYPE),
    "a folder": member("PMC1/f.jpg", type=tarfile.DIRTYPE),
    "no image": member("PMC1/f.jpg", b"GIF? no"),
    "too large": member("PMC1/f.jpg", bytes(70_000)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_picture_is_not_kept(tmp_path: Path, kind: str) -> None:
    archive, target = tmp_path / "a.tar.gz", tmp_path / "images" / "f.jpg"
    archive.write_bytes(pack(member("PMC1/other.jpg", jpeg()), HOSTILE[kind]))
    found = extract_figures(archive, {"PMC1/f.jpg": [target]}, Limits(figure_bytes=60_000))
    assert found["PMC1/f.jpg"] and not target.exists() and not target.is_symlink()


def test_no_member_is_written_where_it_says(tmp_path: Path) -> None:
    archive, out = tmp_path / "in" / "a.tar.gz", tmp_path / "in" / "images"
    out.mkdir(parents=True)
    names = ("../../escaped.jpg", str(tmp_path / "absolute.jpg"), "PMC1/../../up.jpg", "..\\windows.jpg", "f.jpg\0.txt")
    link = member("PMC1", type=tarfile.SYMTYPE, linkname=str(tmp_path))
    archive.write_bytes(pack(link, *(member(name, jpeg()) for name in names), member("./PMC1/f.jpg", jpeg(1))))
    before = sorted(p for p in tmp_path.rglob("*"))
    twice = [out / "1_F1.jpg", out / "1_F2.jpg"]
    assert extract_figures(archive, {"PMC1/f.jpg": twice}) == {"PMC1/f.jpg": None}
    assert sorted(p for p in tmp_path.rglob("*")) == sorted([*before, *twice])
    assert all(p.read_bytes() == jpeg(1) for p in twice)


def bomb() -> bytes:
    return pack(member("PMC1/zeros", bytes(30_000_000)), member("PMC1/f.jpg", jpeg()))


def claim(size: int, kind: bytes) -> bytes:
    """A header that claims a body that is not there."""
    info = tarfile.TarInfo("PMC1/x")
    info.size, info.type = size, kind
    return gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


@pytest.mark.parametrize(
    ("data", "limits", "why"),
    [
        (bomb(), Limits(unpacked_bytes=20_000_000), "unpacks to more than 20000000"),
        (claim(10**15, tarfile.REGTYPE), Limits(), "unpacks to more than|unexpected end"),
        (claim(10**12, tarfile.XHDTYPE), Limits(), "asks for 1000000000000 bytes at once"),
        (claim(10**12, tarfile.GNUTYPE_LONGNAME), Limits(), "asks for"),
        (pack(*(member(f"{i}") for i in range(30))), Limits(members=20), "more than 20 members"),
        (article(1)[:300], Limits(), "."),
        (b"", Limits(), "."),
        (b"no gzip at all", Limits(), "gzip"),
        (gzip.compress(b"no tar" * 200), Limits(), "."),
    ],
    ids=["bomb", "claimed body", "claimed header", "claimed name", "members", "cut", "empty", "no gzip", "no tar"],
)
def test_hostile_and_damaged_archives_end_early(tmp_path: Path, data: bytes, limits: Limits, why: str) -> None:
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(ArchiveDamaged, match=why):
        extract_figures(tmp_path / "a.tar.gz", {"PMC1/f.jpg": [tmp_path / "f.jpg"]}, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz"]


def test_an_archive_that_is_too_large_is_not_downloaded(tmp_path: Path, server: PmcServer) -> None:
    path, out = write_list(tmp_path, server, range(2)), tmp_path / "images"
    size = len(server.files[path_of(0)])
    server.files[path_of(1)] = server.files[path_of(1)][: size - 1]
    server.lengths = False  # then it is found while it comes in
    report = run(path, out, limits=Limits(archive_bytes=size - 1))
    assert report.settled["0_F0"].startswith("unusable: the archive is larger") and leftovers(out) == []
    server.lengths = True
    report = run(path, tmp_path / "again", limits=Limits(archive_bytes=10))
    assert len(report.settled) == 4 and report.downloaded_bytes == 0


def test_the_command(tmp_path: Path, server: PmcServer) -> None:
    path, out = write_list(tmp_path, server), tmp_path / "images"
    del server.files[path_of(3)]
    server.status[path_of(1)] = [(403, {})]
    path.write_text(path.read_text() + "{\n")
    (tmp_path / "only.json").write_text(json.dumps([{"image": f"{n}_F0.jpg"} for n in range(4)]))
    arguments = ["data", "fetch-pmc", str(path), "--out", str(out), "--for", str(tmp_path / "only.json"), "--jobs", "2", "--json"]
    first, second = CliRunner().invoke(app, arguments), CliRunner().invoke(app, arguments)
    counts = [json.loads(done.stdout.splitlines()[-1])["counts"] for done in (first, second)]
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert "run the same command again" in first.stderr and "1 lines of list.jsonl cannot be used" in first.stderr
    assert counts[0]["new"] == 2 and counts[0]["gone"] == 1 and counts[0]["to be tried again"] == 1
    assert counts[1]["here before"] == 2 and counts[1]["new"] == 1 and figures_in(out) == ["0_F0.jpg", "1_F0.jpg", "2_F0.jpg"]
