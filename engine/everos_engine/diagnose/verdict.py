"""What the evidence about one path comes to.

Pure: from facts to a verdict, its cause, what happens next and the remedy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from everos_engine.diagnose.exclusion import BY_NAME
from everos_engine.diagnose.permission import blocked, permit
from everos_engine.diagnose.wording import ago, plural, quoted, shown, size
from everos_engine.errors import BadFile
from everos_engine.stores.held import REMEDY, WHY
from everos_engine.stores.queue_facts import Change

if TYPE_CHECKING:
    from everos_engine.diagnose.explain import Evidence

Verdict = Literal["searchable", "partly", "waiting", "failed", "held", "excluded", "missing", "unknown"]
NOTHING = "nothing: it is as it should be"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """``code`` is stable and names the cause. Literal commands, and nothing else, are in backticks in ``remedy``."""

    verdict: Verdict
    code: str
    cause: str
    remedy: str
    next: str


def diagnose(seen: Evidence) -> Diagnosis:
    """Return the first cause that applies, from the outermost: rule, deletion guard, disk, content, queue, index."""
    for look in (_root, _rule, _trouble, _deletions_held, _gone, _file, _settling, _content, _queue, _failed):
        found = look(seen)
        if found is not None:
            return found
    return _at_rest(seen)


def _root(seen: Evidence) -> Diagnosis | None:
    root = os.fspath(seen.settings.root)
    if os.path.isdir(root):
        return None
    cause = f"the memory root {shown(root)} is missing, and so is the index in it"
    remedy = f"mount it or move it back. `{seen.program} doctor root` looks again"
    return Diagnosis("unknown", "root_missing", cause, remedy, "nothing until the root is back, and nothing is deleted")


def _rule(seen: Evidence) -> Diagnosis | None:
    if seen.excluded is None:
        return None
    rows = seen.known.rows
    if seen.excluded.code in BY_NAME and not os.path.lexists(seen.path) and not rows:
        cause = f"there is no such file, and no kind would match it: {seen.excluded.cause}"
        return Diagnosis(
            "missing", "no_file", cause, "check the name. " + _neighbours(seen), "nothing until there is a file"
        )
    following = "nothing: it stays out" if not rows else f"its {plural(rows, 'row')} leave the index: {_scan(seen)}"
    return Diagnosis("excluded", seen.excluded.code, seen.excluded.cause, seen.excluded.remedy, following)


def _trouble(seen: Evidence) -> Diagnosis | None:
    if seen.known.trouble is None:
        return None
    cause = f"the engine's database cannot be read: {seen.known.trouble}"
    return Diagnosis("unknown", "database", cause, f"see `{seen.program} doctor`", "nothing is known of the file")


def _deletions_held(seen: Evidence) -> Diagnosis | None:
    held = seen.known.held
    if held is None or seen.disk.state != "gone":
        return None
    since = ago((seen.now_milliseconds - held.since) / 1000)
    cause = f"the file is gone, and the deletion guard has held its deletion for {since}: {WHY[held.reason]}"
    remedy = REMEDY[held.reason].replace("`everos-engine ", f"`{seen.program} ")
    rows = plural(seen.known.rows, "row")
    return Diagnosis("held", "held", cause, remedy, f"its {rows} stay searchable until the file is back or released")


def _gone(seen: Evidence) -> Diagnosis | None:
    if seen.disk.state != "gone":
        return None
    change, rows = seen.known.change, seen.known.rows
    if change is None and not rows:
        cause = "there is no such file, and the engine knows of none"
        return Diagnosis(
            "missing", "no_file", cause, "check the name. " + _neighbours(seen), "nothing until there is a file"
        )
    if change is not None and change.fingerprint is not None:
        cause = (
            f"the file is gone, but the engine has not noticed yet, and {plural(rows, 'row')} of it can still be found"
        )
        return _waiting(seen, "deletion_not_seen", cause, _scan(seen))
    return _waiting(seen, "deleting", "the file is gone, and its rows are about to be removed", _next_look(seen))


def _file(seen: Evidence) -> Diagnosis | None:
    """Return why the file itself cannot be read."""
    last = _kept(seen)
    if seen.disk.state == "too_large" and seen.disk.fingerprint is not None:
        has, most = seen.disk.fingerprint.size, seen.settings.max_file_bytes
        cause = f"the file has {has:,} bytes ({size(has)}), more than max_file_bytes={most}{last}"
        command = f"EVEROS_MAX_FILE_BYTES={_doubled(most, has)} {seen.program} sync {quoted(seen.path)}"
        where = f". To keep that, set max_file_bytes in {shown(str(seen.settings.root / 'everos-engine.toml'))}"
        how = f"with the engine stopped, `{command}`" if seen.engine.running else f"`{command}`"
        return Diagnosis(
            "failed", "too_large", cause, f"split it, or raise the bound: {how}{where}", "nothing until then"
        )
    if seen.disk.state == "unreadable":
        barrier, need = blocked(os.fspath(seen.settings.root), seen.path)
        cause = f"{shown(barrier)} may not be read by uid {os.geteuid()}{last}"
        return Diagnosis("failed", "unreadable", cause, permit(barrier, need), f"once it can be read: {_scan(seen)}")
    if seen.disk.state == "hung":
        cause = f"{seen.disk.error}{last}"
        remedy = (
            "check whether its server or its cloud service answers, or download the file. "
            "file_deadline_seconds is how long a look may take"
        )
        return _waiting(seen, "no_answer", cause, "it is tried again, and no attempt is used up", remedy)
    if seen.disk.state == "unsteady":
        cause = f"the file cannot be looked at now: {seen.disk.error}"
        return Diagnosis(
            "waiting", "unsteady", cause, "ask again in a moment. Check the disk if it stays so", _scan(seen)
        )
    return None


def _settling(seen: Evidence) -> Diagnosis | None:
    """Return that the file is too young, so that it may still be being written.

    A fault of its content may be over in a moment.
    """
    change = seen.known.change
    if change is None or change.waits_for != "settle" or change.not_before <= seen.now_milliseconds:
        return None
    due = ago((change.not_before - seen.now_milliseconds) / 1000)
    cause = "it was saved a moment ago, and may still be being written"
    return _waiting(seen, "settling", cause, f"it is read again in {due}")


def _content(seen: Evidence) -> Diagnosis | None:
    """Return that the file is damaged, or has bad entries, in any state of the queue."""
    error, document = seen.disk.error, seen.disk.document
    if seen.disk.state == "damaged" and isinstance(error, BadFile):
        cause = f"{_where(error.line, error.column)}{error.args[0]}{_kept(seen)}"
        following = f"nothing until the file changes. Then {_then(seen)}"
        remedy = _plain(error.remedy).removesuffix(" and save")
        return Diagnosis(
            "failed", "damaged", cause, remedy if remedy.startswith("save ") else f"{remedy}, and save", following
        )
    if document is not None and document.problems and _settled(seen):
        first = document.problems[0]
        more = f" (and {len(document.problems) - 1} more)" if len(document.problems) > 1 else ""
        cause = f"{_where(first.line, first.column)}entry {first.entry_id!r}: {first.message}{more}"
        others = len(document.entries)
        cause += f"; {plural(others, 'other entry is', 'other entries are')} indexed" if others else _kept(seen)
        verdict: Verdict = "partly" if others or seen.known.rows else "failed"
        return Diagnosis(
            verdict, "bad_entries", cause, _plain(first.remedy), f"nothing until the file changes. Then {_then(seen)}"
        )
    return None


def _queue(seen: Evidence) -> Diagnosis | None:
    """Return that the queue has not caught up with the disk."""
    change = seen.known.change
    if change is not None and change.status == "processing":
        if seen.known.orphaned:
            cause = "a process claimed it and died"
            return _waiting(seen, "orphaned", cause, "the claim is taken back within 30 s, or when an engine starts")
        return _waiting(seen, "processing", "it is being indexed at this moment", "its rows are committed")
    if not _settled(seen) and (change is None or change.status != "pending"):
        cause = "the file is new" if change is None else "the file has changed since it was indexed"
        return _waiting(seen, "not_seen", f"{cause}, but the engine has not noticed yet", _scan(seen))
    if change is None or change.status != "pending":
        return None
    if change.not_before > seen.now_milliseconds:
        return _later(seen, change)
    ahead = f"behind {plural(change.ahead, 'older change')}" if change.ahead else "first in the line"
    return _waiting(seen, "pending", f"it waits in the queue, {ahead}", _next_look(seen))


def _later(seen: Evidence, change: Change) -> Diagnosis:
    """Return that it waits for a set time: for the embedder, for what all changes share, or for its next attempt."""
    due = ago((change.not_before - seen.now_milliseconds) / 1000)
    remedy = f"wait, or once the cause is fixed, `{_sync(seen)}`"
    if change.waits_for == "embedder" and seen.known.outage is not None and seen.engine.running:
        since = ago((seen.now_milliseconds - seen.known.outage[0]) / 1000)
        cause = f"the embedder has not answered for {since}: {seen.known.outage[1]}"
        following = "it is indexed when the embedder answers, and no attempt is used up"
        return _waiting(
            seen, "embedder_down", cause, following, f"fix the embedder: `{seen.program} doctor embedder`. Or {remedy}"
        )
    if change.waits_for not in {"retry", None}:
        following = f"it is tried again in {due}, and no attempt is used up"
        return _waiting(seen, "delayed", f"it waits: {change.error}", following, remedy)
    tries = f"attempt {change.retry_count + 1} of {seen.settings.worker_max_retry + 1}"
    return _waiting(seen, "delayed", f"its last attempt failed: {change.error}", f"{tries} is due in {due}", remedy)


def _failed(seen: Evidence) -> Diagnosis | None:
    """Return that the change is failed, though the file can be read and parsed."""
    change = seen.known.change
    if change is None or change.status != "failed":
        return None
    cause = f"{change.error or 'it failed, and no reason was kept'}"
    if change.retryable:
        remedy = f"once the cause is fixed, `{seen.program} fix --apply`"
        following = "nothing automatically: all its attempts are used up"
        return Diagnosis("failed", "dead_letter", cause, remedy, following)
    if "embedder" in change.failed_for and seen.known.rows:
        following = f"nothing until the file, the model or embedder.max_characters changes. Then {_then(seen)}"
        remedy = f"shorten the text and save, or set another model, or a lower embedder.max_characters, then `{seen.program} run`"
        return Diagnosis("partly", "words_only", cause, remedy, following)
    remedy = f"correct what the message names and save. If it was fixed elsewhere, `{_sync(seen)}`"
    return Diagnosis("failed", "refused", cause, remedy, f"nothing until the file changes. Then {_then(seen)}")


def _at_rest(seen: Evidence) -> Diagnosis:
    """Return that the queue has no more work for the file."""
    plan, rows = seen.plan, seen.known.rows
    if seen.known.table_known and not seen.table_there:
        cause = f"the table of its kind is gone from {shown(str(seen.settings.lancedb_directory))}, with its {plural(rows, 'row')}"
        following = "the next scan recreates it" if seen.engine.running else "the next start of an engine recreates it"
        return Diagnosis("waiting", "table_gone", cause, f"now, `{seen.program} sync`", following)
    if plan is not None and (plan.upserts or plan.deletes):
        cause = f"the queue says done, but {plural(len(plan.upserts) + len(plan.deletes), 'entry', 'entries')} differ from the index"
        return _waiting(seen, "differs", cause, _scan(seen), f"`{_sync(seen)}`")
    if not rows:
        cause = "there is nothing in it to index: no entry with text"
        return Diagnosis(
            "excluded",
            "empty",
            cause,
            "write an entry, and save",
            f"nothing until the file changes. Then {_then(seen)}",
        )
    return Diagnosis("searchable", "ok", f"{plural(rows, 'row')} in the index, as the file says", "", NOTHING)


def _waiting(seen: Evidence, code: str, cause: str, following: str, remedy: str | None = None) -> Diagnosis:
    """Return that something will happen, if an engine is there to do it."""
    pid = seen.engine.pid
    if seen.engine.state == "absent":
        help_ = f"start it, `{seen.program} run`, or index once, `{_sync(seen)}`"
        if seen.readonly_mount is not None:
            remount = quoted("mount", "-o", "remount,rw", seen.readonly_mount)
            help_ = f"its file system is mounted read-only: mount it for writing, `{remount}`, then {help_}"
        return Diagnosis("waiting", code, f"{cause}, and no engine is running", help_, "nothing until an engine runs")
    if seen.engine.state == "stopped":
        help_ = f"continue it: `{quoted('kill', '-CONT', str(pid))}`"
        return Diagnosis(
            "waiting", code, f"{cause}, and the engine (pid {pid}) is stopped", help_, "nothing until it continues"
        )
    if seen.engine.state == "silent":
        return Diagnosis(
            "waiting",
            code,
            f"{cause}, and the engine (pid {pid}) does not answer",
            f"see `{seen.program} doctor`",
            following,
        )
    return Diagnosis(
        "waiting", code, cause, remedy if remedy is not None else f"wait, or to do it now, `{_sync(seen)}`", following
    )


def _settled(seen: Evidence) -> bool:
    """Return whether the queue has seen the file as it is on disk."""
    change, print_ = seen.known.change, seen.disk.fingerprint
    return (
        change is not None and print_ is not None and change.fingerprint == tuple(print_) and change.status != "pending"
    )


def _where(line: int | None, column: int | None) -> str:
    if line is None:
        return ""
    return f"line {line}: " if column is None else f"line {line}, column {column}: "


def _kept(seen: Evidence) -> str:
    """Return what of the file can still be found."""
    return f"; still searchable: {plural(seen.known.rows, 'last good row')}" if seen.known.rows else ""


def _plain(remedy: str) -> str:
    """Return a parser's remedy, in which backticks hold no commands."""
    return remedy.replace("`", "'")


def _sync(seen: Evidence) -> str:
    return f"{seen.program} sync {quoted(seen.path)}"


def _scan(seen: Evidence) -> str:
    """Return when the next full scan looks at the tree."""
    if seen.engine.state == "absent":
        return "nothing until an engine runs"
    last, interval = seen.known.last_scan_milliseconds, seen.settings.scan_interval_seconds
    if seen.engine.watch.get("polling"):
        interval = min(interval, seen.settings.watch.poll_interval_seconds)
    if last is None:
        return "the first scan of the tree will see it"
    left = interval - (seen.now_milliseconds - last) / 1000
    return f"the next scan, in about {ago(left)}, sees it" if left > 0.5 else "the next scan, due now, sees it"


def _next_look(seen: Evidence) -> str:
    ahead = 0 if seen.known.change is None else seen.known.change.ahead
    return f"it is indexed after {plural(ahead, 'older change')}" if ahead else "it is next"


def _then(seen: Evidence) -> str:
    return "the engine indexes it automatically" if seen.engine.running else f"`{_sync(seen)}`, or a running engine"


def _neighbours(seen: Evidence) -> str:
    """Return the files next to the missing one."""
    directory = os.path.dirname(seen.path)
    return (
        f"`{quoted('ls', '-a', directory)}` shows what is there"
        if os.path.isdir(directory)
        else f"{shown(directory)} is not a directory"
    )


def _doubled(bound: int, needed: int) -> int:
    while bound < needed:
        bound *= 2
    return bound
