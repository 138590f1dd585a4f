"""Checks of the running engine, of what it noticed, and of the queue."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from everos_engine.diagnose.checkup import Check, notes_of
from everos_engine.diagnose.engine_state import number
from everos_engine.diagnose.wording import ago, plural, shown
from everos_engine.errors import Damaged, EngineError
from everos_engine.stores import queue_facts
from everos_engine.stores.database import Database
from everos_engine.stores.held import REMEDY, WHY
from everos_engine.system import locks

if TYPE_CHECKING:
    from everos_engine.diagnose.checkup import Case

SCANS_MISSED = 3
LATE_SECONDS = 60.0
MOST_CHECKED_BYTES = 512 << 20
"""A larger embedding cache is not read through: it can be thrown away at any time."""
SHOWN_ELSEWHERE = ("deletions_held", "descriptor")
"""How the codes of notes begin that have a check of their own."""


def check_engine(case: Case) -> Check:
    """An engine serves the root, answers, and each of its loops moves."""
    vitals, pid = case.engine, case.engine.pid
    if vitals.state == "absent" and not case.settings.root.is_dir():
        cause = "it cannot be told whether one runs: its lock is in the memory root, which is not there"
        return Check("engine", "warn", cause, "bring the root back; one that served it waits for it, and goes on")
    if vitals.state == "absent":
        remedy = f"start it: {case.command('run')}; or bring the index in step once: {case.again()}"
        return Check("engine", "warn", "not running: changes are not indexed", remedy)
    if vitals.state == "stopped":
        cause = f"pid {pid} does not answer: its process is stopped (SIGSTOP, or a debugger)"
        return Check("engine", "fail", cause, f"let it go on: {case.shell('kill', '-CONT', str(pid))}")
    if vitals.state == "silent":
        cause = f"pid {pid} holds the root but does not answer within a second"
        remedy = f"{case.restart()}; where it does not end, {case.shell('kill', '-KILL', str(pid))}: nothing is lost"
        return Check("engine", "fail", cause, remedy)
    if vitals.state == "hidden":
        return Check("engine", "warn", "its lock may not be read by this user", "run doctor as the engine's user")
    if vitals.state == "mute":
        cause = f"pid {pid} holds the root but listens on no control socket: a command at work, or an older version"
        return Check("engine", "warn", cause, f"ask again in a moment; if it stays so, {case.restart()}")
    if vitals.stalls:
        told = ", ".join(
            f"{stall.loop} for {ago(stall.seconds)} (may take {ago(stall.allowance_seconds)})"
            for stall in vitals.stalls
        )
        return Check("engine", "fail", f"pid {pid} answers, but these loops do not move: {told}", case.restart())
    loops = vitals.pulse.get("loops")
    uptime = max(0.0, time.time() - number(vitals.pulse.get("started_milliseconds")) / 1000)
    count = len(loops) if isinstance(loops, dict) else 0
    return Check("engine", "ok", f"pid {pid}, up {ago(uptime)}, its {plural(count, 'loop')} move")


def check_watch(case: Case) -> Check | None:
    """File events reach the engine, and it has nothing to say that a person should know."""
    if case.books is None or case.books.counts is None:
        return None
    counts = case.books.counts
    total = counts.found_by_scan + counts.found_by_watch
    share = f"{counts.found_by_scan:,} of {total:,} changes found by scans alone" if total else "no change noticed yet"
    notes = [note for note in notes_of(case) if not note.code.startswith(SHOWN_ELSEWHERE)]
    if notes:
        cause = "; ".join(case.tell(note.message) for note in notes)
        remedy = "; ".join(dict.fromkeys(note.remedy for note in notes))
        return Check("watch", "warn", f"{', '.join(note.code for note in notes)}: {cause}", case.program_in(remedy))
    mode = case.settings.watch.mode
    how = "polling" if case.engine.watch.get("polling") else f"mode {mode}"
    return Check("watch", "ok", f"{how}; {share}")


def check_scan(case: Case) -> Check | None:
    """The tree was looked at lately, as a whole."""
    if case.books is None or case.books.trouble is not None:
        return None
    last, interval = case.books.last_scan_milliseconds, case.settings.scan_interval_seconds
    if last is None:
        remedy = case.again() if not case.engine.running else "wait for the first scan to end"
        return Check("scan", "warn", "the tree was never scanned as a whole", remedy)
    age = case.now_seconds - last / 1000
    late = case.engine.running and age > SCANS_MISSED * interval + LATE_SECONDS
    if not late:
        return Check("scan", "ok", f"the last scan ended {ago(max(0.0, age))} ago")
    cause = f"the last whole scan ended {ago(age)} ago, though one is due every {ago(interval)}"
    return Check("scan", "fail", cause, f"mend what else is named here; else {case.restart()}")


def check_queue(case: Case) -> Check:
    """SQLite finds both databases sound."""
    db = case.engine_db
    if case.books is None:
        return Check("queue", "ok", "nothing was ever queued here")
    if case.books.trouble is not None:
        cause = f"{case.show(str(db))} cannot be read now: {case.tell(case.books.trouble)}"
        return Check("queue", "fail", cause, "nothing in it is lost: put right what is named, and ask again")
    if case.books.damaged:
        cause = f"{case.show(str(db))} is damaged: {case.tell('; '.join(case.books.damaged[:3]))}"
        return Check("queue", "fail", cause, _replaced(case))
    cache = case.settings.engine_directory / "embeddings.db"
    if cache.exists() and cache.stat().st_size <= MOST_CHECKED_BYTES:
        try:
            database = Database(cache, readonly=True)
            try:
                wrong = database.read(queue_facts.quick_check)
            finally:
                database.close()
        except Damaged as error:
            wrong = [str(error.__cause__ or error)]
        except EngineError as error:
            cause = f"the embedding cache cannot be read now, and is left out: {case.tell(str(error))}"
            return Check("queue", "warn", cause, "put right what is named; texts are embedded again meanwhile")
        if wrong:
            what = case.tell("; ".join(wrong[:3]))
            cause = f"the embedding cache {case.show(str(cache))} is damaged: {what}"
            return Check("queue", "fail", cause, _replaced(case))
    counts = case.books.counts
    lag = 0 if counts is None else counts.lsn_max - counts.watermark
    return Check("queue", "ok", f"sound; lag {lag:,}" if counts else "sound")


def _replaced(case: Case) -> str:
    """Who sets a damaged database aside: all in it can be made again from markdown."""
    if case.engine.running:
        return f"wait: the engine sets it aside and makes it again from markdown; else {case.restart()}"
    return f"{case.again()} sets it aside, and makes it again from markdown"


def check_claims(case: Case) -> Check | None:
    """Nobody dead holds a change."""
    if case.books is None or case.books.counts is None:
        return None
    directory = case.settings.engine_directory / "owners"
    dead = [owner for owner in case.books.owners if locks.is_dead(directory, owner)]
    if not dead:
        return Check("claims", "ok", f"{plural(case.books.counts.processing, 'change')} in work, none orphaned")
    cause = f"{plural(len(dead), 'process', 'processes')} died with changes in hand"
    if case.engine.running:
        return Check("claims", "warn", cause, "wait: the engine takes them back within 30 s")
    return Check("claims", "warn", cause, f"any start takes them back: {case.again()}")


def check_backlog(case: Case) -> Check | None:
    """What waits is young, and waits for no failure."""
    if case.books is None or case.books.counts is None:
        return None
    counts, delayed = case.books.counts, case.books.delayed
    waiting = counts.pending + counts.processing
    if delayed is not None:
        due = max(0.0, delayed.due / 1000 - case.now_seconds)
        cause = f"{plural(delayed.count, 'change')} wait after failed attempts, the next in {ago(due)}: {case.tell(delayed.error)}"
        help_ = (
            "they are tried again by themselves" if case.engine.running else f"they are tried again by {case.again()}"
        )
        return Check("backlog", "warn", cause, f"mend what is named; {help_}")
    oldest = counts.oldest_pending_milliseconds
    age = 0.0 if oldest is None else case.now_seconds - oldest / 1000
    cause = f"{plural(waiting, 'change')} waiting" + (f", the oldest for {ago(max(0.0, age))}" if waiting else "")
    if waiting and not case.engine.running:
        return Check(
            "backlog",
            "warn",
            f"{cause}, and no engine takes them up",
            f"start it: {case.command('run')}; or {case.again()}",
        )
    if age > LATE_SECONDS:
        return Check(
            "backlog", "warn", cause, f"{case.command('status')} shows whether it shrinks; the embedder sets the pace"
        )
    return Check("backlog", "ok", cause)


def check_files(case: Case) -> Check:
    """Every file and directory answers within the deadline."""
    waiting = [] if case.books is None else list(case.books.unanswered)
    paths = [str(case.settings.root / path) if "\\x" not in path else path for path, _ in waiting]
    named = list(dict.fromkeys([*case.tree.hung, *case.engine.hung, *paths]))
    if not named:
        return Check("files", "ok", "every file and directory answers")
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    cause = (
        f"{case.show(named[0])}{more} does not answer: a network or cloud file system may hang; its last good rows stay"
    )
    remedy = (
        "see whether its server or its cloud service answers, or download the file; it is tried again "
        f"{'by itself' if case.engine.running else f'by {case.again()}'}, and {case.command('explain', named[0])} tells more"
    )
    return Check("files", "warn", cause, remedy)


def check_owners(case: Case) -> Check | None:
    """Every file names the owner of the folder it is in."""
    if case.books is None or case.books.counts is None:
        return None
    if case.books.warnings is None:
        return Check("owners", "ok", "every file is in its owner's folder")
    count, path, first = case.books.warnings
    where = str(case.settings.root / path) if "\\x" not in path else path
    cause = f"{plural(count, 'file')} indexed under another owner than the folder's, the first {case.show(path)}: {case.tell(first)}"
    return Check("owners", "warn", cause, f"{case.command('explain', where)} lists what the file says")


def check_failed(case: Case) -> Check | None:
    """Nothing was given up on."""
    if case.books is None or case.books.counts is None:
        return None
    bad = [one for one in case.books.failed if not one.retryable]
    letters = [one for one in case.books.failed if one.retryable]
    told, remedies = [], []
    if letters:
        told.append(
            f"{plural(len(letters), 'change')} used up their attempts: {case.tell(_first_line(letters[0].error))}"
        )
        remedies.append(f"once that is mended, {case.command('fix', '--apply')}")
    if bad:
        path = bad[0].md_path
        told.append(
            f"{plural(len(bad), 'file')} cannot be indexed, the first {case.show(path)}: {case.tell(_first_line(bad[0].error))}"
        )
        where = str(case.settings.root / path) if "\\x" not in path else path
        remedies.append(f"edit what {case.command('fix')} lists; {case.command('explain', where)} tells more")
    if not told:
        return Check("failed", "ok", "nothing was given up on")
    return Check("failed", "warn", "; ".join(told), "; ".join(remedies))


def check_held(case: Case) -> Check | None:
    """The brake holds no deletion."""
    if case.books is None or case.books.counts is None:
        return None
    held = case.books.held
    if not held:
        return Check("held", "ok", "no deletion is held")
    total, since = sum(one.count for one in held), min(one.since for one in held)
    why = "; ".join(f"{one.count:,} because {WHY[one.reason]}" for one in held)
    remedy = "; ".join(dict.fromkeys(REMEDY[one.reason] for one in held))
    cause = f"{plural(total, 'deletion')} held for {ago(max(0.0, case.now_seconds - since / 1000))}: {why}"
    return Check("held", "warn", cause, case.program_in(remedy))


def _first_line(text: str | None) -> str:
    return shown((text or "no reason was kept").split("\n", 1)[0])
