"""The control socket. A client sends one JSON line, gets one JSON line as the answer, and the connection closes.

A client needs only the standard library.

Questions about the engine are answered from memory immediately. Slow ones, such as a search, have a limit of their own,
so that they never delay the quick ones.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from everos_engine.errors import EngineError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    import trio

    Slow = Callable[[Mapping[str, object]], Awaitable[Mapping[str, object]]]

MAX_PATH_BYTES = 100
"""``sun_path`` holds 108 bytes on Linux and 104 on macOS."""
MAX_QUESTION_BYTES = 16_384
MAX_TALKS = 4
TALK_SECONDS = 1.0
MAX_SLOW_TALKS = 4
SLOW_TALK_SECONDS = 60.0
BUSY = "busy"
FAILED = "the engine could not answer {!r}: its log has the reason. Ask again, and report it if it fails again"
MAX_QUOTED = 80
PAUSE_SECONDS = 0.1
RETRY_SECONDS = 0.02
_FULL = {errno.EMFILE, errno.ENFILE}
_FLEETING = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED}


def ask(
    path: Path, question: str, details: Mapping[str, object] | None = None, *, deadline_seconds: float = 1.0
) -> dict[str, object] | None:
    """Return the answer of the engine that listens at ``path``.

    None if no engine listens there, if it went away, or if the question is too long. Raises TimeoutError if the engine
    does not answer within the deadline, because it is stopped or stuck.
    """
    end = time.monotonic() + deadline_seconds
    line = json.dumps({**(details or {}), "ask": question}).encode() + b"\n"
    if len(line) > MAX_QUESTION_BYTES:
        return None
    try:
        while (answer := _talk_once(path, line, end=end)) is None:
            time.sleep(min(RETRY_SECONDS, _left(end)))  # it disconnected us or it ended: connecting again shows which
    except TimeoutError:
        raise TimeoutError(
            f"the engine at {path} did not answer within {deadline_seconds:g} s: it is stopped or busy"
        ) from None
    except (FileNotFoundError, NotADirectoryError, ConnectionError, PermissionError):
        return None
    found: dict[str, object] = json.loads(answer)
    return found


async def serve_control(
    path: Path,
    answer: Callable[[str], Mapping[str, object]],
    *,
    slow: Mapping[str, Slow] | None = None,
    spare: Callable[[], AbstractContextManager[object]] | None = None,
) -> None:
    """Answer questions at ``path`` until cancelled. A stale socket there is replaced.

    An unexpected error of one question is logged, and answered to the client that asked.

    A function in ``slow`` gets the whole question. MAX_SLOW_TALKS of them run in parallel, and further ones get "busy"
    as the answer. ``spare`` frees one descriptor for the length of its block, so that a process at its limit still
    answers. If the file system does not support sockets, this only sleeps. A client that is silent or breaks the
    protocol is disconnected, and other clients do not notice.
    """
    import trio

    import everos_engine.system.unit  # noqa: F401 - loaded now, since at the descriptor limit no file can be opened

    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with trio.socket.from_stdlib_socket(bound) as listener:
        try:
            with short_address(path) as address:
                path.unlink(missing_ok=True)
                bound.bind(address)
            os.chmod(path, 0o600)
            bound.listen(64)
        except OSError:
            await trio.sleep_forever()
        talks, places = trio.Semaphore(MAX_TALKS), trio.Semaphore(MAX_SLOW_TALKS)
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await talks.acquire()
                    stream = await _accept(listener, spare)
                    nursery.start_soon(_talk, stream, answer, slow or {}, talks, places)
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def short_address(path: Path) -> Iterator[str]:
    """Return an address for ``path`` that fits.

    A long one goes through a descriptor of its directory on Linux.
    """
    full = os.fspath(path)
    if len(os.fsencode(full)) <= MAX_PATH_BYTES:
        yield full
        return
    handle = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}/{path.name}"
    finally:
        os.close(handle)


async def _accept(
    listener: trio.socket.SocketType, spare: Callable[[], AbstractContextManager[object]] | None
) -> trio.SocketStream:
    """Return the next client.

    At the descriptor limit the spare descriptor is used. If there is none, the client waits.
    """
    import trio

    while True:
        try:
            await trio.lowlevel.wait_readable(listener)
            return trio.SocketStream((await listener.accept())[0])
        except OSError as error:
            if error.errno not in _FLEETING:
                raise
            if spare is not None and error.errno in _FULL:
                with spare(), suppress(OSError), trio.move_on_after(PAUSE_SECONDS):
                    return trio.SocketStream((await listener.accept())[0])
            await trio.sleep(PAUSE_SECONDS)


async def _talk(
    stream: trio.SocketStream,
    answer: Callable[[str], Mapping[str, object]],
    slow: Mapping[str, Slow],
    talks: trio.Semaphore,
    places: trio.Semaphore,
) -> None:
    import trio

    from everos_engine.system.unit import unit

    async with stream:
        asked: Mapping[str, object] = {}
        work = None
        try:
            with trio.move_on_after(TALK_SECONDS), suppress(trio.BrokenResourceError):
                asked = await _question(stream)
                name = str(asked.get("ask", ""))
                work = slow.get(name)
                if asked and work is None:
                    line = _line(FAILED.format(name[:MAX_QUOTED]))
                    with unit("control", name[:MAX_QUOTED]):
                        line = _line(None, answer(name))
                    await stream.send_all(line)
        finally:
            talks.release()
        if work is not None:
            with trio.move_on_after(SLOW_TALK_SECONDS), suppress(trio.BrokenResourceError):
                await stream.send_all(await _worked(name, work, asked, places))


async def _worked(name: str, work: Slow, asked: Mapping[str, object], places: trio.Semaphore) -> bytes:
    """Return the line that answers a slow question.

    An error of one question is the answer to that question only.
    """
    import trio

    from everos_engine.system.unit import unit

    try:
        places.acquire_nowait()
    except trio.WouldBlock:
        return _line(BUSY)
    line = _line(FAILED.format(name))
    try:
        with unit("control", name):
            line = _line(None, await work(asked))
    except EngineError as error:
        return _line(str(error))
    finally:
        places.release()
    return line


def _line(error: str | None, answer: Mapping[str, object] | None = None) -> bytes:
    return json.dumps(answer if error is None else {"error": error}).encode() + b"\n"


async def _question(stream: trio.SocketStream) -> Mapping[str, object]:
    """Return the question. It is empty if no whole line came, and asks "" if the line is not a question."""
    line = b""
    while not line.endswith(b"\n"):
        part = await stream.receive_some(MAX_QUESTION_BYTES)
        line += part
        if not part or len(line) > MAX_QUESTION_BYTES:
            return {}
    with suppress(ValueError, RecursionError):
        asked = json.loads(line)
        if isinstance(asked, dict) and isinstance(asked.get("ask"), str):
            return asked
    return {"ask": ""}


def _talk_once(path: Path, line: bytes, *, end: float) -> bytes | None:
    """Return the line of the answer, or None if the connection ended before it was complete."""
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _connect(sock, path, end=end)
        try:
            sock.settimeout(_left(end))
            sock.sendall(line)
            while not answer.endswith(b"\n"):
                sock.settimeout(_left(end))
                part = sock.recv(65536)
                if not part:
                    return None
                answer += part
        except ConnectionError:
            return None
    return answer


def _connect(sock: socket.socket, path: Path, *, end: float) -> None:
    with short_address(path) as address:
        while True:
            sock.settimeout(_left(end))
            try:
                sock.connect(address)
            except BlockingIOError:  # its queue of clients is full, and a Unix socket does not wait until there is room
                time.sleep(min(0.01, _left(end)))
                continue
            return


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
