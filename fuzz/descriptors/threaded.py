"""Trio, with the engine's bridge to LanceDB, in a thread: for callers that are not async, such as a state machine."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import trio

from everos_engine.system.asyncio_thread import AsyncioThread, open_asyncio_thread

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Threaded:
    """Runs from its making until ``close``."""

    bridge: AsyncioThread

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), name="threaded-trio", daemon=True)
        self._thread.start()
        self._ready.wait()

    async def _serve(self) -> None:
        async with open_asyncio_thread() as self.bridge:
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            self._ready.set()
            await self._stop.wait()

    def call(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """What ``await function(*args)`` gives in the Trio thread."""
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def close(self) -> None:
        """End the run and its thread."""
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join()
