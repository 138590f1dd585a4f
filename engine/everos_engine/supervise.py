"""The restart policy of a loop."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

import trio
from loguru import logger

from everos_engine.errors import Fatal, SettingsError, Transient, exhausted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FIRST_DELAY_SECONDS = 0.5
MOST_DELAY_SECONDS = 30.0
MOST_DEATHS = 5
WITHIN_SECONDS = 300.0


async def keep(name: str, loop: Callable[[], Awaitable[None]]) -> None:
    """Run ``loop`` for ever: a death restarts it after 0.5 s, doubling to 30 s, with jitter.

    Raises Fatal after more than 5 deaths by a bug within 300 s, and at once for a Fatal or SettingsError of the loop.
    The world's troubles (Transient, no descriptor left) are waited out however often they come.
    """
    deaths: deque[float] = deque()
    delay = FIRST_DELAY_SECONDS
    while True:
        started = trio.current_time()
        error = await _death(name, loop)
        if error is None:
            return
        now = trio.current_time()
        if isinstance(error, (Fatal, SettingsError)):
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
            if len(deaths) > MOST_DEATHS:
                message = f"the {name} loop died {len(deaths)} times within {WITHIN_SECONDS:g} s, last of {error!r}"
                raise Fatal(message) from error
        await trio.sleep(delay * (1 + random.random() / 4))  # noqa: S311 - spreads restarts
        delay = min(delay * 2, MOST_DELAY_SECONDS)


async def _death(name: str, loop: Callable[[], Awaitable[None]]) -> BaseException | None:
    """What the loop died of, out of its one-member groups; None where it ended well.

    Cancellation passes through, alone: an error that came at the same moment is told, but the end is no failure for it.
    """
    try:
        await loop()
    except Exception as error:  # noqa: BLE001 - the supervisor's is the one broad handler
        return alone(error)
    except BaseExceptionGroup as group:
        cancelled, others = group.split(trio.Cancelled)
        if cancelled is None or not isinstance(others, ExceptionGroup):
            raise
        logger.opt(exception=others).warning("loop_died_at_the_end loop={}", name)
        raise cancelled from None
    return None


def alone(error: BaseException) -> BaseException:
    """The one error inside nested groups, or the first Fatal, or the group itself."""
    while isinstance(error, BaseExceptionGroup):
        fatal = error.subgroup((Fatal, SettingsError))
        members = (fatal or error).exceptions
        if len(members) > 1 and fatal is None:
            return error
        error = members[0]
    return error
