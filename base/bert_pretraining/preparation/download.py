"""`data download`: download and unpack the files of DeepSparkHub's BERT sample.

A file is downloaded as `NAME.partial`. Beside it `NAME.partial.json` says which version of
the remote file it is part of. A rerun asks for the rest of that version, and starts over if
the server has another version. The file is called `NAME` only when it is complete.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PureWindowsPath
from typing import NoReturn

from tqdm import tqdm

from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import counted

BASE_URL = "http://files.deepspark.org.cn:880/deepspark/bert_mini/"
ATTEMPTS = 4  # connections for each file, in all
PAUSE_SECONDS = 1.0  # before the second connection; the pause doubles each time
TIMEOUT_SECONDS = 60.0  # for which no byte arrives
CHUNK_BYTES = 1 << 20
UNPACKED_SHARE = 0.9  # of the free disk space, which an archive may fill
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class RemoteFile:
    """One file to download. md5 is None where none is published.

    leaves: what stays in the data set: of an archive (`unpack`) its directory, else the file.
    """

    name: str
    md5: str | None
    unpack: bool
    leaves: str


# MLCommons publishes an md5 of BERT-large's bert_config.json, but the copy in the sample may be
# formatted in another way. So no md5 is known for any of these files.
FILES = (
    RemoteFile("2048_shards_uncompressed_mini.tar.gz", None, True, "2048_shards_uncompressed"),
    RemoteFile("eval_set_uncompressed.tar.gz", None, True, "eval_set_uncompressed"),
    RemoteFile("model.ckpt-28252.apex.pt", None, False, "model.ckpt-28252.apex.pt"),
    RemoteFile("bert_config.json", None, False, "bert_config.json"),
)


def download(output_dir: Path, mirror: str | None = None, only: Sequence[str] = ()) -> list[str]:
    """Download the files of the data set into output_dir and unpack its archives.

    What exists is kept: a directory that was unpacked (its archive may be deleted), a
    whole file, the beginning of a file. No unfinished file has the name of a whole one.

    Args:
        mirror: the http or https address of another directory with the same files.
        only: names in FILES; an empty sequence means all.

    Returns lines that say what was downloaded, existed already, and was unpacked.
    Raises UserError for a bad mirror or name, for a server that cannot be reached, has not
    all files or breaks the connection again and again (what arrived is kept for the next
    run), for a wrong md5, for an archive that is damaged or unsafe, and for a full disk.
    """
    base = _base_url(BASE_URL if mirror is None else mirror)
    chosen = _chosen(only)
    lines = []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for remote in chosen:
            lines += _bring(remote, base, output_dir)
    except OSError as error:
        raise UserError(
            f"cannot write to {output_dir} ({error.strerror or error})",
            "free disk space, or choose another --output_dir",
        ) from error
    return lines


class _Interrupted(Exception):
    """A download that another connection may continue."""


class _NoFtp(urllib.request.FTPHandler):
    """Replaces urllib's FTP handler, so that redirections lead to http or https only."""

    def ftp_open(self, req: urllib.request.Request) -> NoReturn:
        raise urllib.error.URLError(f"redirected to {req.full_url}")


@dataclass(frozen=True)
class _Version:
    """What a server says about the version of a file that it sends."""

    etag: str | None
    last_modified: str | None
    total: int | None

    def validator(self) -> str | None:
        """The value for If-Range, which must not be a weak ETag."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified

    def same_as(self, other: _Version) -> bool:
        """Whether at least one value is known to both, and all such values are equal."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        known = [one == two for one, two in pairs if one is not None and two is not None]
        return bool(known) and all(known)


def _base_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  reading it raises ValueError for a bad port
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    # urllib would treat credentials as a part of the host name.
    if not good or "@" in parts.netloc or not re.fullmatch(r"[!-~]+", url) or set("?#") & set(url):
        raise UserError(
            f"--mirror {url!r} is no http address of a directory",
            "give an address like http://host:880/directory/",
        )
    return url.rstrip("/") + "/"


def _chosen(only: Sequence[str]) -> list[RemoteFile]:
    names = [remote.name for remote in FILES]
    if unknown := set(only) - set(names):
        raise UserError(f"--only {min(unknown)}: no such file", f"name one of {', '.join(names)}")
    return [remote for remote in FILES if not only or remote.name in only]


def _bring(remote: RemoteFile, base: str, output_dir: Path) -> list[str]:
    """Download and unpack one file, unless that is done already."""
    path = output_dir / remote.name
    if remote.unpack and (output_dir / remote.leaves).is_dir():
        return [f"{remote.leaves}/ is already there"]
    if path.is_file():
        lines = [f"{remote.name} is already there"]
    else:
        checked = "md5 checked" if remote.md5 else "not checked: no md5 of it is known"
        size = _fetch(base + urllib.parse.quote(remote.name), path, remote.md5)
        lines = [f"downloaded {remote.name}: {size} bytes, {checked}"]
    if remote.unpack:
        lines.append(_unpack(path, output_dir, remote.leaves))
    return lines


def _fetch(url: str, path: Path, md5: str | None) -> int:
    """Download one file to `path`, with several connections if needed; returns its size."""
    partial = path.with_name(f"{path.name}.partial")
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            _receive(url, partial)
            break
        except _Interrupted as error:
            reason = _one_line(error)
    else:
        raise UserError(
            f"{url}: {reason} ({ATTEMPTS} attempts); what arrived is kept",
            "run the same command again to go on, or pass --mirror URL",
        )
    digest = hashlib.md5()
    with open(partial, "rb") as file:
        while md5 is not None and (chunk := file.read(CHUNK_BYTES)):
            digest.update(chunk)
    if md5 not in (None, digest.hexdigest()):
        _forget(partial)
        raise UserError(
            f"{url}: its md5 is {digest.hexdigest()}, not {md5}; what arrived was deleted",
            "run again, or pass another --mirror",
        )
    os.replace(partial, path)
    _forget(partial)
    return path.stat().st_size


def _receive(url: str, partial: Path) -> None:
    """Use one connection to complete `partial`, or to start it again.

    Raises _Interrupted if another connection may help, else UserError.
    """
    before = _read_version(partial)
    held = partial.stat().st_size if before is not None and partial.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "bert-pretraining"})
    if before is not None and held:
        request.add_header("Range", f"bytes={held}-")
        if validator := before.validator():
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.build_opener(_NoFtp).open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        response = error  # it is handled below, like every answer
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"no answer ({getattr(error, 'reason', error)!r})") from error
    with response:
        status = response.status
        answer = f"the server answered {status} {_one_line(response.reason)}"
        if status in RETRIED_STATUS:
            raise _Interrupted(answer)
        if status not in (200, 206, 416) or (status != 200 and not held):
            raise UserError(f"{url}: {answer}", "try another --mirror URL")
        version, start = _version(response)
        if status == 200:  # the first connection, another version, or a server without ranges
            # First remove the old bytes, so that they never count as bytes of the new version.
            partial.write_bytes(b"")
            partial.with_suffix(".partial.json").write_text(json.dumps(dataclasses.asdict(version)))
            _append(response, partial, 0, version.total)
            return
        same = before is not None and before.same_as(version)
        if status == 416 and same and version.total == held:
            return  # it is complete; only the renaming was missing
        if status == 206 and same and start == held:
            _append(response, partial, held, version.total)
            return
    _forget(partial)  # it is part of another version
    _receive(url, partial)


def _append(response: HTTPResponse, partial: Path, held: int, total: int | None) -> None:
    """Append the body of the answer to the file; _Interrupted if it ends too early."""
    expected = response.length
    free = shutil.disk_usage(partial.parent).free
    if expected is not None:
        total = total or held + expected
    if (expected or 0) > free:
        problem = f"{partial.parent}: {free} bytes are free, {expected} more are needed"
        raise UserError(problem, "free disk space, or choose another --output_dir")
    arrived = 0
    # disable=None shows the bar on a terminal only.
    bar = tqdm(None, partial.stem, total, initial=held, unit="B", unit_scale=True, disable=None)
    with bar, open(partial, "ab") as file:
        while chunk := _read(response):
            file.write(chunk)
            arrived += len(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and held + arrived < total:
        raise _Interrupted(f"the connection broke after {held + arrived} of {total} bytes")


def _read(response: HTTPResponse) -> bytes:
    try:
        # read1 returns what has arrived, so that a broken connection loses nothing.
        return response.read1(CHUNK_BYTES)
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"the connection broke ({error!r})") from error


def _version(response: HTTPResponse) -> tuple[_Version, int | None]:
    """The version that the server sends, and the offset of the first byte that it sends."""
    headers = response.headers
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", ""))
    start, total = (part and int(part) for part in found.groups()) if found else (None, None)
    if response.status == 200:
        start, total = 0, response.length
    return _Version(headers.get("ETag"), headers.get("Last-Modified"), total), start


def _read_version(partial: Path) -> _Version | None:
    try:
        return _Version(**json.loads(partial.with_suffix(".partial.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # it is not known which version `partial` belongs to


def _forget(partial: Path) -> None:
    for path in (partial, partial.with_suffix(".partial.json")):
        path.unlink(missing_ok=True)


def _unpack(archive: Path, output_dir: Path, leaves: str) -> str:
    """Unpack the directory `leaves` of a .tar.gz into output_dir, whole or not at all.

    An archive is refused if any entry is a link, device or pipe, has an absolute path or
    one with `..`, or comes twice, or if it would fill more than UNPACKED_SHARE of the free
    disk space. Modes and owners are ignored. Entries outside `leaves` are left out and counted.
    """
    staging = output_dir / f"{leaves}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        inside, outside = _extract(archive, staging, leaves)
        os.replace(staging / leaves, output_dir / leaves)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        reason = _one_line(error)
        raise UserError(f"{archive}: damaged ({reason})", "delete it and run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    left_out = f"; {counted(outside, 'entry')} outside of it left out" if outside else ""
    return f"unpacked {archive.name} into {leaves}/: {counted(inside, 'file')}{left_out}"


def _extract(archive: Path, directory: Path, leaves: str) -> tuple[int, int]:
    """Returns how many files were written, and how many entries are outside `leaves`."""
    limit = int(shutil.disk_usage(directory).free * UNPACKED_SHARE)
    size = inside = outside = 0
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            # Windows rules are the strictest: both / and \ separate, and drives are absolute.
            path = PureWindowsPath(member.name)
            escapes = bool(path.anchor) or ".." in path.parts
            if escapes or not (member.isreg() or member.isdir()):
                fault = "leads out of it" if escapes else "is no regular file or directory"
                raise UserError(f"{archive}: unsafe archive, {member.name!r} {fault}", "delete it")
            if path.parts[:1] != (leaves,):
                outside += path.parts != ()  # the entry "." does not count
                continue
            target = directory.joinpath(*path.parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            size += member.size
            if size > limit:
                raise UserError(
                    f"{archive}: unpacks to more than {limit} bytes, {UNPACKED_SHARE:.0%} of what "
                    "is free there",
                    "free disk space, or choose another --output_dir",
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            if target.exists() or source is None:
                raise ValueError(f"{member.name!r} comes twice")
            with source, open(target, "xb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            inside += 1
        while stream.read(CHUNK_BYTES):  # read to the end, where the checksum is verified
            pass
    if not inside or not (directory / leaves).is_dir():
        raise ValueError(f"no files in {leaves}/")
    return inside, outside


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())
