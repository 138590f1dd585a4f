from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from loguru import logger

from everos_engine.engine import open_engine
from everos_engine.settings import Settings
from everos_engine.supervise import keep
from everos_engine.system import instrument
from everos_engine.system.control import (
    BUSY,
    MAX_QUESTION_BYTES,
    MAX_SLOW_TALKS,
    ask,
    serve_control,
    short_address,
)
from everos_engine.system.instrument import watching_the_loop
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS


def echo(question: str) -> dict[str, object]:
    return {"asked": question}


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


async def listening(path: Path) -> None:
    with trio.fail_after(HANG_SECONDS):
        while not path.exists():
            await trio.sleep(0.001)


async def asked(path: Path, question: str, details: Mapping[str, object] | None = None) -> dict[str, object] | None:
    return await trio.to_thread.run_sync(lambda: ask(path, question, details, deadline_seconds=HANG_SECONDS))


@pytest.mark.parametrize("name", ["c.sock", "d" * 120 + "/" + "e" * 120 + "/c.sock"])
async def test_a_question_is_answered_however_long_the_path_is(
    tmp_path: Path, nursery: trio.Nursery, name: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nursery.start_soon(serve_control, path, echo)
    await listening(path)
    assert await asked(path, "pulse") == {"asked": "pulse"}
    assert path.stat().st_mode & 0o077 == 0


def test_where_nobody_listens_there_is_no_answer(tmp_path: Path) -> None:
    assert ask(tmp_path / "none.sock", "pulse") is None
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(os.fspath(tmp_path / "stale.sock"))
    stale.close()
    assert ask(tmp_path / "stale.sock", "pulse") is None
    assert ask(tmp_path / "stale.sock" / "below", "pulse") is None


async def test_a_stale_socket_is_replaced_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    path.write_text("stale")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_control, path, echo)
        await trio.testing.wait_all_tasks_blocked()
        assert await asked(path, "a") == {"asked": "a"}
        nursery.cancel_scope.cancel()
    assert not path.exists()


def test_an_engine_that_does_not_answer_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(os.fspath(path))
        silent.listen(1)
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.1 s"):
            ask(path, "pulse", deadline_seconds=0.1)
        crowd = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
        for client in crowd:
            client.setblocking(False)
            client.connect_ex(os.fspath(path))
        with pytest.raises(TimeoutError):
            ask(path, "pulse", deadline_seconds=0.1)
        for client in crowd:
            client.close()


@pytest.mark.parametrize(
    "garbage", [b"\n", b"{}\n", b"[1]\n", b'{"ask": 7}\n', b"\xff\xfe\n", b"x" * 9000, b"[" * 4000 + b"\n", b""]
)
async def test_garbage_harms_nobody(tmp_path: Path, nursery: trio.Nursery, garbage: bytes) -> None:
    path = tmp_path / "c.sock"
    nursery.start_soon(serve_control, path, echo)
    await listening(path)
    stream = await trio.open_unix_socket(os.fspath(path))
    async with stream:
        try:
            await stream.send_all(garbage)
            await stream.send_eof()
            received = await stream.receive_some()
        except trio.BrokenResourceError:
            received = b""
        assert received in {b'{"asked": ""}\n', b""}
    assert await asked(path, "pulse") == {"asked": "pulse"}


def test_who_is_dropped_without_an_answer_asks_again(tmp_path: Path) -> None:
    """An engine that was suspended in the midst of a talk thinks that its client was silent."""
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen(4)

        def serve() -> None:
            listener.accept()[0].close()
            with listener.accept()[0] as client:
                client.recv(4096)
                client.sendall(b"{}\n")

        server = threading.Thread(target=serve)
        server.start()
        assert ask(path, "pulse", deadline_seconds=HANG_SECONDS) == {}
        server.join()
    assert ask(path, "pulse", deadline_seconds=HANG_SECONDS) is None


async def test_many_ask_at_once_and_the_silent_ones_only_for_a_second(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "c.sock"
    nursery.start_soon(serve_control, path, echo)
    await listening(path)
    silent = [await trio.open_unix_socket(os.fspath(path)) for _ in range(4)]
    found: list[object] = []

    async def one(number: int) -> None:
        found.append(await trio.to_thread.run_sync(lambda: ask(path, str(number), deadline_seconds=HANG_SECONDS)))

    async with trio.open_nursery() as many:
        for number in range(100):
            many.start_soon(one, number)
    assert sorted(str(answer) for answer in found) == sorted(str({"asked": str(number)}) for number in range(100))
    for stream in silent:
        await stream.aclose()


def test_a_process_at_its_descriptor_limit_still_answers(tmp_path: Path) -> None:
    script = """
import contextlib, os, resource, sys, trio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from everos_engine.system import control
from everos_engine.system.control import serve_control
control.TALK_SECONDS = 3600.0  # the silent one is not dropped before it goes
path, held, spare = Path(sys.argv[1]), [], [os.open("/dev/null", os.O_RDONLY)]
@contextlib.contextmanager
def lend():
    if spare: os.close(spare.pop())
    yield
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_control(path, lambda asked: {"asked": asked}, spare=lend))
        await trio.testing.wait_all_tasks_blocked()
        while True:
            try: held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError: break
        print("full", flush=True)
        await trio.sleep_forever()
import trio.testing
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
trio.run(main)
"""
    path = tmp_path / "c.sock"
    process = subprocess.Popen([sys.executable, "-c", script, os.fspath(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"full\n"
        assert ask(path, "pulse", deadline_seconds=HANG_SECONDS) == {"asked": "pulse"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.connect(os.fspath(path))  # takes the descriptor that was spare
            before = cpu_ticks(process.pid)
            with pytest.raises(TimeoutError):
                ask(path, "again", deadline_seconds=0.5)
            assert cpu_ticks(process.pid) - before <= 5  # it waits, and does not spin
        assert ask(path, "again", deadline_seconds=HANG_SECONDS) == {"asked": "again"}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_an_address_that_fits_is_the_path_itself(tmp_path: Path) -> None:
    with short_address(Path("/tmp/c.sock")) as address:  # noqa: S108 - never opened
        assert address == "/tmp/c.sock"  # noqa: S108 - never opened
    with short_address(tmp_path / ("x" * 120)) as address:
        assert address.startswith("/proc/self/fd/")


async def test_the_pulse_of_an_engine_tells_of_every_loop(settings: Settings) -> None:
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        await listening(settings.control_socket)
        snapshot = await asked(settings.control_socket, "pulse")
        assert snapshot is not None
        assert snapshot["pid"] == os.getpid()
        loops = snapshot["loops"]
        assert isinstance(loops, dict)
        assert {"work", "scan", "watch", "maintain"} <= set(loops)
        assert not any(loop["stalled"] for loop in loops.values())
        engine.context.beat("work", within_seconds=-1.0)
        assert engine.context.snapshot()["loops"]["work"]["stalled"]  # type: ignore[index]
        answer = await asked(settings.control_socket, "weather")
        assert answer == {"error": "unknown question 'weather': ask one of pulse, history, look"}
    assert ask(settings.control_socket, "pulse") is None


async def test_a_step_that_holds_up_the_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    seconds = 0.0

    async def rude_task() -> None:
        nonlocal seconds
        seconds += 0.15  # no other task's step takes time by this clock
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(instrument, "time", SimpleNamespace(perf_counter=lambda: seconds))
    sink = logger.add(lambda line: lines.append(str(line)), level="INFO")
    try:
        with watching_the_loop() as blocks:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rude_task)
    finally:
        logger.remove(sink)
    assert (blocks.count, blocks.worst_seconds) == (1, 0.15)
    assert "rude_task" in blocks.worst_task
    assert any("loop_blocked" in line and "rude_task" in line for line in lines)


async def test_a_task_that_blocks_again_and_again_is_logged_once_a_minute_under_its_loops_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = 0.0

    async def rude(times: int, *, of_seconds: float) -> None:
        nonlocal seconds
        for _ in range(times):
            seconds += of_seconds
            await trio.lowlevel.checkpoint()

    async def loop() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(rude, 100, of_seconds=0.3), name="everos_engine.loops.worker._Worker._prepare")

    lines: list[str] = []
    monkeypatch.setattr(instrument, "time", SimpleNamespace(perf_counter=lambda: seconds))
    sink = logger.add(lines.append, level="INFO", format="{level} {message}")
    try:
        with watching_the_loop() as blocks:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(keep, "work", loop), name="work")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(keep, "scan", partial(rude, 1, of_seconds=1.2)), name="scan")
            seconds += 60
            blocks._began = seconds  # this test's own step is none of a loop's
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(keep, "work", loop), name="work")
    finally:
        logger.remove(sink)
    assert [line.strip() for line in lines] == [
        "INFO loop_blocked task=work/_prepare milliseconds=300 times=1",
        "WARNING loop_blocked task=scan milliseconds=1200 times=1",
        "INFO loop_blocked task=work/_prepare milliseconds=300 times=100",
    ]
    assert blocks.count == 201
    assert blocks.worst_task == "scan"


async def test_slow_questions_stand_before_nobody_and_too_many_are_told_so(tmp_path: Path) -> None:
    path, go, begun = tmp_path / "c.sock", trio.Event(), 0
    told: list[dict[str, object] | None] = []

    async def think(asked: Mapping[str, object]) -> dict[str, object]:
        nonlocal begun
        begun += 1
        await go.wait()
        return {"thought": asked["of"]}

    def ask_slowly() -> dict[str, object] | None:
        return ask(path, "think", {"of": "herons"}, deadline_seconds=HANG_SECONDS)

    async def ask_one() -> None:
        told.append(await trio.to_thread.run_sync(ask_slowly))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_control, path, echo, slow={"think": think}))
        await listening(path)
        async with trio.open_nursery() as asking:
            for _ in range(MAX_SLOW_TALKS):
                asking.start_soon(ask_one)
            with trio.fail_after(HANG_SECONDS):
                while begun < MAX_SLOW_TALKS:
                    await trio.sleep(0.001)
            assert await asked(path, "pulse") == {"asked": "pulse"}
            assert await trio.to_thread.run_sync(ask_slowly) == {"error": BUSY}
            go.set()
        assert told == [{"thought": "herons"}] * MAX_SLOW_TALKS
        nursery.cancel_scope.cancel()


async def test_a_question_too_long_to_be_taken_is_not_asked(tmp_path: Path, nursery: trio.Nursery) -> None:
    path = tmp_path / "c.sock"
    nursery.start_soon(serve_control, path, echo)
    await listening(path)
    assert ask(path, "pulse", {"query": "x" * MAX_QUESTION_BYTES}, deadline_seconds=HANG_SECONDS) is None


class Panic(BaseException):
    """As a Rust panic reaches Python: no Exception."""


@pytest.mark.parametrize("error", [ValueError("a bug"), Panic("unwrap on None"), RecursionError("deep")], ids=repr)
async def test_an_unexpected_error_of_a_question_answers_that_question(
    error: BaseException, tmp_path: Path, nursery: trio.Nursery
) -> None:
    def fails(question: str) -> dict[str, object]:
        if question == "fails":
            raise error
        return {"asked": question}

    async def fails_slowly(_: Mapping[str, object]) -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        raise error

    async def says_what_json_cannot(_: Mapping[str, object]) -> dict[str, object]:
        await trio.lowlevel.checkpoint()
        return {"score": object()}

    path = tmp_path / "c.sock"
    slow = {"slow": fails_slowly, "odd": says_what_json_cannot}
    nursery.start_soon(partial(serve_control, path, fails, slow=slow))
    await listening(path)
    logged: list[str] = []
    sink = logger.add(logged.append, level="ERROR", format="{message}")
    for _ in range(2 * MAX_SLOW_TALKS):
        for question in ("fails", "slow", "odd"):
            answer = await asked(path, question)
            assert answer is not None
            assert f"could not answer {question!r}" in str(answer["error"])
            assert await asked(path, "pulse") == {"asked": "pulse"}
    logger.remove(sink)
    assert len([line for line in logged if "unit_failed loop=control" in line]) == 6 * MAX_SLOW_TALKS


@pytest.mark.parametrize("limit", [0, -1, 1001, 3_000_000_000, 2**63, 10**400, True, 2.5, "10", None, [1]], ids=str)
async def test_a_limit_out_of_bounds_is_refused_with_the_bounds(limit: object, settings: Settings) -> None:
    async with open_engine(settings, embedder=FakeEmbedder()):
        await listening(settings.control_socket)
        for _ in range(6):
            answer = await asked(settings.control_socket, "search", {"query": "heron", "limit": limit})
            assert answer is not None
            assert "at least 1 and at most 1000" in str(answer["error"])
        assert await asked(settings.control_socket, "search", {"query": "heron", "limit": 1000}) == {"results": []}
