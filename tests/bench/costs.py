"""What the engine costs in CPU, memory and time, and how much it gets through."""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import trio
from harness import BOOK, Figure, child_cpu, engine_environment, p95, timed

from everos_engine.settings import Settings, load
from everos_engine.system.locks import running_pid

MODULE = [sys.executable, "-m", "everos_engine"]
MEBI = 1 << 20


def notes(root: Path, count: int, *, per_directory: int = 0) -> None:
    for number in range(count):
        directory = root / f"d{number // per_directory}" if per_directory else root
        directory.mkdir(exist_ok=True)
        (directory / f"{number}.md").write_text(f"# One\nText {number} on tides.\n# Two\nMore of {number} on herons.\n")


def settings_of(root: Path, **flags: object) -> Settings:
    chosen = {"memory.root": str(root), "note.globs": ["**/*.md", "*.md"], **flags}
    return load(chosen, environment={}, user_file=root / "none")


@BOOK.bench
def scan_of_20000_unchanged_files() -> Sequence[Figure]:
    """A sweep that finds nothing: CPU, and the longest time it kept other tasks from running."""
    from everos_engine.engine import open_queue
    from everos_engine.loops.deletion_guard import DeletionGuard
    from everos_engine.loops.reconcile import reconcile_tree
    from everos_engine.stores import queue
    from everos_engine.stores.database import Database

    def settle(tx: queue.Transaction) -> int:
        held = queue.claim(tx, "bench", limit=5000, now_milliseconds=2**40)
        for one in held:
            ((*four,),) = tx.execute(
                "SELECT mtime_ns, size, ino, ctime_ns FROM md_change_state WHERE md_path = ?", (one.md_path,)
            )
            queue.mark_done(tx, one, tuple(four), racy=False, now_milliseconds=1, digest=b"x")  # type: ignore[arg-type]
        return len(held)

    async def unchanged(settings: Settings, database: Database, deletion_guard: DeletionGuard) -> None:
        found = await reconcile_tree(settings, database, source="scan", deletion_guard=deletion_guard)
        if found.queued or found.files != 20_000:
            message = f"not unchanged: {found}"
            raise AssertionError(message)

    async def measure(root: Path) -> tuple[list[float], list[float], list[float]]:
        settings = settings_of(root)
        database, deletion_guard = open_queue(settings), DeletionGuard(settings)
        deletion_guard.arm()
        await reconcile_tree(settings, database, source="scan", deletion_guard=deletion_guard)
        while database.write(settle):
            pass
        cpu, wall, blocks = [], [], []
        gc.collect()
        gc.freeze()  # as `run` does once it serves
        for _ in range(9):
            with timed() as watch:
                await unchanged(settings, database, deletion_guard)
            cpu.append(watch.cpu_seconds)
            wall.append(watch.wall_seconds)
        for _ in range(9):  # apart, because measuring it costs CPU
            gaps: list[float] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_gaps, gaps)
                await unchanged(settings, database, deletion_guard)
                nursery.cancel_scope.cancel()
            blocks.append(1000 * max(gaps))
        database.close()
        return cpu, wall, blocks

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        notes(Path(name), 20_000, per_directory=200)
        cpu, wall, blocks = trio.run(measure, Path(name))
    return [
        Figure("scan of 20,000 unchanged files: CPU", "s", cpu, 0.35),
        Figure("scan of 20,000 unchanged files: wall", "s", wall),
        Figure("scan of 20,000 unchanged files: longest wait of another task", "ms", blocks, 50),
    ]


async def _gaps(gaps: list[float]) -> None:
    last = time.perf_counter()
    while True:
        await trio.sleep(0.001)
        now = time.perf_counter()
        gaps.append(now - last - 0.001)
        last = now


@BOOK.bench
def commands() -> Sequence[Figure]:
    """CPU of one command, Python's start included."""
    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        root = Path(name) / "root"
        root.mkdir()
        notes(root, 100)
        environment = engine_environment(root) | {"EVEROS_EMBEDDER__KIND": "none"}
        subprocess.run([*MODULE, "sync"], env=environment, check=True, capture_output=True)
        found = []
        explain, fds = ["explain", str(root / "1.md")], ["fds"]
        targets = ((["--help"], 0.25), (["status"], 0.25), (explain, 0.3), (fds, 0.3), (["search", "herons"], None))
        for words, target in targets:
            runs = [child_cpu([*MODULE, *words], environment) for _ in range(9)]
            if any(status for status, _ in runs):
                message = f"{words} failed"
                raise AssertionError(message)
            shown = " ".join(words).replace(f"{root}/", "")
            found.append(Figure(f"`everos-engine {shown}`: CPU", "s", [cpu for _, cpu in runs], target))
        baseline = [child_cpu([sys.executable, "-c", "pass"], environment)[1] for _ in range(9)]
    return [*found, Figure("`python -c pass`: CPU, for comparison", "s", baseline)]


@BOOK.bench
def queue_of_100000_changes() -> Sequence[Figure]:
    """Claims and marks through a long queue."""
    from everos_engine.stores import queue
    from everos_engine.stores.database import Database

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        database = Database(Path(name) / "engine.db", schema=queue.SCHEMA)
        recorded, worked = [], []
        for start in range(0, 100_000, 1000):
            seen = [queue.Observation(f"n/{n}.md", "note", (n, n, n, n)) for n in range(start, start + 1000)]
            with timed() as watch:
                database.write(lambda tx, s=seen: queue.record(tx, s, source="scan", now_milliseconds=1))  # type: ignore[misc]
            recorded.append(1000 / watch.wall_seconds)
        for _ in range(100):
            with timed() as watch:
                held = database.write(lambda tx: queue.claim(tx, "b", limit=500, now_milliseconds=2))

                def mark(tx: queue.Transaction, held: list[queue.Claim] = held) -> None:
                    for one in held:
                        queue.mark_done(tx, one, (1, 1, 1, 1), racy=False, now_milliseconds=3)

                database.write(mark)
            worked.append(len(held) / watch.wall_seconds)
        database.close()
    return [
        Figure("queue: changes recorded per second", "1/s", recorded),
        Figure("queue of 100,000: changes claimed and marked per second", "1/s", worked),
    ]


def _index(files: int, entries: int, *, local: bool) -> tuple[float, float, float]:
    """Wall and CPU seconds of a first index, and by how many MiB the process grew at most."""
    from everos_engine.engine import open_engine
    from everos_engine.testing import FakeEmbedder

    async def measure(root: Path) -> tuple[float, float, float]:
        settings = settings_of(root, **{"watch.mode": "off", "scan_interval_seconds": 3600})
        embedder = None if local else FakeEmbedder(dimension=512)
        async with open_engine(settings, embedder=embedder) as engine:
            await engine.settle()
            for number in range(files):
                text = "".join(
                    f"# Entry {at}\nFact {at} of {number}: herons wait where tides turn.\n" for at in range(entries)
                )
                (root / f"{number}.md").write_text(text)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with timed() as watch:
                status = await engine.settle()
            if status.rows["note"] != files * entries:
                message = f"not all indexed: {status}"
                raise AssertionError(message)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return watch.wall_seconds, watch.cpu_seconds, (after - before) / 1024

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        return trio.run(measure, Path(name))


@BOOK.bench
def first_index_of_1000_files() -> Sequence[Figure]:
    wall, cpu, _ = _index(1000, 2, local=False)
    return [
        Figure("first index of 1,000 files, 2,000 entries: wall", "s", [wall]),
        Figure("first index of 1,000 files, 2,000 entries: CPU", "s", [cpu]),
    ]


@BOOK.bench
def first_index_with_the_local_model() -> Sequence[Figure]:
    wall, _, _ = _index(150, 2, local=True)
    return [Figure("first index with the local model: entries per second", "1/s", [300 / wall])]


@BOOK.bench
def one_file_of_10000_entries() -> Sequence[Figure]:
    wall, _, grown = _index(1, 10_000, local=False)
    return [
        Figure("one file of 10,000 entries: wall", "s", [wall]),
        Figure("one file of 10,000 entries: growth of the peak resident size", "MiB", [grown]),
    ]


@BOOK.bench
def fifty_starts_and_stops() -> Sequence[Figure]:
    """Real processes: started, stopped by a signal once they serve, and no abort in anybody's threads."""
    bad, took = 0, []
    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        root = Path(name) / "root"
        root.mkdir()
        notes(root, 20)
        environment = engine_environment(root) | {"EVEROS_EMBEDDER__KIND": "none"}
        chance = random.Random(1)
        for _ in range(50):
            process = subprocess.Popen([*MODULE, "run"], env=environment, stderr=subprocess.PIPE, text=True)
            watchdog = threading.Timer(60, process.kill)
            watchdog.start()
            assert process.stderr is not None
            for line in process.stderr:
                if "engine_started" in line:
                    break
            time.sleep(chance.random() * 0.3)
            began = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            bad += process.wait() != 0 or "panicked" in rest or "Traceback" in rest
            took.append(1000 * (time.perf_counter() - began))
            watchdog.cancel()
    return [
        Figure("50 starts and stops: unclean ends", "ends", [bad], 0),
        Figure("signal to exit", "ms", took, 1000),
    ]


@contextmanager
def _serving(files: int) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """A real engine over so many notes, in step, and the environment of commands beside it."""
    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        root = Path(name) / "root"
        root.mkdir()
        notes(root, files)
        environment = engine_environment(root) | {"EVEROS_EMBEDDER__KIND": "none"}
        process = subprocess.Popen([*MODULE, "run"], env=environment, stderr=subprocess.DEVNULL)
        try:
            while running_pid(root / ".index" / "engine" / "engine.lock") != process.pid:
                time.sleep(0.05)  # else `sync` would be the engine
            subprocess.run([*MODULE, "sync"], env=environment, check=True, capture_output=True)
            time.sleep(10)  # what a start leaves to do is done
            yield process, environment
            if process.poll() is not None:
                message = f"the engine ended with {process.returncode}"
                raise AssertionError(message)
        finally:
            process.terminate()
            process.wait(30)


@BOOK.bench
def idle_engine() -> Sequence[Figure]:
    """CPU of a real engine over 20 s in which nothing happens."""
    with _serving(200) as (process, _):
        before, began = _cpu_of(process.pid), time.perf_counter()
        time.sleep(20)
        share = (_cpu_of(process.pid) - before) / (time.perf_counter() - began)
    return [Figure("idle engine: share of a core over 20 s", "%", [100 * share])]


@BOOK.bench
def commands_beside_an_engine() -> Sequence[Figure]:
    """What the commands that ask a running engine cost themselves, and how long a person waits for a search."""
    found = []
    with _serving(200) as (_, environment):
        for words, target in ((["fds"], 0.3), (["status"], 0.25), (["search", "herons"], 0.25)):
            waited, spent = [], []
            for _ in range(9):
                with timed() as watch:
                    status, cpu = child_cpu([*MODULE, *words], environment)
                if status:
                    message = f"{words} failed"
                    raise AssertionError(message)
                waited.append(watch.wall_seconds)
                spent.append(cpu)
            name = f"`everos-engine {' '.join(words)}` beside an engine"
            found += [Figure(f"{name}: CPU", "s", spent, target), Figure(f"{name}: wall", "s", waited)]
    return found


def _cpu_of(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@BOOK.bench
def guard_at_500_descriptors() -> Sequence[Figure]:
    """The descriptor guard alone, with 500 descriptors open."""
    from everos_engine.engine import open_reader
    from everos_engine.loops.fd_guard import guard

    async def measure(root: Path) -> float:
        async with open_reader(settings_of(root)) as engine:
            with trio.move_on_after(20), timed() as watch:
                await guard(engine.context, proving=False)
            return watch.cpu_seconds / watch.wall_seconds

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        open_files = [os.open(os.devnull, os.O_RDONLY) for _ in range(500)]
        share = trio.run(measure, Path(name))
        for handle in open_files:
            os.close(handle)
    return [Figure("descriptor guard at 500 descriptors: share of a core", "%", [100 * share], 0.2)]


@BOOK.bench
def self_test_of_the_descriptor_law() -> Sequence[Figure]:
    """What a start costs once for each version of the library."""
    from everos_engine.loops.fd_self_test import self_test
    from everos_engine.settings import LanceDBSettings
    from everos_engine.system.asyncio_thread import open_asyncio_thread

    async def measure(directory: Path) -> list[float]:
        async with open_asyncio_thread() as bridge:
            laws = [await self_test(bridge, LanceDBSettings(), directory=directory, claimed="reopen") for _ in range(5)]
        return [law.cpu_seconds for law in laws]

    with tempfile.TemporaryDirectory(prefix="everos-bench-") as name:
        return [Figure("self-test of the descriptor law: CPU", "s", trio.run(measure, Path(name)), 1)]


@BOOK.bench
def event_loop_beside_the_local_model() -> Sequence[Figure]:
    """How long another task waits while the local model works, and how much it still does once it is cancelled."""
    from everos_engine.embed.local import LocalEmbedder

    async def measure() -> tuple[list[float], float]:
        embedder, gaps = LocalEmbedder(batch_size=64), list[float]()
        await embedder.embed(["warm"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(embedder.embed, ["word " * 1600] * 64)
            for _ in range(100):
                before = time.perf_counter()
                await trio.sleep(0.01)
                gaps.append(1000 * (time.perf_counter() - before - 0.01))
            nursery.cancel_scope.cancel()
            cancelled = time.process_time()
        return gaps, time.process_time() - cancelled

    gaps, rest = trio.run(measure)
    return [
        Figure("local model at work: 95th percentile of another task's wait", "ms", [p95(gaps)], 100),
        Figure("local model cancelled: CPU until it stops", "s", [rest], 2),
    ]
