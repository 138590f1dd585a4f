"""The daemon as a process: one per root, commands beside it, signals, and a clean end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lancedb
import pytest

from everos_engine.diagnose.engine_state import process_state
from patience import HANG_SECONDS, heard, until
from writer import FACTS, fact, facts, put

MAY_BE_NOBODY = os.geteuid() == 0 and all(
    folder.stat().st_mode & 0o001 for folder in Path(os.path.realpath(sys.executable)).parents
)
ENGINE = [sys.executable, "-m", "everos_engine"]


def environment(root: Path, **more: str) -> dict[str, str]:
    own = {"EVEROS_ROOT": str(root), "EVEROS_EMBEDDER__KIND": "none", "XDG_CONFIG_HOME": str(root)}
    own["EVEROS_SHUTDOWN_GRACE_SECONDS"] = str(HANG_SECONDS)  # a busy machine is no reason to stop ungracefully
    return {**os.environ, **own, **more}


class Daemon(subprocess.Popen[str]):
    """Once it serves; what it says after that is kept."""

    def __init__(self, root: Path, *flags: str, **more: str) -> None:
        super().__init__([*ENGINE, "run", *flags], env=environment(root, **more), stderr=subprocess.PIPE, text=True)
        assert self.stderr is not None
        self._told = heard(self.stderr, "engine_started")

    def ended(self) -> tuple[int, str]:
        """Its exit status, and its log since it served."""
        return self.wait(HANG_SECONDS), self._told()


@contextmanager
def running(root: Path, *flags: str, **more: str) -> Iterator[Daemon]:
    with Daemon(root, *flags, **more) as process:
        try:
            yield process
        finally:
            process.kill()
            process.ended()


def command(root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ENGINE, *words],
        env=environment(root, **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_engine_well(number: signal.Signals, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "one")))
    with running(root) as process:
        process.send_signal(number)
        status, log = process.ended()
        assert (status, "engine_stopped" in log, "Traceback" in log) == (0, True, False)
    assert "not running" in command(root, "status").stdout


def test_a_second_run_names_the_first_and_leaves_it_alone(root: Path) -> None:
    with running(root) as process:
        second = command(root, "run")
        assert second.returncode == 2
        assert f"pid {process.pid}" in second.stderr
        assert process.poll() is None


def test_commands_beside_a_running_engine_hand_their_work_over(root: Path) -> None:
    path = put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter", timestamp="yesterday")))
    flags = {"EVEROS_WATCH__MODE": "off", "EVEROS_SCAN_INTERVAL_SECONDS": "3600"}
    with running(root, **flags):
        first = command(root, "sync")
        assert first.returncode == 1
        assert f"{FACTS}: failed retryable=FALSE" in first.stdout
        path.write_text(facts(fact(1, "heron"), fact(2, "badger")))
        named = command(root, "sync", FACTS)
        assert (named.returncode, named.stdout) == (0, f"{FACTS}: done\n")
        found = json.loads(command(root, "search", "badger", "--json").stdout)
        assert [hit["entry_id"] for hit in found] == ["af_20250227_00000002"]
        assert command(root, "fix", "--apply").returncode == 0
        outside = command(root, "sync", "/etc/hosts.md")
        assert outside.returncode == 2
        assert "outside the memory root" in outside.stderr
        path.unlink()
        assert command(root, "sync", FACTS).stdout == f"{FACTS}: no such file; no rows of it are left\n"


def test_a_path_is_meant_from_the_root_or_from_where_one_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    below = "/".join(FACTS.split("/")[2:])
    monkeypatch.chdir(root / FACTS.removesuffix(below))
    for named in (below, FACTS):
        done = command(root, "sync", named)
        assert (done.returncode, done.stdout) == (0, f"{FACTS}: done\n")


def test_a_command_that_reports_logs_nothing_that_it_says_itself(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter", timestamp="yesterday")))
    done = command(root, "sync")
    assert (done.returncode, "timestamp must be" in done.stdout, done.stderr) == (1, True, "")
    asked = command(root, "sync", FACTS, EVEROS_LOG_FORMAT="json")
    assert "change_failed" in asked.stderr


@pytest.mark.parametrize("words", [["sync"], ["search", "x"], ["fix", "--apply"], ["release"], ["sync", "--audit"]])
def test_a_root_that_is_not_there_is_not_made_by_asking(words: list[str], root: Path) -> None:
    missing = root / "misspelt"
    done = command(root, "--root", str(missing), *words)
    assert (done.returncode, "does not exist" in done.stderr, missing.exists()) == (2, True, False)


@pytest.mark.parametrize("word", ["run", "sync", "status"])
def test_a_root_that_is_a_file_is_refused_or_never_indexed(word: str, root: Path) -> None:
    (root / "file").touch()
    done = command(root, "--root", str(root / "file"), word)
    assert "Traceback" not in done.stderr
    assert ("is no directory" in done.stderr) is (word != "status")


@pytest.mark.skipif(not MAY_BE_NOBODY, reason="needs root, to become somebody else who can reach this Python")
@pytest.mark.parametrize("access", ["owner", "group"])
def test_another_user_of_the_group_may_read_what_failed_and_nobody_else_anything(access: str, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter", timestamp="yesterday")))
    if access == "group":
        os.chown(root, -1, 65534)
        root.chmod(0o2755)
    shared = {"EVEROS_MEMORY__INDEX_ACCESS": access}
    assert command(root, "sync", **shared).returncode == 1
    for directory in (root, *root.parents):
        if str(directory).startswith(tempfile.gettempdir()):
            directory.chmod(directory.stat().st_mode & 0o2000 | 0o755)

    def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*ENGINE, *words],
            env=environment(root) | shared,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            user=65534,
            group=65534,
            extra_groups=[],
        )

    if access == "owner":
        for words in (["status"], ["fix"], ["explain", FACTS], ["sync"], ["search", "heron"]):
            done = as_nobody(*words)
            assert (done.returncode, "as the user the engine runs as" in done.stderr) == (2, True), done
        return
    status = json.loads(as_nobody("status", "--json").stdout)
    assert (status["rows"], status["engine"]["state"]) == ({"atomic_fact": 1}, "absent")
    assert "timestamp must be" in as_nobody("fix").stdout
    assert "heron" in as_nobody("search", "heron").stdout
    for words in (["sync"], ["run"], ["fix", "--apply"]):
        done = as_nobody(*words)
        assert (done.returncode, "as the user the engine runs as" in done.stderr) == (2, True), done.stderr
    with running(root, **shared) as process:
        assert json.loads(as_nobody("status", "--json").stdout)["engine"]["pid"] == process.pid


def test_log_lines_are_json_where_asked(root: Path) -> None:
    with running(root, "--log-format", "json") as process:
        process.terminate()
        _, log = process.ended()
    assert "engine_stopped" in log
    assert all(json.loads(line)["record"]["level"]["name"] for line in log.splitlines())


def test_a_signal_ends_the_engine_in_the_midst_of_work_and_nothing_is_lost(root: Path) -> None:
    for number in range(300):
        put(root, f"users/u1/.atomic_facts/{number}.md", facts(fact(number, f"word{number}")))
    with running(root) as process:
        process.terminate()
        assert process.ended()[0] == 0
    assert command(root, "sync").returncode == 0
    assert json.loads(command(root, "status", "--json").stdout)["rows"] == {"atomic_fact": 300}


STUCK = """
import os, signal, sys, trio
from everos_engine import load, run, settings
from everos_engine.cli import run as daemon
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
class Stuck:
    async def __aenter__(self): interrupt()
    async def __aexit__(self, *_):
        if sys.argv[1] == "twice": interrupt()
        with trio.CancelScope(shield=True): await trio.sleep_forever()
daemon.open_engine = lambda _: Stuck()
daemon.show_status = None
run(load({"memory.root": sys.argv[2], "shutdown_grace_seconds": float(sys.argv[3])}, environment={}))
"""


@pytest.mark.parametrize(("times", "grace"), [("twice", "3600"), ("once", "1")])
def test_a_second_signal_or_the_end_of_grace_stops_at_once(times: str, grace: str, root: Path) -> None:
    command = [sys.executable, "-c", STUCK, times, str(root), grace]
    done = subprocess.run(command, capture_output=True, check=False, timeout=HANG_SECONDS)
    assert done.returncode == 130


def test_a_search_that_cannot_find_anything_is_refused_with_the_reason(root: Path) -> None:
    nothing = command(root, "search", "?!")
    assert (nothing.returncode, "no word" in nothing.stderr) == (2, True)
    unknown = command(root, "search", "x", "--kind", "nope")
    assert (unknown.returncode, "choose one of episode" in unknown.stderr) == (2, True)


def test_sync_beside_a_stopped_process_says_so_instead_of_waiting(root: Path) -> None:
    with running(root, EVEROS_WATCH__MODE="off", EVEROS_SCAN_INTERVAL_SECONDS="3600") as process:
        put(root, FACTS, facts(fact(1, "one")))
        process.send_signal(signal.SIGSTOP)
        done = command(root, "sync", FACTS)
        assert (done.returncode, "does not answer" in done.stderr) == (2, True)
        process.send_signal(signal.SIGCONT)
        assert command(root, "sync").returncode == 0


STOPS_IN_A_TRANSACTION = """
import signal, sys, threading, trio
from everos_engine.engine import open_engine
from everos_engine.settings import load

def stop(tx):
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread goes no further

async def main():
    async with open_engine(load({"memory.root": sys.argv[1]})) as engine:
        await engine.settle()
        await engine.context.database.awrite(stop)
        print("moves", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


def test_a_command_beside_a_process_stopped_inside_a_transaction_says_so(root: Path) -> None:
    settled = {"EVEROS_WATCH__MODE": "off", "EVEROS_SCAN_INTERVAL_SECONDS": "3600"}
    script = [sys.executable, "-c", STOPS_IN_A_TRANSACTION, str(root)]
    with subprocess.Popen(script, env=environment(root, **settled), stdout=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: process_state(process.pid) == "T")
            put(root, FACTS, facts(fact(1, "one")))
            done = command(root, "sync", FACTS)
            assert (done.returncode, "does not answer" in done.stderr, "queued" in done.stderr) == (2, True, True)
            process.send_signal(signal.SIGCONT)
            assert process.stdout is not None
            assert process.stdout.readline() == "moves\n"
            assert command(root, "sync").returncode == 0
        finally:
            process.kill()


def test_a_command_that_writes_leaves_tables_whose_indexes_cover_them(root: Path) -> None:
    put(root, FACTS, facts(*(fact(number, f"heron {number}") for number in range(100))))
    assert command(root, "sync").returncode == 0

    async def uncovered() -> int:
        table = await (await lancedb.connect_async(root / ".index" / "lancedb")).open_table("atomic_fact")
        statistics = await table.index_stats("fact_idx")
        assert statistics is not None
        return int(statistics.num_unindexed_rows)

    assert asyncio.run(uncovered()) == 0


SEARCHES = """
import sys
from everos_engine.cli.main import main
status = main(["search", *sys.argv[1:]])
sys.exit(100 if "lancedb" in sys.modules else status)
"""


def test_a_search_beside_a_running_engine_is_the_engines_and_loads_nothing(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "the heron eats fish"), fact(2, "the otter sleeps")))
    command(root, "sync")
    questions = [["heron otter"], ["otter", "--json"], ["heron", "--owner", "nobody"], ["fish", "--limit", "1"]]
    alone = [command(root, "search", *words).stdout for words in questions]
    assert "the heron eats fish" in alone[0]
    with running(root):
        for words, expected in zip(questions, alone, strict=True):
            script = [sys.executable, "-c", SEARCHES, *words]
            beside = subprocess.run(script, env=environment(root), capture_output=True, text=True, check=True)
            assert beside.stdout == expected
        assert "no kind 'nonsense'" in command(root, "search", "heron", "--kind", "nonsense").stderr
