"""Call an asyncio library from Trio, through one asyncio loop on one thread."""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar, TypeVarTuple, cast

import trio

from everos_engine.errors import EngineError, Transient, UnknownOutcome

CANCEL_GRACE_SECONDS = 5.0
"""How long to wait for the end of a cancelled call."""
STOP_GRACE_SECONDS = 10.0
"""How long the thread may take to end after the last caller."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def run_once(work: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run a coroutine on a new asyncio loop, for a command that has no other.

    Raises OSError if no descriptors are left for a loop. This is checked first, because a loop that is only partly made
    prints warnings at its end.
    """
    one, other = socket.socketpair()
    with one, other, selectors.DefaultSelector():
        pass
    return asyncio.run(work())


class AsyncioThreadDied(EngineError):
    """The asyncio loop ended while it was needed. What was opened on it is lost and must be opened again."""


@asynccontextmanager
async def open_asyncio_thread() -> AsyncIterator[AsyncioThread]:
    """Run an asyncio loop for the length of the block, and end it after the last caller.

    If the loop dies, every call raises AsyncioThreadDied, the block is cancelled and raises it too.
    """
    bridge = AsyncioThread(trio.lowlevel.current_trio_token())
    with trio.CancelScope() as scope:
        await bridge.start(on_death=scope.cancel)
        try:
            yield bridge
        finally:
            with trio.CancelScope(shield=True):
                await bridge.stop()
    bridge.raise_if_dead()


class AsyncioThread:
    """Call coroutine functions on the asyncio loop, from tasks of the Trio run that opened it."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self._thread = threading.Thread(target=self._serve, name="everos-asyncio", daemon=True)
        # Used by the Trio thread only:
        self._waited_for: set[_Call[object]] = set()
        self._started = trio.Event()
        self._ended = trio.Event()
        self._quiet = trio.Event()
        self._stopping = False
        self._death: BaseException | None = None
        self._on_death: Callable[[], object] = lambda: None
        # Used by the asyncio thread only, and set before `_started`:
        self._loop: asyncio.AbstractEventLoop
        self._stop_asked: asyncio.Event
        self._serving = False
        self._running: set[_Call[object]] = set()

    async def read(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, deadline_seconds: float) -> T:
        """Return the result of ``await function(*args)`` on the asyncio loop.

        Cancelling the caller cancels it there. Raises what the function raises, and Transient if it is not done within
        ``deadline_seconds``.
        """
        call = _Call(lambda: function(*args))
        await self._finish(call, deadline_seconds=deadline_seconds, shield=False)
        if call.outcome is None or call.outcome.is_cancelled:
            raise Transient(f"a read of the index was given up after {deadline_seconds:g} s: it is tried again") from (
                call.outcome.error if call.outcome else None
            )
        return call.outcome.unwrap()

    async def write(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, deadline_seconds: float) -> T:
        """Do as `read`, but shielded: a cancelled caller waits for the end, and gets the result.

        A caller cancelled before the call starts nothing. Raises UnknownOutcome if the function is not done
        within ``deadline_seconds``. It is then cancelled, and its end is waited for, at most CANCEL_GRACE_SECONDS.
        """
        call = _Call(lambda: function(*args))
        in_time = await self._finish(call, deadline_seconds=deadline_seconds, shield=True)
        outcome = call.outcome
        if outcome is None or outcome.is_cancelled or (not in_time and outcome.error is not None):
            raise UnknownOutcome(
                f"a write to the index was cut off after {deadline_seconds:g} s and may have happened or not: "
                "it is done again; if this repeats, raise lancedb.write_deadline_seconds"
            ) from (outcome.error if outcome else None)
        return outcome.unwrap()

    @property
    def calls(self) -> int:
        """Return how many callers wait at this moment."""
        return len(self._waited_for)

    async def start(self, *, on_death: Callable[[], object]) -> None:
        """Start the thread. ``on_death`` is called in the Trio thread if the loop dies."""
        self._on_death = on_death
        self._thread.start()
        with trio.CancelScope(shield=True):
            await self._started.wait()

    @trio.lowlevel.enable_ki_protection
    async def stop(self) -> None:
        """Refuse new calls, wait for the last caller, end the loop and its thread."""
        self._stopping = True
        if self._waited_for:
            await self._quiet.wait()
        with suppress(RuntimeError):  # the loop died and is closed
            self._loop.call_soon_threadsafe(self._stop_asked.set)
        with trio.move_on_after(STOP_GRACE_SECONDS):
            await self._ended.wait()
        if not self._ended.is_set():
            raise AsyncioThreadDied(
                f"the asyncio thread did not end within {STOP_GRACE_SECONDS:g} s: a call on it cannot be cancelled"
            )
        self._thread.join()  # the thread ends right after it has set `_ended`

    def raise_if_dead(self) -> None:
        """Raise AsyncioThreadDied if the loop ended by itself."""
        if self._death is not None:
            raise AsyncioThreadDied(f"the asyncio loop under the index died: {self._death!r}") from self._death

    # Trio side

    @trio.lowlevel.enable_ki_protection
    async def _finish(self, call: _Call[T], *, deadline_seconds: float, shield: bool) -> bool:
        """Run the call to its end.

        Returns whether it ended without being cancelled.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        self._submit(call)
        try:
            with trio.CancelScope(deadline=trio.current_time() + deadline_seconds, shield=shield):
                await call.ended.wait()
            return call.ended.is_set()
        finally:
            try:
                if not call.ended.is_set():
                    await self._cut_off(call)
            finally:
                self._waited_for.discard(cast("_Call[object]", call))
                if self._stopping and not self._waited_for:
                    self._quiet.set()

    def _submit(self, call: _Call[T]) -> None:
        self.raise_if_dead()
        if self._stopping:
            raise RuntimeError("the asyncio thread was called after its block had ended")
        self._waited_for.add(cast("_Call[object]", call))
        with suppress(RuntimeError):  # the loop is closed, and `_fail_all` will end the call
            self._loop.call_soon_threadsafe(self._begin, cast("_Call[object]", call))

    async def _cut_off(self, call: _Call[T]) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call.cancel)
        with trio.CancelScope(deadline=trio.current_time() + CANCEL_GRACE_SECONDS, shield=True):
            await call.ended.wait()

    def _fail_all(self, death: BaseException) -> None:
        self._death = death
        for call in list(self._waited_for):
            call.end(call.result_of_task() or _Outcome(error=self._death_error(death)))
        self._on_death()

    @staticmethod
    def _death_error(death: BaseException) -> AsyncioThreadDied:
        error = AsyncioThreadDied(f"the asyncio loop under the index died during a call: {death!r}")
        error.__cause__ = death
        return error

    # asyncio side

    def _serve(self) -> None:
        try:
            with asyncio.Runner() as runner:
                try:
                    runner.run(self._until_stopped())
                except BaseException as death:  # noqa: BLE001 - the waiters must get any error
                    self._serving = False
                    self._post(self._fail_all, death)
        except BaseException as death:  # noqa: BLE001 - no loop could be made, or it could not be closed
            self._post(self._fail_all, death)
        finally:
            self._post(self._started.set)
            self._post(self._ended.set)

    async def _until_stopped(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop_asked = asyncio.Event()
        self._serving = True
        self._post(self._started.set)
        await self._stop_asked.wait()
        self._serving = False

    def _begin(self, call: _Call[object]) -> None:
        if not self._serving:
            return
        call.task = self._loop.create_task(call.run(), context=call.context)
        self._running.add(call)  # asyncio keeps only weak references to tasks
        call.task.add_done_callback(lambda _: self._hand_back(call))

    def _hand_back(self, call: _Call[object]) -> None:
        # This is a done-callback, since a coroutine that is cancelled before its first step never runs.
        self._running.discard(call)
        outcome = call.result_of_task()
        if outcome is not None:
            self._post(call.end, outcome)

    def _post(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        with suppress(trio.RunFinishedError):  # no caller is left
            self._token.run_sync_soon(function, *args)


class _Outcome(Generic[T]):
    """Hold how a call ended: with a value, or with an error."""

    __slots__ = ("error", "value")

    def __init__(self, value: T | None = None, *, error: BaseException | None = None) -> None:
        self.value = value
        self.error = error

    @property
    def is_cancelled(self) -> bool:
        return isinstance(self.error, asyncio.CancelledError)

    def unwrap(self) -> T:
        if self.error is None:
            return cast("T", self.value)
        try:
            raise self.error
        finally:
            self.error = None  # its traceback refers to this frame, which would be a cycle


class _Call(Generic[T]):
    """Hold one call. The Trio thread makes and ends it, and the asyncio thread runs it."""

    __slots__ = ("context", "ended", "function", "outcome", "task")

    def __init__(self, function: Callable[[], Awaitable[T]]) -> None:
        self.function = function
        self.context = contextvars.copy_context()
        self.task: asyncio.Task[_Outcome[T]] | None = None
        self.ended = trio.Event()
        self.outcome: _Outcome[T] | None = None

    async def run(self) -> _Outcome[T]:
        """Return the result or the error as a value.

        So a SystemExit reaches the caller and does not end the loop.
        """
        try:
            return _Outcome(await self.function())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's task
            return _Outcome(error=error)

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def result_of_task(self) -> _Outcome[T] | None:
        """Return how the task ended, or None if it has not."""
        if self.task is None or not self.task.done():
            return None
        if self.task.cancelled():
            return _Outcome(error=asyncio.CancelledError())
        return self.task.result()

    def end(self, outcome: _Outcome[T]) -> None:
        """Wake the caller. The first outcome counts."""
        if not self.ended.is_set():
            self.outcome = outcome
            self.ended.set()
