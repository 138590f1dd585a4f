"""Gather texts of many files into few calls, and keep a bad or slow text from harming the others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from everos_engine.errors import BadText, Exhausted, Transient, Unavailable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from everos_engine.embed.circuit_breaker import CircuitBreaker
    from everos_engine.settings import EmbedderSettings

    Outcome = NDArray[np.float32] | Transient | BadText
    Keep = Callable[[int, Mapping[str, NDArray[np.float32]]], Awaitable[None]]

PARTS = 8
"""A call that was refused or slow is asked again in this many parts. One bad text of 64 is alone after two rounds."""
SHARE = 8
"""Texts taken from one file before the next file gets its share. A file of thousands then does not delay a line
edited elsewhere."""
MAX_SUSPECTS = 4096
MAX_SUSPECTS_WAITING = 64


class _Wanted:
    """One text that a task waits for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.done = trio.Event()
        self.outcome: Outcome | None = None

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.done.set()


class Batcher:
    """Gather texts while calls are busy. A free call takes as many as fit, a few of each file.

    There are three lanes, so that trouble never waits in front of good texts: first calls, parts of calls that were
    refused or slow, and single texts that were so before (suspects). Suspects are asked alone and have the whole
    deadline.
    """

    def __init__(self, breaker: CircuitBreaker, settings: EmbedderSettings, nursery: trio.Nursery, keep: Keep) -> None:
        many = breaker.embedder.concurrency
        self._breaker = breaker
        self._keep = keep
        self._nursery = nursery
        self._batch_size = breaker.embedder.batch_size
        self._first_lane = trio.Semaphore(many)
        self._part_lane = trio.Semaphore(max(1, many // 2))
        self._suspect_lane = trio.Semaphore(max(1, many // 4))
        self._patience_seconds = settings.hedge_seconds if breaker.embedder.hedged else float("inf")
        self._least_patience_seconds = self._patience_seconds
        self._deadline_seconds = settings.deadline_seconds
        self._is_paced = settings.calls_per_second > 0
        self._requests: deque[deque[_Wanted]] = deque()
        self._by_text: dict[str, _Wanted] = {}
        self._suspects: OrderedDict[int, None] = OrderedDict()
        self._arrived = trio.Event()

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | Transient | BadText]:
        """Return one outcome for each text, in the same order: shape (dimension,), or why there is none.

        A text in flight is not asked twice.
        """
        try:
            self._breaker.raise_if_down()
            await self._breaker.identify()
        except Unavailable as error:
            return [error for _ in texts]
        wanted = self._want(texts)
        found = []
        for text in texts:
            one = wanted[text]
            await one.done.wait()
            if one.outcome is None:
                raise AssertionError
            found.append(one.outcome)
        return found

    async def serve(self) -> None:
        """Send calls until cancelled."""
        while True:
            await self._arrived.wait()
            await self._first_lane.acquire()
            await trio.lowlevel.checkpoint()  # texts that were woken together get into the same call
            batch = self._take()
            if not self._requests:
                self._arrived = trio.Event()
            if batch:
                self._nursery.start_soon(self._first, batch)
            else:
                self._first_lane.release()

    def _want(self, texts: Sequence[str]) -> dict[str, _Wanted]:
        wanted: dict[str, _Wanted] = {}
        new: deque[_Wanted] = deque()
        for text in texts:
            if text not in self._by_text:
                one = self._by_text[text] = _Wanted(text)
                if hash(text) in self._suspects:
                    self._nursery.start_soon(self._alone, one)
                else:
                    new.append(one)
            wanted[text] = self._by_text[text]
        if new:
            self._requests.append(new)
            self._arrived.set()
        return wanted

    def _take(self) -> list[_Wanted]:
        """Return the texts of the next call, a few of each request.

        If there are spare calls, take the texts of one request alone.

        Few requests and free calls mean that a person is editing. Then no edit shares a call, or its trouble, with
        another.
        """
        batch: list[_Wanted] = []
        alone = not self._is_paced and len(self._requests) <= 1 + self._first_lane.value // 2
        while self._requests and len(batch) < self._batch_size and not (alone and batch):
            request = self._requests.popleft()
            share = min(len(request) if alone else SHARE, len(request), self._batch_size - len(batch))
            batch += [request.popleft() for _ in range(share)]
            if request:
                self._requests.append(request)
        return batch

    async def _first(self, batch: list[_Wanted]) -> None:
        patience_seconds = self._patience_seconds
        try:
            left = await self._ask(batch, patience_seconds)
        finally:
            self._first_lane.release()
        if not left:
            self._patience_seconds = max(self._least_patience_seconds, 0.98 * self._patience_seconds)
            return
        await self._again(left)
        if not any(isinstance(one.outcome, Exception) for one in batch):  # the service is slower than we thought
            self._patience_seconds = max(self._patience_seconds, min(2 * patience_seconds, self._deadline_seconds))

    async def _again(self, parts: list[list[_Wanted]]) -> None:
        async with trio.open_nursery() as nursery:
            for part in parts:
                if len(part) == 1 and hash(part[0].text) in self._suspects:
                    nursery.start_soon(self._alone, part[0])
                else:
                    nursery.start_soon(self._part, part)

    async def _part(self, part: list[_Wanted]) -> None:
        async with self._part_lane:
            left = await self._ask(part, self._patience_seconds)
        await self._again(left)

    async def _alone(self, one: _Wanted) -> None:
        if self._suspect_lane.statistics().tasks_waiting >= MAX_SUSPECTS_WAITING:
            message = "too many texts hang or are refused now. This one is tried later"
            self._end(one, Transient(message, retry_after_seconds=self._deadline_seconds, counts_as_retry=False))
            return
        async with self._suspect_lane:
            await self._ask([one], float("inf"))

    async def _ask(self, batch: list[_Wanted], patience_seconds: float) -> list[list[_Wanted]]:
        """Make one call. What it leaves to be asked again is split into parts."""
        answers = self._breaker.answers
        try:
            await self._breaker.acquire()
            epoch = self._breaker.epoch
            with trio.move_on_after(patience_seconds) as scope:
                vectors = await self._breaker.embed([one.text for one in batch])
        except (Transient, BadText) as error:
            blamed = await self._breaker.blame(error, answers=answers)
            if not isinstance(blamed, (Unavailable, Exhausted)):
                if len(batch) > 1:
                    return _split(batch)
                self._suspect(batch[0])
            for one in batch:
                self._end(one, blamed)
            return []
        if scope.cancelled_caught:
            if len(batch) == 1:
                self._suspect(batch[0])
            return _split(batch)
        await self._deliver(batch, vectors, epoch)
        return []

    async def _deliver(self, batch: list[_Wanted], vectors: NDArray[np.float32], epoch: int) -> None:
        """Keep the vectors before any caller sees them, so that a crash repeats few calls."""
        try:
            await self._keep(epoch, dict(zip((one.text for one in batch), vectors, strict=True)))
        except Transient as error:
            for one in batch:
                self._end(one, error)
            return
        for one, vector in zip(batch, vectors, strict=True):
            self._suspects.pop(hash(one.text), None)
            self._end(one, vector)

    def _suspect(self, wanted: _Wanted) -> None:
        self._suspects[hash(wanted.text)] = None
        if len(self._suspects) > MAX_SUSPECTS:
            self._suspects.popitem(last=False)

    def _end(self, wanted: _Wanted, outcome: Outcome) -> None:
        self._by_text.pop(wanted.text, None)
        wanted.end(outcome)


@asynccontextmanager
async def open_batcher(breaker: CircuitBreaker, settings: EmbedderSettings, keep: Keep) -> AsyncIterator[Batcher]:
    """Yield a batcher for the length of the block. Calls that are in flight at its end are cancelled.

    ``keep`` is called with the ``epoch`` of the model and the vectors by text, before any caller gets them.
    """
    async with trio.open_nursery() as nursery:
        batcher = Batcher(breaker, settings, nursery, keep)
        nursery.start_soon(batcher.serve)
        nursery.start_soon(breaker.serve)
        yield batcher
        nursery.cancel_scope.cancel()


def _split(batch: list[_Wanted]) -> list[list[_Wanted]]:
    size = -(-len(batch) // PARTS)
    return [batch[start : start + size] for start in range(0, len(batch), size)]
