"""A wake-up between processes: an empty datagram on a socket in the index folder."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio

from everos_engine.system.control import short_address


class Wake:
    """Receive wake-ups. None ever come if the file system does not support sockets."""

    def __init__(self, sock: trio.socket.SocketType | None) -> None:
        self._sock = sock

    async def messages(self) -> AsyncIterator[None]:
        """Yield one item for each wake-up."""
        if self._sock is None:
            await trio.sleep_forever()
            return
        while True:
            await self._sock.recv(64)
            yield


@asynccontextmanager
async def open_wake(path: Path) -> AsyncIterator[Wake]:
    """Listen at ``path``. A stale socket there is replaced."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound = False
    with sock:
        with suppress(OSError), short_address(path) as address:
            with suppress(FileNotFoundError):
                path.unlink()
            await sock.bind(address)
            os.chmod(path, 0o600)
            bound = True
        try:
            yield Wake(sock if bound else None)
        finally:
            if bound:
                with suppress(OSError):
                    path.unlink()


def send(path: Path) -> bool:
    """Wake the process that listens at ``path``.

    Returns False if there is none. Never blocks, and raises nothing about the socket.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            with short_address(path) as address:
                sock.sendto(b"w", address)
        except BlockingIOError:
            return True  # its queue is full of wake-ups
        except OSError:
            return False
    return True
