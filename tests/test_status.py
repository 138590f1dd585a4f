from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from everos_engine.diagnose import doctor, status
from everos_engine.diagnose.wording import Style
from everos_engine.engine import open_engine
from everos_engine.settings import Settings, load
from everos_engine.system.control import serve_control
from everos_engine.system.locks import EngineLock
from everos_engine.testing import FakeEmbedder
from writer import FACTS, fact, facts, put

SHAPE = {
    "version": int, "root": str,
    "engine": {"running": bool, "pid": (int, type(None)), "state": str, "stalled": list},
    "queue": {"pending": int, "processing": int, "delayed": int, "done": int, "failed_retryable": int,
              "failed_permanent": int, "oldest_pending_seconds": (float, int, type(None))},
    "lsn": {"max": int, "last_processed": int, "lag": int},
    "rows": dict,
    "last_scan_seconds_ago": (float, type(None)),
    "found_by": {"watch": int, "scan": int, "scan_share": (float, type(None))},
    "held": {"count": int, "oldest_seconds": (float, type(None)), "reasons": dict},
    "embedder": {"down_seconds": (float, type(None)), "reason": (str, type(None))},
    "conditions": list, "descriptors": dict, "warnings": {"count": int},
}  # fmt: skip


def fits(value: object, shape: object) -> bool:
    if isinstance(shape, dict):
        return isinstance(value, dict) and set(value) == set(shape) and all(fits(value[k], shape[k]) for k in shape)
    return isinstance(value, shape)  # type: ignore[arg-type]


async def test_the_block_is_the_runbooks_and_counts_what_is_there(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "the heron eats fish"), fact(2, "the otter FLAKY")))
    put(root, "users/u1/.atomic_facts/bad.md", "---\n[\n---\n")
    put(root, "users/u1/.atomic_facts/good.md", facts(fact(3, "a third")))
    quick = load(
        {"memory.root": str(root), "worker_max_retry": 0, "settle_milliseconds": 20},
        environment={}, user_file=root / "none.toml",
    )  # fmt: skip
    async with open_engine(quick, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
        running = await trio.to_thread.run_sync(status.snapshot, quick)
        assert running.engine.pid == os.getpid()
    found = status.snapshot(quick)
    assert status.as_text(found).splitlines()[:9] == [
        "queue:",
        "  pending: 0",
        "  done: 1",
        "  failed (retryable=TRUE): 1 (eligible for `everos-engine fix --apply`)",
        "  failed (retryable=FALSE): 1 (fix md and re-save to recover)",
        "lsn:",
        "  max: 3",
        "  last_processed: 3",
        "  lag: 0",
    ]
    assert "  atomic_fact: 2" in status.as_text(found).splitlines()
    assert "`everos-engine --root x fix --apply`" in status.as_text(found, program="everos-engine --root x")
    assert all(fits(json.loads(json.dumps(status.as_json(one))), SHAPE) for one in (running, found))


def test_a_root_that_was_never_indexed_has_a_status_of_the_same_shape(settings: Settings) -> None:
    found = status.snapshot(settings)
    assert fits(status.as_json(found), SHAPE)
    assert "empty, and never indexed. If a file system belongs here, mount it" in status.as_text(found)
    put(settings.root, FACTS, facts(fact(1, "the heron eats fish")))
    assert "never indexed: start with" in status.as_text(status.snapshot(settings))


async def test_a_new_engine_does_not_repeat_what_an_earlier_one_said(settings: Settings) -> None:
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.context.conditions.say("watch_limit", "events cannot be had", "raise it")
        said = status.as_json(await trio.to_thread.run_sync(status.snapshot, settings))
        assert "watch_limit" in str(said["conditions"])
    async with open_engine(settings, embedder=FakeEmbedder()):
        found = status.as_json(await trio.to_thread.run_sync(status.snapshot, settings))
        assert found["conditions"] == []


async def test_status_imports_nothing_heavy(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "the heron eats fish")))
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
    code = (
        "import sys; from everos_engine.cli.main import main; main(sys.argv[1:]);"
        "print(sorted({'lancedb', 'pyarrow', 'numpy', 'httpx'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--root", str(root), "status"]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
    assert done.stderr.decode().strip() == "[]"


async def test_a_stopped_engine_is_named(settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "the heron eats fish")))
    command = [sys.executable, "-m", "everos_engine", "--root", str(root), "run", "--log-format", "text"]
    environment = {**os.environ, "EVEROS_EMBEDDER__KIND": "none"}
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(command, stderr=subprocess.PIPE, env=environment)
        assert process.stderr is not None
        told = b""
        while b"engine_started" not in told:
            part = await process.stderr.receive_some()
            assert part, told
            told += part
        nursery.start_soon(read_on, process.stderr)
        try:
            found = await trio.to_thread.run_sync(status.snapshot, settings)
            assert (found.engine.state, found.engine.pid) == ("answers", process.pid)
            process.send_signal(signal.SIGSTOP)
            found = await trio.to_thread.run_sync(status.snapshot, settings)
            assert found.engine.state == "stopped"
            assert f"kill -CONT {process.pid}" in status.as_text(found)
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            await process.wait()


async def test_a_stalled_loop_is_named_by_status_and_doctor(settings: Settings) -> None:
    settings.engine_directory.mkdir(parents=True)
    loops = {
        "scan": {"beat_seconds_ago": 1.0, "allowance_seconds": 60.0, "stalled": False},
        "work": {"beat_seconds_ago": 300.0, "allowance_seconds": 60.0, "stalled": True},
    }
    with EngineLock(settings.engine_directory / "engine.lock"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_control, settings.control_socket, lambda _: {"pid": os.getpid(), "loops": loops})
            found = await trio.to_thread.run_sync(status.snapshot, settings)
            (check,) = await trio.to_thread.run_sync(doctor.examine, settings, ["engine"])
            nursery.cancel_scope.cancel()
    assert "stalled: work has not moved for 5 min" in status.as_text(found)
    assert fits(status.as_json(found), SHAPE)
    assert (check.verdict, "work for 5 min" in check.cause, "scan" in check.cause) == ("fail", True, False)
    assert f"kill {os.getpid()}" in check.remedy


async def read_on(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize(("colour", "has"), [(True, True), (False, False)])
def test_colour_is_only_where_it_is_wanted(settings: Settings, root: Path, *, colour: bool, has: bool) -> None:
    settings.engine_directory.mkdir(parents=True)
    from everos_engine.engine import open_queue

    open_queue(settings).close()
    assert ("\x1b[" in status.as_text(status.snapshot(settings), Style(colour))) is has
