"""Commands that meet on one root wait for each other; a signal stops them with what was done and what is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from everos_engine.errors import AlreadyRunning
from everos_engine.system.locks import EngineLock, holder, running_pid
from patience import HANG_SECONDS, heard
from test_terminal import ENGINE, command, environment
from writer import FACTS, fact, facts, put


def begin(root: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    """A command, without waiting for it."""
    return subprocess.Popen(
        [*ENGINE, *words],
        env=environment(root, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def lock_of(root: Path, *, ends_by_itself: bool) -> Iterator[None]:
    """Hold the root's lock as another process does: a lock belongs to an open file, whoever opened it."""
    path = root / ".index" / "engine" / "engine.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with EngineLock(path, ends_by_itself=ends_by_itself):
        yield


def test_commands_that_start_together_all_do_their_work(root: Path) -> None:
    for number in range(5):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    together = [begin(root, "sync") for _ in range(2)] + [begin(root, "fix", "--apply")]
    ends = [(process.communicate(timeout=HANG_SECONDS), process.returncode) for process in together]
    assert [status for _, status in ends] == [0, 0, 0], ends
    assert json.loads(command(root, "status", "--json").stdout)["rows"] == {"atomic_fact": 5}


@pytest.mark.parametrize("words", [["run"], ["sync"]])
def test_who_comes_while_a_command_works_says_that_it_waits_and_goes_on(words: list[str], root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    with ExitStack() as stack:
        with lock_of(root, ends_by_itself=True):
            process = stack.enter_context(begin(root, *words, EVEROS_LOG_FORMAT="text"))
            assert process.stderr is not None
            told = heard(process.stderr, "lock_waiting pid=")
            assert process.poll() is None
        if words == ["run"]:
            process.terminate()
        assert process.wait(HANG_SECONDS) == 0, told()
        told()
    assert command(root, "sync").returncode == 0


@pytest.mark.parametrize("words", [["run"], ["sync"]])
def test_the_wait_has_an_end_with_a_remedy(words: list[str], root: Path) -> None:
    with lock_of(root, ends_by_itself=True):
        done = command(root, *words, EVEROS_LOCK_WAIT_SECONDS="0.1")
    assert (done.returncode, "run this one again when it is done" in done.stderr) == (2, True)


def test_a_second_engine_does_not_wait_for_the_first(root: Path) -> None:
    with lock_of(root, ends_by_itself=False):
        done = command(root, "run", EVEROS_LOCK_WAIT_SECONDS="1e6")
    assert (done.returncode, "already serves" in done.stderr) == (2, True)


def test_who_asks_for_the_holder_is_not_taken_for_one(root: Path) -> None:
    path = root / "engine.lock"
    with EngineLock(path, ends_by_itself=True):
        assert holder(path) == holder(path)
        assert running_pid(path)
    script = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_SH); print(1, flush=True); sys.stdin.read()"
    call = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "1\n"
        assert holder(path) is None
        with pytest.raises(AlreadyRunning), EngineLock(path):
            pass
        asking.communicate("")


@pytest.mark.parametrize("beside", [False, True])
def test_an_interrupted_sync_says_what_it_did_and_what_is_left(root: Path, *, beside: bool) -> None:
    """``beside`` a holder of the lock, it waits for that; else its embedder never answers."""
    for number in range(30):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    if beside:
        with lock_of(root, ends_by_itself=True):
            status, told = interrupted(root, "lock_waiting")
    else:
        never = {
            "EVEROS_EMBEDDER__KIND": "http",
            "EVEROS_EMBEDDER__URL": "http://127.0.0.1:9",
            "EVEROS_EMBEDDER__MODEL": "m",
        }
        status, told = interrupted(root, "embedder_", **never)
    assert status == 130, told
    assert "stopping within" in told
    assert "what is left is done by the next `everos-engine sync`" in told
    assert "Traceback" not in told
    assert command(root, "sync").returncode == 0
    assert json.loads(command(root, "status", "--json").stdout)["rows"] == {"atomic_fact": 30}


def interrupted(root: Path, word: str, **more: str) -> tuple[int, str]:
    """Exit status and messages of a `sync` that gets SIGINT after the word."""
    with begin(root, "sync", **more) as process:
        assert process.stderr is not None
        told = heard(process.stderr, word)
        process.send_signal(signal.SIGINT)
        return process.wait(HANG_SECONDS), told()
