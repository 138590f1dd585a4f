"""``everos-engine fds calibrate``: measure what each cap costs in descriptors and saves in time, on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from everos_engine.errors import EngineError, Fatal
from everos_engine.settings import DescriptorMode, LanceDBSettings, Settings
from everos_engine.system import descriptors, files
from everos_engine.system.ceiling import HEADROOM, MIB, own_of
from everos_engine.text import kinds

CAPS = tuple(mib * MIB for mib in (2, 4, 8, 16, 32))
QUICK_CAPS = (MIB, 8 * MIB)
UNBOUNDED = 1 << 40
CYCLES, QUICK_CYCLES = 30, 12
QUERIES, QUICK_QUERIES = 100, 40
ROWS = 100
LIMITS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROOMY = 1024
"""A limit under which the engine reads with its full width."""
TRIAL_SECONDS = 900.0
MAX_FILES, MIN_ENTRIES, MAX_WORDS = 400, 20, 20_000
MARGIN = 1.25
"""On the recommended slope, because the next run pins a little more or less."""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table. ``ceiling`` is projected from the slope if the cap was not reached. None: it never ends."""

    mode: DescriptorMode
    cap_bytes: int | None
    pinned: int
    ceiling: int | None
    projected: bool
    p50_milliseconds: float
    p95_milliseconds: float
    cpu_milliseconds: float
    session_bytes: int
    safe_limit: int | None
    per_cycle: Sequence[int]
    exhausted: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """Running words, and the words per FTS column of sample entries. ``source`` says whose they are."""

    words: tuple[str, ...]
    lengths: tuple[tuple[int, ...], ...]
    source: str


def calibrate(settings: Settings, *, quick: bool, output: Path) -> int:
    """Run every benchmark in a new process, and print the table and the recommended setting.

    JSON and a plot go to ``output``.
    """
    shape = shape_of(settings)
    print(f"calibrating with {shape.source}: each line is a process of its own", flush=True)
    caps, cycles = (QUICK_CAPS, QUICK_CYCLES) if quick else (CAPS, CYCLES)
    queries = QUICK_QUERIES if quick else QUERIES
    plan = {"cycles": cycles, "rows": ROWS, "queries": queries, "dimension": _dimension(settings)}
    found = {
        (mode, cap): _try(plan | {"mode": mode, "cap_bytes": cap}, shape)
        for mode, cap in [*(("pinned", cap) for cap in (*caps, UNBOUNDED)), ("reopen", caps[-1])]
    }
    counts: dict[int, Sequence[int]] = {
        cap: trial["per_cycle"]  # type: ignore[misc]  # a default binds the value of this turn
        for (mode, cap), trial in found.items()
        if mode == "pinned"
    }
    slope = slope_of(counts, otherwise=settings.lancedb.descriptors_per_mebibyte)
    lines = [_line(mode, cap, trial, slope) for (mode, cap), trial in found.items()]  # type: ignore[arg-type]  # our own trial's JSON
    facts: dict[str, object] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "lancedb": importlib.metadata.version("lancedb"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "limit": descriptors.limits()[1],
        "shape": shape.source,
        **plan,
        "descriptors_per_mebibyte": slope,
        "lines": [asdict(line) for line in lines],
        "offer": offer(lines, slope=slope, limit=descriptors.limits()[1]),
    }
    print("\n".join([*as_text(lines), "", *_advice(facts, lines)]))
    _write(facts, lines, output)
    return 0


def shape_of(settings: Settings) -> Shape:
    """Return the words and lengths of the root's own episodes, or made-up ones if it has fewer than 20."""
    columns = kinds.KINDS["episode"].fts_columns
    words: list[str] = []
    lengths: list[tuple[int, ...]] = []
    for texts in _episodes(settings):
        split = [text.split() for text in texts]
        words += [word for column in split for word in column]
        lengths.append(tuple(map(len, split)))
        if len(words) > MAX_WORDS:
            break
    if len(lengths) >= MIN_ENTRIES:
        return Shape(tuple(words[:MAX_WORDS]), tuple(lengths), f"{len(lengths)} episodes of {settings.root}")
    chance = random.Random(0)  # noqa: S311 - text to fill an index
    ranks = range(1, 5001)
    made = chance.choices([f"word{rank}" for rank in ranks], [1 / rank for rank in ranks], k=MAX_WORDS)
    sizes = tuple((chance.randint(3, 8), *(chance.randint(30, 120) for _ in columns[1:-1]), 1) for _ in range(200))
    return Shape(tuple(made), sizes, "made-up episodes (the root has too few of its own)")


def slope_of(pinned: Mapping[int, Sequence[int]], *, otherwise: float) -> float:
    """Return the descriptors per MiB of cap: the steepest of the caps that were reached, or ``otherwise`` if none was.

    ``pinned`` is cap -> index descriptors after each cycle. They fall only if the cache evicted something.
    """
    reached = [
        max(counts) / (cap / MIB)
        for cap, counts in pinned.items()
        if cap != UNBOUNDED and any(after < before for before, after in pairwise(counts))
    ]
    return round(max(reached), 1) if reached else otherwise


def offer(lines: Sequence[Line], *, slope: float, limit: int) -> dict[str, object]:
    """Return the settings to use: ``reopen`` if it pins none, together with the fitting cap for ``pinned``."""
    reopen = next(line for line in lines if line.mode == "reopen")
    fitting = [
        line.cap_bytes
        for line in lines
        if line.mode == "pinned" and line.cap_bytes and _fits(line.cap_bytes, MARGIN * slope, limit)
    ]
    return {
        "lancedb.descriptor_mode": "reopen" if reopen.pinned == 0 else "pinned",
        "lancedb.index_cache_size_bytes": max(fitting, default=0) if reopen.pinned else reopen.cap_bytes,
        "lancedb.descriptors_per_mebibyte": round(MARGIN * slope, 1),
        "pinned.index_cache_size_bytes": max(fitting, default=0),
    }


def _fits(cap_bytes: int, slope: float, limit: int) -> bool:
    """Return whether the engine will accept the cap at its next start."""
    return HEADROOM * (own_of(LanceDBSettings(), limit=limit) + cap_bytes / MIB * slope) <= limit


def as_text(lines: Sequence[Line]) -> list[str]:
    """Return the runbook's table for this machine."""
    rows = [
        ["mode", "cap", "descriptor ceiling", "p50", "p95", "CPU", f"safe under `ulimit -n` ({HEADROOM}x headroom)"]
    ]
    for line in lines:
        ceiling = "grows for ever" if line.ceiling is None else f"{'~' if line.projected else ''}{line.ceiling}"
        ceiling += f" (ran out at {line.pinned})" if line.exhausted else ""
        rows.append(
            [
                line.mode,
                "unbounded" if line.cap_bytes is None else f"{line.cap_bytes // MIB} MiB",
                ceiling,
                f"{line.p50_milliseconds:.1f} ms",
                f"{line.p95_milliseconds:.1f} ms",
                f"{line.cpu_milliseconds:.1f} ms",
                "never" if line.safe_limit is None else str(line.safe_limit),
            ]
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draw pinned descriptors over the cycles, and latency against ceiling for each cap."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for line in lines:
        cap = "unbounded" if line.cap_bytes is None else f"{line.cap_bytes // MIB} MiB"
        (drawn,) = left.plot(range(1, len(line.per_cycle) + 1), line.per_cycle, linewidth=1, label=f"{line.mode} {cap}")
        beyond = [[0], [line.p95_milliseconds - line.p50_milliseconds]]
        right.errorbar(line.pinned, line.p50_milliseconds, yerr=beyond, fmt="o", color=drawn.get_color())
    left.set(xlabel="add + optimize cycles", ylabel="index descriptors pinned", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(lines), fontsize=7)
    right.set(xlabel="index descriptors pinned at most", ylabel="query, p50 to p95, ms", ylim=(0, None))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _try(plan: Mapping[str, object], shape: Shape) -> dict[str, object]:
    """Make one benchmark run in a new process. Raises Fatal with its last words if it fails."""
    given = json.dumps({**plan, "words": shape.words, "lengths": shape.lengths})
    command = [sys.executable, "-m", "everos_engine.calibrate.benchmark_run"]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False)  # noqa: S603 - ourselves
    except subprocess.TimeoutExpired:
        raise Fatal(
            f"a trial took more than {TRIAL_SECONDS:g} s: try `--quick`, or a machine that is not busy"
        ) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.search(r"\w", line)]  # a frame has none
        raise Fatal(
            f"a trial failed with status {done.returncode}: {(lines or ['it said nothing'])[-1].strip(' |')}: "
            "run `everos-engine doctor`, which names what is missing"
        )
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _line(mode: DescriptorMode, cap: int, trial: Mapping[str, object], slope: float) -> Line:
    times = sorted(trial["query_milliseconds"] or [0.0])  # type: ignore[call-overload]  # our own trial's JSON
    pinned, peak = int(str(trial["pinned"])), int(str(trial["peak"]))
    own = own_of(LanceDBSettings(), limit=ROOMY)
    seen, projected = max(peak, own + pinned), 0
    ceiling: int | None = seen
    if mode == "pinned" and cap == UNBOUNDED:
        ceiling = None
    elif mode == "pinned":
        projected = own + round(slope * cap / MIB)
        ceiling = max(seen, projected)
    return Line(
        mode,
        None if cap == UNBOUNDED else cap,
        pinned,
        ceiling,
        projected > seen,
        statistics.median(times),
        times[min(len(times) - 1, int(0.95 * len(times)))],
        float(str(trial["query_cpu_milliseconds"])),
        int(str(trial["session_bytes"])),
        None if ceiling is None else next((limit for limit in LIMITS if limit >= HEADROOM * ceiling), None),
        trial["per_cycle"],  # type: ignore[arg-type]  # our own trial's JSON
        bool(trial["exhausted"]),
    )


def _advice(facts: Mapping[str, object], lines: Sequence[Line]) -> list[str]:
    chosen: Mapping[str, object] = facts["offer"]  # type: ignore[assignment]  # our own JSON
    reopen = next(line for line in lines if line.mode == "reopen")
    beside = next(line for line in lines if line.mode == "pinned" and line.cap_bytes == reopen.cap_bytes)
    dearer = reopen.cpu_milliseconds / max(beside.cpu_milliseconds, 1e-9) - 1
    text = [f"~ is projected: the cap was not reached; one MiB of cap pins {facts['descriptors_per_mebibyte']} here."]
    if chosen["lancedb.descriptor_mode"] == "reopen":
        text.append(
            f"Use `reopen` (the default): it pins no index descriptor and costs {dearer:+.0%} of a query's CPU time."
        )
    else:
        text.append(f"Mode `reopen` pinned {reopen.pinned} with this LanceDB: use `pinned` with a cap, and report it.")
    return [
        *text,
        f"For `pinned` under this `ulimit -n` of {facts['limit']}:",
        "    [lancedb]",
        '    descriptor_mode = "pinned"',
        f"    index_cache_size_bytes = {chosen['pinned.index_cache_size_bytes']}",
        f"    descriptors_per_mebibyte = {chosen['lancedb.descriptors_per_mebibyte']}",
    ]


def _write(facts: Mapping[str, object], lines: Sequence[Line], output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "calibration.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        print(f"written: {output / 'calibration.json'}")
        if importlib.util.find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed (pip install 'everos-engine[plots]')")
            return
        draw(lines, output / "calibration.png")
        print(f"written: {output / 'calibration.png'}")
    except OSError as error:
        raise EngineError(f"{output}: cannot be written to: {error}: name another folder with --output") from None


def _episodes(settings: Settings) -> list[list[str]]:
    """Return the FTS columns' texts of the root's episodes, of at most 400 files. None if it cannot be read."""

    def wanted(key: str) -> kinds.Place | None:
        place = kinds.recognise(key)
        return place if place is not None and place.kind == "episode" else None

    texts: list[list[str]] = []
    try:
        swept = files.walk(settings.root, wanted)
        for place, _ in list(swept.found.values())[:MAX_FILES]:
            reading = files.read(settings.root, place, max_file_bytes=settings.max_file_bytes)
            entries = kinds.parse(place, reading.sources).entries
            columns = kinds.KINDS["episode"].fts_columns
            texts += [[str(entry.values.get(column) or "") for column in columns] for entry in entries]
    except (EngineError, OSError):
        return texts
    return texts


def _dimension(settings: Settings) -> int:
    widths: Mapping[str, Callable[[], int]] = {
        "local": lambda: 512,
        "http": lambda: settings.embedder.dimension or 1024,
        "none": lambda: 0,
    }
    return widths[settings.embedder.kind]()
