"""Keep the engine running: restart a loop that ends with an error, and open the stores again if that is not enough."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import trio
from loguru import logger
from trio_util import AsyncValue

from everos_engine.errors import (
    Damaged,
    EngineError,
    Fatal,
    KeepsDying,
    SettingsError,
    Transient,
    exhausted,
    split_end,
    unwrap,
)

FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
MAX_DEATHS = 5
WITHIN_SECONDS = 300.0
FIRST_REST_SECONDS = 1.0
MAX_REST_SECONDS = 300.0
ONE_SHOT_REOPENINGS = 3
"""A command that ends when its work is done opens damaged stores again only this often."""

State = Literal["closed", "searching", "serving", "ended"]


@dataclass(slots=True)
class Health:
    """Whether the stores are open and the loops run, and if not, why and for how long.

    ``state`` is "closed" while the stores are opened, "searching" while they are open and the loops wait, "serving"
    while the loops run, and "ended" after that. ``until`` is the time (monotonic seconds) of the next try.
    ``reopenings`` counts since the start. ``tried`` is set once the first opening succeeded or failed.
    """

    state: AsyncValue[State] = field(default_factory=lambda: AsyncValue("closed"))
    reason: str = ""
    until: float = 0.0
    reopenings: int = 0
    tried: trio.Event = field(default_factory=trio.Event)

    def as_data(self) -> dict[str, object]:
        """Return plain data for the control socket."""
        left = max(0.0, self.until - time.monotonic())
        return {
            "state": self.state.value,
            "reason": self.reason,
            "next_try_seconds": round(left, 1),
            "reopenings": self.reopenings,
        }


async def keep(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Run ``loop`` without end. Restart it after an error in 0.5 s, doubling to 30 s, with jitter.

    Raises KeepsDying after more than 5 deaths by a bug within 300 s. Raises Fatal, SettingsError and Damaged of the
    loop without a restart. Trouble outside our code (Transient, no descriptor left) is waited out, as often as it
    comes.
    """
    deaths: deque[float] = deque()
    delay = FIRST_DELAY_SECONDS
    while True:
        started = trio.current_time()
        error = await _death(name, loop)
        if error is None:
            return
        now = trio.current_time()
        if isinstance(error, (Fatal, SettingsError, Damaged)):
            raise error
        if now - started > WITHIN_SECONDS:
            delay = FIRST_DELAY_SECONDS
        starved = exhausted(error)
        if starved:
            delay = FIRST_DELAY_SECONDS
        if starved or isinstance(error, Transient):
            logger.warning("loop_restart loop={} in_seconds={:.1f} error={!r}", name, delay, str(error))
        else:
            logger.opt(exception=error).error("loop_died loop={} in_seconds={:.1f}", name, delay)
            deaths.append(now)
            while deaths and now - deaths[0] > WITHIN_SECONDS:
                deaths.popleft()
            if len(deaths) > MAX_DEATHS:
                raise KeepsDying(
                    f"the {name} loop died {len(deaths)} times within {WITHIN_SECONDS:g} s, last of {error!r}"
                ) from error
        await trio.sleep(delay * (1 + random.random() / 4))  # noqa: S311 - spreads restarts
        delay = min(delay * 2, MAX_DELAY_SECONDS)


async def keep_open(health: Health, serve: Callable[[float], Awaitable[None]], *, forever: bool) -> None:
    """Run ``serve`` without end. It opens the stores, waits so many seconds, and runs the loops.

    An error opens the stores again. The waits double from 1 s to 5 minutes, and begin at 1 s again after 300 s of
    service. The first wait after damage is 0. While the loops wait, the stores are open for searches. If the stores
    cannot be opened, the wait comes before the next try. Raises Fatal and SettingsError, and without ``forever`` every
    error but Damaged.
    """
    rest, before_loops, damages = 0.0, 0.0, 0
    while True:
        health.until = time.monotonic() + before_loops
        began = trio.current_time()
        error = await _death("stores", partial(serve, before_loops))
        if error is None:
            return
        was_open, health.state.value = health.state.value != "closed", "closed"
        damaged = isinstance(error, Damaged)
        damages += damaged
        if isinstance(error, (Fatal, SettingsError)) or not (forever or (damaged and damages <= ONE_SHOT_REOPENINGS)):
            raise error
        if trio.current_time() - began - before_loops > WITHIN_SECONDS:
            rest = 0.0
        wait = 0.0 if damaged and not rest else min(max(2 * rest, FIRST_REST_SECONDS), MAX_REST_SECONDS)
        rest = max(wait, FIRST_REST_SECONDS / 2)
        wait *= 1 + random.random() / 4  # noqa: S311 - spreads tries
        health.reason, health.reopenings = str(error) or repr(error), health.reopenings + 1
        health.tried.set()
        cause = None if isinstance(error, EngineError) else error
        logger.opt(exception=cause).error("stores_reopened in_seconds={:.1f} error={!r}", wait, health.reason)
        before_loops = wait if was_open else 0.0
        if not was_open:
            health.until = time.monotonic() + wait
            await trio.sleep(wait)


async def _death(name: str, loop: Callable[[], Awaitable[None]]) -> BaseException | None:
    """Return the error that ended the loop, out of its one-member groups, or None if it ended well.

    Cancellation passes through alone. An error that came at the same moment is logged, but the end is not a failure
    because of it.
    """
    try:
        await loop()
    except BaseException as error:
        end, rest = split_end(error)
        if rest is None:
            raise
        if end is None:
            return unwrap(rest)
        logger.opt(exception=rest).warning("loop_died_at_the_end loop={}", name)
        raise end from None
    return None
