"""The command line on streams that are closed, full, or of another encoding; what it refuses, and what it says."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from everos_engine.engine import open_queue
from everos_engine.settings import load
from everos_engine.stores import queue
from patience import HANG_SECONDS
from writer import FACTS, fact, facts, put

ENGINE = [sys.executable, "-m", "everos_engine"]


def environment(root: Path, **more: str) -> dict[str, str]:
    own = {"EVEROS_ROOT": str(root), "EVEROS_EMBEDDER__KIND": "none", "EVEROS_NOTE__GLOBS": "**/*.md"}
    own["EVEROS_SHUTDOWN_GRACE_SECONDS"] = str(HANG_SECONDS)  # a busy machine is no reason to stop ungracefully
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, **own, "XDG_CONFIG_HOME": str(root), **more}


def command(root: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ENGINE, *words],
        env=environment(root, **more),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        timeout=HANG_SECONDS,
    )


def shell(root: Path, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A line of sh in which ``$E`` is the command."""
    return subprocess.run(
        ["/bin/sh", "-c", line],
        env=environment(root, E=f"{sys.executable} -m everos_engine", **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("line", ["$E kinds", "$E --help", "$E fds --json"])
def test_output_that_cannot_be_written_is_said_and_fails(line: str, buffered: str, root: Path) -> None:
    for stream, reason in ((">/dev/full", "No space left"), (">&-", "Bad file descriptor")):
        done = shell(root, f"{line} {stream}", PYTHONUNBUFFERED=buffered)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"standard output cannot be written: {reason}" in done.stderr


def test_a_reader_that_leaves_early_is_not_an_error(root: Path) -> None:
    done = shell(root, "{ $E settings; echo $? >&2; } | true")
    assert done.stderr == "0\n"


@pytest.mark.parametrize("stream", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_without_standard_error_a_command_does_its_work(stream: str, root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    done = shell(root, f"$E sync {stream} && $E search heron {stream}")
    assert (done.returncode, "heron" in done.stdout) == (0, True)


def test_no_database_is_opened_under_the_number_of_a_closed_stream(root: Path) -> None:
    """A line meant for standard output would be written into it."""
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter", timestamp="yesterday")))
    for _ in range(2):
        shell(root, "$E sync <&- >&- 2>&-")
    assert json.loads(command(root, "status", "--json").stdout)["rows"] == {"atomic_fact": 1}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:strict"])
def test_text_that_the_encoding_does_not_have_is_written_as_an_escape(encoding: str, root: Path) -> None:
    put(root, "ünï→.md", "# Ünï →\n\nthe heron eats 魚\n")
    assert command(root, "sync", PYTHONIOENCODING=encoding).returncode == 0
    said = command(root, "search", "heron", PYTHONIOENCODING=encoding)
    assert (said.returncode, "\\u9b5a" in said.stdout, said.stderr) == (0, True, "")
    found = json.loads(command(root, "search", "heron", "--json", PYTHONIOENCODING=encoding).stdout)
    assert found[0]["snippet"] == "the heron eats 魚"
    assert command(root, "explain", "ünï→.md", PYTHONIOENCODING=encoding).stderr == ""


def test_two_different_roots_are_refused_wherever_they_are_named(root: Path) -> None:
    other = root / "other"
    other.mkdir()
    for words in (
        ["run", str(root), "--root", str(other)],
        ["--root", str(root), "run", str(other)],
        ["--root", str(root), "status", "--root", str(other)],
    ):
        done = command(root, *words)
        assert (done.returncode, "two memory roots are named" in done.stderr) == (2, True)
    assert command(root, "--root", str(root), "status", "--root", f"{root}/").returncode == 0


def test_a_root_whose_name_is_empty_is_refused(root: Path) -> None:
    for words in (["run", ""], ["--root", "", "sync"]):
        done = command(root, *words)
        assert (done.returncode, "must not be empty" in done.stderr) == (2, True)


def test_run_makes_no_root_that_is_mistyped(root: Path) -> None:
    missing = root / "misspelt"
    for more in ({}, {"EVEROS_ROOT": str(missing)}):
        done = command(root, "run", *([] if more else [str(missing)]), **more)
        assert (done.returncode, "run --create" in done.stderr, missing.exists()) == (2, True, False)


def test_a_path_that_never_was_is_reported_and_does_not_hold_up_the_others(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    done = command(root, "sync", "nope.md", FACTS)
    assert done.returncode == 1
    assert "nope.md: no such file; no rows of it are left" in done.stdout
    assert "nope.md: nothing was indexed of it: check the name" in done.stderr
    assert f"{FACTS}: done" in done.stdout
    (root / FACTS).unlink()
    gone = command(root, "sync", FACTS)
    assert (gone.returncode, gone.stdout) == (0, f"{FACTS}: no such file; no rows of it are left\n")
    assert command(root, "sync", FACTS).returncode == 1


def test_fix_says_what_it_tried_and_what_no_attempt_helps(root: Path) -> None:
    nothing = command(root, "fix", "--apply")
    assert (nothing.returncode, nothing.stdout) == (0, "nothing to try again\n")
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter", timestamp="yesterday")))
    assert command(root, "sync").returncode == 1
    done = command(root, "fix", "--apply")
    assert done.returncode == 1
    assert done.stdout.startswith("nothing to try again; 1 more failed")


BAD_SETTINGS = {
    "a name that no setting has": ("scan_interval = 5\n", "did you mean 'scan_interval_seconds'"),
    "a section that is none": ('[embeder]\nkind = "none"\n', "did you mean 'embedder.kind'"),
    "a value out of bounds": ("worker_batch_size = 0\n", "below its minimum"),
    "no TOML": ("x =\n", "cannot be read as settings"),
    "nested without end": (f"x = {'[' * 5000}\n", "cannot be read as settings"),
    "no UTF-8": ("# \udcff\n", "is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_the_list_of_settings_is_shown_when_a_file_has_a_fault(case: str, root: Path) -> None:
    content, fault = BAD_SETTINGS[case]
    (root / "everos-engine.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused = command(root, "status")
    assert (refused.returncode, fault in refused.stderr) == (2, True), refused.stderr
    shown = command(root, "settings")
    assert (shown.returncode, fault in shown.stderr) == (2, True), shown.stderr
    assert "worker_batch_size = 50\n" in shown.stdout


def test_a_settings_file_may_begin_with_a_byte_order_mark(root: Path) -> None:
    for place in (root / "everos-engine.toml", root / "everos-engine" / "settings.toml"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"\xef\xbb\xbfscan_interval_seconds = 7\n")
        assert "scan_interval_seconds = 7.0\n" in command(root, "settings").stdout
        place.unlink()


HOMELESS = """
import pwd, runpy
def unknown(_): raise KeyError
pwd.getpwuid = unknown
runpy.run_module("everos_engine", run_name="__main__")
"""


def test_a_home_that_nobody_knows_is_no_directory_named_tilde(root: Path) -> None:
    """As in a container that runs as a user without an entry in its list of users."""
    homeless = {name: value for name, value in environment(root).items() if name not in {"HOME", "EVEROS_ROOT"}}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS, "run"],
        env=homeless,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert (done.returncode, "set HOME" in done.stderr, (root / "~").exists()) == (2, True, False), done.stderr


@pytest.mark.parametrize("words", [["sync"], ["search", "x"], ["run"]])
def test_every_command_in_a_message_names_the_root_that_was_named(words: list[str], root: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    said = command(root, "--root", str(absent), *words)
    assert said.returncode == 2
    assert "`everos-engine " in said.stderr
    assert said.stderr.count("`everos-engine ") == said.stderr.count(f"`everos-engine --root {absent} ")


def test_fds_without_an_engine_names_the_root_that_was_named(root: Path) -> None:
    named = shlex.join(["everos-engine", "--root", str(root)])
    assert f"start one with `{named} run`" in command(root, "--root", str(root), "fds").stdout


def test_a_search_that_finds_nothing_says_what_is_not_indexed_yet(root: Path) -> None:
    settings = load({"memory.root": str(root)}, environment={}, user_file=root / "none.toml")
    database = open_queue(settings)
    seen = queue.Observation("a.md", "note", (1, 1, 1, 1))
    database.write(lambda tx: queue.record(tx, [seen], source="scan", now_milliseconds=1))
    database.close()
    said = command(root, "search", "anything")
    assert said.stdout == "nothing found\n"
    assert "1 change not indexed yet: `everos-engine sync` indexes it" in said.stderr


STILL_BUSY = """
import sys, threading
threading.Thread(target=threading.Event().wait).start()
from everos_engine.cli.main import main
main()
"""


def test_a_thread_of_a_library_does_not_keep_a_finished_command_from_ending(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STILL_BUSY, "--root", str(root), "status"],
        env=environment(root), capture_output=True, text=True, timeout=HANG_SECONDS, check=False,
    )  # fmt: skip
    assert (done.returncode, "never indexed" in done.stdout) == (0, True)
