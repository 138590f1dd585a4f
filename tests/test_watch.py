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
from typing import Any

import pytest
import trio

from everos_engine.engine import open_engine
from everos_engine.settings import load
from everos_engine.system import limits
from everos_engine.system.control import ask
from everos_engine.testing import FakeEmbedder
from writer import put

ENGINE = [sys.executable, "-m", "everos_engine"]


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
            for line in process.stderr:
                if "engine_started" in line:
                    break
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)


def wait_done(env: dict[str, str], count: int, *, seconds: float) -> None:
    """The only announced event of another process is its status."""
    until = time.monotonic() + seconds
    while (found := status(env))["queue"]["done"] != count:
        assert time.monotonic() < until, found
        time.sleep(0.3)


def notes(root: Path) -> dict[str, str]:
    pulse: Any = ask(root / ".index" / "engine" / "control.sock", "pulse", deadline_seconds=10)
    return {note["code"]: note["remedy"] for note in pulse["watch"]["notes"]}


def test_an_overflow_of_the_kernels_queue_is_made_good_and_named(root: Path) -> None:
    env, many = environment(root), 6000
    put(root, "n/first.md", "# A\nfirst")
    with running(root, env) as process:
        until = time.monotonic() + 30
        while not notes_watching(root):
            assert time.monotonic() < until
            time.sleep(0.05)
        wait_done(env, 1, seconds=30)
        os.kill(process.pid, signal.SIGSTOP)
        for number in range(many):
            put(root, f"n/{number}.md", f"# A\nword{number}")
        time.sleep(6)  # longer than a stall may be
        os.kill(process.pid, signal.SIGCONT)
        wait_done(env, many + 1, seconds=60)
        until = time.monotonic() + 30
        while "events_lost" not in notes(root):
            assert time.monotonic() < until
            time.sleep(0.3)
        assert "max_queued_events" in notes(root)["events_lost"]


def notes_watching(root: Path) -> bool:
    pulse: Any = ask(root / ".index" / "engine" / "control.sock", "pulse", deadline_seconds=10)
    return bool(pulse and pulse["watch"]["watching"])


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
        wait_done(env, 30, seconds=30)
        for number in range(150):
            put(root, f"later{number}/x.md", f"# A\nlate{number}")
        wait_done(env, 180, seconds=30)
        until = time.monotonic() + 30
        while "watch_limit" not in notes(root):
            assert time.monotonic() < until
            time.sleep(0.3)
        assert "max_user_watches" in notes(root)["watch_limit"]
        put(root, "later149/y.md", "# A\nlast")
        wait_done(env, 181, seconds=30)


async def test_a_replaced_root_is_watched_anew(root: Path) -> None:
    flags = {"memory.root": str(root), "scan_interval_seconds": 3600, "note.globs": ["**/*.md"], "brake_ratio": 1}
    settings = load(flags, environment={}, user_file=root / "none")
    put(root, "a/1.md", "# A\none")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        aside = root.with_name("aside")
        root.rename(aside)
        with trio.fail_after(30):
            while engine.desk.progress.watching:  # noqa: ASYNC110 - noticed on a beat
                await trio.sleep(0.1)
            aside.rename(root)
            while not engine.desk.progress.watching:  # noqa: ASYNC110 - laid in a thread
                await trio.sleep(0.1)
        put(root, "a/2.md", "# A\ntwo")
        with trio.fail_after(30):
            while (await engine.status()).counts.done < 2:
                await engine.desk.applied.wait_transition()


async def test_stopping_is_prompt(root: Path) -> None:
    settings = load({"memory.root": str(root)}, environment={}, user_file=root / "none")
    with trio.fail_after(4):
        async with open_engine(settings, embedder=FakeEmbedder()):
            pass


def test_the_watches_of_this_process_are_counted() -> None:
    counted = limits.own_watches()
    assert counted is None or counted >= 0


def test_mounts_that_stay_silent_are_polled() -> None:
    silent = limits.parse_mounts("36 35 98:0 / /mnt/c rw,noatime - 9p C: rw\n37 35 0:50 / /srv rw - nfs4 host:/x rw\n")
    assert [limits.delivers_events(mount) for mount in silent] == [False, False]
    assert shutil.which("sh")
