"""The whole engine under a low `ulimit -n`, with ingest, edits and queries at once: no leak, no loss, never at the limit.

    python -m fuzz.soak --minutes 10               # 64, 128, 256 and 1024 in mode reopen, 256 in mode pinned
    python -m fuzz.soak --minutes 0.5 --limit 64
    python -m fuzz.soak --defaults --minutes 60    # see defaults.py

The tree keeps its size while its content changes without pause, so whatever grows in the second half is a leak.
"""

from __future__ import annotations

import argparse
import bisect
import json
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fuzz import REPOSITORY, realistic
from fuzz.meter import Meter
from fuzz.results import RESULTS, Run, write_result
from fuzz.soak import defaults
from fuzz.soak.engine import WORDS
from fuzz.soak.slope import NEEDS_SECONDS, Slope, crest, slope

CHILD = ("-m", "fuzz.soak.engine")
"""Options of Python, run in the repository."""
PLAN = ((64, "reopen"), (128, "reopen"), (256, "reopen"), (1024, "reopen"), (256, "pinned"))
FILES, ENTRIES = 60, 5
AT_ONCE = 5
"""Soaks side by side: a full run lasts as long as one."""
PAUSE_SECONDS = 0.08
"""Between two changes of the tree."""
END_SECONDS = 180.0
SESSION_BUDGET_BYTES = 8 << 20
"""Low, so that every stretch by which slopes are judged has a Session that is full, and one that was rotated."""
SESSION_BOUND = 1.5
"""Times its budget a Session may reach: it is looked at once a second, and rotated once in five at most."""
LASTING_SAMPLES = 20
"""Two seconds: a read of the index in mode `reopen` opens its files for milliseconds."""


@dataclass(slots=True)
class Forest:
    """The tree and its random changes; about FILES files of about ENTRIES entries, half facts and half episodes."""

    root: Path
    chance: random.Random
    serial: int = 0
    changes: int = 0
    held: dict[Path, list[str]] = field(default_factory=dict)

    def plant(self) -> None:
        """The first files."""
        while len(self.held) < FILES:
            self.add_file()

    def change(self) -> None:
        """One step of ingest or editing."""
        self.changes += 1
        count = len(self.held)
        if count < FILES - 5 or (count < FILES + 5 and self.chance.random() < 0.1):
            self.add_file()
            return
        path = self.chance.choice(list(self.held))
        entries, how = self.held[path], self.chance.random()
        if how < 0.1 and count > FILES - 5:
            path.unlink()
            del self.held[path]
        elif how < 0.2:
            moved = self.path(path.parent.name)
            path.rename(moved)
            self.held[moved] = self.held.pop(path)
        elif how < 0.45 and len(entries) < 2 * ENTRIES:
            entries.append(self.entry(path.parent.name))
            self.write(path)
        elif how < 0.6 and len(entries) > 1:
            entries.pop(self.chance.randrange(len(entries)))
            self.write(path)
        else:
            entries[self.chance.randrange(len(entries))] = self.entry(path.parent.name)
            self.write(path)

    def add_file(self) -> None:
        """A new file of ENTRIES entries."""
        folder = self.chance.choice([".atomic_facts", "episodes"])
        path = self.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.held[path] = [self.entry(folder) for _ in range(ENTRIES)]
        self.write(path)

    def path(self, folder: str) -> Path:
        """A name nobody had."""
        self.serial += 1
        return self.root / "users" / "u1" / folder / f"{folder.strip('.')}-{self.serial}.md"

    def entry(self, folder: str) -> str:
        """One entry with an id of its own."""
        self.serial += 1
        text = " ".join(self.chance.choices(WORDS, k=30))
        entry_id = f"{'ep' if folder == 'episodes' else 'af'}_20250227_{self.serial:08d}"
        head = f"<!-- entry:{entry_id} -->\n## {entry_id}\n\n**session_id**: s1\n**timestamp**: 2025-02-27T09:25:00+00:00\n\n"
        body = f"### Subject\n{text[:40]}\n\n### Content\n{text}\n" if folder == "episodes" else f"### Fact\n{text}\n"
        return f"{head}{body}<!-- /entry:{entry_id} -->\n"

    def write(self, path: Path) -> None:
        """Save whole, as an editor does."""
        kind = "episode_daily" if path.parent.name == "episodes" else "atomic_fact_daily"
        fresh = path.with_suffix(".tmp")
        fresh.write_text(f"---\ntype: {kind}\nuser_id: u1\n---\n" + "".join(self.held[path]), encoding="utf-8")
        fresh.replace(path)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a soak found; ``faults`` is empty where it passed."""

    limit: int
    mode: str
    faults: tuple[str, ...]
    peak: int
    told: Mapping[str, object]
    counts: Slope
    rss: Slope

    def line(self) -> str:
        """For people."""
        word = "passed" if not self.faults else "FAILED: " + "; ".join(self.faults)
        return (
            f"soak ulimit -n {self.limit} {self.mode}: {word}; peak {self.peak}, {self.told.get('changes')} changes, "
            f"{self.told.get('searches')} searches, descriptors {self.counts.per_minute:+.2f} "
            f"[{self.counts.low:+.2f}, {self.counts.high:+.2f}] per minute, RSS {self.rss.per_minute / 2**20:+.2f} "
            f"[{self.rss.low / 2**20:+.2f}, {self.rss.high / 2**20:+.2f}] MiB per minute"
        )


def soak(
    limit: int,
    mode: str,
    minutes: float,
    *,
    child: Sequence[str] = CHILD,
    flags: Mapping[str, object] | None = None,
    folder: Path = RESULTS,
) -> Verdict:
    """Run one engine under ``ulimit -n limit``, judge it, and leave a plot and a JSON line in ``folder``.

    ``child`` are the options of Python that start the engine. ``flags`` are settings that not every soak has.
    """
    with tempfile.TemporaryDirectory(prefix="everos-soak-") as place:
        forest, history = Forest(Path(place, "memory").resolve(), random.Random(1)), Path(place, "history.jsonl")
        forest.plant()
        settings = _settings(forest.root, mode) | {"lancedb.history_file": str(history)} | dict(flags or {})
        told, meter, log = _live(forest, limit, settings, minutes, child)
        session = session_bytes(history, meter)
    run = Run(meter.seconds, meter.counts, meter.rss, session, limit, _budget(told))
    counts, rss = slope(run.seconds, run.counts), slope(run.seconds, run.rss_bytes, crest)
    judged = {"descriptors": counts, "crests of RSS in bytes": rss} if run.seconds[-1] >= NEEDS_SECONDS else {}
    faults = _faults(told, meter.peak, limit, log, slopes=judged)
    if mode == "reopen" and meter.lasting(LASTING_SAMPLES):
        faults.append(f"mode reopen holds {meter.lasting(LASTING_SAMPLES)} index descriptors open")
    if max(session, default=0) > SESSION_BOUND * SESSION_BUDGET_BYTES:
        faults.append(f"the Session's caches held {max(session)} bytes of a budget of {SESSION_BUDGET_BYTES}")
    verdict = Verdict(limit, mode, tuple(faults), meter.peak, told, counts, rss)
    facts = {
        "passed": not faults, "faults": faults, "limit": limit, "mode": mode, "minutes": minutes, "peak": meter.peak,
        "count_slope": counts.as_json(), "rss_slope_bytes": rss.as_json(), **{key: told.get(key) for key in TOLD},
    }  # fmt: skip
    write_result(f"soak-{limit}-{mode}", facts, run, folder=folder)
    return verdict


TOLD = ("changes", "searches", "rows", "fds")


def _settings(root: Path, mode: str) -> dict[str, object]:
    """Everything that happens seldom in a daemon's life happens often here; so many deletions are no accident."""
    return {
        "brake_ratio": 1.0,
        "memory.root": str(root),
        "scan_interval_seconds": 5.0,
        "lancedb.descriptor_mode": mode,
        "lancedb.index_cache_size_bytes": "auto" if mode == "pinned" else 4 << 20,
        "lancedb.session_most_bytes": SESSION_BUDGET_BYTES,
        "lancedb.optimize_after_commits": 6,
        "lancedb.optimize_idle_seconds": 0.2,
        "lancedb.keep_versions_seconds": 60,
    }


def _live(
    forest: Forest, limit: int, flags: Mapping[str, object], minutes: float, child: Sequence[str]
) -> tuple[dict[str, object], Meter, str]:
    """What the child told at its end, what was measured of it, and its log."""
    command = ["sh", "-c", f'ulimit -n {limit} && exec "$@"', "sh", sys.executable, *child, json.dumps(flags)]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=REPOSITORY
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        lines = _lines(process.stdout.readline)
        meter = Meter(process.pid, directory=forest.root)
        told: dict[str, object] = {}
        try:
            if "serving" in next(lines):
                meter.start()
                _edit(forest, minutes, process)
                process.stdin.close()
                told = json.loads(next(lines) or "{}")
        finally:
            meter.stop()
            process.kill()
        log.seek(0)
        return told, meter, log.read()


def session_bytes(history: Path, meter: Meter) -> list[int]:
    """What the guard's history file says of the Session, at the meter's moments; empty where there is none."""
    points = [json.loads(line) for line in history.read_text(encoding="ascii").splitlines()] if history.exists() else []
    if not points:
        return []
    when = [(point["at_milliseconds"] - meter.began_milliseconds) / 1000 for point in points]
    return [int(points[max(0, bisect.bisect(when, second) - 1)]["session_bytes"]) for second in meter.seconds]


def _lines(readline: Callable[[], str]) -> Iterator[str]:
    """Lines of the child; the empty one where it says nothing for END_SECONDS, or has ended."""
    while True:
        said: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=lambda into=said: into.put(readline()), daemon=True).start()
        try:
            yield said.get(timeout=END_SECONDS)
        except queue.Empty:
            yield ""


def _edit(forest: Forest, minutes: float, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end and process.poll() is None:
        forest.change()
        time.sleep(PAUSE_SECONDS)


def _budget(told: Mapping[str, object]) -> int | None:
    fds = told.get("fds")
    return int(fds["soft_budget"]) if isinstance(fds, dict) and "soft_budget" in fds else None


def _faults(told: Mapping[str, object], peak: int, limit: int, log: str, *, slopes: Mapping[str, Slope]) -> list[str]:
    """Everything that is not as it should be, in words."""
    if not told:
        return ["the engine ended or hung: " + " | ".join(log.splitlines()[-3:])]
    found = [
        f"{name}: {told[name]}"
        for name in ("search_errors", "failed", "pending", "lost", "left_over", "stale")
        if told[name]
    ]
    if peak >= limit:
        found.append(f"{peak} descriptors: at the limit of {limit}")
    if "os error 24" in log or "Too many open files" in log:
        found.append("the log tells of EMFILE")
    found += [
        f"{name} rise by {slope.per_minute:.2f} a minute, surely more than {slope.low:.2f}"
        for name, slope in slopes.items()
        if slope.rises
    ]
    return found


def main(arguments: Sequence[str]) -> int:
    """Soak under each limit in turn; exit status 1 where one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.soak", description="Soak the engine under low descriptor limits."
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="how long each soak lasts; slopes are judged from 7.5 on"
    )
    parser.add_argument(
        "--limit", action="append", type=_limit, help="only this one, in mode reopen, or none; may be repeated"
    )
    parser.add_argument("--defaults", action="store_true", help="soak the default settings with the local model")
    parser.add_argument("--rows", type=int, default=realistic.ROWS, help="rows of the memory, with --defaults")
    parser.add_argument("--rest-minutes", type=float, help="how long to rest at the end, with --defaults")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting, with --defaults")
    chosen = parser.parse_args(arguments)
    if chosen.defaults:
        return _soak_defaults(chosen)
    if chosen.limit and None in chosen.limit:
        parser.error("--limit none is for --defaults")
    return run_plan([(limit, "reopen") for limit in chosen.limit] if chosen.limit else PLAN, chosen.minutes)


def _limit(text: str) -> int | None:
    return None if text == "none" else int(text)


def _soak_defaults(chosen: argparse.Namespace) -> int:
    flags = dict(setting.split("=", 1) for setting in chosen.set)
    rest = chosen.rest_minutes
    if rest is None:
        rest = defaults.REST_SECONDS / 60 if chosen.minutes >= defaults.REST_FROM_MINUTES else 0.0
    failed = False
    for limit in chosen.limit or [None]:
        verdict = defaults.soak(limit, chosen.minutes, rest_seconds=60 * rest, rows=chosen.rows, flags=flags)
        print(verdict.line(), flush=True)
        failed = failed or bool(verdict.faults)
    return int(failed)


def run_plan(plan: Sequence[tuple[int, str]], minutes: float) -> int:
    """Every limit and mode for so many minutes, AT_ONCE of them at a time; 1 where one fails."""
    failed = False
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for verdict in pool.map(lambda one: soak(*one, minutes), plan):
            print(verdict.line(), flush=True)
            failed = failed or bool(verdict.faults)
    return int(failed)
