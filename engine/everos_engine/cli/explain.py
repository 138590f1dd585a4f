"""An explanation for people: the verdict first, what to do, then the facts it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from everos_engine.diagnose.wording import Style, ago, plural, shown, size

if TYPE_CHECKING:
    from everos_engine.diagnose.explain import Evidence, Explanation

COLOURS = {"searchable": "green", "partly": "yellow", "waiting": "yellow", "held": "yellow"}
WORDS = {"excluded": "not indexed", "partly": "searchable in part"}
LABEL = 10
MAX_NAMED = 5


def as_text(found: Explanation, style: Style) -> str:
    """Return the block for a terminal."""
    seen, diagnosis = found.evidence, found.diagnosis
    name = shown(seen.place.md_path if seen.place is not None and seen.key != seen.path else seen.key or seen.path)
    word = WORDS.get(diagnosis.verdict, diagnosis.verdict)
    verdict = style(f"{word}:", COLOURS.get(diagnosis.verdict, "red"))
    lines = [style(name, "bold"), style.wrap(diagnosis.cause, indent=2, first=f"{verdict} ")]
    facts = [
        ("do", diagnosis.remedy),
        ("next", diagnosis.next),
        ("kind", _kind(seen)),
        ("disk", _disk(seen)),
        ("queue", _queue(seen)),
        ("error", _error(found)),
        ("entries", _entries(seen)),
        ("warnings", _warnings(seen)),
        ("rows", _rows(found)),
        ("engine", _engine(seen)),
    ]
    for label, text in facts:
        if text:
            lines.append(style.wrap(text, indent=LABEL + 2, first=f"  {style(label.ljust(LABEL), 'dim')}"))
    return "\n".join(lines)


def _kind(seen: Evidence) -> str:
    place = seen.place
    if place is None:
        return "none"
    owner = f", {place.owner_type} {shown(place.owner_id)}" if place.owner_id else ""
    space = (
        f", {shown(place.app_id)}/{shown(place.project_id)}"
        if (place.app_id, place.project_id) != ("default",) * 2
        else ""
    )
    part = "" if place.md_path == seen.key else f", as a part of {shown(place.md_path)}"
    return f"{place.kind}{owner}{space}{part}"


def _disk(seen: Evidence) -> str:
    if seen.excluded is not None:
        return ""
    print_ = seen.disk.fingerprint
    if print_ is None:
        return {"gone": "no such file", "hung": "does not answer"}.get(seen.disk.state, "cannot be read")
    described = f"{size(print_.size)}, saved {_since(seen, print_.mtime_ns // 1_000_000)}"
    change = seen.known.change
    if change is None:
        return f"{described}, not in the queue yet"
    if change.fingerprint == tuple(print_):
        return f"{described}, unchanged since the queue recorded it"
    if change.fingerprint is None:
        return f"{described}, but the queue recorded it as gone"
    names = ("mtime", "size", "inode", "ctime")
    moved = [name for name, ours, theirs in zip(names, change.fingerprint, print_, strict=True) if ours != theirs]
    return f"{described}, but its {', '.join(moved)} changed since the queue recorded it"


def _queue(seen: Evidence) -> str:
    change = seen.known.change
    if change is None:
        return ""
    word = change.status
    tries = ""
    if change.status == "failed":
        tries = f" retryable={str(change.retryable).upper()}"
    if change.retry_count:
        tries += f", {plural(change.retry_count, 'retry', 'retries')} of {seen.settings.worker_max_retry}"
    return f"{word}{tries}, lsn {change.lsn}, found by {change.source.removesuffix('_path')}, {_since(seen, change.updated)}"


def _error(found: Explanation) -> str:
    change = found.evidence.known.change
    if change is None or not change.error or change.error.split(";", 1)[0] in found.diagnosis.cause:
        return ""
    return change.error


def _entries(seen: Evidence) -> str:
    plan, document = seen.plan, seen.disk.document
    if plan is None or document is None:
        return ""
    known = seen.known.entries or {}
    parts = [
        (f"{plan.unchanged} as indexed", ()),
        ("new", [f"{shown(e.entry_id)} (line {e.line})" for e in plan.upserts if e.entry_id not in known]),
        ("changed", [f"{shown(e.entry_id)} (line {e.line})" for e in plan.upserts if e.entry_id in known]),
        ("gone", [shown(entry_id) for entry_id in plan.deletes]),
        ("bad", [f"{shown(p.entry_id)} (line {p.line})" for p in document.problems]),
    ]
    described = [parts[0][0]] if plan.unchanged else []
    described += [f"{len(named)} {word}: {_some(named)}" for word, named in parts[1:] if named]
    total = len(document.entries) + len(document.problems)
    return f"{total} in the file; {'; '.join(described)}" if described else f"{total} in the file"


def _warnings(seen: Evidence) -> str:
    warnings = () if seen.disk.document is None else seen.disk.document.warnings
    said = [f"line {one.line}: {one.message}; {one.remedy}" for one in warnings[:MAX_NAMED]]
    more = [f"and {len(warnings) - MAX_NAMED} more"] if len(warnings) > MAX_NAMED else []
    return shown(". ".join([*said, *more]))


def _some(named: Sequence[str]) -> str:
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return ", ".join(named[:MAX_NAMED]) + more


def _rows(found: Explanation) -> str:
    seen = found.evidence
    if seen.known.trouble is not None or (seen.place is None and not seen.known.rows):
        return ""
    counted = "" if found.index_rows is None else f", {found.index_rows} counted in the index"
    return f"{seen.known.rows} by the ledger{counted}"


def _engine(seen: Evidence) -> str:
    words = {
        "absent": "not running",
        "answers": f"running (pid {seen.engine.pid})",
        "mute": f"running (pid {seen.engine.pid})",
        "silent": f"pid {seen.engine.pid}, does not answer",
        "stopped": f"pid {seen.engine.pid}, stopped",
        "hidden": "its lock may not be read by this user",
    }
    return words[seen.engine.state]


def _since(seen: Evidence, milliseconds: int) -> str:
    seconds = (seen.now_milliseconds - milliseconds) / 1000
    return f"{ago(seconds)} ago" if seconds >= 0 else f"{ago(-seconds)} in the future"
