"""The boundary of a unit of work: what stays inside, and what passes."""

from __future__ import annotations

import errno

import pytest
import trio
from loguru import logger

from everos_engine.errors import BadFile, Damaged, Fatal, Transient
from everos_engine.system.unit import unit


class Panic(BaseException):
    """As a Rust panic reaches Python: no Exception."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        Panic("unwrap on None"),
        OSError(errno.EIO, "I/O error"),
        ExceptionGroup("", [ValueError("a bug"), Transient("the world")]),
        BaseExceptionGroup("", [Panic("unwrap on None")]),
    ],
    ids=repr,
)
def test_an_unexpected_error_stays_in_its_unit_and_is_logged_once_with_its_traceback(error: BaseException) -> None:
    logged: list[str] = []
    sink = logger.add(logged.append, format="{level} {message}", level="INFO", backtrace=False, diagnose=False)
    with unit("work", "a batch") as done:
        raise error
    logger.remove(sink)
    assert done.error is error
    assert len(logged) == 1
    assert logged[0].startswith("ERROR unit_failed loop=work what='a batch'")
    assert "raise error" in logged[0]


@pytest.mark.parametrize(
    "error",
    [
        Transient("the world"),
        Damaged("engine.db"),
        Fatal("only a human"),
        BadFile("bad", remedy="edit"),
        OSError(errno.EMFILE, "Too many open files"),
        KeyboardInterrupt(),
        SystemExit(3),
        ExceptionGroup("", [Transient("the world"), Transient("twice")]),
        ExceptionGroup("", [ValueError("a bug"), Fatal("only a human")]),
    ],
    ids=repr,
)
def test_what_a_loop_knows_to_handle_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, unit("work", "a batch"):
        raise error
    assert caught.value is error


async def test_a_cancellation_passes_though_the_unit_fails_at_the_same_moment() -> None:
    async def fails() -> None:
        try:
            await trio.sleep_forever()
        finally:
            message = "at the last moment"
            raise ValueError(message)

    with trio.CancelScope() as scope:
        with unit("work", "a batch"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails)
                nursery.start_soon(trio.sleep_forever)
                await trio.lowlevel.checkpoint()
                scope.cancel()
        pytest.fail("the cancellation was lost")
    assert scope.cancelled_caught
