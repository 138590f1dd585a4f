"""Pace the calls of an embedder, and hold them all back while the service as a whole does not answer.

This is a circuit breaker with two states in ``down``: None (closed) and the reason (open). While it is open one probe
call at a time asks whether the service is back. No other call is made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import trio
from loguru import logger
from numpy.typing import NDArray
from trio_util import AsyncValue

from everos_engine.embed.protocol import PROBE_SENTENCE, Embedder, check, quoted, similar
from everos_engine.errors import (
    BadText,
    Exhausted,
    Fatal,
    SettingsError,
    Transient,
    Unavailable,
    exhausted,
    split_end,
)
from everos_engine.settings import EmbedderSettings

WAITING = "waiting for the embedder"
"""The message of every change that waits for the service starts with this."""
RECHECK_SECONDS = 600.0
"""A service that is called gets the probe sentence this often too, because its model may be changed without a pause."""


class CircuitBreaker:
    """An embedder behind a rate limit and a circuit breaker.

    ``down`` is why the service is down, or None. ``since`` is when that began (trio's clock). ``epoch`` counts the
    models that have answered. It moves when the probe sentence gets another vector, which may be ``unsure_seconds``
    late. ``answers`` counts the calls answered.
    """

    def __init__(self, embedder: Embedder, settings: EmbedderSettings) -> None:
        self.embedder = embedder
        self.down: AsyncValue[str | None] = AsyncValue(None)
        self.since = 0.0
        self.epoch = 0
        self.answers = 0
        self._settings = settings
        self.probe_vector: NDArray[np.float32] | None = None
        self._probing = trio.Lock()
        self._due = 0.0
        self._failures = 0
        self._cause: BaseException | None = None
        self._next_call = 0.0
        self._confirmed = 0.0
        self.unsure_seconds = 0.0

    async def acquire(self) -> None:
        """Return when a call may begin, at most ``calls_per_second``. Raises Unavailable while the service is down."""
        self.raise_if_down()
        if rate := self._settings.calls_per_second:
            at = max(trio.current_time(), self._next_call)
            self._next_call = at + 1 / rate
            await trio.sleep_until(at)
        else:
            await trio.lowlevel.checkpoint()
        if self.embedder.hedged and self.epoch and self._is_old:
            async with self._probing:
                if self.down.value is None and self._is_old:
                    await self._probe()
        self.raise_if_down()

    def raise_if_down(self, *, longer_than_seconds: float = 0.0) -> None:
        """Raise Unavailable, with the time until the next probe, if the service is down and has been for that long."""
        now = trio.current_time()
        if self.down.value is not None and now - self.since >= longer_than_seconds:
            raise Unavailable(
                f"{WAITING}: {self.down.value}", retry_after_seconds=max(0.0, self._due - now)
            ) from self._cause

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Make one call. Returns shape (n, dimension), finite, of this model's width. Call ``acquire`` before.

        Raises BadText, Transient and Unavailable. Unavailable opens the circuit for all calls.
        """
        width = 0 if self.probe_vector is None else self.probe_vector.shape[0]
        try:
            found = await self._call(texts, dimension=width)
        except Unavailable as error:
            self._open(error)
            self.raise_if_down()
            raise
        self.answers += 1
        self._failures = 0
        return found

    async def blame(self, error: Transient | BadText, *, answers: int) -> Transient | BadText:
        """Return who is to blame for a failed call: ``error`` if the texts are, Unavailable if the service is down.

        ``answers`` is the count when the call began. A service that has answered other calls since is well. Otherwise a
        probe decides.
        """
        if isinstance(error, (Unavailable, Exhausted)):
            return error
        async with self._probing:
            if self.down.value is None and self.answers == answers:
                await self._probe()
            try:
                self.raise_if_down()
            except Unavailable as down:
                return down
            return error

    async def identify(self) -> NDArray[np.float32]:
        """Return the vector of the probe sentence from the model of this ``epoch``.

        Raises Unavailable while none has answered.
        """
        await trio.lowlevel.checkpoint()
        while self.probe_vector is None:
            async with self._probing:
                if self.probe_vector is None and self.down.value is None:
                    await self._probe()
            if self.probe_vector is None:
                self.raise_if_down()
        return self.probe_vector

    async def serve(self) -> None:
        """While the service is down, probe it less and less often, until cancelled."""
        while True:
            await self.down.wait_value(lambda reason: reason is not None)
            await trio.sleep_until(self._due)
            async with self._probing:
                if trio.current_time() >= self._due:
                    await self._probe()

    @property
    def _is_old(self) -> bool:
        return trio.current_time() - self._confirmed >= RECHECK_SECONDS

    async def _call(self, texts: Sequence[str], *, dimension: int) -> NDArray[np.float32]:
        """Make one call under the deadline, except for an embedder that works in threads and cannot be left.

        This is the door to embedders. Answers are checked, and any error becomes a Transient, a BadText or a Fatal.
        """
        seconds = self._settings.deadline_seconds if self.embedder.hedged else float("inf")
        deadline = trio.current_time() + seconds
        try:
            with trio.fail_at(deadline):
                return check(await self.embedder.embed(texts), count=len(texts), dimension=dimension)
        except (Transient, BadText, Fatal, SettingsError):
            raise
        except BaseException as error:
            end, rest = split_end(error)
            if rest is None:
                raise
            if end is not None:
                raise end from None
            if isinstance(error, trio.TooSlowError) and trio.current_time() >= deadline:
                raise Transient(f"the embedder did not answer within {seconds:g} s") from None
            raise translated(rest) from rest

    async def _probe(self) -> None:
        """Make one call with the probe sentence.

        It opens or closes the circuit, and finds whether another model answers.
        """
        try:
            found = (await self._call([PROBE_SENTENCE], dimension=self.embedder.dimension))[0]
        except BadText as error:
            self._open(Transient(f"it refuses even a plain sentence: {error}"))
            return
        except Transient as error:
            self._open(error)
            return
        now = trio.current_time()
        if self.probe_vector is None or not similar(self.probe_vector, found):
            self.epoch += 1
            self.unsure_seconds = now - self._confirmed
            self.probe_vector = found
        self._confirmed = now
        self.answers += 1
        if self.down.value is not None:
            logger.info("embedder_back after_seconds={:.1f}", now - self.since)
            self.down.value = None

    def _open(self, error: Transient) -> None:
        asked = error.retry_after_seconds
        now = trio.current_time()
        if self.down.value is None or now >= self._due:
            settings = self._settings
            delay = min(
                settings.outage_probe_seconds * 2.0 ** min(self._failures, 30), settings.outage_probe_max_seconds
            )
            self._failures += 1
            self._due = now + delay * (1 + random.random() / 4)  # noqa: S311 - spreads probes
        if asked is not None:
            self._due = max(self._due, now + asked)
        self._cause = error.__cause__
        if self.down.value is None:
            self.since = now
            logger.warning("embedder_down error={!r}", str(error))
            logger.opt(exception=self._cause).debug("embedder_down_cause")
        self.down.value = str(error)


def translated(error: BaseException) -> Transient:
    """Translate an error that an embedder raised into one of our families.

    It counts as an attempt. The circuit breaker asks whether the embedder answers at all, and if it does not, no text
    is to blame.
    """
    if exhausted(error):
        return Exhausted(f"the embedder found no file descriptor: {quoted(error)}")
    return Transient(f"the embedder raised {quoted(error)}")
