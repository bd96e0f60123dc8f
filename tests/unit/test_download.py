"""`data download` against a server on this machine that cuts, changes and lies."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from pytest import MonkeyPatch

from bert_pretraining.errors import UserError
from bert_pretraining.preparation import download as module
from bert_pretraining.preparation.download import FILES, RemoteFile, download

CHECKPOINT = "model.ckpt-28252.apex.pt"
ARCHIVE = "eval_set_uncompressed.tar.gz"
DIRECTORY = "eval_set_uncompressed"
UNKNOWN = '{"etag": null, "last_modified": null, "total": null}'
BODY = bytes(range(256)) * 1200


@dataclass
class Site:
    """What the server does. `cuts`: bytes of body before each next connection breaks."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    ranges: bool = True
    honours_if_range: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    redirect: str | None = None
    # of every request: its path, Range, the status, how many bytes of body were sent
    log: list[tuple[str, str | None, int, int]] = field(default_factory=list)


def handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            body = site.files[self.path.rpartition("/")[2]]
            if site.statuses:
                return self.answer(site.statuses.pop(0), b"")
            condition = self.headers.get("If-Range")
            same = condition is None or (condition == site.etag and condition[:2] != "W/")
            if asked is None or not site.ranges or (site.honours_if_range and not same):
                return self.answer(200, body)
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.answer(416, b"", f"bytes */{len(body)}")
            return self.answer(206, body[start:], f"bytes {start}-{len(body) - 1}/{len(body)}")

        def answer(self, status: int, body: bytes, span: str | None = None) -> None:
            sent = body[: site.cuts.pop(0)] if site.cuts else body
            site.log.append((self.path, self.headers.get("Range"), status, len(sent)))
            self.send_response(status)
            headers = {"ETag": site.etag, "Content-Range": span, "Location": site.redirect}
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    return Handler


@pytest.fixture
def site(monkeypatch: MonkeyPatch) -> Iterator[Site]:
    """A server with every file of the data set; connections are tried again at once."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)
    made = Site(files={CHECKPOINT: BODY, "bert_config.json": b"{}"})
    for remote in FILES:
        if remote.unpack:
            made.files[remote.name] = archive({f"{remote.leaves}/part_0.hdf5": b"rows" * 500})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    made.url = f"http://127.0.0.1:{server.server_port}/some/where"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join(timeout=600)
    assert not thread.is_alive()


def entry(name: str, kind: bytes = b"0", target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def archive(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    """A .tar.gz of files and then of other entries."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            tar.addfile(entry(name, size=len(content)), io.BytesIO(content))
        for other in others:
            tar.addfile(other)
    return buffer.getvalue()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def give_up(site: Site, directory: Path) -> str:
    """A run that gets the first 4,000 bytes and then ends; returns what it says."""
    site.cuts = [1000] * module.ATTEMPTS
    with pytest.raises(UserError, match="broke after 4000 of 307200 bytes") as caught:
        download(directory, site.url, [CHECKPOINT])
    return str(caught.value)


def test_the_files_are_those_of_the_sample() -> None:
    assert module.BASE_URL == "http://files.deepspark.org.cn:880/deepspark/bert_mini/"
    assert {remote.name: remote.leaves for remote in FILES} == {
        "2048_shards_uncompressed_mini.tar.gz": "2048_shards_uncompressed",
        ARCHIVE: DIRECTORY,
        CHECKPOINT: CHECKPOINT,
        "bert_config.json": "bert_config.json",
    }
    assert {remote.md5 for remote in FILES} == {None}


def test_all_files_come_and_a_rerun_asks_for_nothing(site: Site, tmp_path: Path) -> None:
    output = tmp_path / "data" / "set"
    lines = download(output, site.url + "/")
    assert len(lines) == 6
    assert lines[4] == f"downloaded {CHECKPOINT}: 307200 bytes, not checked: no md5 of it is known"
    assert f"unpacked {ARCHIVE} into {DIRECTORY}/: 1 file" in lines
    assert set(names(output)) == {name for file in FILES for name in (file.name, file.leaves)}
    assert (output / CHECKPOINT).read_bytes() == BODY
    assert (output / DIRECTORY / "part_0.hdf5").read_bytes() == b"rows" * 500
    assert {path for path, *_ in site.log} == {f"/some/where/{remote.name}" for remote in FILES}
    site.log.clear()
    (output / ARCHIVE).unlink()
    there = ["2048_shards_uncompressed/", f"{DIRECTORY}/", CHECKPOINT, "bert_config.json"]
    assert download(output, site.url) == [f"{name} is already there" for name in there]
    assert site.log == []


def test_only(site: Site, tmp_path: Path) -> None:
    lines = download(tmp_path, site.url, ["bert_config.json"])
    assert lines == ["downloaded bert_config.json: 2 bytes, not checked: no md5 of it is known"]
    assert names(tmp_path) == ["bert_config.json"]
    with pytest.raises(UserError, match=r"--only config: no such file; name one of 2048_shards"):
        download(tmp_path, site.url, ["bert_config.json", "config"])
    with pytest.raises(UserError, match=r"cannot write to .*json \(File exists\)"):
        download(tmp_path / "bert_config.json", site.url)


@pytest.mark.parametrize(
    "mirror",
    ["", "ftp://host/x", "file:///etc", "/local", "http://", "http://host:port/", "http://[::1/",
     "http://user:word@host/", "http://host/a b", "http://host/?q", "http://host/\n"],
)  # fmt: skip
def test_bad_mirror(mirror: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no http address of a directory; give an"):
        download(tmp_path / "new", mirror)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("etag", "ranges"), [('"1"', True), ('W/"1"', True), ('"1"', False)])
def test_a_cut_connection(site: Site, tmp_path: Path, etag: str, ranges: bool) -> None:
    site.etag, site.ranges, site.cuts = etag, ranges, [100_000]
    download(tmp_path, site.url, [CHECKPOINT])
    assert (tmp_path / CHECKPOINT).read_bytes() == BODY
    rest = (206, len(BODY) - 100_000) if ranges else (200, len(BODY))
    assert [request[1:] for request in site.log] == [(None, 200, 100_000), ("bytes=100000-", *rest)]


def test_another_run_goes_on(site: Site, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    message = give_up(site, tmp_path)
    assert "(4 attempts); what arrived is kept; run the same command again to go on" in message
    assert names(tmp_path) == [f"{CHECKPOINT}.partial", f"{CHECKPOINT}.partial.json"]
    file = RemoteFile(CHECKPOINT, hashlib.md5(BODY).hexdigest(), False, CHECKPOINT)
    monkeypatch.setattr(module, "FILES", (file,))
    assert download(tmp_path, site.url) == [f"downloaded {CHECKPOINT}: 307200 bytes, md5 checked"]
    assert sum(request[3] for request in site.log) == len(BODY), "a byte was sent twice"
    assert names(tmp_path) == [CHECKPOINT]


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("etag", ['"one"', 'W/"one"', None])
@pytest.mark.parametrize("shorter", [0, 306_200])
def test_a_changed_file_is_not_glued_to_an_old_beginning(
    site: Site, tmp_path: Path, etag: str | None, shorter: int, honours_if_range: bool
) -> None:
    site.etag, site.honours_if_range = etag, honours_if_range
    give_up(site, tmp_path)
    site.etag = etag and etag.replace("one", "two")
    # without an ETag only the size tells versions apart
    site.files[CHECKPOINT] = BODY[::-1][shorter if etag else shorter + 10 :]
    download(tmp_path, site.url, [CHECKPOINT])
    assert (tmp_path / CHECKPOINT).read_bytes() == site.files[CHECKPOINT]
    assert etag != '"one"' or not honours_if_range or len(site.log) == module.ATTEMPTS + 1


@pytest.mark.parametrize("stale", [False, True])
def test_a_whole_file_that_was_never_renamed(site: Site, tmp_path: Path, stale: bool) -> None:
    give_up(site, tmp_path)
    (tmp_path / f"{CHECKPOINT}.partial").write_bytes(BODY)
    site.log.clear()
    if stale:
        site.etag, site.honours_if_range = '"two"', False
        site.files[CHECKPOINT] = BODY[::-1]
    download(tmp_path, site.url, [CHECKPOINT])
    assert (tmp_path / CHECKPOINT).read_bytes() == site.files[CHECKPOINT]
    assert [request[2] for request in site.log] == ([416, 200] if stale else [416])


@pytest.mark.parametrize("note", [None, "{", "[1]", '{"etag": ""}', UNKNOWN])
def test_unknown_beginning_is_not_used(site: Site, tmp_path: Path, note: str | None) -> None:
    (tmp_path / f"{CHECKPOINT}.partial").write_bytes(b"something else")
    if note is not None:
        (tmp_path / f"{CHECKPOINT}.partial.json").write_text(note)
    download(tmp_path, site.url, [CHECKPOINT])
    assert (tmp_path / CHECKPOINT).read_bytes() == BODY
    assert names(tmp_path) == [CHECKPOINT]


def test_wrong_checksum(site: Site, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES", (RemoteFile(CHECKPOINT, "0" * 32, False, CHECKPOINT),))
    found = hashlib.md5(BODY).hexdigest()
    with pytest.raises(UserError, match=f"its md5 is {found}, not 0{{32}}; what arrived was"):
        download(tmp_path, site.url)
    assert names(tmp_path) == []


def test_refused_connection(site: Site, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        with pytest.raises(UserError, match=r"no answer \(ConnectionRefused.*pass --mirror"):
            download(tmp_path, url)


@pytest.mark.parametrize(
    ("status", "redirect", "message", "pauses"),
    [
        (404, None, "the server answered 404 Not Found; try another --mirror URL", []),
        (503, None, r"the server answered 503 Service Unavailable \(4 attempts\)", [0.5, 1.0, 2.0]),
        (302, "file:///etc/hostname", "the server answered 302", []),
        (302, "ftp://127.0.0.1/x", "redirected to ftp", [0.5, 1.0, 2.0]),
    ],
)
def test_answers_without_a_file(
    site: Site, tmp_path: Path, monkeypatch: MonkeyPatch,
    status: int, redirect: str | None, message: str, pauses: list[float],
) -> None:  # fmt: skip
    paused: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=paused.append))
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.5)
    site.statuses, site.redirect = [status] * 9, redirect
    with pytest.raises(UserError, match=message):
        download(tmp_path, site.url, [CHECKPOINT])
    assert paused == pauses
    assert len(site.log) == 1 + len(pauses)
    assert names(tmp_path) == []


def set_free(monkeypatch: MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_full_disk(site: Site, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    set_free(monkeypatch, len(BODY) - 1)
    with pytest.raises(UserError, match="307199 bytes are free, 307200 more are needed"):
        download(tmp_path, site.url, [CHECKPOINT])
    set_free(monkeypatch, 2222)
    site.files[ARCHIVE] = archive({f"{DIRECTORY}/a": b"0" * 1000, f"{DIRECTORY}/b": b"1" * 999})
    download(tmp_path, site.url, [ARCHIVE])
    shutil.rmtree(tmp_path / DIRECTORY)
    set_free(monkeypatch, 2220)
    with pytest.raises(UserError, match="unpacks to more than 1998 bytes, 90% of what is free"):
        download(tmp_path, site.url, [ARCHIVE])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


UNSAFE = {
    "leads out of it": [
        entry("../outside"), entry(f"{DIRECTORY}/../../outside"), entry("/outside"),
        entry(f"{DIRECTORY}\\..\\outside"), entry("C:\\outside"), entry("..", tarfile.DIRTYPE),
    ],
    "is no regular file or directory": [
        entry(f"{DIRECTORY}/link", tarfile.SYMTYPE, "../.."),
        entry("elsewhere", tarfile.SYMTYPE, "part_0"),
        entry(f"{DIRECTORY}/hard", tarfile.LNKTYPE, f"{DIRECTORY}/part_0"),
        *(entry(f"{DIRECTORY}/x", kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, b"6")),
    ],
    "comes twice": [entry(f"{DIRECTORY}/part_0")],
}  # fmt: skip


@pytest.mark.parametrize(("message", "bad"), [(key, bad) for key in UNSAFE for bad in UNSAFE[key]])
def test_unsafe_archive_is_refused(tmp_path: Path, message: str, bad: tarfile.TarInfo) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / ARCHIVE).write_bytes(archive({f"{DIRECTORY}/part_0": b"rows"}, bad))
    with pytest.raises(UserError, match=message) as caught:
        download(output, None, [ARCHIVE])
    assert "\n" not in str(caught.value)
    assert names(output) == [ARCHIVE]
    assert names(tmp_path) == ["output"]


def test_damaged_archives(tmp_path: Path) -> None:
    whole = archive({f"{DIRECTORY}/part_0": hashlib.sha256(b"").digest() * 9000})
    spoiled = whole[:-8] + b"12345678"  # the checksum and the length
    alone = archive({DIRECTORY: b"a file in the directory's place"})
    elsewhere = archive({"another/part_0": b"rows"})
    for bad in (b"", whole[:200], whole[:-100], whole[:-4], spoiled, alone, elsewhere, b"<html>"):
        (tmp_path / ARCHIVE).write_bytes(bad)
        with pytest.raises(UserError, match=re.escape(f"{ARCHIVE}: damaged (")):
            download(tmp_path, None, [ARCHIVE])
        assert names(tmp_path) == [ARCHIVE]
    (tmp_path / ARCHIVE).write_bytes(whole)
    assert download(tmp_path, None, [ARCHIVE])[1].startswith("unpacked")


def test_entries_beside_the_directory_are_left_out(tmp_path: Path) -> None:
    files = {f"./{DIRECTORY}/deep/part_0": b"rows", "notes.txt": b"read me"}
    folders = [entry("./", tarfile.DIRTYPE), entry(f"./{DIRECTORY}/empty", tarfile.DIRTYPE)]
    (tmp_path / ARCHIVE).write_bytes(archive(files, *folders))
    (tmp_path / f"{DIRECTORY}.partial").mkdir()  # what a killed run left
    assert download(tmp_path, None, [ARCHIVE]) == [
        f"{ARCHIVE} is already there",
        f"unpacked {ARCHIVE} into {DIRECTORY}/: 1 file; 1 entry outside of it left out",
    ]
    assert names(tmp_path) == [DIRECTORY, ARCHIVE]
    assert names(tmp_path / DIRECTORY) == ["deep", "empty"]
    assert (tmp_path / DIRECTORY / "deep" / "part_0").read_bytes() == b"rows"
