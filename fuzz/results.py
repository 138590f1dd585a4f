"""Where a run leaves what it saw: one JSON line in ``results/stress.jsonl``, its series as CSV and their plot beside it."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuzz import REPOSITORY

WRITING = threading.Lock()
"""pyplot keeps its figures in one place for all threads."""
RESULTS = REPOSITORY / "results"


@dataclass(frozen=True, slots=True)
class Run:
    """The series of one run, sampled together, and the lines they are held against; ``session_bytes`` may be empty."""

    seconds: Sequence[float]
    counts: Sequence[int]
    rss_bytes: Sequence[int]
    session_bytes: Sequence[int]
    limit: int
    budget: int | None = None
    ceiling_bytes: int | None = None
    index_bytes: Sequence[int] = ()


def write_result(name: str, facts: Mapping[str, object], run: Run, *, folder: Path = RESULTS) -> Path:
    """Append the JSON line, draw the plot where matplotlib is installed; the folder. One thread at a time."""
    with WRITING:
        return _write(name, facts, run, folder)


def _write(name: str, facts: Mapping[str, object], run: Run, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    line = {
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "lancedb": importlib.metadata.version("lancedb"),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        **facts,
    }
    with (folder / "stress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    series = {
        "seconds": [f"{second:.2f}" for second in run.seconds],
        "descriptors": run.counts,
        "rss_bytes": run.rss_bytes,
    }
    if run.session_bytes:
        series["session_bytes"] = run.session_bytes
    if run.index_bytes:
        series["index_bytes"] = run.index_bytes
    with (folder / f"{name}.csv").open("w", encoding="ascii", newline="") as file:
        csv.writer(file).writerows([series, *zip(*series.values(), strict=True)])
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed (pip install 'everos-engine[plots]')")
    else:
        draw(name, run, folder / f"{name}.png")
    return folder


def draw(title: str, run: Run, path: Path) -> None:
    """Count, budget and limit above, RSS and the Session's bytes below, over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 5), height_ratios=(2, 1))
    above.plot(run.seconds, run.counts, linewidth=0.8, color="#1f5fa8", label="descriptors")
    above.axhline(run.limit, color="#b02a2a", linewidth=1, label=f"limit {run.limit}")
    if run.budget is not None:
        above.axhline(run.budget, color="#c98a1b", linewidth=1, linestyle="--", label=f"soft budget {run.budget}")
    above.set_ylim(0, None if run.limit <= 4 * max(run.counts) else 1.5 * max(run.counts))
    above.set_ylabel("open descriptors")
    above.set_title(title)
    above.legend(loc="upper left", fontsize="small")
    below.plot(run.seconds, [value / (1 << 20) for value in run.rss_bytes], linewidth=0.8, color="#2c7a4b", label="RSS")
    if run.session_bytes:
        session = [value / (1 << 20) for value in run.session_bytes]
        below.plot(run.seconds, session, linewidth=0.8, color="#7a4b9c", label="of it the Session's caches")
    if run.ceiling_bytes is not None:
        below.axhline(run.ceiling_bytes / (1 << 20), color="#b02a2a", linewidth=1, label="ceiling of RSS")
    if run.index_bytes:
        size = [value / (1 << 20) for value in run.index_bytes]
        below.plot(run.seconds, size, linewidth=0.8, color="#c98a1b", label="index on disk")
    if run.session_bytes:
        below.legend(loc="center", ncols=2, fontsize="small")
    below.set_ylabel("MiB")
    below.set_ylim(bottom=0)
    below.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
