from __future__ import annotations

import errno
import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from everos_engine.errors import Fatal, SettingsError, Transient
from everos_engine.supervise import FIRST_DELAY_SECONDS, MOST_DEATHS, MOST_DELAY_SECONDS, WITHIN_SECONDS, keep


def dying(
    of: Callable[[int], BaseException | None], *, after_seconds: float = 0.0
) -> tuple[Callable[[], Awaitable[None]], list[float]]:
    """A loop that dies of ``of(n)`` the n-th time, or ends well of None; and the times it was started."""
    starts: list[float] = []

    async def loop() -> None:
        starts.append(trio.current_time())
        await trio.sleep(after_seconds)
        error = of(len(starts))
        if error is not None:
            raise error

    return loop, starts


async def test_a_loop_that_dies_is_started_again_ever_more_rarely(autojump_clock: trio.testing.MockClock) -> None:
    loop, starts = dying(lambda n: ValueError("a bug") if n <= MOST_DEATHS else None)
    await keep("work", loop)
    pauses = [later - sooner for sooner, later in itertools.pairwise(starts)]
    due = [min(FIRST_DELAY_SECONDS * 2**n, MOST_DELAY_SECONDS) for n in range(MOST_DEATHS)]
    assert [one <= pause <= one * 1.25 for one, pause in zip(due, pauses, strict=True)] == [True] * MOST_DEATHS


async def test_a_loop_that_dies_again_and_again_ends_the_process(autojump_clock: trio.testing.MockClock) -> None:
    loop, starts = dying(lambda _: ValueError("a bug"))
    with pytest.raises(Fatal, match=r"the work loop died 6 times within 300 s, last of ValueError\('a bug'\)"):
        await keep("work", loop)
    assert len(starts) == MOST_DEATHS + 1


async def test_deaths_far_apart_never_end_the_process(autojump_clock: trio.testing.MockClock) -> None:
    loop, starts = dying(lambda n: ValueError("a bug") if n < 20 else None, after_seconds=WITHIN_SECONDS + 1)
    await keep("work", loop)
    assert len(starts) == 20


@pytest.mark.parametrize("trouble", [Transient("the disk is full"), OSError(errno.EMFILE, "Too many open files")])
async def test_troubles_of_the_world_are_waited_out_however_often_they_come(
    trouble: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    loop, starts = dying(lambda n: ExceptionGroup("", [trouble]) if n < 50 else None)
    await keep("scan", loop)
    assert len(starts) == 50


async def test_an_error_at_the_moment_of_the_end_does_not_outlive_it() -> None:
    async def fails() -> None:
        try:
            await trio.sleep_forever()
        finally:
            message = "at the last moment"
            raise OSError(message)

    async def loop() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            await trio.sleep_forever()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, "watch", loop)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


@pytest.mark.parametrize("error", [Fatal("only a human"), SettingsError("a bad value")])
async def test_what_only_a_human_can_change_ends_the_process_at_once(error: Exception) -> None:
    loop, starts = dying(lambda _: ExceptionGroup("", [ValueError("beside it"), error]))
    with pytest.raises(type(error), match=str(error)):
        await keep("work", loop)
    assert len(starts) == 1
