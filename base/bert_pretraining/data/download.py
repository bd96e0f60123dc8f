"""`data download`: the files of DeepSparkHub's BERT sample, fetched once and unpacked.

A file arrives as `NAME.partial`, beside which `NAME.partial.json` remembers which version
of the remote file it is the beginning of. A rerun asks for the rest of that version and
starts over if the server has another. `NAME` appears only when all of it is there.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.client
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
from email.message import Message
from pathlib import Path, PureWindowsPath

from tqdm import tqdm

from bert_pretraining.errors import UserError

BASE_URL = "http://files.deepspark.org.cn:880/deepspark/bert_mini/"
ATTEMPTS = 4  # connections a file, in all
PAUSE_SECONDS = 1.0  # before the second connection; doubles each time
TIMEOUT_SECONDS = 60.0  # without a byte
CHUNK_BYTES = 1 << 20
UNPACKED_SHARE = 0.9  # of the free disk that an archive may fill
RETRIED_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch. `leaves` is what the data set needs of it.

    md5 is None where none is published. An archive (`unpack`) leaves a directory, any
    other file itself.
    """

    name: str
    md5: str | None
    unpack: bool
    leaves: str


# MLCommons publishes an md5 of BERT-large's bert_config.json, but the sample's copy need
# not be formatted the same, so that no md5 is known for any of these.
FILES = (
    RemoteFile("2048_shards_uncompressed_mini.tar.gz", None, True, "2048_shards_uncompressed"),
    RemoteFile("eval_set_uncompressed.tar.gz", None, True, "eval_set_uncompressed"),
    RemoteFile("model.ckpt-28252.apex.pt", None, False, "model.ckpt-28252.apex.pt"),
    RemoteFile("bert_config.json", None, False, "bert_config.json"),
)


def download(output_dir: Path, mirror: str | None = None, only: Sequence[str] = ()) -> list[str]:
    """Fetch the data set's files into output_dir and unpack its archives.

    What is there is kept: a directory that was unpacked (its archive may be deleted), a
    whole file, the beginning of a file. No file of the data set is ever there in part.

    Args:
        mirror: the http or https address of another directory with the same files.
        only: names in FILES; none means all.

    Returns lines that say what was downloaded, was there already, and was unpacked.
    Raises UserError for a bad mirror or name, for a server that cannot be reached, lacks
    a file or keeps cutting the connection (what arrived is kept for the next run), for
    a wrong md5, for an archive that is damaged or unsafe, and for a full disk.
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
            f"cannot write to {output_dir} ({error.strerror or error}); "
            "free disk space, or choose another --output_dir"
        ) from error
    return lines


class _Interrupted(Exception):
    """A transfer that may go on with another connection."""


@dataclass(frozen=True)
class _Version:
    """What a server tells of the version of a file that it sends."""

    etag: str | None
    last_modified: str | None
    total: int | None

    def validator(self) -> str | None:
        """For If-Range, which takes no weak ETag."""
        if self.etag and not self.etag.startswith("W/"):
            return self.etag
        return self.last_modified

    def same_as(self, other: _Version) -> bool:
        """Something that both know is equal, and nothing differs."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        known = [one == two for one, two in pairs if one is not None and two is not None]
        return bool(known) and all(known)


def _base_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  a bad port is found when it is asked for
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    # Credentials are refused because urllib would take them for a part of the host's name.
    if not good or "@" in parts.netloc or not re.fullmatch(r"[!-~]+", url) or set("?#") & set(url):
        raise UserError(f"--mirror {url!r}: give an address like http://host:880/directory/")
    return url.rstrip("/") + "/"


def _chosen(only: Sequence[str]) -> list[RemoteFile]:
    names = [remote.name for remote in FILES]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name}: no such file; there are {', '.join(names)}")
    return [remote for remote in FILES if not only or remote.name in only]


def _bring(remote: RemoteFile, base: str, output_dir: Path) -> list[str]:
    """Fetch and unpack one file, so far as it is not there."""
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
    """Bring one file to `path`, in several connections if need be; returns its size."""
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
        held = partial.stat().st_size if partial.is_file() else 0
        raise UserError(
            f"{url}: {reason} ({ATTEMPTS} attempts); run the same command again to go on from "
            f"byte {held}, or pass --mirror URL"
        )
    if md5 is not None:
        found = _md5(partial)
        if found != md5:
            _forget(partial)
            raise UserError(
                f"{url}: its md5 is {found}, not {md5}; what arrived was deleted: "
                "run again, or pass another --mirror"
            )
    os.replace(partial, path)
    _forget(partial)
    return path.stat().st_size


def _receive(url: str, partial: Path) -> None:
    """One connection: append to `partial` what it lacks, or begin it anew.

    Raises _Interrupted where another connection may help, UserError where none will.
    """
    before = _read_version(partial)
    held = partial.stat().st_size if before is not None and partial.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "bert-pretraining"})
    if before is not None and held:
        request.add_header("Range", f"bytes={held}-")
        validator = before.validator()
        if validator:
            request.add_header("If-Range", validator)
    try:
        response = _opener().open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        response = error  # an answer like the others, to be looked at below
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"no answer ({getattr(error, 'reason', error)!r})") from error

    with response:
        status = response.status
        if status in RETRIED_STATUS:
            raise _Interrupted(f"the server answered {status} {response.reason}")
        if status not in (200, 206, 416) or (status != 200 and not held):
            raise UserError(
                f"{url}: the server answered {status} {_one_line(response.reason)}; "
                "pass --mirror URL, or put the file there yourself"
            )
        if status == 200:  # the first connection, another version, or a server without ranges
            held = 0
            version = _version(response.headers, response.length)
            # Emptied before its new version is noted: old bytes never pass for new ones.
            partial.write_bytes(b"")
            _version_path(partial).write_text(json.dumps(dataclasses.asdict(version)))
        else:
            start, total = _content_range(response.headers)
            version = _version(response.headers, total)
            same = before is not None and before.same_as(version)
            if status == 416 and same and total == held:
                return  # whole; only its renaming was missing
            if status == 416 or not same or start != held:
                _forget(partial)
                return _receive(url, partial)
        _append(response, partial, held, version.total)


def _append(
    response: http.client.HTTPResponse, partial: Path, held: int, total: int | None
) -> None:
    """Write the body behind what is held; _Interrupted if it ends too early."""
    expected = response.length
    free = shutil.disk_usage(partial.parent).free
    if expected is not None and expected > free:
        raise UserError(
            f"{partial.parent}: {expected} more bytes are needed, {free} are free; "
            "free disk space, or choose another --output_dir"
        )
    arrived = 0
    # disable=None: a bar on a terminal only
    bar = tqdm(None, partial.stem, total, initial=held, unit="B", unit_scale=True, disable=None)
    with bar, open(partial, "ab") as file:
        while True:
            try:
                # read1 returns what has arrived, so that a cut loses nothing
                chunk = response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _Interrupted(f"the connection broke ({error!r})") from error
            if not chunk:
                break
            file.write(chunk)
            arrived += len(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if expected is not None and arrived < expected:
        raise _Interrupted(f"the connection broke after {arrived} of {expected} bytes")


def _opener() -> urllib.request.OpenerDirector:
    """http and https only: a redirection to file: or ftp: finds no handler."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _version(headers: Message, total: int | None) -> _Version:
    return _Version(headers.get("ETag"), headers.get("Last-Modified"), total)


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """Where the part that is sent begins, and the size of the whole, if they are told."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)", headers.get("Content-Range", ""))
    start, total = found.groups() if found else (None, None)
    return start and int(start), total and int(total)


def _version_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_version(partial: Path) -> _Version | None:
    """None if nothing is known of what `partial` begins."""
    try:
        return _Version(**json.loads(_version_path(partial).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # none, or cut off when it was written


def _forget(partial: Path) -> None:
    for path in (partial, _version_path(partial)):
        path.unlink(missing_ok=True)


def _md5(path: Path) -> str:
    digest = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(archive: Path, output_dir: Path, leaves: str) -> str:
    """Unpack the directory `leaves` of a .tar.gz into output_dir, whole or not at all.

    An archive is refused whole if any entry is not a regular file or a directory (links
    of either kind, devices, pipes), has an absolute path or one with `..`, or comes
    twice; or if what it holds would fill more than UNPACKED_SHARE of the free disk.
    Modes and owners in the archive are ignored. Entries outside `leaves` are left out.

    Returns a line that says what was unpacked. Raises UserError.
    """
    staging = output_dir / f"{leaves}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        inside, outside = _extract(archive, staging, leaves)
        os.replace(staging / leaves, output_dir / leaves)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise UserError(
            f"{archive}: damaged archive ({_one_line(error)}); delete it and run again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    left_out = f"; {outside} entries outside of it left out" if outside else ""
    return f"unpacked {archive.name} into {leaves}/: {inside} files{left_out}"


def _extract(archive: Path, directory: Path, leaves: str) -> tuple[int, int]:
    """Returns how many files were written, and how many entries are outside `leaves`."""
    limit = int(shutil.disk_usage(directory).free * UNPACKED_SHARE)
    size = inside = outside = 0
    with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            where = f"{archive}: unsafe archive, {member.name!r}"
            # Read as on Windows, where / and \ both separate and drives are absolute.
            path = PureWindowsPath(member.name)
            if path.anchor or ".." in path.parts:
                raise UserError(f"{where} leads out of its directory; nothing was unpacked")
            if not (member.isreg() or member.isdir()):
                raise UserError(f"{where} is no regular file or directory; nothing was unpacked")
            if path.parts[:1] != (leaves,):
                outside += path.parts != ()  # "." itself is nothing to be left out
                continue
            target = directory.joinpath(*path.parts)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            size += member.size
            if size > limit:
                raise UserError(
                    f"{archive}: unpacks to more than {limit} bytes, {UNPACKED_SHARE:.0%} of the "
                    f"free disk at {directory.parent}; free disk space, or choose another "
                    "--output_dir"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            if target.exists() or source is None:
                raise ValueError(f"{member.name!r} comes twice")
            with source, open(target, "xb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            inside += 1
        while stream.read(CHUNK_BYTES):  # to the end, where the checksum is
            pass
    if not inside:
        raise ValueError(f"no files in {leaves}/")
    return inside, outside


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())
