from __future__ import annotations

import errno
import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from everos_engine.errors import (
    Damaged,
    EngineError,
    Fatal,
    KeepsDying,
    SettingsError,
    Transient,
    Unexpected,
    exhausted,
)
from everos_engine.supervise import (
    FIRST_DELAY_SECONDS,
    FIRST_REST_SECONDS,
    MAX_DEATHS,
    MAX_DELAY_SECONDS,
    MAX_REST_SECONDS,
    ONE_SHOT_REOPENINGS,
    WITHIN_SECONDS,
    Health,
    keep,
    keep_open,
)


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
    loop, starts = dying(lambda n: ValueError("a bug") if n <= MAX_DEATHS else None)
    await keep("work", loop)
    pauses = [later - sooner for sooner, later in itertools.pairwise(starts)]
    due = [min(FIRST_DELAY_SECONDS * 2**n, MAX_DELAY_SECONDS) for n in range(MAX_DEATHS)]
    assert [one <= pause <= one * 1.25 for one, pause in zip(due, pauses, strict=True)] == [True] * MAX_DEATHS


async def test_a_loop_that_dies_again_and_again_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    loop, starts = dying(lambda _: ValueError("a bug"))
    with pytest.raises(KeepsDying, match=r"the work loop died 6 times within 300 s, last of ValueError\('a bug'\)"):
        await keep("work", loop)
    assert len(starts) == MAX_DEATHS + 1


class Panic(BaseException):
    """As a Rust panic reaches Python: no Exception."""


async def test_a_panic_is_a_death_like_any_other(autojump_clock: trio.testing.MockClock) -> None:
    loop, starts = dying(lambda n: BaseExceptionGroup("", [Panic("unwrap on None")]) if n < 3 else None)
    await keep("watch", loop)
    assert len(starts) == 3


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


@pytest.mark.parametrize("error", [Fatal("only a human"), SettingsError("a bad value"), Damaged("engine.db")])
async def test_what_only_a_human_can_change_ends_the_process_at_once(error: Exception) -> None:
    loop, starts = dying(lambda _: ExceptionGroup("", [ValueError("beside it"), error]))
    with pytest.raises(type(error), match=str(error)):
        await keep("work", loop)
    assert len(starts) == 1


class Life:
    """Opens at once, unless ``closed``; then waits as it is asked to, serves for ``serving_seconds`` and ends with ``of(n)``."""

    def __init__(
        self, of: Callable[[int], BaseException | None], *, closed: bool = False, serving_seconds: float = 0.0
    ) -> None:
        self.of, self.closed, self.serving_seconds = of, closed, serving_seconds
        self.health = Health()
        self.began: list[float] = []
        self.waits: list[float] = []

    async def __call__(self, wait_seconds: float) -> None:
        self.began.append(trio.current_time())
        self.waits.append(wait_seconds)
        error = self.of(len(self.began))
        if not self.closed:
            self.health.state.value = "searching"
            await trio.sleep(wait_seconds)
            self.health.state.value = "serving"
            await trio.sleep(self.serving_seconds)
        if error is not None:
            raise error


BUGS: list[BaseException] = [
    KeepsDying("the work loop died 6 times"),
    ValueError("a bug"),
    Panic("unwrap on None"),
    OSError(errno.ENOSPC, "no space"),
    Unexpected("a library"),
    ExceptionGroup("", [ValueError("one"), KeyError("two")]),
]


def grows(waits: list[float]) -> bool:
    due = [min(FIRST_REST_SECONDS * 2**n, MAX_REST_SECONDS) for n in range(len(waits))]
    return all(one <= wait <= one * 1.25 for one, wait in zip(due, waits, strict=True))


@pytest.mark.parametrize("error", BUGS, ids=repr)
async def test_whatever_ends_the_loops_opens_the_stores_again_and_searches_need_not_wait(
    error: BaseException, autojump_clock: trio.testing.MockClock
) -> None:
    epoch = Life(lambda n: error if n < 13 else None)
    await keep_open(epoch.health, epoch, forever=True)
    assert epoch.waits[0] == 0
    assert grows(epoch.waits[1:])
    assert epoch.waits[-1] >= MAX_REST_SECONDS
    assert epoch.health.reopenings == 12
    assert epoch.health.reason in {str(error), repr(error)}
    pauses = [later - sooner for sooner, later in itertools.pairwise(epoch.began)]
    assert pauses == pytest.approx(epoch.waits[:-1])  # the stores were open while the loops waited


@pytest.mark.parametrize("error", BUGS, ids=repr)
async def test_stores_that_cannot_be_opened_are_tried_again_ever_more_rarely(
    error: BaseException, autojump_clock: trio.testing.MockClock
) -> None:
    epoch = Life(lambda n: error if n < 13 else None, closed=True)
    await keep_open(epoch.health, epoch, forever=True)
    assert epoch.waits == [0] * 13
    assert grows([later - sooner for sooner, later in itertools.pairwise(epoch.began)])


async def test_damage_opens_the_stores_again_without_a_pause_but_not_for_ever(
    autojump_clock: trio.testing.MockClock,
) -> None:
    epoch = Life(lambda n: Damaged("engine.db") if n < 5 else None)
    await keep_open(epoch.health, epoch, forever=True)
    assert epoch.waits[:2] == [0, 0]
    assert grows(epoch.waits[2:])


async def test_the_pauses_are_short_again_after_a_time_of_service(autojump_clock: trio.testing.MockClock) -> None:
    epoch = Life(lambda n: ValueError("a bug") if n < 6 else None, serving_seconds=WITHIN_SECONDS + 1)
    await keep_open(epoch.health, epoch, forever=True)
    assert max(epoch.waits) <= FIRST_REST_SECONDS * 1.25


@pytest.mark.parametrize("error", [Fatal("only a human"), SettingsError("a bad value")])
async def test_the_stores_are_not_opened_again_for_what_only_a_human_can_change(error: Exception) -> None:
    epoch = Life(lambda _: ExceptionGroup("", [ValueError("beside it"), error]))
    with pytest.raises(type(error), match=str(error)):
        await keep_open(epoch.health, epoch, forever=True)
    assert len(epoch.began) == 1


@pytest.mark.parametrize(
    ("error", "lives"), [(Transient("no space"), 1), (KeepsDying("work"), 1), (Damaged("engine.db"), 4)]
)
async def test_a_one_shot_command_ends_with_its_error_but_opens_damaged_stores_again(
    error: EngineError, lives: int, autojump_clock: trio.testing.MockClock
) -> None:
    epoch = Life(lambda _: error)
    with pytest.raises(type(error), match=str(error)):
        await keep_open(epoch.health, epoch, forever=False)
    assert len(epoch.began) == lives <= 1 + ONE_SHOT_REOPENINGS


def test_an_error_that_left_its_group_is_asked_once_whether_it_is_exhaustion() -> None:
    """Raised again out of the group that it came in, it has that group as its context."""
    error = OSError(errno.EROFS, "Read-only file system")
    group = ExceptionGroup("nursery", [error])
    error.__context__ = group
    assert not exhausted(error)
    assert not exhausted(group)
    error.errno = errno.EMFILE
    assert exhausted(group)
