"""Gathers texts of many files into few calls, and keeps one bad or slow text from harming the others."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from everos_engine.errors import BadText, EngineError, Exhausted, Transient, exhausted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from everos_engine.embed.protocol import Embedder
    from everos_engine.settings import EmbedderSettings

    Outcome = NDArray[np.float32] | EngineError


class _Wanted:
    """One text somebody waits for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.done = trio.Event()
        self.outcome: Outcome | None = None

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.done.set()


class Batcher:
    """While all calls are busy, texts gather; a free call takes as many as fit."""

    def __init__(self, embedder: Embedder, settings: EmbedderSettings, nursery: trio.Nursery) -> None:
        self._embedder = embedder
        self._settings = settings
        self._nursery = nursery
        self._slots = trio.Semaphore(embedder.concurrency)
        self._slow_slots = trio.Semaphore(embedder.concurrency)
        self._waiting: deque[_Wanted] = deque()
        self._by_text: dict[str, _Wanted] = {}
        self._arrived = trio.Event()

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | EngineError]:
        """One outcome per text, in order: shape (dimension,), or why there is none. A text in flight is not asked twice."""
        wanted = [self._want(text) for text in texts]
        found = []
        for one in wanted:
            await one.done.wait()
            if one.outcome is None:
                raise AssertionError
            found.append(one.outcome)
        return found

    async def serve(self) -> None:
        """Send calls until cancelled."""
        while True:
            await self._arrived.wait()
            await self._slots.acquire()
            await trio.lowlevel.checkpoint()  # whoever was woken together gets into the same call
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._embedder.batch_size))]
            if not self._waiting:
                self._arrived = trio.Event()
            if batch:
                self._nursery.start_soon(self._first, batch)
            else:
                self._slots.release()

    def _want(self, text: str) -> _Wanted:
        if text in self._by_text:
            return self._by_text[text]
        wanted = self._by_text[text] = _Wanted(text)
        self._waiting.append(wanted)
        self._arrived.set()
        return wanted

    async def _first(self, batch: list[_Wanted]) -> None:
        try:
            left = await self._call(batch, self._patience())
        finally:
            self._slots.release()
        async with trio.open_nursery() as nursery:
            for part in left:
                nursery.start_soon(self._again, part)

    async def _again(self, batch: list[_Wanted]) -> None:
        """A part of a call that was refused or slow, away from the slots that serve everyone else."""
        async with self._slow_slots:
            left = await self._call(batch, self._patience() if len(batch) > 1 else self._settings.deadline_seconds)
        async with trio.open_nursery() as nursery:
            for part in left:
                nursery.start_soon(self._again, part)

    def _patience(self) -> float:
        return self._settings.hedge_seconds if self._embedder.hedged else float("inf")

    async def _call(self, batch: list[_Wanted], patience_seconds: float) -> list[list[_Wanted]]:
        """One call; what it leaves to be asked again, in parts."""
        halves = [half for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]) if half]
        try:
            with trio.move_on_after(patience_seconds) as scope:
                vectors = await self._embedder.embed([one.text for one in batch])
                for one, vector in zip(batch, vectors, strict=True):
                    self._end(one, vector)
                return []
            if scope.cancelled_caught and patience_seconds >= self._settings.deadline_seconds:
                message = f"the embedder did not answer within {patience_seconds:g} s"
                raise Transient(message)
        except BadText as error:
            if len(batch) > 1:
                return halves
            self._end(batch[0], error)
            return []
        except EngineError as error:
            for one in batch:
                self._end(one, error)
            return []
        except (OSError, ImportError) as error:  # a model that loads when first used
            if not exhausted(error):
                raise
            for one in batch:
                self._end(one, Exhausted(f"the embedder found no file descriptor: {error}"))
            return []
        return halves

    def _end(self, wanted: _Wanted, outcome: Outcome) -> None:
        self._by_text.pop(wanted.text, None)
        wanted.end(outcome)


@asynccontextmanager
async def open_batcher(embedder: Embedder, settings: EmbedderSettings) -> AsyncIterator[Batcher]:
    """A batcher for the length of the block; calls in flight at its end are cancelled."""
    async with trio.open_nursery() as nursery:
        batcher = Batcher(embedder, settings, nursery)
        nursery.start_soon(batcher.serve)
        yield batcher
        nursery.cancel_scope.cancel()
