"""Checks of the running engine, of what it noticed, and of the queue."""

from __future__ import annotations

import time

from everos_engine.diagnose.checkup import Check, Facts, conditions_of
from everos_engine.diagnose.engine_state import number
from everos_engine.diagnose.wording import ago, plural, shown
from everos_engine.errors import Damaged, EngineError
from everos_engine.stores import queue_facts
from everos_engine.stores.database import Database
from everos_engine.stores.held import REMEDY, WHY
from everos_engine.system import locks

SCANS_MISSED = 3
LATE_SECONDS = 60.0
MAX_CHECKED_BYTES = 512 << 20
"""A larger embedding cache is not read through. It can be thrown away at any time."""
SHOWN_ELSEWHERE = ("deletions_held", "descriptor")
"""How the codes of conditions begin that have a separate check."""


def check_engine(facts: Facts) -> Check:
    """Check that an engine serves the root and answers, and that each of its loops moves."""
    engine_state, pid = facts.engine, facts.engine.pid
    if engine_state.state == "absent" and not facts.settings.root.is_dir():
        cause = "it is unknown whether one runs, because its lock is in the memory root, which is missing"
        return Check(
            "engine", "warn", cause, "bring the root back. An engine that served it waits for it, and continues"
        )
    if engine_state.state == "absent":
        remedy = f"start it: {facts.command('run')}; or update the index once: {facts.again()}"
        return Check("engine", "warn", "not running: changes are not indexed", remedy)
    if engine_state.state == "stopped":
        cause = f"pid {pid} does not answer: its process is stopped (SIGSTOP, or a debugger)"
        return Check("engine", "fail", cause, f"continue it: {facts.shell('kill', '-CONT', str(pid))}")
    if engine_state.state == "silent":
        cause = f"pid {pid} holds the root but does not answer within a second"
        remedy = f"{facts.restart()}. If it does not end, {facts.shell('kill', '-KILL', str(pid))}. Nothing is lost"
        return Check("engine", "fail", cause, remedy)
    if engine_state.state == "hidden":
        return Check("engine", "warn", "its lock may not be read by this user", "run doctor as the engine's user")
    if engine_state.state == "mute":
        cause = f"pid {pid} holds the root but does not listen on its control socket. It is a command at work, or an older version"
        return Check("engine", "warn", cause, f"ask again in a moment. If it stays so, {facts.restart()}")
    if engine_state.stalls:
        causes = ", ".join(
            f"{stall.loop} for {ago(stall.seconds)} (may take {ago(stall.allowance_seconds)})"
            for stall in engine_state.stalls
        )
        return Check("engine", "fail", f"pid {pid} answers, but these loops are stalled: {causes}", facts.restart())
    loops = engine_state.snapshot.get("loops")
    uptime = max(0.0, time.time() - number(engine_state.snapshot.get("started_milliseconds")) / 1000)
    count = len(loops) if isinstance(loops, dict) else 0
    return Check("engine", "ok", f"pid {pid}, up {ago(uptime)}, all {plural(count, 'loop')} work")


def check_watch(facts: Facts) -> Check | None:
    """Check that file events reach the engine, and report its other conditions."""
    if facts.queue is None or facts.queue.counts is None:
        return None
    counts = facts.queue.counts
    total = counts.found_by_scan + counts.found_by_watch
    share = f"{counts.found_by_scan:,} of {total:,} changes found only by a scan" if total else "no change found yet"
    conditions = [condition for condition in conditions_of(facts) if not condition.code.startswith(SHOWN_ELSEWHERE)]
    if conditions:
        cause = "; ".join(facts.quote(condition.message) for condition in conditions)
        remedy = "; ".join(dict.fromkeys(condition.remedy for condition in conditions))
        return Check(
            "watch",
            "warn",
            f"{', '.join(condition.code for condition in conditions)}: {cause}",
            facts.program_in(remedy),
        )
    mode = facts.settings.watch.mode
    how = "polling" if facts.engine.watch.get("polling") else f"mode {mode}"
    return Check("watch", "ok", f"{how}; {share}")


def check_scan(facts: Facts) -> Check | None:
    """Check that the whole tree was scanned lately."""
    if facts.queue is None or facts.queue.trouble is not None:
        return None
    last, interval = facts.queue.last_scan_milliseconds, facts.settings.scan_interval_seconds
    if last is None:
        remedy = facts.again() if not facts.engine.running else "wait for the first scan to end"
        return Check("scan", "warn", "the whole tree was never scanned", remedy)
    age = facts.now_seconds - last / 1000
    late = facts.engine.running and age > SCANS_MISSED * interval + LATE_SECONDS
    if not late:
        return Check("scan", "ok", f"the last scan ended {ago(max(0.0, age))} ago")
    cause = f"the last full scan ended {ago(age)} ago, but one is due every {ago(interval)}"
    return Check("scan", "fail", cause, f"fix the other problems that doctor names. If it stays so, {facts.restart()}")


def check_queue(facts: Facts) -> Check:
    """Check that SQLite finds both databases sound."""
    db = facts.engine_db
    if facts.queue is None:
        return Check("queue", "ok", "nothing was ever queued here")
    if facts.queue.trouble is not None:
        cause = f"{facts.show(str(db))} cannot be read now: {facts.quote(facts.queue.trouble)}"
        return Check("queue", "fail", cause, "nothing in it is lost. Fix the cause, and run doctor again")
    if facts.queue.damaged:
        cause = f"{facts.show(str(db))} is damaged: {facts.quote('; '.join(facts.queue.damaged[:3]))}"
        return Check("queue", "fail", cause, _replaced(facts))
    cache = facts.settings.embeddings_database
    if cache.exists() and cache.stat().st_size <= MAX_CHECKED_BYTES:
        try:
            database = Database(cache, readonly=True)
            try:
                wrong = database.read(queue_facts.quick_check)
            finally:
                database.close()
        except Damaged as error:
            wrong = [str(error.__cause__ or error)]
        except EngineError as error:
            cause = f"the embedding cache cannot be read now, and is left out: {facts.quote(str(error))}"
            return Check("queue", "warn", cause, "fix the cause. Texts are embedded again meanwhile")
        if wrong:
            what = facts.quote("; ".join(wrong[:3]))
            cause = f"the embedding cache {facts.show(str(cache))} is damaged: {what}"
            return Check("queue", "fail", cause, _replaced(facts))
    counts = facts.queue.counts
    lag = 0 if counts is None else counts.lsn_max - counts.watermark
    return Check("queue", "ok", f"sound, lag {lag:,}" if counts else "sound")


def _replaced(facts: Facts) -> str:
    """Say who sets a damaged database aside. Everything in it can be made again from markdown."""
    if facts.engine.running:
        return f"wait: the engine sets it aside and makes it again from markdown. If it does not, {facts.restart()}"
    return f"{facts.again()} sets it aside, and makes it again from markdown"


def check_claims(facts: Facts) -> Check | None:
    """Check that no dead process holds a change."""
    if facts.queue is None or facts.queue.counts is None:
        return None
    directory = facts.settings.engine_directory / "owners"
    dead = [owner for owner in facts.queue.owners if locks.is_dead(directory, owner)]
    if not dead:
        return Check("claims", "ok", f"{plural(facts.queue.counts.processing, 'change')} in work, none orphaned")
    cause = f"{plural(len(dead), 'process', 'processes')} died while it held changes"
    if facts.engine.running:
        return Check("claims", "warn", cause, "wait: the engine takes them back within 30 s")
    return Check("claims", "warn", cause, f"any start takes them back: {facts.again()}")


def check_backlog(facts: Facts) -> Check | None:
    """Check that waiting changes are young, and that none waits because of a failure."""
    if facts.queue is None or facts.queue.counts is None:
        return None
    counts, delayed = facts.queue.counts, facts.queue.delayed
    waiting = counts.pending + counts.processing
    if delayed is not None:
        due = max(0.0, delayed.due / 1000 - facts.now_seconds)
        cause = f"{plural(delayed.count, 'change')} wait after failed attempts, the next in {ago(due)}: {facts.quote(delayed.error)}"
        help_ = (
            "they are tried again automatically" if facts.engine.running else f"they are tried again by {facts.again()}"
        )
        return Check("backlog", "warn", cause, f"fix the cause. Then {help_}")
    oldest = counts.oldest_pending_milliseconds
    age = 0.0 if oldest is None else facts.now_seconds - oldest / 1000
    cause = f"{plural(waiting, 'change')} waiting" + (f", the oldest for {ago(max(0.0, age))}" if waiting else "")
    if waiting and not facts.engine.running:
        return Check(
            "backlog",
            "warn",
            f"{cause}, and no engine is running to index them",
            f"start it: {facts.command('run')}; or {facts.again()}",
        )
    if age > LATE_SECONDS:
        return Check(
            "backlog",
            "warn",
            cause,
            f"{facts.command('status')} shows whether the number falls. The embedder sets the speed",
        )
    return Check("backlog", "ok", cause)


def check_files(facts: Facts) -> Check:
    """Check that every file and directory answers within the deadline."""
    waiting = [] if facts.queue is None else list(facts.queue.unanswered)
    paths = [str(facts.settings.root / path) if "\\x" not in path else path for path, _ in waiting]
    named = list(dict.fromkeys([*facts.tree.hung, *facts.engine.hung, *paths]))
    if not named:
        return Check("files", "ok", "every file and directory answers")
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    cause = f"{facts.show(named[0])}{more} does not answer. A network or cloud file system may hang. Its last good rows stay"
    remedy = (
        "check whether its server or its cloud service answers, or download the file. It is tried again "
        f"{'automatically' if facts.engine.running else f'by {facts.again()}'}, and {facts.command('explain', named[0])} says more"
    )
    return Check("files", "warn", cause, remedy)


def check_owners(facts: Facts) -> Check | None:
    """Check that every file names the owner of the folder it is in."""
    if facts.queue is None or facts.queue.counts is None:
        return None
    if facts.queue.warnings is None:
        return Check("owners", "ok", "every file is in its owner's folder")
    count, path, first = facts.queue.warnings
    where = str(facts.settings.root / path) if "\\x" not in path else path
    cause = f"{plural(count, 'file')} indexed under another owner than the folder's, the first {facts.show(path)}: {facts.quote(first)}"
    return Check("owners", "warn", cause, f"{facts.command('explain', where)} lists what the file says")


def check_failed(facts: Facts) -> Check | None:
    """Check that no change is failed."""
    if facts.queue is None or facts.queue.counts is None:
        return None
    bad = [one for one in facts.queue.failed if not one.retryable]
    letters = [one for one in facts.queue.failed if one.retryable]
    causes, remedies = [], []
    if letters:
        causes.append(
            f"{plural(len(letters), 'change')} used up their attempts: {facts.quote(_first_line(letters[0].error))}"
        )
        remedies.append(f"once that is fixed, {facts.command('fix', '--apply')}")
    if bad:
        path = bad[0].md_path
        causes.append(
            f"{plural(len(bad), 'file')} cannot be indexed, the first {facts.show(path)}: {facts.quote(_first_line(bad[0].error))}"
        )
        where = str(facts.settings.root / path) if "\\x" not in path else path
        remedies.append(f"edit what {facts.command('fix')} lists. {facts.command('explain', where)} says more")
    if not causes:
        return Check("failed", "ok", "no change has failed")
    return Check("failed", "warn", "; ".join(causes), "; ".join(remedies))


def check_held(facts: Facts) -> Check | None:
    """Check that the deletion guard holds no deletion."""
    if facts.queue is None or facts.queue.counts is None:
        return None
    held = facts.queue.held
    if not held:
        return Check("held", "ok", "no deletion is held")
    total, since = sum(one.count for one in held), min(one.since for one in held)
    why = "; ".join(f"{one.count:,} because {WHY[one.reason]}" for one in held)
    remedy = "; ".join(dict.fromkeys(REMEDY[one.reason] for one in held))
    cause = f"{plural(total, 'deletion')} held for {ago(max(0.0, facts.now_seconds - since / 1000))}: {why}"
    return Check("held", "warn", cause, facts.program_in(remedy))


def _first_line(text: str | None) -> str:
    return shown((text or "no reason was kept").split("\n", 1)[0])
