"""A watcher that is blind, late or limited says so, and nothing is missed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import trio
from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from derived import counted
from everos_engine.engine import open_engine
from everos_engine.loops import watcher
from everos_engine.loops.scanner import STALL_BEAT_SECONDS, STALL_SECONDS
from everos_engine.settings import Settings, load
from everos_engine.system import limits
from everos_engine.system.control import ask
from everos_engine.testing import FakeEmbedder
from patience import HANG_SECONDS, heard, until
from writer import put

ENGINE = [sys.executable, "-m", "everos_engine"]
STALL = STALL_BEAT_SECONDS + STALL_SECONDS + 0.1
"""A process that was stopped for so long notices it, wherever in its beat it was."""


def environment(root: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "EVEROS_ROOT": str(root),
        "EVEROS_EMBEDDER__KIND": "none",
        "EVEROS_NOTE__GLOBS": "**/*.md",
        "EVEROS_SCAN_INTERVAL_SECONDS": "600",
        "EVEROS_WATCH__POLL_INTERVAL_SECONDS": "1",
        "XDG_CONFIG_HOME": str(root),
        **more,
    }


def status(env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run([*ENGINE, "status", "--json"], env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def running(root: Path, env: dict[str, str], *, prefix: list[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A daemon that listens for changes."""
    with subprocess.Popen([*(prefix or []), *ENGINE, "run"], env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            heard(process.stderr, "engine_started")
            yield process
        finally:
            process.terminate()
            process.wait(HANG_SECONDS)


def wait_done(env: dict[str, str], count: int) -> None:
    """The only announced event of another process is its status."""
    until(lambda: status(env)["queue"]["done"] == count, every_seconds=0.3)


def watch_of(root: Path) -> dict[str, Any]:
    """What the engine says of its watching; nothing before it listens."""
    snapshot = ask(root / ".index" / "engine" / "control.sock", "pulse", deadline_seconds=HANG_SECONDS)
    found: Any = snapshot["watch"] if snapshot else {"watching": False, "conditions": []}
    return dict(found)


def notes(root: Path) -> dict[str, str]:
    return {note["code"]: note["remedy"] for note in watch_of(root)["conditions"]}


QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.mark.skipif(
    not 0 < int(QUEUE.read_text()) <= 16384, reason="the kernel's queue takes more than this test writes"
)
def test_an_overflow_of_the_kernels_queue_is_made_good_and_named(root: Path) -> None:
    env, many = environment(root), 12_000
    put(root, "n/first.md", "# A\nfirst")
    with running(root, env) as process:
        until(lambda: watch_of(root)["watching"])
        wait_done(env, 1)
        os.kill(process.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        for number in range(many):
            put(root, f"n/{number}.md", f"# A\nword{number}")
        time.sleep(max(0.0, stopped + STALL - time.monotonic()))
        os.kill(process.pid, signal.SIGCONT)
        wait_done(env, many + 1)
        remedy = until(lambda: notes(root).get("events_lost"))
        assert "max_queued_events" in str(remedy)


NAMESPACE = ["unshare", "-Ur", "sh", "-c", 'echo "$0" > /proc/sys/user/max_inotify_watches && exec "$@"']


@pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "25", "true"], capture_output=True, check=False).returncode != 0,
    reason="no user namespaces here",
)
@pytest.mark.parametrize("watches", [25, 150])
def test_a_limit_of_watches_is_named_and_everything_is_found_by_polling(watches: int, root: Path) -> None:
    """25 are reached when the watches are laid; 150 later, when directories are added."""
    env = environment(root)
    for number in range(30):
        put(root, f"d{number}/x.md", f"# A\nword{number}")
    with running(root, env, prefix=[*NAMESPACE, str(watches)]):
        wait_done(env, 30)
        for number in range(150):
            put(root, f"later{number}/x.md", f"# A\nlate{number}")
        wait_done(env, 180)
        remedy = str(until(lambda: notes(root).get("watch_limit")))
        assert "max_user_watches" in remedy
        assert "/proc/sys/user/max_inotify_watches" in remedy  # the bound that was hit
        put(root, "later149/y.md", "# A\nlast")
        wait_done(env, 181)
        if watches == 25:  # no event was ever heard of
            assert status(env)["found_by"] == {"watch": 0, "scan": 151, "scan_share": 1.0}


MOUNTINFO = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /proc/$$/mountinfo && exec "$@"']
"""Shows a process mounts that cannot be had here."""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0,
    reason="no mount namespaces here",
)
@pytest.mark.parametrize(
    ("point", "kind", "said"),
    [
        ("", "nfs4", "the memory root is on a network share"),
        ("/shared", "fuse.sshfs", "in the memory root is on a FUSE"),
    ],
)
def test_a_mount_that_stays_silent_is_named_and_polled_wherever_it_is(
    point: str, kind: str, said: str, tmp_path: Path
) -> None:
    root, told = tmp_path / "root", tmp_path / "mountinfo"
    put(root, "shared/x.md", "# A\nheron")
    told.write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n41 27 0:41 / {root}{point} rw - {kind} box:/ rw\n")
    env = environment(root)
    with running(root, env, prefix=[*MOUNTINFO, str(told)]):
        wait_done(env, 1)
        (note,) = [note for note in status(env)["conditions"] if note["code"] == "mount_silent"]
        assert said in note["message"]
        assert "scans every 1 s" in note["remedy"]


async def test_a_replaced_root_is_watched_anew(root: Path) -> None:
    flags = {"memory.root": str(root), "scan_interval_seconds": 3600, "note.globs": ["**/*.md"], "brake_ratio": 1}
    settings = load(flags, environment={}, user_file=root / "none")
    put(root, "a/1.md", "# A\none")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        aside = root.with_name("aside")
        root.rename(aside)
        with trio.fail_after(HANG_SECONDS):
            while engine.context.progress.watching:
                await trio.sleep(0.1)
            aside.rename(root)
            while not engine.context.progress.watching:
                await trio.sleep(0.1)
        put(root, "a/2.md", "# A\ntwo")
        await counted(engine, lambda counts: counts.done == 2)


async def test_stopping_waits_for_no_event(root: Path) -> None:
    settings = load({"memory.root": str(root)}, environment={}, user_file=root / "none")
    with trio.fail_after(HANG_SECONDS):
        async with open_engine(settings, embedder=FakeEmbedder()) as engine:
            while not engine.context.progress.watching:
                await trio.sleep(0.01)


def listening(root: Path) -> Settings:
    flags: dict[str, object] = {"memory.root": str(root), "scan_interval_seconds": 3600, "note.globs": ["**/*.md"]}
    return load(flags | {"watch.poll_interval_seconds": 0.2}, environment={}, user_file=root / "none")


async def test_names_that_are_not_utf8_end_no_watching(root: Path) -> None:
    async with open_engine(listening(root), embedder=FakeEmbedder()) as engine:
        await engine.settle()
        for number in range(1, 9):
            with trio.fail_after(HANG_SECONDS):
                while not engine.context.progress.watching and not engine.context.progress.polling:
                    await trio.sleep(0.01)
            Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9%d.txt" % number)).touch()
            put(root, f"{number}.md", "# A\ntext")
            await counted(engine, lambda counts, number=number: counts.done == number)  # type: ignore[misc]  # a default binds the value of this turn
        assert "watch_failed" in engine.context.conditions.now
        assert "caf\\xE9" in engine.context.conditions.now["watch_failed"].message


class Panic(BaseException):
    """As PyO3 raises a panic of Rust: no Exception."""


Point = Literal["new", "watch", "close"]


class Failing:
    """The library's class, whose next call at one point raises what is listed first."""

    point: Point
    errors: list[BaseException]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.fail("new")
        self.watches = RustNotify(*arguments, **named)

    def fail(self, at: Point) -> None:
        if at == self.point and self.errors:
            raise self.errors.pop(0)

    def watch(self, *arguments: Any) -> object:
        self.fail("watch")
        return self.watches.watch(*arguments)

    def close(self) -> None:
        self.watches.close()
        self.fail("close")


@pytest.mark.parametrize("point", ["new", "watch", "close"])
async def test_no_error_of_the_events_library_ends_the_engine(
    point: Point, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Failing.point = point
    Failing.errors = [
        WatchfilesRustInternalError("internal"), RuntimeError("RustNotify watcher closed"), Panic("called `unwrap`"), KeyError("unknown"),
        UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), MemoryError(), OverflowError(), OSError(5, "I/O"),
    ]  # fmt: skip
    del Failing.errors[3 if point == "close" else 99 :]
    monkeypatch.setattr(watcher, "RustNotify", Failing)
    monkeypatch.setattr(watcher, "RETRY_SECONDS", 1.0)
    many = len(Failing.errors)
    async with open_engine(listening(root), embedder=FakeEmbedder()) as engine:
        for number in range(1, many + 2):
            put(root, f"{number}.md", "# A\ntext")
            await counted(engine, lambda counts, number=number: counts.done == number)  # type: ignore[misc]  # a default binds the value of this turn
            if point == "close" and Failing.errors:  # the watches end where the root is another directory
                left = len(Failing.errors)
                root.rename(root.with_name("aside"))
                with trio.fail_after(HANG_SECONDS):
                    while engine.context.progress.watching:
                        await trio.sleep(0.05)
                    root.with_name("aside").rename(root)
                    while len(Failing.errors) == left and engine.context.progress.watching:
                        await trio.sleep(0.05)
        with trio.fail_after(HANG_SECONDS):
            while Failing.errors and point != "close":
                await trio.sleep(0.05)


class Recording(Failing):
    """The library's class, which writes down the steps it is asked to take."""

    point, errors = "new", []
    steps: list[int]

    def watch(self, *arguments: Any) -> object:
        self.steps.append(arguments[1])
        return super().watch(*arguments)


async def test_a_quiet_tree_is_looked_at_less_often_until_the_next_event(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recording.steps = steps = []
    monkeypatch.setattr(watcher, "RustNotify", Recording)
    monkeypatch.setattr(watcher, "QUIET_AFTER_MILLISECONDS", 100)
    async with open_engine(listening(root), embedder=FakeEmbedder()) as engine:
        for number in (1, 2):
            with trio.fail_after(HANG_SECONDS):
                while not steps or steps[-1] != watcher.QUIET_STEP_MILLISECONDS:
                    await trio.sleep(0.05)
            quiet = len(steps)
            put(root, f"{number}.md", "# A\ntext")
            await counted(engine, lambda counts, number=number: counts.done == number)  # type: ignore[misc]  # a default binds the value of this turn
            with trio.fail_after(HANG_SECONDS):  # a scan may have been faster than the event
                while watcher.STEP_MILLISECONDS not in steps[quiet:]:
                    await trio.sleep(0.05)


def test_the_watches_of_this_process_are_counted() -> None:
    counted = limits.own_watches()
    assert counted is None or counted >= 0


def test_mounts_that_stay_silent_are_polled() -> None:
    silent = limits.parse_mounts("36 35 98:0 / /mnt/c rw,noatime - 9p C: rw\n37 35 0:50 / /srv rw - nfs4 host:/x rw\n")
    assert [limits.delivers_events(mount) for mount in silent] == [False, False]
    assert shutil.which("sh")
