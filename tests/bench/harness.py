"""Figures: measured, told with their spread, held against a target, kept as JSON lines and as a page of the docs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import apsw

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("lancedb", "apsw", "trio", "watchfiles", "numpy")


@dataclass(frozen=True)
class Figure:
    """One measured thing: the median of ``values``; ``target`` is the most it may be, or with ``least`` the least."""

    name: str
    unit: str
    values: Sequence[float]
    target: float | None = None
    least: bool = False
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def mad(self) -> float:
        """Median absolute deviation."""
        return statistics.median(abs(value - self.median) for value in self.values)

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if (self.median >= self.target if self.least else self.median <= self.target) else "missed"


@dataclass
class Stopwatch:
    """Wall and CPU seconds of a block; CPU is of all threads of this process."""

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def timed() -> Iterator[Stopwatch]:
    watch = Stopwatch()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield watch
    finally:
        watch.wall_seconds, watch.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu


def p95(values: Sequence[float]) -> float:
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]


def child_cpu(command: Sequence[str], environment: dict[str, str]) -> tuple[int, float]:
    """Exit status and CPU seconds of a command whose output goes nowhere."""
    pid = os.posix_spawn(command[0], command, environment, file_actions=_nowhere())
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def _nowhere() -> list[tuple[object, ...]]:
    return [(os.POSIX_SPAWN_OPEN, handle, os.devnull, os.O_RDWR, 0) for handle in (0, 1, 2)]


def engine_environment(root: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EVEROS_")}
    return kept | {"EVEROS_ROOT": str(root), "XDG_CONFIG_HOME": str(root.parent / "none"), "EVEROS_NOTE__GLOBS": "*.md"}


def machine() -> dict[str, str]:
    """What the figures were measured on and with."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return {
        "machine": f"{model}, {os.cpu_count()} cores, {platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "versions": f"Python {platform.python_version()}, SQLite {apsw.sqlite_lib_version()}, {versions}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


Bench = Callable[[], Sequence[Figure]]


@dataclass
class Book:
    """Benchmarks by name."""

    benches: dict[str, Bench] = field(default_factory=dict)

    def bench(self, function: Bench) -> Bench:
        self.benches[function.__name__] = function
        return function


BOOK = Book()


def told(figure: Figure) -> str:
    return f"{shown(figure.median)} {figure.unit}"


def shown(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """A table for people."""
    rows = [("what", "median", "MAD", "n", "target", "")]
    for figure in figures:
        sign = "≥" if figure.least else "≤"
        target = "" if figure.target is None else f"{sign} {shown(figure.target)} {figure.unit}"
        rows.append(
            (figure.name, told(figure), f"{shown(figure.mad)}", str(len(figure.values)), target, figure.verdict)
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def keep(figures: Sequence[Figure]) -> Path:
    """Append the figures to ``results/bench.jsonl``."""
    path = REPOSITORY / "results" / "bench.jsonl"
    path.parent.mkdir(exist_ok=True)
    facts = machine() | {"command": " ".join(["python", *sys.argv])}
    with path.open("a") as file:
        for figure in figures:
            file.write(json.dumps(asdict(figure) | {"median": figure.median, "mad": figure.mad} | facts) + "\n")
    return path


def page(figures: Sequence[Figure]) -> str:
    """``docs/benchmarks.md``."""
    facts = machine()
    lines = [
        "# Benchmarks",
        "",
        "Written by `nox -s bench -- --update-docs`; do not edit. Each figure is a median with its median absolute",
        "deviation (MAD) over n measurements. CPU figures count all threads. Embeddings come from an instant fake",
        "embedder, unless a line says otherwise, so that the figures are the engine's own. Targets are for an idle",
        "machine with two cores; other work on it moves wall times most.",
        "",
        f"- machine: {facts['machine']}",
        f"- versions: {facts['versions']}",
        f"- date: {facts['date']}",
        "",
        "| what | median | MAD | n | target | |",
        "|---|---|---|---|---|---|",
    ]
    for figure in figures:
        sign = "≥" if figure.least else "≤"
        target = "" if figure.target is None else f"{sign} {shown(figure.target)} {figure.unit}"
        name = f"{figure.name} ({figure.note})" if figure.note else figure.name
        lines.append(
            f"| {name} | {told(figure)} | {shown(figure.mad)} | {len(figure.values)} | {target} | {figure.verdict} |"
        )
    return "\n".join(lines) + "\n"
