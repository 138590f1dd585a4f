"""The batcher and its gate: few calls, every wait ends, and trouble stays where it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from embedding_server import Handler, reply, serving
from everos_engine.embed.batcher import Batcher, open_batcher
from everos_engine.embed.circuit_breaker import RECHECK_SECONDS, WAITING, CircuitBreaker
from everos_engine.embed.http import open_http_embedder
from everos_engine.embed.protocol import PROBE_SENTENCE, Embedder, check_embedder
from everos_engine.errors import (
    BadFile,
    BadQuestion,
    BadText,
    EngineError,
    Fatal,
    SettingsError,
    Transient,
    Unavailable,
)
from everos_engine.settings import EmbedderSettings
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS

DOWN = Transient("HTTP 503")
THROTTLED = Unavailable("HTTP 429", retry_after_seconds=3)
NO_MODEL = ("HTTP 400: no such model",)
SHORT = {"hedge_seconds": 2, "deadline_seconds": 30}
"""For the virtual clock."""
LONG = {"hedge_seconds": HANG_SECONDS, "deadline_seconds": HANG_SECONDS}
"""For the real one: a machine that is busy elsewhere makes no call slow, so that calls can be counted."""


class Panic(BaseException):
    """As a Rust panic reaches Python: no Exception."""


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError


FOREIGN: list[BaseException] = [
    ConnectionResetError("reset"),
    ValueError("a bad value"),
    MemoryError(),
    ExceptionGroup("two", [ValueError("one"), KeyError("two")]),
    BaseExceptionGroup("two", [Panic("one"), ValueError("two")]),
    Panic("unwrap on None"),
    Speechless(),
    trio.TooSlowError(),
    trio.BrokenResourceError(),
    StopAsyncIteration(),
    asyncio.CancelledError(),
    BadQuestion("not for us"),
    BadFile("not for us", remedy="none"),
    RecursionError("deep"),
    ImportError("no such model"),
    UnicodeEncodeError("ascii", "ü", 0, 1, "no"),
    ValueError("line\nline " * 10_000),
]
"""What an embedder may raise that is none of the errors it is asked to raise."""
ODD: list[object] = [
    None,
    "text",
    b"bytes",
    7,
    [],
    [["x"] * 16],
    [[0.5] * 16, [0.5] * 15],
    np.zeros((0, 16), dtype=np.float32),
    np.zeros(16, dtype=np.float32),
    np.full((1, 16), np.nan),
    np.full((1, 16), 1e300),
    np.zeros((1, 16), dtype=object),
    np.zeros((1, 16), dtype=complex),
    np.zeros((1, 16), dtype=bool),
    object(),
    iter([]),
]
"""What an embedder may answer that is no array of finite vectors."""


def name_of(trouble: object) -> str:
    """Return a test id that is the same in every process: no addresses."""
    return repr(trouble).split(" at 0x")[0][:60]


async def forget(_life: int, _vectors: Mapping[str, NDArray[np.float32]]) -> None:
    await trio.lowlevel.checkpoint()


@asynccontextmanager
async def batching(embedder: Embedder, **more: float) -> AsyncIterator[tuple[Batcher, CircuitBreaker]]:
    chosen = EmbedderSettings(**(SHORT | more))  # type: ignore[arg-type]
    breaker = CircuitBreaker(embedder, chosen)
    async with open_batcher(breaker, chosen, forget) as batcher:
        yield batcher, breaker


@asynccontextmanager
async def over_http(**more: float) -> AsyncIterator[tuple[Any, Batcher, CircuitBreaker]]:
    with serving() as service:
        chosen = EmbedderSettings(kind="http", url=service.url, model="m", **(LONG | more))  # type: ignore[arg-type]
        async with open_http_embedder(chosen) as embedder, batching(embedder, **(LONG | more)) as (batcher, breaker):
            yield service, batcher, breaker


def same(found: Sequence[object], embedder: FakeEmbedder, texts: Sequence[str]) -> bool:
    wanted = [embedder.vector(text) for text in texts]
    return all(isinstance(one, np.ndarray) and np.allclose(one, two) for one, two in zip(found, wanted, strict=True))


async def test_texts_of_many_files_share_calls_of_64_with_8_in_flight_over_kept_connections() -> None:
    async with over_http() as (service, batcher, breaker):
        await breaker.identify()
        service.full_at = 8
        results: dict[int, list[object]] = {}

        async def ask(number: int) -> None:
            results[number] = list(await batcher.embed([f"{number}/{entry}" for entry in range(4)]))

        async with trio.open_nursery() as nursery:
            for number in range(320):
                nursery.start_soon(ask, number)
        for number, found in results.items():
            assert same(found, service.model, [f"{number}/{entry}" for entry in range(4)])
        sizes = [len(request["input"]) for request in service.requests[1:]]
        assert sum(sizes) == 1280
        assert max(sizes) == 64
        assert len(sizes) <= 28
        assert service.peak == 8
        assert service.connections <= 9


async def test_a_poisoned_text_is_found_in_two_rounds_and_harms_nobody() -> None:
    async with over_http() as (service, batcher, breaker):
        await breaker.identify()
        texts = [f"text {number}" for number in range(63)]
        *found, refused = await batcher.embed([*texts, "POISON"])
        assert same(found, service.model, texts)
        assert isinstance(refused, BadText)
        probes = sum(one["input"] == [PROBE_SENTENCE] for one in service.requests)
        assert len(service.requests) - probes == 1 + 8 + 8  # the call, and two rounds of its parts
        assert 2 <= probes <= 1 + 3  # who answers, and is it the service: once at most for the call and each round
        asked = len(service.requests)
        await batcher.embed([*texts, "POISON"])
        assert [one["input"] for one in service.requests[asked:] if "POISON" in one["input"]] == [["POISON"]]


async def test_a_text_that_crashes_the_service_is_alone_to_blame() -> None:
    def crash(handler: Handler, body: dict[str, Any]) -> bool:
        if any("CRASH" in text for text in body["input"]):
            reply(handler, 500, {"error": "segfault"})
            return True
        return False

    async with over_http() as (service, batcher, breaker):
        await breaker.identify()
        service.misbehave = crash
        texts = [f"text {number}" for number in range(63)]
        *found, crashed = await batcher.embed([*texts, "CRASH"])
        assert same(found, service.model, texts)
        assert type(crashed) is Transient
        assert crashed.counts_as_retry
        assert breaker.down.value is None


async def test_a_429_pauses_every_call_for_as_long_as_it_asks(autojump_clock: trio.testing.MockClock) -> None:
    class Throttling(FakeEmbedder):
        async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            found = await super().embed(texts)
            if "much" in texts:
                raise THROTTLED
            return found

    fake = Throttling()
    async with batching(fake, outage_probe_seconds=0.01) as (batcher, breaker):
        await breaker.identify()
        began, asked = trio.current_time(), len(fake.calls) + 1
        (outcome,) = await batcher.embed(["much"])
        assert isinstance(outcome, Unavailable)
        (other,) = await batcher.embed(["another file's"])
        assert isinstance(other, Unavailable)
        assert str(other).startswith(WAITING)
        assert other.retry_after_seconds == THROTTLED.retry_after_seconds
        await breaker.down.wait_value(lambda reason: reason is None)
        assert trio.current_time() - began == THROTTLED.retry_after_seconds
        assert fake.calls[asked:] == [(PROBE_SENTENCE,)]
        assert same(await batcher.embed(["another file's"]), fake, ["another file's"])


async def test_no_more_calls_begin_in_a_second_than_allowed(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeEmbedder(batch_size=1)
    async with batching(fake, calls_per_second=4) as (batcher, _):
        began = trio.current_time()
        await batcher.embed([str(number) for number in range(41)])
        assert 9.9 <= trio.current_time() - began <= 10.1
        assert fake.peak <= 8


async def test_an_outage_costs_one_probe_at_a_time_ever_more_rarely(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeEmbedder()
    async with batching(fake, outage_probe_seconds=1, outage_probe_max_seconds=30) as (batcher, breaker):
        await batcher.embed(["warm"])
        fake.outage = DOWN
        outcomes = await batcher.embed([str(number) for number in range(1000)])
        assert all(isinstance(outcome, Unavailable) for outcome in outcomes)
        asked = len(fake.calls)
        for _ in range(100):
            assert isinstance((await batcher.embed(["waiting"]))[0], Unavailable)
        assert len(fake.calls) == asked
        await trio.sleep(3600)
        assert 3600 / 40 < len(fake.calls) - asked < 3600 / 30 + 10
        assert set(fake.calls[asked:]) == {(PROBE_SENTENCE,)}
        fake.outage = None
        await trio.sleep(38)
        assert breaker.down.value is None
        assert same(await batcher.embed(["waiting"]), fake, ["waiting"])


async def test_a_service_that_refuses_everything_is_down_and_no_text_is_to_blame(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Refusing(FakeEmbedder):
        async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if len(self.calls) > 1:
                raise BadText(*NO_MODEL)
            return await super().embed(texts)

    async with batching(Refusing()) as (batcher, _):
        await batcher.embed(["warm"])
        (outcome,) = await batcher.embed(["good"])
        assert isinstance(outcome, Unavailable)
        assert "even a plain sentence" in str(outcome)


async def test_a_hanging_text_fails_alone_and_is_asked_alone_ever_after(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeEmbedder()
    async with batching(fake) as (batcher, breaker):
        texts = [str(number) for number in range(63)]
        began = trio.current_time()
        results: list[object] = []

        async def good() -> None:
            results.extend(await batcher.embed(texts))
            results.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(good)
            (hung,) = await batcher.embed(["HANG"])
        assert same(results[:-1], fake, texts)
        assert isinstance(results[-1], float)
        assert results[-1] <= 2 * 2 + 0.1  # two rounds of patience at most
        assert isinstance(hung, Transient)
        assert hung.counts_as_retry
        assert breaker.down.value is None
        asked = len(fake.calls)
        began = trio.current_time()
        results.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batcher.embed, ["HANG"])
            nursery.start_soon(good)
        assert results[-1] == 0  # nobody waited for it this time
        assert ("HANG",) in fake.calls[asked:]
        assert not [call for call in fake.calls[asked:] if "HANG" in call and len(call) > 1]


async def test_edits_of_a_few_files_at_once_share_no_call_and_so_no_trouble(
    autojump_clock: trio.testing.MockClock,
) -> None:
    fake = FakeEmbedder()
    async with batching(fake) as (batcher, breaker), trio.open_nursery() as nursery:
        await breaker.identify()
        nursery.start_soon(batcher.embed, ["HANG"])
        began = trio.current_time()
        assert same(await batcher.embed(["one", "two"]), fake, ["one", "two"])
        assert trio.current_time() == began
        nursery.cancel_scope.cancel()


async def test_many_hanging_texts_keep_no_slot_from_the_others(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeEmbedder()
    async with batching(fake) as (batcher, _), trio.open_nursery() as nursery:
        for number in range(300):
            nursery.start_soon(batcher.embed, [f"HANG {number}"])
        await trio.sleep(120)
        for number in range(50):
            began = trio.current_time()
            assert same(await batcher.embed([f"edit {number}"]), fake, [f"edit {number}"])
            assert trio.current_time() - began <= 4.1
        assert fake.peak <= 8 + 4 + 2 + 1
        nursery.cancel_scope.cancel()


async def test_a_slow_service_is_given_more_time_instead_of_more_calls(autojump_clock: trio.testing.MockClock) -> None:
    class Slow(FakeEmbedder):
        async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            await trio.sleep(0.1 * len(texts))
            return await super().embed(texts)

    slow = Slow()
    async with batching(slow) as (batcher, _):
        for acquire in range(12):
            assert same(await batcher.embed([f"{acquire}/0"]), slow, [f"{acquire}/0"])
            texts = [f"{acquire}/{number}" for number in range(1, 64)]
            assert same(await batcher.embed(texts), slow, texts)
        assert max(len(call) for call in slow.calls) == 63


class Steady(FakeEmbedder):
    """Takes a second for every call."""

    async def _answer(self, texts: Sequence[str]) -> NDArray[np.float32]:
        await trio.sleep(1)
        return await super()._answer(texts)


async def test_a_file_of_ten_thousand_entries_does_not_hold_up_a_single_edit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    steady = Steady()
    async with batching(steady) as (batcher, _), trio.open_nursery() as nursery:
        nursery.start_soon(batcher.embed, [f"entry {number}" for number in range(10_000)])
        await trio.sleep(3)
        began = trio.current_time()
        await batcher.embed(["an edit"])
        assert trio.current_time() - began <= 2
    assert len(steady.calls) <= 10_000 / 64 + 4
    assert steady.peak == 8


async def test_whoever_is_cancelled_leaves_nothing_stuck(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeEmbedder()
    async with batching(fake) as (batcher, _):
        for text in ("HANG", "plain", "POISON", "FLAKY"):
            with trio.move_on_after(0.01):
                await batcher.embed([text, "together"])
            with trio.fail_after(100):
                first, second = await batcher.embed([text, "together"])
            assert same([second], fake, ["together"])
            assert isinstance(first, EngineError) == (text != "plain")


async def test_the_same_text_in_many_files_is_asked_once(autojump_clock: trio.testing.MockClock) -> None:
    fake = Steady()
    async with batching(fake) as (batcher, _), trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(batcher.embed, ["same", "same", "same"])
    assert [call for call in fake.calls if call != (PROBE_SENTENCE,)] == [("same",)]


async def test_a_model_swapped_without_a_pause_is_noticed_by_the_clock(autojump_clock: trio.testing.MockClock) -> None:
    fake = FakeEmbedder()
    async with batching(fake) as (batcher, breaker):
        await batcher.embed(["one"])
        assert breaker.epoch == 1
        fake.model = "another"
        await trio.sleep(RECHECK_SECONDS)
        await batcher.embed(["two"])
        assert breaker.epoch == 2
        assert breaker.unsure_seconds >= RECHECK_SECONDS


class Moody(FakeEmbedder):
    """Answers, dawdles, fails or hangs by chance from a seed; a text with BAD is always refused."""

    def __init__(self, seed: int, trouble: float) -> None:
        super().__init__(batch_size=8, concurrency=3)
        self.chance = random.Random(seed)
        self.trouble = trouble

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        await trio.sleep(self.chance.choice([0, 0.01, 1]))
        if self.chance.random() < self.trouble:
            mood = self.chance.choice(["hang", "transient", "throttle", "short", "foreign", "odd"])
            if mood == "hang":
                await trio.sleep_forever()
            if mood == "transient":
                raise DOWN
            if mood == "throttle":
                raise THROTTLED
            if mood == "foreign":
                raise self.chance.choice(FOREIGN)
            if mood == "odd":
                return self.chance.choice(ODD)  # type: ignore[return-value]
            return np.zeros((len(texts) + 1, 16), dtype=np.float32)
        if any("BAD" in text for text in texts):
            raise BadText(*NO_MODEL)
        return await super().embed(texts)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    trouble=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    asks=st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 30), max_size=20), st.booleans()), max_size=12),
)
def test_every_wait_ends_with_the_right_vector_or_an_error_whatever_the_service_does(
    seed: int, trouble: float, asks: list[tuple[int, list[int], bool]]
) -> None:
    moody = Moody(seed, trouble)
    ended: list[tuple[list[str], Sequence[object]]] = []

    async def ask(batcher: Batcher, after: int, texts: list[str], impatient: bool) -> None:  # noqa: FBT001
        await trio.sleep(after)
        with trio.move_on_after(1 if impatient else 10_000) as scope:
            ended.append((texts, await batcher.embed(texts)))
        assert impatient or not scope.cancelled_caught

    async def run() -> None:
        async with batching(moody) as (batcher, _):
            async with trio.open_nursery() as nursery:
                for after, numbers, impatient in asks:
                    texts = [f"{number} BAD" if number % 7 == 6 else str(number) for number in numbers]
                    nursery.start_soon(ask, batcher, after, texts, impatient)
            await trio.sleep(10_000)
            assert not batcher._by_text

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    for texts, outcomes in ended:
        for text, outcome in zip(texts, outcomes, strict=True):
            if isinstance(outcome, np.ndarray):
                assert np.allclose(outcome, moody.vector(text))
            else:
                assert isinstance(outcome, (Transient, BadText))
            if "BAD" in text:
                assert not isinstance(outcome, np.ndarray)
            elif trouble == 0:
                assert isinstance(outcome, np.ndarray)
    assert moody.peak <= 3 + 1 + 1 + 1


@pytest.mark.parametrize("size", [0, 1, 7, 64, 65, 200])
async def test_outcomes_come_in_the_order_of_the_texts(size: int) -> None:
    fake = FakeEmbedder()
    texts = [f"text {number}" for number in range(size)]
    async with batching(fake) as (batcher, _):
        assert same(await batcher.embed(texts), fake, texts)


class Sick(FakeEmbedder):
    """Raises or answers ``with_what`` to each call that has a text with ``word`` in it."""

    def __init__(self, with_what: object, *, word: str) -> None:
        super().__init__()
        self.with_what, self.word = with_what, word

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        found = await super().embed(texts)
        if not any(self.word in text for text in texts):
            return found
        if isinstance(self.with_what, BaseException):
            raise self.with_what
        return self.with_what  # type: ignore[return-value]


@pytest.mark.parametrize("trouble", [*FOREIGN, *ODD], ids=name_of)
async def test_whatever_an_embedder_does_for_one_text_is_the_trouble_of_that_text(
    trouble: object, autojump_clock: trio.testing.MockClock
) -> None:
    embedder = Sick(trouble, word="sick")
    texts = [f"text {number}" for number in range(20)]
    async with batching(embedder) as (batcher, breaker):
        *well, sick = await batcher.embed([*texts, "sick"])
        assert breaker.down.value is None
    assert same(well, embedder, texts)
    assert type(sick) is Transient
    assert sick.counts_as_retry
    assert len(str(sick)) < 500
    assert "\n" not in str(sick)
    if isinstance(trouble, BaseException):
        assert sick.__cause__ is trouble


@pytest.mark.parametrize("trouble", [*FOREIGN, *ODD], ids=name_of)
async def test_an_embedder_that_fails_for_every_text_is_down_and_no_text_is_to_blame(
    trouble: object, autojump_clock: trio.testing.MockClock
) -> None:
    embedder = Sick(trouble, word="")
    async with batching(embedder) as (batcher, breaker):
        found = await batcher.embed(["one", "two"])
        assert all(isinstance(one, Unavailable) for one in found)
        if isinstance(trouble, BaseException):
            assert [one.__cause__ for one in found if isinstance(one, Unavailable)] == [trouble] * 2
        assert breaker.down.value is not None
        embedder.word = "nobody"
        await breaker.down.wait_value(lambda reason: reason is None)
        assert same(await batcher.embed(["one", "two"]), embedder, ["one", "two"])


@pytest.mark.parametrize("convert", [np.ndarray.tolist, lambda found: found.astype(np.float64), np.asfortranarray])
async def test_vectors_that_can_be_converted_are_taken(convert: Any, autojump_clock: trio.testing.MockClock) -> None:
    class Other(FakeEmbedder):
        async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return convert(await super().embed(texts))  # type: ignore[no-any-return]

    embedder = Other()
    async with batching(embedder) as (batcher, _):
        found = await batcher.embed(["one", "two"])
    assert same(found, embedder, ["one", "two"])
    assert {one.dtype for one in found if isinstance(one, np.ndarray)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("error", [Fatal("only a human"), SettingsError("a bad value"), KeyboardInterrupt()], ids=repr)
async def test_what_an_embedder_means_to_end_the_process_with_does(error: BaseException) -> None:
    async def run() -> None:
        async with batching(Sick(error, word="")) as (batcher, _):
            await batcher.embed(["one"])

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert caught.value.subgroup(type(error)) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", None),
        ("dimension", -1),
        ("dimension", 16.0),
        ("concurrency", 0),
        ("batch_size", 0),
        ("batch_size", "64"),
        ("hedged", None),
        ("embed", None),
    ],
)
def test_an_embedder_that_cannot_be_worked_with_is_refused_at_the_start(name: str, value: object) -> None:
    embedder = FakeEmbedder()
    check_embedder(embedder)
    setattr(embedder, name, value)
    with pytest.raises(SettingsError, match=f"FakeEmbedder has {name}="):
        check_embedder(embedder)
    with pytest.raises(SettingsError, match="has no model"):
        check_embedder(object())  # type: ignore[arg-type]
