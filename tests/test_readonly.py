"""A memory root that may not be written: what can be read is, and the remedy is the one that helps."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import apsw
import pytest

from everos_engine.stores.database import Database
from patience import HANG_SECONDS
from test_terminal import ENGINE, command, environment
from writer import FACTS, fact, facts, put

UNSHARE = [shutil.which("unshare") or "unshare", "-m"]
MAY_MOUNT = os.geteuid() == 0 and subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(not MAY_MOUNT, reason="needs root and mount namespaces, for a read-only mount")


def on_readonly_mount(root: Path, *lines: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Run commands while the root is mounted read-only, for them alone."""
    found = []
    at = shlex.quote(str(root))
    for words in lines:
        script = f"mount --bind {at} {at} && mount -o remount,bind,ro {at} && exec {shlex.join([*ENGINE, *words])}"
        found.append(
            subprocess.run(
                [*UNSHARE, "sh", "-c", script],
                env=environment(root),
                capture_output=True,
                text=True,
                check=False,
                timeout=HANG_SECONDS,
            )
        )
    return found


@needs_mounts
def test_a_root_on_a_readonly_mount_is_searched_and_explained(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    assert command(root, "sync").returncode == 0
    put(root, FACTS, facts(fact(1, "heron"), fact(2, "otter")))
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    search, status, explain, doctor, sync = on_readonly_mount(
        root,
        ["search", "heron", "--json"],
        ["status", "--json"],
        ["explain", FACTS, "--rows"],
        ["doctor", "--json", "--offline", "permissions", "queue", "index"],
        ["sync"],
    )
    assert [hit["entry_id"] for hit in json.loads(search.stdout)] == ["af_20250227_00000001"]
    assert (json.loads(status.stdout)["rows"], status.returncode) == ({"atomic_fact": 1}, 0)
    assert "1 counted in the index" in explain.stdout
    assert [check["verdict"] for check in json.loads(doctor.stdout)["checks"]] == ["fail", "ok", "ok"]
    assert sync.returncode == 2
    for said in (explain.stdout, doctor.stdout, sync.stderr):
        assert "mount -o remount,rw" in " ".join(said.split())
        assert "Traceback" not in said
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before


@needs_mounts
def test_a_readonly_root_that_was_never_indexed_says_so(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "heron")))
    (search,) = on_readonly_mount(root, ["search", "heron"])
    assert (search.returncode, "never indexed" in search.stderr) == (2, True), search.stderr


@needs_mounts
def test_commits_that_a_dead_process_left_in_the_log_are_read_from_a_copy(root: Path) -> None:
    path = root / "left.db"
    database = Database(path, schema="CREATE TABLE IF NOT EXISTS t (n)", version=1)
    database.write(lambda tx: list(tx.execute("INSERT INTO t VALUES (7)")))
    copies = {end: Path(f"{path}{end}").read_bytes() for end in ("", "-wal")}
    database.close()
    for end, content in copies.items():
        Path(f"{path}{end}").write_bytes(content)
    script = (
        "import sys, pathlib; from everos_engine.stores.database import Database;"
        "d = Database(pathlib.Path(sys.argv[1]), readonly=True);"
        "print(d.read(lambda tx: list(tx.execute('SELECT n FROM t')))); d.close()"
    )
    at = shlex.quote(str(root))
    mounted = f"mount --bind {at} {at} && mount -o remount,bind,ro {at} && exec {ENGINE[0]} -c {shlex.quote(script)} {shlex.quote(str(path))}"
    spare = root.parent / "spare"
    spare.mkdir()
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", mounted],
        env=environment(root, TMPDIR=str(spare)),
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    assert (done.stdout, list(spare.iterdir())) == ("[(7,)]\n", []), done.stderr
    assert apsw.Connection(str(path)).execute("SELECT n FROM t").fetchall() == [(7,)]
