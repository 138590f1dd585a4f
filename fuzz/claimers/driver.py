"""Real processes claim and mark from one queue while others record into it: no double claim, no lost edit, no lsn twice.

    python -m fuzz.claimers --seconds 30 [--claimers 2] [--recorders 2]

A shared array of versions stands for the disk: a recorder raises a path's version, then records it; a claimer reads the
version of what it holds, as a worker reads a file, and marks what it read.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import random
import struct
import tempfile
import time
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

from everos_engine.stores import queue, reports
from everos_engine.stores.database import Database, Transaction
from everos_engine.stores.queue import Claim, Observation

PATHS = 40
SLOT = struct.Struct("<q")


class Disk:
    """Versions by path number, shared between processes."""

    def __init__(self, path: Path) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(handle, PATHS * SLOT.size)
        self._map = mmap.mmap(handle, PATHS * SLOT.size)
        os.close(handle)

    def __getitem__(self, number: int) -> int:
        return int(SLOT.unpack_from(self._map, number * SLOT.size)[0])

    def __setitem__(self, number: int, version: int) -> None:
        SLOT.pack_into(self._map, number * SLOT.size, version)


def name_of(number: int) -> str:
    return f"p{number}.md"


def print_of(version: int) -> queue.Fingerprint4 | None:
    """Every ninth version is a deletion."""
    return None if version == 0 or version % 9 == 0 else (version, version, version, version)


def recorder(directory: Path, begin: Barrier, which: int, many: int, seconds: float) -> None:
    """Edits the paths that are its own; its log has every lsn it was given."""
    chance, disk = random.Random(which), Disk(directory / "disk")
    database = Database(directory / "engine.db", schema=queue.SCHEMA)
    begin.wait()
    until = time.monotonic() + seconds
    with (directory / f"recorder-{which}.log").open("w") as log:
        while time.monotonic() < until:
            numbers = {chance.randrange(PATHS // many) * many + which for _ in range(chance.randint(1, 6))}
            for number in numbers:
                disk[number] += 1
            seen = [Observation(name_of(number), "note", print_of(disk[number])) for number in sorted(numbers)]

            def record(tx: Transaction, seen: list[Observation] = seen) -> tuple[int, int]:
                before = queue.newest(tx)
                queue.record(tx, seen, source="watch", now_milliseconds=now())
                return before + 1, queue.newest(tx)

            first, last = database.write(record)
            log.write(json.dumps(list(range(first, last + 1))) + "\n")
            time.sleep(chance.random() * 0.002)
    database.close()


def claimer(directory: Path, begin: Barrier, which: int, seconds: float) -> None:
    """Holds, reads, and marks done, failed or postponed; its log has each hold's time from claim to mark."""
    chance, disk = random.Random(100 + which), Disk(directory / "disk")
    database = Database(directory / "engine.db", schema=queue.SCHEMA)
    owner = f"claimer-{which}"
    begin.wait()
    until = time.monotonic() + seconds
    with (directory / f"{owner}.log").open("w") as log:
        while time.monotonic() < until:
            limit = chance.randint(1, 8)
            claims = database.write(lambda tx, n=limit: queue.claim(tx, owner, limit=n, now_milliseconds=now()))  # type: ignore[misc]
            claimed = time.monotonic_ns()
            if not claims:
                time.sleep(0.001)
            for held in claims:
                number = int(held.md_path[1:-3])
                version = disk[number]
                how = chance.choices(["done", "failed", "later"], [8, 1, 1])[0]
                marked = time.monotonic_ns()
                database.write(lambda tx, h=held, v=version, w=how: mark(tx, h, v, w))  # type: ignore[misc]
                log.write(json.dumps([held.claim_no, held.claim_lsn, number, version, how, claimed, marked]) + "\n")
    database.close()


def mark(tx: Transaction, held: Claim, version: int, how: str) -> None:
    moment = now()
    if how == "done":
        queue.mark_done(tx, held, print_of(version), racy=False, now_milliseconds=moment)
    elif how == "failed":
        queue.mark_failed(tx, held, "no", retryable=True, now_milliseconds=moment)
    else:
        queue.postpone(tx, held, "later", not_before=moment + 5, now_milliseconds=moment)


def now() -> int:
    return time.time_ns() // 1_000_000


def drain(directory: Path) -> dict[int, int]:
    """Work off what is left, as a last engine would; path number -> version applied last."""
    database, disk = Database(directory / "engine.db", schema=queue.SCHEMA), Disk(directory / "disk")
    applied = {}
    database.write(lambda tx: queue.requeue_failed(tx, now_milliseconds=now()))
    while claims := database.write(lambda tx: queue.claim(tx, "last", limit=99, now_milliseconds=now() + 60_000)):
        for held in claims:
            number = int(held.md_path[1:-3])
            applied[number] = disk[number]
            database.write(lambda tx, h=held, v=disk[number]: mark(tx, h, v, "done"))  # type: ignore[misc]
    counts = database.read(reports.counts)
    if counts.pending + counts.processing + counts.failed_retryable or counts.watermark != counts.lsn_max:
        message = f"not worked off: {counts}"
        raise AssertionError(message)
    database.close()
    return applied


def verdict(directory: Path) -> dict[str, int]:
    """Figures of a finished run."""
    lsns: Counter[int] = Counter()
    for path in directory.glob("recorder-*.log"):
        for line in path.read_text().splitlines():
            lsns.update(json.loads(line))
    holds = [json.loads(line) for path in directory.glob("claimer-*.log") for line in path.read_text().splitlines()]
    numbers = Counter(hold[0] for hold in holds)
    overlapping = 0
    last_end: dict[int, int] = {}
    applied: dict[int, tuple[int, int]] = {}
    for _, _, number, version, how, claimed, marked in sorted(holds, key=lambda hold: hold[5]):
        overlapping += claimed < last_end.get(number, 0)
        last_end[number] = max(last_end.get(number, 0), marked)
        if how == "done":
            applied[number] = max(applied.get(number, (0, 0)), (marked, version))
    left, disk = drain(directory), Disk(directory / "disk")
    final = {number: version for number, (_, version) in applied.items()} | left
    lost = [number for number in range(PATHS) if print_of(disk[number]) != print_of(final.get(number, 0))]
    return {
        "recorded": sum(lsns.values()),
        "claimed": len(holds),
        "double_claims": overlapping + sum(count - 1 for count in numbers.values()),
        "lost_edits": len(lost),
        "duplicate_lsns": sum(count - 1 for count in lsns.values()),
    }


def main() -> int:
    """Run it; exit status 1 where anything was claimed twice, lost or numbered twice."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.claimers", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--claimers", type=int, default=2)
    parser.add_argument("--recorders", type=int, default=2)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="everos-claim-") as name:
        directory = Path(name)
        Database(directory / "engine.db", schema=queue.SCHEMA).close()
        Disk(directory / "disk")
        begin = context.Barrier(arguments.claimers + arguments.recorders)  # a process may take long to start
        jobs = [(claimer, (directory, begin, which, arguments.seconds)) for which in range(arguments.claimers)]
        jobs += [
            (recorder, (directory, begin, which, arguments.recorders, arguments.seconds))
            for which in range(arguments.recorders)
        ]
        processes = [context.Process(target=target, args=args) for target, args in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        figures = verdict(directory)
        died = sum(process.exitcode != 0 for process in processes)
    print(f"two_claimers: {arguments.seconds:g} s: {json.dumps(figures)}")
    bad = figures["double_claims"] + figures["lost_edits"] + figures["duplicate_lsns"] + died
    return 1 if bad or not figures["claimed"] or not figures["recorded"] else 0
