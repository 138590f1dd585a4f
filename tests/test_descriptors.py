from __future__ import annotations

import gc
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import apsw
import pytest

from everos_engine.errors import EngineError, Exhausted, Transient, exhausted
from everos_engine.stores.database import Database
from everos_engine.system import descriptors


@pytest.fixture(scope="module", autouse=True)
def _at_rest() -> None:
    """What earlier tests let go of is closed on threads and by the collector: begin when nothing is any more."""
    gc.collect()
    count, _ = descriptors.counter()
    before = -1
    while before != (before := count()):
        time.sleep(0.2)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[None]:
    """This process at its descriptor limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = os.stat("/proc/self/fd").st_size
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 20, hard))
    try:
        while True:
            try:
                held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for handle in held:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_count_needs_no_descriptor_and_agrees_with_a_listing() -> None:
    count, way = descriptors.counter()
    assert way == "stat"
    before = count()
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(open(os.devnull, encoding="ascii"))
        assert count() == before + 7
    assert count() == len(os.listdir("/proc/self/fd")) - 1


@pytest.mark.usefixtures("full")
def test_at_the_limit_it_still_counts_and_tells_apart(tmp_path: Path) -> None:
    soft = descriptors.limits()[0]
    found = descriptors.classify(soft, lancedb=tmp_path, engine=tmp_path)
    assert sum(found.values()) >= soft - 1
    assert descriptors.memory() is None
    assert descriptors.tree_size(tmp_path) is None
    assert not descriptors.Reserve().take()


@pytest.mark.usefixtures("full")
def test_a_database_that_cannot_be_opened_for_want_of_descriptors_says_so(tmp_path: Path) -> None:
    with pytest.raises(Exhausted, match="no file descriptor is left"):
        Database(tmp_path / "engine.db")
    assert descriptors.none_left()


def test_a_database_that_cannot_be_opened_for_another_reason_is_no_want_of_descriptors(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as refused:
        Database(tmp_path / "none" / "engine.db")
    assert isinstance(refused.value.__cause__, apsw.CantOpenError)
    assert not isinstance(refused.value, Exhausted)
    assert not descriptors.none_left(wanted=8)


def test_every_class_is_told_apart(tmp_path: Path) -> None:
    lancedb, engine = tmp_path / "lancedb", tmp_path / "engine"
    names = ["lancedb/n.lance/_indices/u/part", "lancedb/n.lance/data/x.lance", "lancedb/n.lance/gone", "engine/q.db"]
    names += ["engine/q.db-wal", "engine/q.db-shm", "engine/engine.lock"]
    before = descriptors.classify(1 << 20, lancedb=lancedb, engine=engine)
    with ExitStack() as stack:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(open(tmp_path / name, "w", encoding="ascii"))
        (tmp_path / "lancedb/n.lance/gone").unlink()
        for end in socket.socketpair():
            stack.enter_context(end)
        for handle in os.pipe():
            stack.callback(os.close, handle)
        after = descriptors.classify(1 << 20, lancedb=lancedb, engine=engine)
    gained = {name: after[name] - before[name] for name in descriptors.CLASSES if after[name] != before[name]}
    assert gained == {
        "lance_index": 1, "lance_data": 1, "deleted": 1, "sqlite": 3, "sockets": 2, "pipes": 2, "other": 1
    }  # fmt: skip


def test_the_reserve_gives_one_descriptor_back_and_takes_it_again() -> None:
    count, _ = descriptors.counter()
    reserve, before = descriptors.Reserve(), count()
    assert reserve.take()
    assert reserve.take()
    assert count() == before + 1
    with reserve.borrow() as had:
        assert had
        assert count() == before
    assert count() == before + 1
    reserve.release()
    assert count() == before


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    script = "from everos_engine.system import descriptors; print(descriptors.raise_soft_limit(), descriptors.limits())"
    command = f"ulimit -Sn 100; ulimit -Hn 512; exec {sys.executable} -c '{script}'"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert told == "(100, 512) (512, 512)\n"


def test_memory_and_the_size_of_a_tree_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    assert descriptors.tree_size(tmp_path) == (1, 1, 5)
    assert descriptors.tree_size(tmp_path / "none") == (0, 0, 0)
    found = descriptors.memory()
    assert found is not None
    assert found.rss_bytes > 10_000_000
    assert found.threads >= 1


def test_exhaustion_is_recognised_wherever_it_hides() -> None:
    assert exhausted(OSError(24, "Too many open files"))
    assert exhausted(OSError(23, "Too many open files in system"))
    assert exhausted(RuntimeError("lance error: LanceError(IO): Too many open files (os error 24), file.rs:1"))
    assert exhausted(Exhausted("none left"))
    assert exhausted(ExceptionGroup("g", [ValueError("x"), ExceptionGroup("h", [OSError(24, "x")])]))
    wrapped = Transient("reading failed")
    wrapped.__cause__ = OSError(24, "Too many open files")
    assert exhausted(wrapped)
    assert not exhausted(OSError(28, "No space left on device"))
    assert not exhausted(RuntimeError("os error 28"))
    assert not exhausted(ValueError("a text that speaks of os error 24"))
    assert not exhausted(None)
