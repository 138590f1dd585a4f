"""The engine over a reopening of its stores, and what its block's own errors look like outside."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
from loguru import logger

from derived import described, indexed
from everos_engine import engine as engine_module
from everos_engine import supervise
from everos_engine.engine import REOPENED, Engine, open_engine
from everos_engine.errors import Damaged, EngineError, Fatal, SettingsError
from everos_engine.loops import compactor, fd_guard, scanner, watcher
from everos_engine.loops.context import Context
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS
from writer import FACTS, fact, facts, put


class Panic(BaseException):
    """As a Rust panic reaches Python: no Exception."""


def striking(
    loop: Callable[[Context], Awaitable[None]], errors: list[BaseException]
) -> Callable[[Context], Awaitable[None]]:
    """The loop itself, which raises the next of ``errors`` whenever it is started, while there is one."""

    async def struck(context: Context) -> None:
        if errors:
            await trio.lowlevel.checkpoint()
            raise errors.pop(0)
        await loop(context)

    return struck


async def reopened(engine: Engine, times: int) -> None:
    while engine.health.reopenings < times:
        await engine.health.state.wait_transition()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same policies, in milliseconds."""
    for name in ("FIRST_DELAY_SECONDS", "FIRST_REST_SECONDS"):
        monkeypatch.setattr(supervise, name, 0.001)


async def test_a_damaged_store_is_opened_again_and_the_engine_goes_on(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, FACTS, facts(fact(1, "the heron eats fish")))
    monkeypatch.setattr(engine_module, "scan", striking(engine_module.scan, [Damaged("engine.db: page 3")]))
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=FakeEmbedder()) as engine:
            first = engine.context
            await reopened(engine, 1)
            status = await engine.settle()
            assert engine.context is not first
            assert engine.context.progress is first.progress
            assert status.counts.done == 1
            assert [hit.md_path for hit in await engine.search("heron")] == [FACTS]
            assert await indexed(engine) == described(settings)
            note = engine.context.conditions.now[REOPENED]
            assert "engine.db: page 3" in note.message
            assert engine.snapshot()["health"] == {
                "state": "serving",
                "reason": "engine.db: page 3",
                "next_try_seconds": 0.0,
                "reopenings": 1,
            }


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("loop", ["work", "guard", "watch", "scan", "maintain"])
@pytest.mark.parametrize("error", [ValueError("a bug"), Panic("unwrap on None")], ids=["bug", "panic"])
async def test_a_loop_that_keeps_dying_never_ends_the_engine(
    loop: str, error: BaseException, settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, FACTS, facts(fact(1, "the heron eats fish")))
    deaths = [error] * (2 * supervise.MAX_DEATHS + 3)
    original = getattr(engine_module, loop)

    async def struck(context: Context, **options: object) -> None:
        await striking(lambda context: original(context, **options), deaths)(context)

    monkeypatch.setattr(engine_module, loop, struck)
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=FakeEmbedder()) as engine:
            await reopened(engine, 2)
            await engine.settle()
            assert await indexed(engine) == described(settings)
            assert f"the {loop} loop died 6 times" in engine.context.conditions.now[REOPENED].message


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (watcher, "_record"),
        (scanner, "_scan_once"),
        (scanner, "audit"),
        (fd_guard.Guard, "look"),
        (compactor, "_optimize"),
        (compactor, "_prune"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
async def test_a_bug_in_one_unit_of_a_loop_costs_that_unit(
    module: object, name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "memory.root": str(root),
        "note.globs": ["**/*.md"],
        "audit_interval_hours": 0.0001,
        "lancedb.optimize_idle_seconds": 0.05,
        "lancedb.optimize_after_commits": 1,
    }
    sound, failures = getattr(module, name), [ValueError("a bug")] * 3

    def failing(*args: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return sound(*args, **options)

    logged: list[str] = []
    sink = logger.add(logged.append, format="{message}", level="ERROR", backtrace=False, diagnose=False)
    monkeypatch.setattr(module, name, failing)
    if name == "_prune":
        monkeypatch.setattr(compactor, "LONG_SECONDS", 0.05)
    try:
        with trio.fail_after(HANG_SECONDS):
            async with open_engine(
                load(flags, environment={}, user_file=root / "none"), embedder=FakeEmbedder()
            ) as engine:
                number = 0
                while failures:
                    number += 1
                    put(root, FACTS, facts(fact(number % 1000, f"the heron eats {number} fish")))
                    await engine.settle()
                    await trio.sleep(0.1)
                await engine.settle()
                assert await indexed(engine) == described(engine.settings)
                assert engine.health.reopenings == 0
    finally:
        logger.remove(sink)
    assert len([line for line in logged if line.startswith("unit_failed")]) == 3
    assert not [line for line in logged if line.startswith(("loop_died", "stores_reopened"))]


async def test_a_call_waits_for_the_stores_and_is_made_again_on_the_new_ones(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, FACTS, facts(fact(1, "HANG")))
    strike = trio.Event()

    async def struck(context: Context) -> None:
        if not strike.is_set():
            await strike.wait()
            message = "the table's folder"
            raise Damaged(message)
        await trio.sleep_forever()

    monkeypatch.setattr(engine_module, "maintain", struck)
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=FakeEmbedder()) as engine, trio.open_nursery() as nursery:
            nursery.start_soon(engine.settle)
            while not engine.context.vectors.breaker or not engine.context.vectors.breaker.embedder.calls:  # type: ignore[attr-defined]  # the fake's
                await trio.sleep(0.01)
            put(root, FACTS, facts(fact(1, "the heron eats fish")))
            strike.set()
    # the nursery's end: that very call returned


async def test_what_only_a_human_can_change_ends_the_engine(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "scan", striking(engine_module.scan, [Fatal("only a human")]))
    with trio.fail_after(HANG_SECONDS), pytest.raises(Fatal, match="only a human"):
        async with open_engine(settings, embedder=FakeEmbedder()):
            await trio.sleep_forever()


async def test_an_engine_that_has_ended_says_so(settings: Settings) -> None:
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        pass
    for call in (engine.settle, engine.status, lambda: engine.search("one")):
        with pytest.raises(EngineError, match="has ended"):
            await call()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        Panic("mine"),
        ExceptionGroup("mine", [ValueError("one of them")]),
        ExceptionGroup("mine", [ValueError("one of them"), ExceptionGroup("", [KeyError("another")])]),
        SettingsError("mine"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_block_leaves_it_as_it_was_raised(error: BaseException, settings: Settings) -> None:
    cause, context = OSError("the cause"), KeyError("the context")

    async def block() -> None:
        async with open_engine(settings, embedder=FakeEmbedder(), watching=False):
            try:
                raise context
            except KeyError:
                raise error from cause

    with pytest.raises(type(error)) as caught:
        await block()
    assert caught.value is error
    assert error.__cause__ is cause
    assert error.__context__ is context
