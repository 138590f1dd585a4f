"""A wake-up between processes: an empty datagram on a socket in the index folder."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from pathlib import Path

MOST_PATH_BYTES = 100
"""``sun_path`` holds 108 bytes on Linux and 104 on macOS."""


class Wake:
    """Wake-ups as they come; ``available`` is False where the file system takes no sockets, then none ever come."""

    def __init__(self, sock: trio.socket.SocketType | None) -> None:
        self._sock = sock
        self.available = sock is not None

    async def messages(self) -> AsyncIterator[None]:
        """One item per wake-up."""
        if self._sock is None:
            await trio.sleep_forever()
            return
        while True:
            await self._sock.recv(64)
            yield


@asynccontextmanager
async def open_wake(path: Path) -> AsyncIterator[Wake]:
    """Listen at ``path``; a stale socket there is replaced."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound = False
    with sock:
        with suppress(OSError), _short(path) as address:
            with suppress(FileNotFoundError):
                path.unlink()
            await sock.bind(address)
            bound = True
        try:
            yield Wake(sock if bound else None)
        finally:
            if bound:
                with suppress(OSError):
                    path.unlink()


def send(path: Path) -> bool:
    """Wake whoever listens at ``path``; False if nobody does. Never blocks, never raises for the socket's state."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            with _short(path) as address:
                sock.sendto(b"w", address)
        except BlockingIOError:
            return True  # its queue is full of wake-ups
        except OSError:
            return False
    return True


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """An address for ``path`` that fits; long ones go through a descriptor of their directory on Linux."""
    full = os.fspath(path)
    if len(os.fsencode(full)) <= MOST_PATH_BYTES:
        yield full
        return
    handle = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}/{path.name}"
    finally:
        os.close(handle)
