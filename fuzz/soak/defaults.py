"""The engine as a user gets it: default settings, the local model, a realistic memory, an edit and three searches every two seconds.

    python -m fuzz.soak --defaults --minutes 60               # the limit of the shell
    python -m fuzz.soak --defaults --minutes 60 --limit 64

A run of 30 minutes or more ends with a rest: once old versions may go, the index must be within twice the size of a fresh one.
"""

from __future__ import annotations

import bisect
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everos_engine.settings import LanceDBSettings
from everos_engine.system import descriptors
from fuzz import REPOSITORY
from fuzz.meter import Meter
from fuzz.realistic import Memory
from fuzz.results import RESULTS, Run, write_result
from fuzz.soak.slope import NEEDS_SECONDS, Slope, crest, slope

CHILD = ("-m", "fuzz.soak.engine", "--defaults")
BEAT_SECONDS = 2.0
READY_SECONDS, END_SECONDS = 900.0, 300.0
"""A first index embeds every text; the slowest machine may take minutes."""
REST_FROM_MINUTES = 30.0
REST_SECONDS = 1.25 * LanceDBSettings().keep_versions_seconds + 60
"""A table at rest needs two passes at most, and a minute is for the machine."""
MAX_TIMES_FRESH = 2.0
MIB = 1 << 20


@dataclass(slots=True)
class Disk:
    """The index on disk, sampled from a thread until it is stopped: seconds, bytes and files."""

    directory: Path
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._sample, name="disk", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        began = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            found = descriptors.tree_size(self.directory)
            if found is not None:
                self.seconds.append(time.monotonic() - began)
                self.files.append(found[0])
                self.sizes.append(found[2])


@dataclass(slots=True)
class Seen:
    """What was measured, what the child said at its end, its log, the guard's history, and bytes and files of a fresh index."""

    meter: Meter
    disk: Disk
    told: dict[str, Any]
    log: str
    points: list[dict[str, int]] = field(default_factory=list)
    fresh: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a soak of the defaults found; ``faults`` is empty when it passed."""

    faults: tuple[str, ...]
    facts: Mapping[str, object]

    def line(self) -> str:
        """One line for people."""
        word = "passed" if not self.faults else "FAILED: " + "; ".join(self.faults)
        return f"soak of the defaults: {word}; {json.dumps(self.facts)}"


def soak(
    limit: int | None,
    minutes: float,
    *,
    rest_seconds: float,
    rows: int,
    flags: Mapping[str, object] | None = None,
    folder: Path = RESULTS,
) -> Verdict:
    """Run one engine with default settings, judge it, and leave a plot, its series and a JSON line in ``folder``.

    ``limit`` is that of descriptors, None the shell's own. ``flags`` are settings that differ from the defaults.
    """
    with tempfile.TemporaryDirectory(prefix="everos-soak-") as place:
        memory, history = Memory(Path(place, "memory").resolve(), random.Random(1), rows), Path(place, "history.jsonl")
        memory.plant()
        settings = {"memory.root": str(memory.root), "lancedb.history_file": str(history), **(flags or {})}
        seen = _live(memory, limit, settings, minutes, rest_seconds)
        if seen.told:
            seen.points = [json.loads(line) for line in history.read_text(encoding="ascii").splitlines()]
            seen.fresh = _fresh(memory, Path(place, "copy")) if rest_seconds else None
    faults, facts = _judge(memory, seen, minutes)
    facts = {"passed": not faults, "faults": faults, "limit": limit, "minutes": minutes, **facts}
    if seen.told:
        write_result(f"soak-defaults-{limit or 'none'}", facts, _run(seen), folder=folder)
    return Verdict(tuple(faults), facts)


def _live(memory: Memory, limit: int | None, flags: Mapping[str, object], minutes: float, rest_seconds: float) -> Seen:
    """Run the child, edit the memory under it, let it rest."""
    bound = "" if limit is None else f"ulimit -n {limit} && "
    command = ["sh", "-c", f'{bound}exec "$@"', "sh", sys.executable, *CHILD, json.dumps(flags)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        meter, disk = Meter(process.pid, every_seconds=0.02, keep_seconds=1.0), Disk(memory.root / ".index" / "lancedb")
        watchdog = threading.Timer(READY_SECONDS, process.kill)
        watchdog.start()
        told: dict[str, Any] = {}
        try:
            if "serving" in process.stdout.readline():
                watchdog.cancel()
                meter.start()
                disk.start()
                _edit(memory, minutes, process)
                process.stdin.write("rest\n")
                process.stdin.flush()
                time.sleep(rest_seconds)
                meter.stop()
                disk.stop()
                watchdog = threading.Timer(END_SECONDS, process.kill)
                watchdog.start()
                process.stdin.close()
                told = json.loads(process.stdout.readline() or "{}")
        finally:
            watchdog.cancel()
            meter.stop()
            disk.stop()
            process.kill()
        log.seek(0)
        return Seen(meter, disk, told, log.read())


def _edit(memory: Memory, minutes: float, process: subprocess.Popen[str]) -> None:
    """One edit a beat, whatever an edit takes."""
    began, beats = time.monotonic(), 0
    while (now := time.monotonic()) < began + 60 * minutes and process.poll() is None:
        if now >= began + beats * BEAT_SECONDS:
            memory.edit()
            beats += 1
        time.sleep(0.05)


def _fresh(memory: Memory, copy: Path) -> tuple[int, int]:
    """Bytes and files of an index of the same files that nothing was ever edited in; vectors come from the same cache."""
    shutil.copytree(memory.root, copy, ignore=shutil.ignore_patterns(".index"))
    cache = memory.root / ".index" / "engine" / "embeddings.db"
    (copy / ".index" / "engine").mkdir(parents=True)
    shutil.copy(cache, copy / ".index" / "engine")
    command = [sys.executable, "-m", "everos_engine", "--root", str(copy), "sync"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EVEROS_")}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    found = descriptors.tree_size(copy / ".index" / "lancedb")
    assert found is not None
    return found[2], found[0]


def _judge(memory: Memory, seen: Seen, minutes: float) -> tuple[list[str], dict[str, object]]:
    """Everything that is not as it should be, in words; and the figures."""
    meter, disk, told, log = seen.meter, seen.disk, seen.told, seen.log
    if not told:
        return ["the engine ended or hung: " + " | ".join(log.splitlines()[-3:])], {}
    fault_names = ("search_errors", "failed", "pending", "lost", "left_over", "stale", "notes")
    faults = [f"{name}: {told[name]}" for name in fault_names if told[name]]
    sample = told["fds"]
    if meter.peak >= sample["limit"]:
        faults.append(f"{meter.peak} descriptors: at the limit of {sample['limit']}")
    if "os error 24" in log or "Too many open files" in log:
        faults.append("the log reports EMFILE")
    ceiling, peak_rss = int(sample["memory"]["ceiling_bytes"]), max(meter.rss)
    if peak_rss > ceiling:
        faults.append(f"resident memory reached {mib(peak_rss)} MiB, its ceiling is {mib(ceiling)} MiB")
    if seen.fresh is not None and disk.sizes[-1] > MAX_TIMES_FRESH * seen.fresh[0]:
        faults.append(f"after its rest the index has {mib(disk.sizes[-1])} MiB, a fresh one {mib(seen.fresh[0])} MiB")
    session = max((point["session_bytes"] for point in seen.points), default=0)
    if session > sample["memory"]["parts"]["session"]:
        faults.append(f"the Session's caches held {mib(session)} MiB, more than their part of the ceiling")
    slopes: dict[str, Slope] = {}
    if 60 * minutes >= NEEDS_SECONDS:
        slopes = {
            "RSS": _slope(meter.seconds, meter.rss, until=60 * minutes),
            "index": _slope(disk.seconds, disk.sizes, until=60 * minutes),
        }
    reasons = [line.split("reason=")[1].split()[0] for line in log.splitlines() if "session_rotated" in line]
    return faults, {
        "files": len(memory.logs),
        "edits": memory.edits,
        "rows": told["rows"],
        "searches": told["searches"],
        "latency_milliseconds": told["latency"],
        "descriptors": {"peak": meter.peak, "limit": sample["limit"], "soft_budget": sample["soft_budget"]},
        "rotations": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "rss_mib": {
            "start": mib(meter.rss[0]),
            "peak": mib(peak_rss),
            "end": mib(meter.rss[-1]),
            "ceiling": mib(ceiling),
        },
        "memory": sample["memory"],
        "session_mib": {"peak": mib(session), "part": mib(sample["memory"]["parts"]["session"])},
        "index_mib": {"start": mib(disk.sizes[0]), "peak": mib(max(disk.sizes)), "end": mib(disk.sizes[-1])},
        "index_files": {"start": disk.files[0], "peak": max(disk.files), "end": disk.files[-1]},
        "fresh_index": None if seen.fresh is None else {"mib": mib(seen.fresh[0]), "files": seen.fresh[1]},
        "crests_mib_per_minute": {
            name: {key: round(value / MIB, 3) for key, value in found.as_json().items() if key != "level"}
            for name, found in slopes.items()
        },
    }


def _slope(seconds: Sequence[float], values: Sequence[int], *, until: float) -> Slope:
    """The slope of the crests while the memory was edited."""
    end = bisect.bisect(seconds, until)
    return slope(seconds[:end], values[:end], crest)


def _run(seen: Seen) -> Run:
    """The series, all at the meter's moments."""
    meter, disk, sample = seen.meter, seen.disk, seen.told["fds"]
    at_seconds = [(point["at_milliseconds"] - meter.began_milliseconds) / 1000 for point in seen.points]
    session = _at(meter.seconds, at_seconds, [point["session_bytes"] for point in seen.points])
    index = _at(meter.seconds, disk.seconds, disk.sizes)
    ceiling = int(sample["memory"]["ceiling_bytes"])
    return Run(
        meter.seconds, meter.counts, meter.rss, session, int(sample["limit"]), sample["soft_budget"], ceiling, index
    )


def mib(size: int) -> float:
    """Bytes as MiB, for a report."""
    return round(size / MIB, 1)


def _at(moments: Sequence[float], seconds: Sequence[float], values: Sequence[int]) -> list[int]:
    """The value that was the last one at each moment; empty when there is none at all."""
    return [values[max(0, bisect.bisect(seconds, moment) - 1)] for moment in moments] if values else []
