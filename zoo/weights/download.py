"""Fetching published weights: resumed, checked against the card, and in place only when whole."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

from filelock import FileLock
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from zoo.errors import CheckpointError
from zoo.files import atomic_path
from zoo.weights.cards import WeightCard
from zoo.weights.formats import reject_stand_in

MIRROR_ENV = "ZOO_MIRROR"
"""Base URL or local folder that holds `NAME/FILE`, as the cache folder does, in place of every origin."""
ATTEMPTS = 5
BACKOFF_SECONDS = 1.0
"""Pause before the second attempt; doubled for each further one."""
TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 1 << 18
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Advance = Callable[[int, int | None], None]
"""Called with bytes so far and bytes in all (None: unknown)."""


def fetch(card: WeightCard) -> Path:
    """The card's file in the cache, downloaded when it is not there yet.

    Raises:
        CheckpointError: no origin could be reached, or what it sent is not the file of the card; says where
            to put the file by hand.
    """
    path = card.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        if path.is_file() and card.size in (None, path.stat().st_size):
            return path
        mirror = os.environ.get(MIRROR_ENV, "")
        address = f"{mirror.rstrip('/')}/{card.name}/{card.file}" if mirror else card.address
        try:
            if "://" in address:
                download(address, path, sha256=card.sha256, size=card.size)
            else:
                copy(Path(address), path, sha256=card.sha256, size=card.size)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}\nTo place it by hand: get {card.address} elsewhere and put it at {path}, or set "
                f"{MIRROR_ENV} to a folder or URL that holds {card.name}/{card.file}."
            ) from None
    return path


def copy(source: Path, path: Path, *, sha256: str | None = None, size: int | None = None) -> None:
    """Copy a local file into place, checked like a download."""
    if not source.is_file():
        raise CheckpointError(f"There is no file {source}.")
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)
        check_file(temporary, sha256=sha256, size=size, name=str(source))


def check_file(path: Path, *, sha256: str | None, size: int | None, name: str = "") -> None:
    """Compare a file with its card.

    Raises:
        CheckpointError: another size or hash, or a stand-in (empty, LFS pointer, web page).
    """
    name = name or str(path)
    with open(path, "rb") as file:
        reject_stand_in(file.read(512), name)
        file.seek(0)
        actual = path.stat().st_size
        if size is not None and actual != size:
            raise CheckpointError(f"{name} has {actual} bytes, the card says {size}.")
        found = hashlib.file_digest(file, "sha256").hexdigest() if sha256 else None
    if found != sha256:
        raise CheckpointError(
            f"{name} has sha256 {found}, the card says {sha256}. It was changed or damaged."
        )


# ---- HTTP --------------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """An attempt ended early in a way that another may mend."""


def download(url: str, path: Path, *, sha256: str | None = None, size: int | None = None) -> None:
    """Download `url` to `path`: resume what an earlier attempt left in `path.part`, check, move into place.

    A partial file of an earlier call is only trusted where `sha256` can prove the result.

    Raises:
        CheckpointError: the server cannot be reached, refuses, keeps breaking off, or sends another file.
    """
    if not url.startswith(("http://", "https://")):
        raise CheckpointError(f"{url} is no address of the web (http:// or https://).")
    part = path.with_name(path.name + ".part")
    inherited = _length(part) > 0 and sha256 is not None
    if not inherited:
        part.unlink(missing_ok=True)
    _transfer(url, part, size)
    try:
        check_file(part, sha256=sha256, size=size, name=url)
    except CheckpointError:
        part.unlink()
        if not inherited:
            raise
        download(url, path, sha256=sha256, size=size)
        return
    os.replace(part, path)


def _transfer(url: str, part: Path, size: int | None) -> None:
    """Fill `part`, in as many attempts as it takes up to `ATTEMPTS`."""
    reason = ""
    with _progress(url) as advance:
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                _attempt(url, part, size, advance)
                return
            except _Interrupted as error:
                reason = str(error)
    have = _length(part)
    kept = f" {have} bytes are kept in {part}." if have else ""
    raise CheckpointError(f"Cannot download {url}: {reason} ({ATTEMPTS} attempts).{kept}")


def _attempt(url: str, part: Path, size: int | None, advance: Advance) -> None:
    """One request for what is missing. The card's size is believed before the server's."""
    have = _length(part)
    if size is not None and have == size:
        return
    with _request(url, part, have) as response:
        offset, promised = _span(response, part, have)
        total = promised if size is None else size
        done = offset
        with _opened(part, offset) as file:
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                advance(done, total)
                if total is not None and done > total:
                    break
    if total is not None and done > total:
        part.unlink()
        raise CheckpointError(f"{url} sends more than the {total} bytes it should have.")
    if total is not None and done < total:
        raise _Interrupted(f"the connection ended after {done} of {total} bytes")


def _request(url: str, part: Path, have: int) -> HTTPResponse:
    headers = {"User-Agent": "attention-zoo"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        answer = f"the server answers {error.code} {error.msg}"
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        elif error.code not in RETRY_STATUS:
            raise CheckpointError(f"Cannot download {url}: {answer}.") from None
        raise _Interrupted(answer) from None
    except urllib.error.URLError as error:
        raise _Interrupted(f"no connection ({error.reason})") from None
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"no connection ({error})") from None


def _span(response: HTTPResponse, part: Path, have: int) -> tuple[int, int | None]:
    """Where in the file the body starts (0: the server ignored the range), and the length promised in all."""
    length = response.headers.get("Content-Length", "")
    promised = int(length) if length.isdigit() else None
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        return 0, promised
    found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != have:
        part.unlink()
        raise _Interrupted("the server sent another range than asked for")
    return have, None if found[2] == "*" else int(found[2])


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, HTTPException) as error:
        raise _Interrupted(f"the connection broke ({error})") from None


@contextmanager
def _opened(part: Path, offset: int) -> Iterator[IO[bytes]]:
    """The file from `offset` on; on disk when the block ends."""
    try:
        with open(part, "r+b" if offset else "wb", buffering=0) as file:
            file.seek(offset)
            yield file
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"Cannot write {part}: {error.strerror}.") from error


def _length(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


@contextmanager
def _progress(url: str) -> Iterator[Advance]:
    """A progress bar on standard error, where that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(url.rsplit("/", 1)[-1], total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
