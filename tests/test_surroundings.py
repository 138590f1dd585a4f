"""Every command in every bad surrounding: no traceback, a known exit status, and with status 2 a line that names a remedy.

CI runs a part of the table in which each command and each surrounding occurs. `WHOLE_TABLE=1`, or
`nox -s surroundings`, runs all of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from everos_engine.cli.main import BUG, parser
from patience import HANG_SECONDS
from test_readonly import MAY_MOUNT, UNSHARE
from test_terminal import environment
from writer import FACTS, fact, facts, put

WHOLE = "WHOLE_TABLE" in os.environ
STATUSES = {0, 1, 2, 130}
REMEDY = re.compile(
    r"`[^`]+`|free |check |mount|raise |run |set |rename|unset|give |change |make |choose|name |write |save |send |install|usage:|retry|wait"
)
"""What a line for a person to act on has: a command, or what to do."""
COMMANDS: dict[str, list[str]] = {
    "run": ["run"],
    "sync": ["sync"],
    "sync PATH": ["sync", FACTS],
    "sync --audit": ["sync", "--audit"],
    "search": ["search", "heron"],
    "search --json": ["search", "heron", "--json"],
    "status": ["status"],
    "explain": ["explain", FACTS, "--rows"],
    "kinds": ["kinds"],
    "settings": ["settings"],
    "trust": ["trust", "--show"],
    "fds": ["fds"],
    "fds calibrate": ["fds", "calibrate", "--quick", "--output", "calibration"],
    "doctor": ["doctor", "--offline"],
    "doctor --bundle": ["doctor", "--offline", "--bundle", "bundle.tar.gz"],
    "fix": ["fix"],
    "fix --apply": ["fix", "--apply"],
    "release": ["release"],
    "forget": ["forget", "users/u1/.atomic_facts/gone.md"],
    "--help": ["--help"],
}
INTERRUPTED = (
    "import os, signal, sys, threading; from everos_engine.cli.main import main;"
    "timer = threading.Timer(float(os.environ['AFTER']), os.kill, (os.getpid(), signal.SIGINT));"
    "timer.daemon = True; timer.start(); sys.exit(main())"
)
"""A command that gets SIGINT so long after it was loaded."""
SLOW = {"fds calibrate"}
"""Measures for half a minute where nothing is in its way."""


@dataclass(slots=True)
class Surrounding:
    """What is done to the root before, and how the command is started."""

    prepare: Callable[[Path], object] = lambda _: None
    environment: dict[str, str | None] = field(default_factory=dict)
    script: str = "exec $C"
    namespace: bool = False


def _text(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


def _garbage(root: Path) -> None:
    for name in ("engine.db", "embeddings.db"):
        (root / ".index" / "engine" / name).write_bytes(b"\x07garbage" * 4096)


def _full_disk(root: Path) -> None:
    """The disk is filled in the shell that mounts it; what is there now is moved onto it."""
    root.rename(root.with_name("kept"))
    root.mkdir()


SURROUNDINGS: dict[str, Surrounding] = {
    "ascii": Surrounding(environment={"PYTHONIOENCODING": "ascii"}),
    "latin-1": Surrounding(environment={"PYTHONIOENCODING": "latin-1:strict"}),
    "C locale": Surrounding(environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "full output": Surrounding(script="exec $C >/dev/full"),
    "full output and errors": Surrounding(script="exec $C >/dev/full 2>/dev/full"),
    "closed output": Surrounding(script="exec $C >&-"),
    "closed errors": Surrounding(script="exec $C 2>&-"),
    "all closed": Surrounding(script="exec $C <&- >&- 2>&-"),
    "no reader": Surrounding(script="{ $C; echo $? >status; } | true; read s <status; exit $s"),
    "no home": Surrounding(environment={"HOME": None, "XDG_CONFIG_HOME": None}),
    "removed directory": Surrounding(script="mkdir gone && cd gone && rmdir ../gone && exec $C"),
    "missing root": Surrounding(prepare=lambda root: root.rename(root.with_name("away"))),
    "root is a file": Surrounding(prepare=lambda root: (root.rename(root.with_name("away")), root.write_text("x"))),
    "read-only mount": Surrounding(
        script="mount --bind $R $R && mount -o remount,bind,ro $R && exec $C", namespace=True
    ),
    "full disk": Surrounding(
        prepare=_full_disk,
        script="mount -t tmpfs -o size=3m,mode=755 x $R && cp -r $R/../kept/. $R; cat /dev/zero >$R/filler 2>/dev/null; exec $C",
        namespace=True,
    ),
    "garbage databases": Surrounding(prepare=_garbage),
    "an index that is a file": Surrounding(
        prepare=lambda root: (shutil.rmtree(root / ".index"), (root / ".index").write_text("x"))
    ),
    "never indexed": Surrounding(prepare=lambda root: shutil.rmtree(root / ".index")),
    "bad settings": Surrounding(prepare=_text("everos-engine.toml", b"scan_interval = [\n")),
    "unknown setting": Surrounding(prepare=_text("everos-engine.toml", b"scan_interval = 5\n")),
    "settings with a mark": Surrounding(
        prepare=_text("everos-engine.toml", b"\xef\xbb\xbfscan_interval_seconds = 5\n")
    ),
    "settings are a directory": Surrounding(prepare=lambda root: (root / "everos-engine.toml").mkdir()),
    "unknown variable": Surrounding(environment={"EVEROS_SCAN_INTERVAL": "5"}),
    "20 descriptors": Surrounding(script="ulimit -n 20; exec $C"),
    "8 descriptors": Surrounding(script="ulimit -n 8; exec $C"),
    "no file may grow": Surrounding(script="ulimit -f 8; exec $C"),
    "interrupted while it loads": Surrounding(environment={"AFTER": "0.05"}),
    "interrupted while it works": Surrounding(environment={"AFTER": "1"}),
}
NEEDS_NOTHING = {"full output and errors", "closed errors", "all closed"}
"""Where nothing can be said."""


def test_the_table_has_every_command() -> None:
    (subparsers,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert set(subparsers.choices) <= {words[0] for words in COMMANDS.values()}


CHOSEN = (
    ("run", "full disk"),
    ("sync", "full disk"),
    ("doctor", "full disk"),
    ("search", "read-only mount"),
    ("sync", "20 descriptors"),
    ("sync", "interrupted while it works"),
    ("run", "garbage databases"),
    ("doctor", "8 descriptors"),
    ("status", "no file may grow"),
    ("sync", "C locale"),
    ("fds calibrate", "no file may grow"),
)
"""Pairs of which one was a fault."""


def table() -> list[tuple[str, str]]:
    """All pairs, or so many that each surrounding and each command occurs, with CHOSEN."""
    if WHOLE:
        return [(command, surrounding) for surrounding in SURROUNDINGS for command in COMMANDS]
    names = [name for name in COMMANDS if name not in SLOW]
    some = [(names[5 * number % len(names)], surrounding) for number, surrounding in enumerate(SURROUNDINGS)]
    return list(dict.fromkeys([*some, *CHOSEN]))


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with something in each list: rows, a failed file, a name and a text that ASCII does not have."""
    root = tmp_path_factory.mktemp("surroundings") / "rööt"
    root.mkdir()
    put(root, FACTS, facts(fact(1, "the heron eats 魚")))
    put(root, "users/ü/.atomic_facts/f.md", facts(fact(2, "otter", timestamp="yesterday ü")))
    subprocess.run(
        [sys.executable, "-m", "everos_engine", "sync"], env=environment(root), check=False, timeout=HANG_SECONDS
    )
    return root


@pytest.mark.parametrize(("command", "surrounding"), table())
def test_a_command_says_what_is_wrong(command: str, surrounding: str, indexed: Path, tmp_path: Path) -> None:
    case = SURROUNDINGS[surrounding]
    if case.namespace and not MAY_MOUNT:
        pytest.skip("needs root and mount namespaces")
    root = tmp_path / indexed.name
    shutil.copytree(indexed, root, symlinks=True)
    case.prepare(root)
    status, said = ended(COMMANDS[command], case, root)
    assert "Traceback" not in said, said
    assert BUG not in said, said
    assert "Exception ignored" not in said, said
    if surrounding == "full disk":
        assert "damaged" not in said, said
    stopped = {-signal.SIGTERM} if command == "run" else set()  # by us, before it could listen
    assert status in STATUSES | stopped, said
    if status == 2 and surrounding not in NEEDS_NOTHING:
        assert REMEDY.search(said), said


def ended(words: list[str], case: Surrounding, root: Path) -> tuple[int, str]:
    """Exit status and output of a command; `run` is stopped when it serves, or after the time that a start takes."""
    given = environment(
        root, EVEROS_LOCK_WAIT_SECONDS="5", EVEROS_SHUTDOWN_GRACE_SECONDS="20", R=shlex.quote(str(root))
    )
    start = ["-c", INTERRUPTED] if "AFTER" in case.environment else ["-m", "everos_engine"]
    given["C"] = shlex.join([sys.executable, *start, *words])
    own = {**given, **case.environment}
    script = case.script.replace("$C", given["C"]).replace("$R", given["R"])
    call = ["/bin/sh", "-c", script]
    process = subprocess.Popen(
        [*UNSHARE, *call] if case.namespace else call,
        env={name: value for name, value in own.items() if value is not None},
        cwd=root.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    with process:
        stop = None
        if words[0] == "run":
            stop = threading.Timer(RUN_SECONDS, lambda: _stop(process))
            stop.start()
        try:
            said, _ = process.communicate(timeout=HANG_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            if stop is not None:
                stop.cancel()
    return process.returncode, said


RUN_SECONDS = 8.0


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)


def test_the_locale_changes_no_key_and_no_file(indexed: Path, tmp_path: Path) -> None:
    """A name is its bytes: under an ASCII locale the same files are known, read and found under the same keys."""
    root = tmp_path / indexed.name
    shutil.copytree(indexed, root, symlinks=True)
    put(root, "users/ö/.atomic_facts/new.md", facts(fact(3, "a new heron")))
    case = SURROUNDINGS["C locale"]
    for words, expected in (
        (["sync"], "in step: 2 files, 2 rows, 1 failed"),
        (["search", "new"], "a new heron"),
        (["explain", "users/ö/.atomic_facts/new.md"], "searchable: 1 row in the index"),
    ):
        _, said = ended(words, case, root)
        assert expected in said
    _, said = ended(["sync"], Surrounding(), root)
    assert "in step: 2 files, 2 rows, 1 failed" in said
