"""Planted causes: `doctor` or `explain` names each, and its remedy, followed literally in a shell, ends it."""

from __future__ import annotations

import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from everos_engine.diagnose.checkup import survey
from everos_engine.diagnose.wording import commands_in
from everos_engine.engine import open_engine
from everos_engine.loops.fd_guard import LAW
from everos_engine.settings import Settings, load
from everos_engine.stores import meta
from everos_engine.stores.database import Database
from everos_engine.stores.reports import Outcome
from patience import HANG_SECONDS, heard, until
from writer import FACTS, fact, facts, put

GOOD = facts(fact(1, "the heron eats fish"), fact(2, "the otter sleeps"))
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")


@dataclass
class Shell:
    """A person at a terminal: every command is a process of its own, under one environment and one ulimit."""

    root: Path
    bin: Path
    environment: dict[str, str] = field(default_factory=dict)
    before: str = ":"
    powerless: bool = False

    def run(self, command: str, *, check: bool = False) -> subprocess.CompletedProcess[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EVEROS_")},
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "XDG_CONFIG_HOME": str(self.bin),
            "NO_COLOR": "1",
            **self.environment,
        }
        return subprocess.run(
            ["bash", "-c", f"{self.before}\n{command}"],
            env=environment, capture_output=True, text=True, check=check, timeout=HANG_SECONDS,
        )  # fmt: skip

    def engine(self, *words: str) -> subprocess.CompletedProcess[str]:
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        return self.run(f"everos-engine --root '{self.root}' {quoted}")

    def doctor(self, *names: str) -> dict[str, dict[str, object]]:
        done = self.engine("doctor", "--json", *names)
        assert done.stdout, done.stderr
        told = json.loads(done.stdout)
        worst = {"ok": 0, "warn": 1, "fail": 2}[told["verdict"]]
        assert done.returncode == worst, done.stderr
        return {check["name"]: check for check in told["checks"]}

    def explain(self, path: str | Path) -> dict[str, object]:
        done = self.engine("explain", "--json", str(path))
        assert done.stdout, done.stderr
        told: dict[str, object] = json.loads(done.stdout)
        assert (done.returncode == 0) == (told["verdict"] == "searchable")
        return told

    def verdict(self, name: str) -> object:
        return self.doctor(name)[name]["verdict"]

    def follow(self, told: dict[str, object], *, which: Callable[[str], bool] = lambda _: True) -> list[str]:
        """Type in the commands of a remedy, in their order. One that starts an engine to stay is started so."""
        commands = told["commands"]
        assert isinstance(commands, list)
        chosen = [command for command in commands if which(command)]
        assert chosen, told
        for command in chosen:
            if command.startswith(("export ", "ulimit ")):
                self.before += f"\n{command}"
                continue
            done = self.run(command)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        return chosen

    @contextmanager
    def running(self, *, wait: bool = True) -> Iterator[subprocess.Popen[str]]:
        """An engine at work; ended with the block."""
        environment = {**os.environ, **self.environment, "EVEROS_LOG_LEVEL": "INFO", "XDG_CONFIG_HOME": str(self.bin)}
        command = f"{self.before}\nexec {self.bin / 'everos-engine'} --root '{self.root}' run --log-format text"
        process = subprocess.Popen(["bash", "-c", command], env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            heard(process.stderr, "engine_started")
            if wait:
                assert self.engine("sync").returncode in {0, 1}
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(timeout=HANG_SECONDS)
            process.stderr.close()


@pytest.fixture
def shell(root: Path, tmp_path: Path) -> Shell:
    """A root with one good file, in step, without an embedder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "everos-engine"
    source = Path(__file__).parents[1] / "engine"
    program.write_text(f"#!/bin/sh\nPYTHONPATH='{source}' exec '{sys.executable}' -m everos_engine \"$@\"\n")
    program.chmod(0o755)
    found = Shell(root, folder, {"EVEROS_EMBEDDER__KIND": "none"})
    put(root, FACTS, GOOD)
    return found


def in_step(shell: Shell) -> Shell:
    """What `everos-engine sync` does, without waiting for another process to import LanceDB."""
    if shell.powerless:
        done = shell.engine("sync")
        assert done.returncode == 0, done.stderr
        return shell
    settings = load({"memory.root": str(shell.root)}, environment=shell.environment, user_file=shell.bin / "none.toml")

    async def sync() -> list[Outcome]:
        async with open_engine(settings, watching=False) as engine:
            return await engine.sync()

    assert trio.run(sync) == []
    return shell


def sync_only(command: str) -> bool:
    return " sync" in command


# --- causes in a file: explain names them -----------------------------------------------------------------------------


def test_cause_1_bad_yaml_is_named_with_its_line_and_mended_by_an_edit(shell: Shell) -> None:
    in_step(shell)
    path = put(shell.root, FACTS, GOOD.replace("user_id: u1", "user_id: [u1"))
    assert shell.engine("sync").returncode == 1
    told = shell.explain(FACTS)
    assert (told["verdict"], told["code"]) == ("failed", "damaged")
    assert re.match(r"line \d", str(told["cause"]))
    assert "still searchable: 2 last good rows" in str(told["cause"])
    check = shell.doctor("failed")["failed"]
    assert (check["verdict"], FACTS in str(check["cause"])) == ("warn", True)
    path.write_text(GOOD)  # "... and save"
    shell.follow(shell.explain(FACTS), which=sync_only)
    assert shell.explain(FACTS)["verdict"] == "searchable"
    assert shell.verdict("failed") == "ok"


def test_cause_2_a_file_of_no_kind_is_moved_where_it_belongs(shell: Shell) -> None:
    in_step(shell)
    path = put(shell.root, "users/u1/episode/today.md", "---\nuser_id: u1\n---\n")
    told = shell.explain(path)
    assert (told["verdict"], told["code"]) == ("excluded", "no_layout")
    shell.follow(told)
    assert shell.explain("users/u1/episodes/today.md")["code"] == "not_seen"


def test_cause_3_plain_markdown_becomes_a_note(shell: Shell) -> None:
    in_step(shell)
    put(shell.root, "plans/tea.md", "# Tea\n\nOolong in the morning.\n")
    told = shell.explain("plans/tea.md")
    assert (told["verdict"], told["code"]) == ("excluded", "no_glob")
    shell.follow(told)
    in_step(shell)
    assert shell.explain("plans/tea.md")["verdict"] == "searchable"


def test_cause_4_a_file_too_large_is_indexed_once_the_bound_is_raised(shell: Shell) -> None:
    shell.environment["EVEROS_MAX_FILE_BYTES"] = "4KB"
    text = facts(*(fact(number, "x" * 100) for number in range(30)))
    put(shell.root, FACTS, text)
    assert shell.engine("sync").returncode == 1
    told = shell.explain(FACTS)
    assert (told["verdict"], told["code"]) == ("failed", "too_large")
    assert f"{len(text):,} bytes" in str(told["cause"])
    shell.follow(told)
    assert shell.explain(FACTS)["rows"] == {"ledger": 30, "index": None}


def test_cause_5_a_file_that_may_not_be_read_is_given_permission(shell: Shell) -> None:
    path = shell.root / FACTS
    person = unprivileged(shell)
    in_step(person)
    path.chmod(0o000)
    assert person.engine("sync").returncode == 1
    told = person.explain(FACTS)
    assert (told["verdict"], told["code"]) == ("failed", "unreadable")
    check = person.doctor("root")["root"]
    assert check["verdict"] == "warn"
    assert check["commands"] == told["commands"]
    person.follow(check)
    in_step(person)
    assert person.explain(FACTS)["verdict"] == "searchable"


def test_cause_6_a_directory_that_may_not_be_read_is_given_permission(shell: Shell) -> None:
    person = unprivileged(shell)
    in_step(person)
    (shell.root / "users").chmod(0o000)
    check = person.doctor("root")["root"]
    assert check["verdict"] == "fail"
    assert "1 directory cannot be read" in str(check["cause"])
    assert person.explain(FACTS)["verdict"] in {"failed", "held"}
    person.follow(check)
    assert person.verdict("root") == "ok"
    assert person.explain(FACTS)["verdict"] == "searchable"


def test_cause_6_a_root_that_may_not_be_entered_is_given_permission(shell: Shell) -> None:
    person = in_step(unprivileged(shell))
    shell.root.chmod(0o000)
    for words in (["doctor"], ["status"], ["explain", FACTS], ["sync"]):
        done = person.engine(*words)
        assert (done.returncode, "may not be entered by uid" in done.stderr) == (2, True), done
    (command,) = commands_in(done.stderr)
    assert person.run(command).returncode == 0
    assert person.verdict("root") == "ok"
    assert person.explain(FACTS)["verdict"] == "searchable"


def test_cause_6_an_index_that_may_not_be_written_is_given_permission(shell: Shell) -> None:
    person = in_step(unprivileged(shell))
    folder = shell.root / ".index" / "engine"
    folder.chmod(0o500)
    put(shell.root, FACTS, facts(fact(3, "a third")))
    check = person.doctor("permissions")["permissions"]
    assert check["verdict"] == "fail"
    assert str(folder) in str(check["cause"])
    person.follow(check)
    assert person.verdict("permissions") == "ok"
    in_step(person)
    assert person.explain(FACTS)["verdict"] == "searchable"


def unprivileged(shell: Shell) -> Shell:
    """The same person without root's power to read everything."""
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv, to give up root's powers")
        powers = "-dac_override,-dac_read_search"
        real = shell.bin / "everos-engine"
        real.rename(shell.bin / "real")
        real.write_text(
            f"#!/bin/sh\nexec setpriv --bounding-set={powers} --inh-caps={powers} '{shell.bin / 'real'}' \"$@\"\n"
        )
        real.chmod(0o755)
        shell.powerless = True
    return shell


# --- causes in the engine and its queue -------------------------------------------------------------------------------


def test_cause_7_an_engine_that_is_not_running_is_started(shell: Shell) -> None:
    told = shell.explain(FACTS)
    assert (told["verdict"], told["code"]) == ("waiting", "not_seen")
    assert "no engine is running" in str(told["cause"])
    check = shell.doctor("engine")["engine"]
    assert check["verdict"] == "warn"
    shell.follow(check, which=sync_only)
    assert shell.explain(FACTS)["verdict"] == "searchable"
    run = next(command for command in check["commands"] if command.endswith(" run"))  # type: ignore[attr-defined]
    assert run == f"everos-engine --root '{shell.root}' run"
    with shell.running():
        assert shell.verdict("engine") == "ok"


def test_cause_8_a_stopped_engine_is_let_go_on(shell: Shell) -> None:
    with shell.running() as process:
        process.send_signal(signal.SIGSTOP)
        path = put(shell.root, "users/u2/.atomic_facts/atomic_fact-2025-02-27.md", GOOD.replace(": u1", ": u2"))
        check = shell.doctor("engine")["engine"]
        assert check["verdict"] == "fail"
        assert f"pid {process.pid} does not answer" in str(check["cause"])
        told = shell.explain(path)
        assert "is stopped" in str(told["cause"])
        assert told["commands"] == check["commands"]
        shell.follow(check)
        assert shell.engine("sync").returncode == 0
        assert shell.verdict("engine") == "ok"
        assert shell.explain(path)["verdict"] == "searchable"


def test_cause_9_deletions_held_by_the_brake_are_released(shell: Shell) -> None:
    keys = [f"users/u1/.atomic_facts/atomic_fact-2025-01-{day:02}.md" for day in range(1, 29)]
    for number, key in enumerate(keys):
        put(shell.root, key, facts(fact(number, f"fact {number}")))
    in_step(shell)
    for key in keys:
        (shell.root / key).unlink()
    shell.engine("sync")
    told = shell.explain(keys[0])
    assert (told["verdict"], told["code"]) == ("held", "held")
    check = shell.doctor("held")["held"]
    assert check["verdict"] == "warn"
    assert "28 deletions" in str(check["cause"])
    assert told["commands"] == check["commands"]
    shell.follow(check)
    assert shell.verdict("held") == "ok"
    assert shell.explain(keys[0])["verdict"] == "missing"


def test_cause_10_a_damaged_database_is_made_again(shell: Shell) -> None:
    in_step(shell)
    database = shell.root / ".index" / "engine" / "engine.db"
    content = bytearray(database.read_bytes())
    content[:16] = b"no database here"
    database.write_bytes(content)
    assert shell.explain(FACTS)["code"] == "database"
    check = shell.doctor("queue")["queue"]
    assert check["verdict"] == "fail"
    shell.follow(check)
    assert shell.verdict("queue") == "ok"
    assert shell.explain(FACTS)["verdict"] == "searchable"


def test_cause_10_damage_inside_the_database_is_found_too(shell: Shell) -> None:
    in_step(shell)
    database = shell.root / ".index" / "engine" / "engine.db"
    content = bytearray(database.read_bytes())
    content[4096 * 2 : 4096 * 6] = random.Random(0).randbytes(4096 * 4)
    database.write_bytes(content)
    check = shell.doctor("queue")["queue"]
    assert check["verdict"] == "fail"
    shell.follow(check)
    assert shell.verdict("queue") == "ok"


# --- causes in the index ----------------------------------------------------------------------------------------------


def test_cause_11_a_removed_index_directory_is_made_again(shell: Shell) -> None:
    in_step(shell)
    shutil.rmtree(shell.root / ".index" / "lancedb")
    told = shell.explain(FACTS)
    assert (told["verdict"], told["code"]) == ("waiting", "table_gone")
    check = shell.doctor("index")["index"]
    assert check["verdict"] == "fail"
    assert "with 2 rows" in str(check["cause"])
    shell.follow(check)
    assert shell.verdict("index") == "ok"
    assert shell.explain(FACTS)["verdict"] == "searchable"


def test_rows_removed_under_a_running_engine_are_written_again_by_sync(shell: Shell) -> None:
    import asyncio

    import lancedb

    async def remove() -> None:
        connection = await lancedb.connect_async(str(shell.root / ".index" / "lancedb"))
        table = await connection.open_table("atomic_fact")
        await table.delete("true")

    shell.environment["EVEROS_SCAN_INTERVAL_SECONDS"] = "3600"
    with shell.running():
        asyncio.run(remove())
        assert shell.engine("sync").returncode == 0
        assert shell.engine("explain", "--rows", FACTS).stdout.count("2 counted in the index") == 1


def test_cause_11_an_index_removed_under_a_running_engine_is_made_again(shell: Shell) -> None:
    shell.environment["EVEROS_SCAN_INTERVAL_SECONDS"] = "3600"
    with shell.running():
        shutil.rmtree(shell.root / ".index" / "lancedb")
        told = shell.explain(FACTS)
        assert (told["verdict"], told["code"]) == ("waiting", "table_gone")
        check = shell.doctor("index")["index"]
        assert check["commands"] == told["commands"]
        shell.follow(check)
        assert shell.explain(FACTS)["verdict"] == "searchable"
        assert shell.verdict("index") == "ok"
    assert shell.engine("explain", "--rows", FACTS).stdout.count("2 counted in the index") == 1


def test_cause_12_a_foreign_table_under_our_name_is_removed_and_made_again(shell: Shell) -> None:
    make = (
        "import sys, lancedb; from urllib.parse import quote; "
        "lancedb.connect('file-object-store://' + quote(sys.argv[1])).create_table('atomic_fact', data=[{'fact': 'x', 'n': 1}])"
    )
    lancedb = shell.root / ".index" / "lancedb"
    lancedb.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", make, str(lancedb)], check=True, timeout=HANG_SECONDS)
    assert shell.engine("sync").returncode == 2
    check = shell.doctor("index")["index"]
    assert check["verdict"] == "fail"
    assert "schema drift" in str(check["cause"])
    assert "'n'" in str(check["cause"])
    shell.follow(check)
    assert shell.verdict("index") == "ok"
    assert shell.explain(FACTS)["verdict"] == "searchable"


def test_cause_12_a_table_whose_manifest_is_torn_is_made_again(shell: Shell) -> None:
    in_step(shell)
    newest = sorted((shell.root / ".index" / "lancedb" / "atomic_fact.lance" / "_versions").iterdir())
    for manifest in newest:
        manifest.write_bytes(b"torn")
    check = shell.doctor("index")["index"]
    assert check["verdict"] == "fail"
    assert "cannot be read" in str(check["cause"])
    shell.follow(check)
    assert shell.verdict("index") == "ok"


# --- causes in the embedder -------------------------------------------------------------------------------------------


class Service:
    """An OpenAI-compatible service on loopback, as wide as it is told, that can be away."""

    def __init__(self, dimension: int) -> None:
        service = self
        self.dimension = dimension
        self.status = 200
        self.poison = "no such word"

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                data = [
                    {"index": at, "embedding": [float(len(text) % 7), *([1.0] * (service.dimension - 1))]}
                    for at, text in enumerate(asked["input"])
                ]
                status = 500 if any(service.poison in text for text in asked["input"]) else service.status
                body = json.dumps({"data": data}).encode() if status == 200 else b"{}"
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service(8)
    yield found
    found.server.shutdown()
    found.server.server_close()


def with_service(shell: Shell, service: Service, **more: str) -> Shell:
    shell.environment |= {
        "EVEROS_EMBEDDER__KIND": "http",
        "EVEROS_EMBEDDER__URL": service.url,
        "EVEROS_EMBEDDER__MODEL": "m",
        "EVEROS_WORKER_RETRY_BACKOFF_SECONDS": "1",
        **more,
    }
    return shell


def test_cause_13_an_embedder_that_is_down_is_named_until_it_answers(shell: Shell, service: Service) -> None:
    service.status = 503
    with_service(shell, service)
    with shell.running(wait=False):
        path = shell.root / FACTS
        until(lambda: shell.explain(path)["code"] == "embedder_down")
        assert "503" in str(shell.explain(path)["cause"])
        checks = shell.doctor("embedder", "backlog")
        assert checks["embedder"]["verdict"] == "fail"
        assert "503" in str(checks["embedder"]["cause"])
        assert checks["backlog"]["verdict"] == "warn"
        service.status = 200  # "start it"
        shell.follow(checks["embedder"], which=sync_only)
        assert shell.verdict("embedder") == "ok"
        assert shell.explain(path)["verdict"] == "searchable"


def test_cause_14_a_change_that_used_up_its_attempts_is_tried_again(shell: Shell, service: Service) -> None:
    service.poison = "otter"
    with_service(shell, service, EVEROS_WORKER_MAX_RETRY="1", EVEROS_WORKER_RETRY_BACKOFF_SECONDS="0.01")
    assert shell.engine("sync").returncode == 1
    told = shell.explain(FACTS)
    assert (told["verdict"], told["code"]) == ("failed", "dead_letter")
    check = shell.doctor("failed")["failed"]
    assert check["verdict"] == "warn"
    assert "used up their attempts" in str(check["cause"])
    service.poison = "no such word"  # "once that is mended"
    assert check["commands"] == told["commands"]
    shell.follow(check)
    assert shell.verdict("failed") == "ok"
    assert shell.explain(FACTS)["verdict"] == "searchable"


def test_cause_15_an_embedder_of_another_width_is_named_with_the_setting(shell: Shell, service: Service) -> None:
    with_service(shell, service, EVEROS_EMBEDDER__DIMENSION="16", EVEROS_WORKER_MAX_RETRY="0")
    check = shell.doctor("embedder")["embedder"]
    assert check["verdict"] == "fail"
    assert "8 wide, and embedder.dimension is 16" in str(check["cause"])
    shell.follow(check)
    assert shell.verdict("embedder") == "ok"
    assert shell.explain(FACTS)["verdict"] == "searchable"


def test_cause_15_vectors_of_another_model_are_named_and_made_again(shell: Shell, service: Service) -> None:
    in_step(with_service(shell, service))
    assert shell.verdict("embedder") == "ok"
    service.dimension = 12
    check = shell.doctor("embedder")["embedder"]
    assert check["verdict"] == "warn"
    assert "atomic_fact come from another model" in str(check["cause"])
    shell.follow(check)
    assert shell.verdict("embedder") == "ok"
    assert shell.verdict("index") == "ok"
    assert shell.explain(FACTS)["verdict"] == "searchable"


# --- causes in the machine --------------------------------------------------------------------------------------------


def test_cause_16_files_saved_in_the_future_are_given_todays_time(shell: Shell) -> None:
    path = shell.root / FACTS
    ahead = time.time() + 86_400
    os.utime(path, (ahead, ahead))
    check = shell.doctor("clock")["clock"]
    assert check["verdict"] == "warn"
    assert str(path) in str(check["cause"])
    shell.follow(check)
    assert shell.verdict("clock") == "ok"


def test_cause_17_a_low_descriptor_limit_is_raised(shell: Shell) -> None:
    shell.before = "ulimit -n 60"
    check = shell.doctor("descriptors")["descriptors"]
    assert check["verdict"] == "fail"
    assert "limit is 60" in str(check["cause"])
    shell.before = ":"  # "... a new shell"
    shell.follow(check)
    assert shell.verdict("descriptors") == "ok"


def test_cause_17_a_cap_that_does_not_fit_the_limit_is_named_with_the_arithmetic(shell: Shell) -> None:
    shell.environment |= {"EVEROS_LANCEDB__DESCRIPTOR_MODE": "pinned", "EVEROS_LANCEDB__INDEX_CACHE_SIZE_BYTES": "16MB"}
    shell.before = "ulimit -n 1024"
    check = shell.doctor("descriptors")["descriptors"]
    assert check["verdict"] == "fail"
    assert "the engine would not start" in str(check["cause"])
    shell.before = ":"  # "... a new shell"
    shell.follow(check)
    assert shell.verdict("descriptors") == "ok"


def test_cause_18_too_few_watches_are_raised(shell: Shell) -> None:
    for number in range(30):
        (shell.root / "users" / f"u{number}").mkdir(exist_ok=True)
    inside = (
        f"echo 25 > /proc/sys/user/max_inotify_watches; everos-engine --root '{shell.root}' doctor --offline --json"
    )
    if shell.run("unshare -Ur true").returncode:
        pytest.skip("no user namespaces here")
    done = shell.run(f'unshare -Ur bash -c "{inside}"')
    check = {one["name"]: one for one in json.loads(done.stdout)["checks"]}["inotify"]
    assert check["verdict"] == "warn"
    assert "of 25 watches left" in check["cause"]
    (command,) = check["commands"]
    again = inside.replace("; ", f"; {command}; ", 1)
    done = shell.run(f'unshare -Ur bash -c "{again}"')
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert {one["name"]: one for one in told["checks"]}["inotify"]["verdict"] == "ok"


def test_cause_20_a_root_that_was_moved_away_is_moved_back_and_nothing_was_put_in_its_place(shell: Shell) -> None:
    """Every command tells that it is gone, and none makes an empty one, which a move back would land in."""
    with shell.running() as process:
        await_self_test(shell)
        aside = shell.root.with_name("aside")
        shell.root.rename(aside)
        assert "Mount it or move it back" in shell.engine("status").stdout
        check = shell.doctor("root")["root"]
        assert (check["verdict"], "does not exist" in str(check["cause"])) == ("fail", True)
        assert "move it back" in str(check["remedy"])
        assert "its lock is in the memory root" in str(shell.doctor("engine")["engine"]["cause"])
        told = shell.explain(FACTS)
        assert (told["verdict"], told["code"]) == ("unknown", "root_missing")
        for words in (["sync"], ["sync", "--audit"], ["release"], ["fix", "--apply"], ["search", "heron"]):
            done = shell.engine(*words)
            assert (done.returncode, "does not exist" in done.stderr) == (2, True), done
        assert not shell.root.exists()
        aside.rename(shell.root)
        assert shell.engine("sync").returncode == 0
        assert f"pid {process.pid}, up" in str(shell.doctor("engine")["engine"]["cause"])
        assert shell.verdict("held") == "ok"
        assert shell.explain(FACTS)["rows"] == {"ledger": 2, "index": None}


def await_self_test(shell: Shell) -> None:
    """LanceDB makes the directories of what it writes: an engine's first seconds would bring the root back."""
    database = Database(shell.root / ".index" / "engine" / "engine.db", readonly=True)
    deadline = time.monotonic() + HANG_SECONDS
    while database.read(lambda tx: meta.get(tx, LAW)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    database.close()


@AS_ROOT
def test_cause_19_a_full_disk_is_named_and_the_index_catches_up_once_there_is_room(
    shell: Shell, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        full = Shell(disk, shell.bin, shell.environment)
        put(disk, FACTS, GOOD)
        in_step(full)
        assert full.verdict("disk") == "ok"
        ballast = disk / "ballast"
        assert "No space" in full.run(f"dd if=/dev/zero of='{ballast}' bs=1M").stderr
        check = full.doctor("disk")["disk"]
        assert check["verdict"] == "fail"
        assert str(disk) in str(check["cause"])
        full.follow(check, which=lambda command: command.startswith("du"))
        ballast.unlink()  # "free at least ..."
        full.follow(check, which=sync_only)
        assert full.verdict("disk") == "ok"
        assert full.explain(FACTS)["verdict"] == "searchable"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_link_that_leads_to_itself_hides_no_other_file_of_its_directory(settings: Settings, root: Path) -> None:
    for number in range(20):
        (root / f"loop{number}.md").symlink_to(f"loop{number}.md")
    path = put(root, FACTS, facts(fact(1, "the heron eats")))
    (path.parent / "loop.md").symlink_to("loop.md")
    os.utime(path, (10_413_792_000, 10_413_792_000))
    tree = survey(settings, now_seconds=time.time())
    assert (tree.files, tree.closed, [name for name, _ in tree.future]) == (1, (), [str(path)])
