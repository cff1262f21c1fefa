"""Downloads from a server on this machine that behaves as badly as servers do."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import CheckpointError
from zoo.weights import download as module
from zoo.weights.cards import WeightCard
from zoo.weights.download import download, fetch

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Answer = Callable[["Handler", int | None], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request by `server.answer(handler, start of range or None)`, logging the ranges."""

    server: Any

    def do_GET(self) -> None:
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else None
        self.server.ranges.append(start)
        self.server.answer(self, start)

    def log_message(self, *args: Any) -> None:
        pass

    def send(self, body: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        """One answer; `length` is what Content-Length says, if not the truth (-1: nothing)."""
        self.send_response(status)
        if length != -1:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_range(self, start: int | None, stop: int | None = None) -> None:
        """An honest header for the rest of the file; the connection ends at `stop`."""
        if start is None:
            self.send(CONTENT[:stop], length=len(CONTENT))
        elif start >= len(CONTENT):
            self.send(b"", 416, Content_Range=f"bytes */{len(CONTENT)}")
        else:
            span = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
            self.send(CONTENT[start:stop], 206, length=len(CONTENT) - start, Content_Range=span)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    answer: Answer
    ranges: list[int | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.bin"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 1.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.ranges = []
        server.answer = lambda handler, start: handler.send_range(start)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.bin"


def _get(server: Server, path: Path, **card: Any) -> None:
    download(server.url, path, **({"sha256": SHA256, "size": len(CONTENT)} | card))


def _assert_whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# ---- mended ------------------------------------------------------------------------------------------------


def test_an_honest_server_is_asked_once(server: Server, path: Path) -> None:
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [None]


@pytest.mark.parametrize("known", [{}, {"sha256": None, "size": None}])
def test_a_dropped_connection_is_resumed_where_it_broke(server: Server, path: Path, known: dict) -> None:
    stops = itertools.chain([100_000, 300_000], itertools.repeat(None))
    server.answer = lambda handler, start: handler.send_range(start, next(stops))
    _get(server, path, **known)
    _assert_whole(path)
    assert server.ranges == [None, 100_000, 300_000]


def test_a_server_that_ignores_ranges_starts_again(server: Server, path: Path) -> None:
    stops = itertools.chain([100_000], itertools.repeat(None))
    server.answer = lambda handler, start: handler.send_range(None, next(stops))
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [None, 100_000]


def test_a_server_that_sends_another_range_starts_again(server: Server, path: Path) -> None:
    def answer(handler: Handler, start: int | None) -> None:
        if start is None:
            handler.send_range(None, 100_000 if len(server.ranges) == 1 else None)
        else:
            handler.send(CONTENT[7:], 206, Content_Range=f"bytes 7-{len(CONTENT) - 1}/{len(CONTENT)}")

    server.answer = answer
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [None, 100_000, None]


def test_an_interrupted_call_is_resumed_by_the_next(server: Server, path: Path) -> None:
    path.with_name("file.bin.part").write_bytes(CONTENT[:200_000])
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [200_000]


def test_a_finished_part_is_not_asked_for_again(server: Server, path: Path) -> None:
    path.with_name("file.bin.part").write_bytes(CONTENT)
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == []


def test_a_wrong_part_of_an_earlier_call_is_found_by_its_hash_and_dropped(server: Server, path: Path) -> None:
    path.with_name("file.bin.part").write_bytes(b"x" * 200_000)
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [200_000, None]


def test_a_part_that_is_too_long_is_dropped(server: Server, path: Path) -> None:
    path.with_name("file.bin.part").write_bytes(CONTENT + b"more")
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [len(CONTENT) + 4, None]


def test_an_earlier_part_is_not_trusted_without_a_hash(server: Server, path: Path) -> None:
    path.with_name("file.bin.part").write_bytes(b"x" * 200_000)
    _get(server, path, sha256=None)
    _assert_whole(path)
    assert server.ranges == [None]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, path: Path, status: int) -> None:
    def answer(handler: Handler, start: int | None) -> None:
        if len(server.ranges) < 3:
            handler.send(b"busy", status)
        else:
            handler.send_range(start)

    server.answer = answer
    _get(server, path)
    _assert_whole(path)


def test_redirects_are_followed_and_keep_the_range(server: Server, path: Path) -> None:
    def answer(handler: Handler, start: int | None) -> None:
        if handler.path == "/file.bin":
            handler.send(b"", 302, Location="/elsewhere")
        else:
            handler.send_range(start, 100_000 if start is None else None)

    server.answer = answer
    _get(server, path)
    _assert_whole(path)
    assert server.ranges == [None, None, 100_000, 100_000]


def test_the_size_of_the_card_is_believed_before_a_length_that_is_too_long(
    server: Server, path: Path
) -> None:
    server.answer = lambda handler, start: handler.send(CONTENT, length=len(CONTENT) + 999)
    _get(server, path)
    _assert_whole(path)


def test_a_body_without_length_is_read_to_its_end(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(CONTENT, length=-1)
    _get(server, path, size=None)
    _assert_whole(path)


# ---- refused -----------------------------------------------------------------------------------------------


def test_a_file_with_another_hash_is_not_kept(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(CONTENT[::-1])
    with pytest.raises(CheckpointError, match=f"has sha256 [0-9a-f]+, the card says {SHA256}"):
        _get(server, path)
    assert list(path.parent.iterdir()) == []


def test_an_older_file_stays_when_the_new_one_is_refused(server: Server, path: Path) -> None:
    path.write_bytes(b"older")
    server.answer = lambda handler, start: handler.send(CONTENT[::-1])
    with pytest.raises(CheckpointError, match="sha256"):
        _get(server, path)
    assert path.read_bytes() == b"older"


def test_more_bytes_than_the_card_says_are_not_read(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(CONTENT * 3)
    with pytest.raises(CheckpointError, match=f"more than the {len(CONTENT)} bytes"):
        _get(server, path)
    assert list(path.parent.iterdir()) == []


def test_a_length_that_is_too_short_never_yields_a_file(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(CONTENT, length=1000)
    with pytest.raises(CheckpointError, match=f"ended after 1000 of {len(CONTENT)} bytes"):
        _get(server, path)
    assert not path.exists()


def test_a_length_that_is_too_long_never_yields_a_file_without_a_card(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(CONTENT, length=len(CONTENT) + 999)
    with pytest.raises(CheckpointError, match=f"ended after {len(CONTENT)} of {len(CONTENT) + 999} bytes"):
        _get(server, path, sha256=None, size=None)
    assert not path.exists()


def test_a_server_that_always_breaks_off_is_given_up_and_the_part_kept(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send_range(None, 1000)
    with pytest.raises(
        CheckpointError, match=r"ended after 1000 of .*\(5 attempts\)\. 1000 bytes are kept in"
    ):
        _get(server, path)
    assert len(server.ranges) == module.ATTEMPTS


def test_a_silent_server_times_out(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    release = threading.Event()
    server.answer = lambda handler, start: (release.wait(10), None)[1]
    with pytest.raises(CheckpointError, match=r"timed out.*\(2 attempts\)"):
        _get(server, path)
    release.set()


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(server: Server, path: Path, status: int) -> None:
    server.answer = lambda handler, start: handler.send(b"no", status)
    with pytest.raises(CheckpointError, match=f"the server answers {status}"):
        _get(server, path)
    assert server.ranges == [None]


def test_a_circle_of_redirects_is_final(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(b"", 302, Location="/file.bin")
    with pytest.raises(CheckpointError, match="the server answers 302"):
        _get(server, path)


def test_a_log_in_page_in_place_of_the_file_is_named(server: Server, path: Path) -> None:
    server.answer = lambda handler, start: handler.send(b"<!doctype html><html>Sign in</html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        _get(server, path, size=None)
    assert list(path.parent.iterdir()) == []


def test_an_address_that_is_none_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights://nowhere is no address of the web"):
        download("weights://nowhere", path)


def test_a_full_disk_names_the_file_and_is_not_tried_again(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"Cannot write .*file\.bin\.part: No space left on device"):
        _get(server, path)
    assert server.ranges == [None]
    assert not path.exists()


# ---- cards, cache and mirrors ------------------------------------------------------------------------------


@pytest.fixture
def card(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightCard:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ZOO_MIRROR", raising=False)
    return WeightCard(
        name="toy",
        models=("a/b",),
        file="w.bin",
        licence="MIT",
        format="bytes",
        url=server.url,
        sha256=SHA256,
        size=len(CONTENT),
    )


def test_fetch_downloads_once(server: Server, card: WeightCard) -> None:
    assert fetch(card).read_bytes() == CONTENT
    assert fetch(card) == card.path
    assert server.ranges == [None]


def test_fetch_replaces_a_file_of_another_size(server: Server, card: WeightCard) -> None:
    card.path.parent.mkdir(parents=True)
    card.path.write_bytes(b"cut off")
    assert fetch(card).read_bytes() == CONTENT


def test_several_processes_share_one_download(server: Server, card: WeightCard) -> None:
    threads = [threading.Thread(target=fetch, args=(card,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.ranges == [None]
    assert card.path.read_bytes() == CONTENT


def test_a_mirror_stands_in_for_the_origin(
    server: Server, card: WeightCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(handler: Handler, start: int | None) -> None:
        asked.append(handler.path)
        handler.send_range(start)

    server.answer = answer
    monkeypatch.setenv("ZOO_MIRROR", f"http://127.0.0.1:{server.server_port}/mirror/")
    fetch(dataclasses.replace(card, url="http://origin.invalid/w.bin"))
    assert asked == ["/mirror/toy/w.bin"]


def test_a_local_folder_stands_in_for_the_origin_and_is_checked(
    card: WeightCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "usb" / "toy" / "w.bin"
    source.parent.mkdir(parents=True)
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path / "usb"))
    with pytest.raises(CheckpointError, match=f"no file {source}"):
        fetch(card)
    source.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(CheckpointError, match="the card says"):
        fetch(card)
    assert not card.path.exists()
    source.write_bytes(CONTENT)
    assert fetch(card).read_bytes() == CONTENT


def test_without_a_network_the_error_says_where_to_put_the_file(server: Server, card: WeightCard) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        port = closed.server_port
    away = dataclasses.replace(card, url=f"http://127.0.0.1:{port}/w.bin")
    with pytest.raises(CheckpointError) as error:
        fetch(away)
    message = str(error.value)
    assert "no connection" in message
    assert f"get {away.url} elsewhere and put it at {away.path}" in message
    assert "ZOO_MIRROR to a folder or URL that holds toy/w.bin" in message


def test_a_hub_card_resolves_to_the_address_of_its_revision(card: WeightCard) -> None:
    hub = dataclasses.replace(
        card, url="", hub="openai-community/gpt2", revision="607a30d", file="model.safetensors"
    )
    assert hub.address == "https://huggingface.co/openai-community/gpt2/resolve/607a30d/model.safetensors"
