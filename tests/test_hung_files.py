"""A file or a directory that does not answer holds up nothing else, is named, and is indexed when it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from everos_engine.system.file_threads import Call, FileThreads, NoAnswer, call_within, visit_within
from hanging import library
from patience import HANG_SECONDS, heard, until
from writer import put

ENGINE = [sys.executable, "-m", "everos_engine"]


@pytest.fixture
def hung(root: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the environment of a process in which files named HUNG do not answer while the sign exists."""
    shim = library(tmp_path)
    if shim is None:
        pytest.skip("there is no compiler")
    sign = tmp_path / "sign"
    sign.touch()
    yield {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "HANG": "HUNG",
        "HANG_WHILE": str(sign),
        "EVEROS_ROOT": str(root),
        "EVEROS_EMBEDDER__KIND": "none",
        "EVEROS_NOTE__GLOBS": "**/*.md",
        "EVEROS_FILE_DEADLINE_SECONDS": "2",
        "EVEROS_WATCH__POLL_INTERVAL_SECONDS": "0.5",
        "XDG_CONFIG_HOME": str(tmp_path),
    }
    sign.unlink(missing_ok=True)


def output_of(env: dict[str, str], *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [*ENGINE, *arguments], env=env, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    return done.returncode, done.stdout + done.stderr


def check_of(env: dict[str, str], name: str) -> dict[str, Any]:
    (check,) = json.loads(output_of(env, "doctor", name, "--json", "--offline")[1])["checks"]
    found: dict[str, Any] = check
    return found


def test_one_file_that_hangs_keeps_no_neighbour_out(root: Path, hung: dict[str, str]) -> None:
    for number in range(199):
        put(root, f"{number}.md", f"# A\ntext {number}")
    put(root, "HUNG.md", "# A\ntext")
    status, said = output_of(hung, "sync")
    assert (status, "in step: 199 files" in said, "HUNG.md: pending" in said) == (1, True, True), said
    assert "has not answered for 2 s" in said
    status, said = output_of(hung, "explain", "HUNG.md")
    assert "waiting: 'HUNG.md' has not answered" in said.replace("\n", " ")
    files = check_of(hung, "files")
    assert (files["verdict"], "HUNG.md" in files["cause"]) == ("warn", True)
    assert check_of(hung, "backlog")["verdict"] == "warn"  # it waits, and no engine runs
    Path(hung["HANG_WHILE"]).unlink()
    assert "in step: 200 files" in output_of(hung, "sync")[1]
    assert check_of(hung, "files")["verdict"] == "ok"


def test_a_running_engine_names_what_hangs_indexes_it_later_and_stops_in_time(root: Path, hung: dict[str, str]) -> None:
    put(root, "HUNG.md", "# A\ntext")
    put(root, "HUNG/inside.md", "# A\ntext")
    put(root, "near.md", "# A\ntext")

    def done() -> int:
        return int(json.loads(output_of(hung, "status", "--json")[1])["queue"]["done"])

    with subprocess.Popen([*ENGINE, "run"], env=hung, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        heard(process.stderr, "engine_started")
        until(lambda: done() == 1)
        named = until(lambda: (found := check_of(hung, "files"))["verdict"] == "warn" and found)
        assert "HUNG" in named["cause"]
        assert check_of(hung, "engine")["verdict"] == "ok"
        put(root, "later.md", "# A\ntext")
        until(lambda: done() == 2)
        Path(hung["HANG_WHILE"]).unlink()
        until(lambda: done() == 4)
        Path(hung["HANG_WHILE"]).touch()
        (root / "HUNG.md").write_text("# A\nanother text")
        until(lambda: check_of(hung, "files")["verdict"] == "warn")
        process.terminate()
        began = time.monotonic()
        process.wait(HANG_SECONDS)
        assert process.returncode == 0
        assert time.monotonic() - began < HANG_SECONDS / 2


class Gate:
    """Calls of which some do not return before they are let go."""

    def __init__(self, *hanging: str) -> None:
        self.hanging, self.let_go, self.seen = set(hanging), threading.Event(), list[str]()

    def look(self, name: str) -> str:
        self.seen.append(name)
        if name in self.hanging:
            self.let_go.wait(HANG_SECONDS)
        return name.upper()


def name_of(item: str) -> str:
    return item


async def test_calls_after_one_that_hangs_are_made_and_it_is_not_made_twice() -> None:
    gate, threads = Gate("b"), FileThreads(deadline_seconds=0.2)
    threads.slow_seconds = 0.01
    found = dict(await threads.all(["a", "b", "c"], gate.look, what="read", name=name_of))
    assert (found["a"], found["c"]) == ("A", "C")
    assert isinstance(found["b"], NoAnswer)
    assert [name for name, _ in threads.hung()] == ["b"]
    again = dict(await threads.all(["b", "d"], gate.look, what="read", name=name_of))
    assert isinstance(again["b"], NoAnswer)
    assert again["d"] == "D"
    assert gate.seen.count("b") == 1
    seen = threads.returned.value
    gate.let_go.set()
    with trio.fail_after(HANG_SECONDS):
        await threads.returned.wait_value(lambda value: value > seen)
    assert dict(await threads.all(["b"], gate.look, what="read", name=name_of)) == {"b": "B"}
    assert not threads.hung()


async def test_the_threads_that_hang_are_bounded_and_the_bound_is_named() -> None:
    names = [f"f{number}" for number in range(6)]
    gate, threads = Gate(*names[:4]), FileThreads(deadline_seconds=0.2, max_late=2)
    threads.slow_seconds = 0.01
    found = dict(await threads.all(names, gate.look, what="read", name=name_of))
    assert all(isinstance(error, NoAnswer) for error in found.values())
    assert "files and directories do not answer, among them 'f0'" in str(found["f5"])
    assert gate.seen == names[:2]
    gate.let_go.set()


async def test_a_call_that_raises_raises_for_its_caller() -> None:
    def fail(_name: str) -> str:
        raise KeyError

    with pytest.raises(KeyError):
        await FileThreads(deadline_seconds=1).all(["a"], fail, what="read", name=name_of)


async def test_who_is_cancelled_waits_for_no_call() -> None:
    gate, threads = Gate("a"), FileThreads(deadline_seconds=HANG_SECONDS)
    with trio.fail_after(HANG_SECONDS), trio.move_on_after(0.05):
        await threads.all(["a"], gate.look, what="read", name=name_of)
    gate.let_go.set()


async def test_a_call_waits_for_one_that_its_caller_gave_up_and_is_made() -> None:
    gate, threads = Gate("a"), FileThreads(deadline_seconds=HANG_SECONDS)
    with trio.fail_after(HANG_SECONDS):
        with trio.move_on_after(0.05):
            await threads.all(["a"], gate.look, what="read", name=name_of)
        async with trio.open_nursery() as nursery:
            found: dict[str, Any] = {}

            async def ask() -> None:
                found.update(await threads.all(["a", "b"], gate.look, what="read", name=name_of))

            nursery.start_soon(ask)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.05)
            gate.let_go.set()
    assert found == {"a": "A", "b": "B"}
    assert not threads.hung()


async def test_a_caller_that_gives_up_at_any_moment_leaves_no_call_behind() -> None:
    threads = FileThreads(deadline_seconds=HANG_SECONDS, max_late=2)
    with trio.fail_after(HANG_SECONDS):
        for number in range(300):
            with trio.move_on_after(number % 30 / 10_000):
                await threads.all(["a", "b"], lambda name: time.sleep(0.0005) or name, what="read", name=name_of)
            assert await threads.call(lambda: 1, what="read", name="a") == 1


async def test_the_result_of_a_call_that_is_over_is_there_without_a_wait() -> None:
    call: Call[str, int] = Call("a", "a", 10 * HANG_SECONDS, is_over=True, result=1)
    with trio.fail_after(HANG_SECONDS):
        assert await call.wait() == 1


async def test_a_call_waits_until_a_same_one_that_just_returned_is_forgotten() -> None:
    """Its thread says that it is over a moment before the event loop knows, and the loop must go on in that moment."""
    threads = FileThreads(deadline_seconds=HANG_SECONDS)
    earlier: Call[object, object] = Call("a", "a", HANG_SECONDS, is_over=True)
    threads._late["read", "a"] = earlier
    found: list[int] = []

    async def call() -> None:
        found.append(await threads.call(lambda: 1, what="read", name="a"))

    with trio.fail_after(HANG_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            assert not found
            earlier.over.set()
            threads._came_back("read", earlier)
    assert found == [1]


def test_a_directory_that_hangs_hides_no_other_outside_the_loop() -> None:
    gate, seen = Gate("b"), list[str]()

    def visit(name: str) -> list[str]:
        seen.append(gate.look(name))
        return ["b", "c"] if name == "a" else []

    assert visit_within(["a"], visit, seconds=0.2) == ["b"]
    assert sorted(seen) == ["A", "C"]
    with pytest.raises(NoAnswer):
        call_within(lambda: gate.look("b"), name="b", seconds=0.05)
    gate.let_go.set()
