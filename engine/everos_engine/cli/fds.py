"""``everos-engine fds``: the running engine's descriptors by class, against its limit, budgets and ceiling."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

from everos_engine.cli.terminal import print_json
from everos_engine.diagnose.engine_state import EngineState, read_engine_state
from everos_engine.diagnose.wording import Style, ago, size, style_for, with_root
from everos_engine.errors import SettingsError
from everos_engine.settings import Settings
from everos_engine.system import ceiling, descriptors

OK, TROUBLE = 0, 1
WATCH_SECONDS = 1.0
BAR = 24
MEANINGS = {
    "lance_index": "index files of LanceDB, held open",
    "lance_data": "its data and manifests, being read",
    "deleted": "its files, unlinked and still held",
    "sqlite": "queue, ledger and embedding cache",
    "sockets": "control, wake-ups, event loops, HTTP",
    "pipes": "input and output",
    "watch": "inotify",
    "other": "event loops, locks, terminal",
}


def show(settings: Settings, *, watch: bool, as_json: bool, program: str = "everos-engine") -> int:
    """Print the table once, or every second until interrupted. JSON is one object, with ``watch`` one per line."""
    while True:
        found = read_engine_state(settings)
        data = as_data(settings, found)
        if as_json:
            print_json(data, indent=None if watch else 2)
        else:
            clear = "\x1b[H\x1b[2J" if watch and sys.stdout.isatty() else ""
            print(clear + with_root(as_text(data, found, style_for(sys.stdout)), program), flush=True)
        if not watch:
            return OK if found.state in {"answers", "absent"} else TROUBLE
        time.sleep(WATCH_SECONDS)


def as_data(settings: Settings, found: EngineState) -> dict[str, object]:
    """Return the stable form of ``fds --json``.

    It is ``engine`` and ``fds``, the guard's last sample, or what the settings imply.
    """
    engine = {"state": found.state, "pid": found.pid}
    if found.descriptors:
        return {
            "version": 1,
            "engine": engine,
            "fds": dict(found.descriptors),
            "pressure": found.snapshot.get("pressure"),
        }
    return {"version": 1, "engine": engine, "implied": implied(settings)}


def implied(settings: Settings) -> dict[str, object]:
    """Return what an engine started here and now would have. ``refusal`` is why it would not start, or None."""
    lancedb = settings.lancedb
    limit, pinned = descriptors.limits()[1], lancedb.descriptor_mode == "pinned"
    try:
        cap_bytes, refusal = ceiling.cap_of(lancedb, limit=limit), None
    except SettingsError as error:
        cap_bytes, refusal = cast("int", lancedb.index_cache_size_bytes), str(error)
    soft, hard = ceiling.budgets_of(settings, limit=limit)
    memory = ceiling.memory_ceiling(settings)
    return {
        "limit": limit,
        "soft_budget": soft,
        "hard_budget": hard,
        "mode": lancedb.descriptor_mode,
        "cap_bytes": cap_bytes,
        "ceiling": ceiling.ceiling_of(settings, cap_bytes=cap_bytes, pinned=pinned, limit=limit),
        "memory": {
            "soft_bytes": memory.soft_bytes,
            "ceiling_bytes": memory.ceiling_bytes,
            "parts": asdict(memory),
            "rows": 0,
        },
        "refusal": refusal,
    }


def as_text(data: Mapping[str, object], found: EngineState, style: Style) -> str:
    """Return the table for people."""
    if "fds" in data:
        return _live(cast("Mapping[str, object]", data["fds"]), found, style)
    facts = cast("Mapping[str, object]", data["implied"])
    said = {
        "absent": "no engine is running here: start one with `everos-engine run`",
        "stopped": f"the engine (pid {found.pid}) is stopped: continue it with `kill -CONT {found.pid}`",
        "silent": f"the engine (pid {found.pid}) does not answer. It is busy or stuck, see its log",
        "mute": f"the engine (pid {found.pid}) does not listen yet, or its file system does not support sockets",
        "hidden": "an engine may be running here, of another user: ask as that user",
        "answers": f"the engine (pid {found.pid}) has not counted yet: ask again in a second",
    }[found.state]
    lines = [said, "", "what the settings imply here:", *_bounds(facts)]
    if facts["refusal"]:
        lines += ["", style.wrap(f"it would not start: {facts['refusal']}", indent=4)]
    return "\n".join(lines)


def _live(sample: Mapping[str, object], found: EngineState, style: Style) -> str:
    count, limit = _int(sample, "count"), max(1, _int(sample, "limit"))
    colour = "green"
    if count > _int(sample, "soft_budget"):
        colour = "red" if count >= _int(sample, "hard_budget") else "yellow"
    filled = min(BAR, round(BAR * count / limit))
    bar = style("#" * filled, colour) + "." * (BAR - filled)
    old = max(0.0, time.time() - _int(sample, "sampled_milliseconds") / 1000)
    classes = cast("Mapping[str, int]", sample["classes"])
    law = cast("Mapping[str, object] | None", sample["law"])
    proven = (
        "not run yet"
        if law is None
        else ("passed" if law["holds"] else "FAILED, the engine rotates the session instead")
    )
    lines = [
        f"engine: pid {found.pid}, counted {ago(old)} ago by {sample['counted_by']}",
        f"descriptors: {style(str(count), colour)} of {limit:,}  [{bar}]  peak {_int(sample, 'peak'):,}",
        *(f"  {name:<12}{number:>7,}  {MEANINGS.get(name, '')}" for name, number in classes.items()),
        *_bounds(sample),
        f"self-test of mode {sample['mode']}: {proven}"
        + ("" if law is None else f" (pinned {law['pinned']}, {law['library']})"),
        (
            f"session: {size(_int(sample, 'session_bytes'))} cached, rotated {_int(sample, 'rotations')} times, "
            f"{_int(sample, 'generations_open') - 1} old ones still in use"
        ),
        *_slope(sample),
        f"ran out of descriptors: {_int(sample, 'exhaustions')} times",
        f"worker speed: {cast('float', found.snapshot.get('pressure', 1.0)):.0%}",
        f"memory: {size(_int(sample, 'rss_bytes'))} resident, {_int(sample, 'threads')} threads",
        (
            f"index on disk: {_int(sample, 'index_files'):,} files in {_int(sample, 'index_directories'):,} directories, "
            f"{size(_int(sample, 'index_bytes'))}"
        ),
    ]
    return "\n".join(lines)


def _slope(sample: Mapping[str, object]) -> list[str]:
    """Return what one MiB of the Session pins, as the guard counted it. Nothing before it has seen enough."""
    learned = cast("Mapping[str, float] | None", sample.get("slope"))
    if learned is None:
        return []
    interval = f"[{learned['low']:.1f}, {learned['high']:.1f}]"
    return [
        f"pinned by a MiB of the session: {learned['per_mebibyte']:.1f} descriptors {interval}, {learned['points']:.0f} pairs"
    ]


def _bounds(facts: Mapping[str, object]) -> list[str]:
    return [
        (
            f"limit: {_int(facts, 'limit'):,}, soft budget {_int(facts, 'soft_budget'):,} (rotate, slow down), "
            f"hard budget {_int(facts, 'hard_budget'):,} (new work waits)"
        ),
        f"mode: {facts['mode']}, cap {size(_int(facts, 'cap_bytes'))}, ceiling {_int(facts, 'ceiling'):,}",
        _memory(cast("Mapping[str, object]", facts.get("memory") or {})),
    ]


def _memory(facts: Mapping[str, object]) -> str:
    """Return the ceiling of resident memory, as a sum."""
    parts = cast("Mapping[str, int]", facts.get("parts") or {})
    total = " + ".join(f"{name} {size(part)}" for name, part in parts.items())
    return f"memory ceiling: {size(_int(facts, 'ceiling_bytes'))} = {total}; slows down above {size(_int(facts, 'soft_bytes'))}"


def _int(facts: Mapping[str, object], name: str) -> int:
    return int(cast("int", facts.get(name, 0)))
