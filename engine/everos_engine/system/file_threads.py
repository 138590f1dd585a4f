"""Make calls of the file system that may never return, each with a deadline.

A server may hang, and a file may be only in the cloud. Many calls share a thread. A slow call keeps its thread, and the
calls after it continue in a new one. A thread that hangs cannot be ended. It is abandoned, the number of abandoned
threads is bounded, and the end of the process does not wait for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Generic, TypeVar, cast

import trio
from trio_util import AsyncValue

from everos_engine.errors import Transient
from everos_engine.system import descriptors

T = TypeVar("T")
R = TypeVar("R")
SLOW_SECONDS = 0.5
"""After this time the next calls no longer wait for a slow one."""
MAX_LATE = 64
"""The most threads that may be abandoned. At this number, no other call starts until one returns."""
MIN_LATE, LATE_SHARE = 4, 16
"""Each abandoned thread may hold a descriptor. They may hold a sixteenth of all descriptors, and at least four."""


class NoAnswer(Transient):
    """A file or directory did not answer within the deadline.

    It is tried again later, and no attempt is counted.
    """

    waits_for = "file"

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, counts_as_retry=False)


@dataclass(eq=False, slots=True)
class Call(Generic[T, R]):
    """One call for an item. It is running or over."""

    item: T
    name: str
    deadline_seconds: float
    began_seconds: float = field(default_factory=time.monotonic)
    over: trio.Event = field(default_factory=trio.Event)
    is_over: bool = False
    result: R | None = None
    error: BaseException | None = None
    begin: Callable[[], Awaitable[R]] | None = None
    """Make the call later, if an earlier call for the same name is still running."""

    def get(self) -> R:
        """Return the result of a call that is over, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return cast("R", self.result)

    async def wait(self) -> R:
        """Wait for the result. Raises NoAnswer at the deadline, and what the call raised."""
        if self.begin is not None:
            return await self.begin()
        if not self.is_over:
            await self.until_over()
        return self.get()

    async def until_over(self) -> None:
        """Wait until a running call is over, with any result. Raises NoAnswer at the deadline."""
        with trio.move_on_after(max(0.0, self.began_seconds + self.deadline_seconds - time.monotonic())):
            await self.over.wait()  # not is_over, which a thread sets a moment before the call is forgotten
        if not self.is_over:
            raise no_answer(self.name, self.deadline_seconds)

    @property
    def is_overdue(self) -> bool:
        """Return whether the deadline of a running call has passed."""
        return time.monotonic() >= self.began_seconds + self.deadline_seconds


@dataclass(frozen=True, slots=True)
class Calls(Generic[T, R]):
    """Hold the calls that are over, the calls still running, and the items that were not started."""

    over: Sequence[Call[T, R]]
    late: Sequence[Call[T, R]]
    rest: Sequence[T]


class FileThreads:
    """Make calls of the file system in threads, and remember the ones that did not return."""

    slow_seconds: ClassVar[float] = SLOW_SECONDS

    def __init__(self, *, deadline_seconds: float, max_late: int = MAX_LATE) -> None:
        self.deadline_seconds = deadline_seconds
        self.max_late = max_late
        self.waited_seconds = 0.0
        """How long all callers together only waited for late calls."""
        self.returned = AsyncValue(0)
        """Changes when a late call has returned."""
        self._late: dict[tuple[str, str], Call[object, object]] = {}

    def hung(self) -> list[tuple[str, float]]:
        """Return what did not answer within its deadline, and for how many seconds, the longest first."""
        now = time.monotonic()
        ages: dict[str, float] = {}
        for call in self._late.values():
            age = now - call.began_seconds
            if age > call.deadline_seconds:
                ages[call.name] = max(age, ages.get(call.name, 0.0))
        return sorted(ages.items(), key=lambda found: -found[1])

    async def call(self, work: Callable[[], R], *, what: str, name: str) -> R:
        """Make one call, and wait for it up to the deadline. Raises NoAnswer, and what the call raises."""
        ((_, found),) = await self.all([name], lambda _: work(), what=what, name=str)
        if isinstance(found, BaseException):
            raise found
        return found

    async def all(
        self, items: Sequence[T], work: Callable[[T], R], *, what: str, name: Callable[[T], str]
    ) -> list[tuple[T, R | NoAnswer]]:
        """Make one call for each item, and wait for all of them up to the deadline. Raises what a call raises."""
        calls = await self.each(items, work, what=what, name=name)
        found: list[tuple[T, R | NoAnswer]] = []
        for call in calls.over:
            try:
                found.append((call.item, call.get()))
            except NoAnswer as error:
                found.append((call.item, error))
        for call in calls.late:
            try:
                result: R = await self.wait(call)
                found.append((call.item, result))
            except NoAnswer as error:
                found.append((call.item, error))
        return found

    async def wait(self, call: Call[T, R]) -> R:
        """Wait for a call as ``Call.wait`` does, and count the time."""
        began = time.monotonic()
        try:
            return await call.wait()
        finally:
            self.waited_seconds += time.monotonic() - began

    async def each(
        self,
        items: Sequence[T],
        work: Callable[[T], R],
        *,
        what: str,
        name: Callable[[T], str],
        enough: Callable[[R], bool] = lambda _: False,
    ) -> Calls[T, R]:
        """Make one call for each item, until all are over or late, or one gives ``enough``.

        ``what`` and the name identify a call. While an earlier call for them is running, no second one starts. The
        second counts as late. It starts when the earlier one returns, or ends with NoAnswer once the deadline of the
        earlier one has passed. ``work`` may run on in its thread after this returns, so it must change nothing.
        """
        refused: list[Call[T, R]] = []
        late: list[Call[T, R]] = []
        todo = deque[Call[T, R]]()
        for item in items:
            call: Call[T, R] = Call(item, name(item), self.deadline_seconds)
            earlier = self._late.get((what, call.name))
            if earlier is None:
                todo.append(call)
            elif earlier.is_overdue:
                self._refuse(call, no_answer(call.name, self.deadline_seconds))
                refused.append(call)
            else:
                call.begin = partial(self._begin_after, earlier, partial(work, item), what)
                late.append(call)
        batch = _Batch(todo, work, enough, lambda call: self._came_back(what, cast("Call[object, object]", call)))
        try:
            while batch.todo and not batch.ended.is_set():
                if not await self._room():
                    refused += self._refuse_all(batch.todo)
                    break
                batch.start()
                while not batch.ended.is_set():
                    with trio.move_on_after(self.slow_seconds):
                        await batch.ended.wait()
                        break
                    slow = batch.abandon(after_seconds=self.slow_seconds)
                    if slow is not None:
                        self._late[what, slow.name] = cast("Call[object, object]", slow)
                        late.append(slow)
                        break
        finally:
            left = batch.abandon(after_seconds=0)
            if left is not None:  # the caller was cancelled
                self._late[what, left.name] = cast("Call[object, object]", left)
        return Calls([*refused, *batch.over], late, [call.item for call in batch.todo])

    async def _begin_after(self, earlier: Call[object, object], work: Callable[[], R], what: str) -> R:
        """Make a call after an earlier one for the same name has returned.

        Raises NoAnswer if either does not return.
        """
        await earlier.until_over()
        return await self.call(work, what=what, name=earlier.name)

    def _refuse_all(self, todo: deque[Call[T, R]]) -> list[Call[T, R]]:
        refused = list(todo)
        todo.clear()
        names = ", ".join(repr(name) for name, _ in self.hung()[:3])
        for call in refused:
            message = (
                f"{call.name!r} was not read: {len(self._late)} files and directories do not answer, among them {names}"
            )
            self._refuse(call, NoAnswer(message, retry_after_seconds=self.deadline_seconds))
        return refused

    def _refuse(self, call: Call[T, R], error: NoAnswer) -> None:
        call.error = error
        call.is_over = True

    async def _room(self) -> bool:
        """Wait until another thread may start. Returns False if the deadline comes first."""
        with trio.move_on_after(self.deadline_seconds):
            while len(self._late) >= self.max_late:
                await self.returned.wait_transition()
        return len(self._late) < self.max_late

    def _came_back(self, what: str, call: Call[object, object]) -> None:
        if self._late.get((what, call.name)) is call:
            del self._late[what, call.name]
        self.returned.value += 1


class _Batch(Generic[T, R]):
    """Run calls one after the other on one thread, and on another thread after a late one."""

    def __init__(
        self,
        todo: deque[Call[T, R]],
        work: Callable[[T], R],
        enough: Callable[[R], bool],
        came_back: Callable[[Call[T, R]], None],
    ) -> None:
        self.todo = todo
        self.over: list[Call[T, R]] = []
        self.ended = trio.Event()
        self._work, self._enough, self._came_back = work, enough, came_back
        self._lock = threading.Lock()
        self._now: Call[T, R] | None = None
        self._thread_number = 0
        self._token = trio.lowlevel.current_trio_token()

    def start(self) -> None:
        """Continue in a new thread. Raises Transient if the system cannot start one."""
        number = self._thread_number
        try:
            trio.lowlevel.start_thread_soon(lambda: self._run(number), lambda _: None, name="files")
        except (RuntimeError, OSError) as error:
            raise Transient(f"no thread could be started to look at files: {error}", counts_as_retry=False) from error

    def abandon(self, *, after_seconds: float) -> Call[T, R] | None:
        """Return the running call if it has taken so long.

        It then keeps its thread, and no other call waits for it.
        """
        with self._lock:
            call = self._now
            if call is None or time.monotonic() - call.began_seconds < after_seconds:
                if after_seconds == 0:
                    self._thread_number += 1
                return None
            self._thread_number += 1
            self._now = None
            return call

    def _run(self, number: int) -> None:
        while True:
            with self._lock:
                if self._thread_number != number:
                    return
                if not self.todo:
                    self._say(self.ended.set)
                    return
                call = self._now = self.todo.popleft()
                call.began_seconds = time.monotonic()
            try:
                call.result = self._work(call.item)
            except BaseException as error:  # noqa: BLE001 - handed to the one who waits
                call.error = error
            with self._lock:
                call.is_over = True
                if self._thread_number == number:
                    self.over.append(call)
                    self._now = None
                    if call.error is None and self._enough(cast("R", call.result)):
                        self._say(self.ended.set)
                        return
                    continue
            self._say(self._return, call)
            return

    def _return(self, call: Call[T, R]) -> None:
        call.over.set()
        self._came_back(call)

    def _say(self, announce: Callable[..., object], *arguments: object) -> None:
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(announce, *arguments)


def open_threads(*, deadline_seconds: float) -> FileThreads:
    """Return the threads for the file calls of one process."""
    max_late = max(MIN_LATE, min(MAX_LATE, descriptors.limits()[0] // LATE_SHARE))
    return FileThreads(deadline_seconds=deadline_seconds, max_late=max_late)


def no_answer(name: str, seconds: float) -> NoAnswer:
    """Return the error of a call that has not returned."""
    message = f"{name!r} has not answered for {seconds:g} s: a network or cloud file system may hang"
    return NoAnswer(message, retry_after_seconds=seconds)


def call_within(work: Callable[[], R], *, name: str, seconds: float) -> R:
    """Make one call outside an event loop. Raises NoAnswer at the deadline, and what the call raises."""
    found: list[R] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again below
            raised.append(error)

    thread = threading.Thread(target=run, name="files", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not found:
        raise no_answer(name, seconds)
    return found[0]


def visit_within(stack: list[str], visit: Callable[[str], Sequence[str]], *, seconds: float) -> list[str]:
    """Visit what is on a stack and what the visits add to it, outside an event loop.

    Returns what did not answer. A visit that takes longer than ``seconds`` is abandoned, and the next one starts.
    """
    lost: list[str] = []
    while stack:
        batch = _Visits(stack, visit)
        batch.run_for(seconds)
        if batch.error is not None:
            raise batch.error
        if batch.now is None:
            break
        lost.append(batch.now[0])
    return lost


class _Visits:
    """Run visits one after the other on one thread, until one hangs."""

    def __init__(self, stack: list[str], visit: Callable[[str], Sequence[str]]) -> None:
        self.now: tuple[str, float] | None = None
        self.error: BaseException | None = None
        self._stack, self._visit = stack, visit
        self._lock = threading.Lock()
        self._is_abandoned = False

    def run_for(self, seconds: float) -> None:
        """Return when the stack is empty, or one visit has taken ``seconds``."""
        thread = threading.Thread(target=self._run, name="files", daemon=True)
        thread.start()
        while True:
            thread.join(seconds)
            with self._lock:
                if not thread.is_alive():
                    return
                if self.now is not None and time.monotonic() - self.now[1] >= seconds:
                    self._is_abandoned = True
                    return

    def _run(self) -> None:
        while True:
            with self._lock:
                self.now = None
                if not self._stack:
                    return
                item = self._stack.pop()
                self.now = item, time.monotonic()
            try:
                more = self._visit(item)
            except BaseException as error:  # noqa: BLE001 - raised again by who waits
                self.error, more = error, []
            with self._lock:
                if self._is_abandoned:
                    return
                self._stack.extend(more)
                if self.error is not None:
                    self.now = None
                    return
