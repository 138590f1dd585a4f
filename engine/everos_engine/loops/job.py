"""One claimed change on its way through the worker, and what its troubles mean for its entries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from everos_engine.errors import BadFile, EngineError, Transient, clipped, quoted
from everos_engine.loops.context import now_milliseconds
from everos_engine.settings import Settings
from everos_engine.stores import ledger, queue
from everos_engine.stores.database import Transaction
from everos_engine.system import files
from everos_engine.text import diff
from everos_engine.text.entries import Document, Entry, Place, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(slots=True)
class Job:
    """One claimed change on its way: what was read, what is to be written, and why it failed if it did.

    ``deferred`` is why some of its entries wait. ``deferred_for`` names them if they are to blame. The other entries
    are written. ``epoch`` is the number of the model that made its vectors. ``refused`` are the entries whose text the
    embedder refuses. They are written without a vector.
    """

    claim: queue.Claim
    fingerprint: files.Fingerprint | None = None
    racy: bool = False
    digest: bytes | None = None
    is_empty: bool = False
    vanished: bool = False
    place: Place | None = None
    sources: Mapping[str, bytes] = field(default_factory=dict)
    document: Document = field(default_factory=lambda: Document((), ()))
    plan: diff.Plan = field(default_factory=lambda: diff.Plan((), (), 0))
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    epoch: int = 0
    size_bytes: int = 0
    deferred: Transient | None = None
    deferred_for: str = ""
    problems: list[Problem] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    error: EngineError | None = None

    @property
    def missing(self) -> list[str]:
        """Return the texts that have no vector yet."""
        texts = dict.fromkeys(entry.embed_text for entry in self.plan.upserts if entry.embed_text)
        return [text for text in texts if text not in self.vectors]


def refuse(job: Job, refused: dict[str, EngineError]) -> None:
    """Turn the entries whose text the embedder refuses into problems.

    They are written without a vector, and found by words.
    """
    bad = [entry for entry in job.plan.upserts if entry.embed_text in refused]
    job.refused = {entry.entry_id for entry in bad}
    job.problems += [
        Problem(
            entry.entry_id,
            f"it is found by words only, because the embedder refuses its text: {refused[entry.embed_text]}",
            "shorten the text, or lower embedder.max_characters",
            entry.line,
        )
        for entry in bad
    ]


def values_to_blame(settings: Settings, model: str) -> dict[str, str]:
    """Return each setting that a change can fail for, with its value today.

    The embedder's value is a digest, because a URL may hold a password.
    """
    embedder = f"{settings.embedder.kind}\n{settings.embedder.url}\n{model}"
    return {
        "max_file_bytes": str(settings.max_file_bytes),
        "embedder": hashlib.blake2b(embedder.encode(), digest_size=16).hexdigest(),
        "embedder.max_characters": str(settings.embedder.max_characters),
    }


def blamed(job: Job) -> set[str]:
    """Return the names of the settings that may be to blame for what is wrong with a change."""
    names = {"embedder", "embedder.max_characters"} if job.refused else set()
    if isinstance(job.error, BadFile) and job.error.setting is not None:
        names.add(job.error.setting)
    return names


def defer(job: Job, later: Mapping[str, Transient]) -> None:
    """Let the entries whose text has no vector yet wait.

    They keep their last good rows, and the other entries are written.
    """
    counting = [error for error in later.values() if error.counts_as_retry]
    job.deferred = next(iter(counting or later.values()))
    late = [entry for entry in job.plan.upserts if entry.embed_text in later and later[entry.embed_text] in counting]
    if late:
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        job.deferred_for = f"line {late[0].line}: entry {quoted(late[0].entry_id)}{more}: "
    keep = tuple(entry for entry in job.plan.upserts if entry.embed_text not in later)
    job.plan = diff.Plan(keep, job.plan.deletes, job.plan.unchanged)


def keep(job: Job, known: queue.Fingerprint4) -> None:
    """Leave the rows of a file that vanished as they are.

    The file is queued again when it comes back, whether or not its fingerprint changed.
    """
    job.plan = diff.Plan((), (), 0)
    job.fingerprint, job.racy, job.digest = files.Fingerprint(*known), True, None


class Unsettled(Transient):
    """The file is so young, and looks so truncated, that it may still be being written."""

    waits_for = "settle"


def looks_truncated(job: Job, known: Mapping[str, bytes]) -> bool:
    """Return whether the file is empty, or lost its structure or half of its entries since it was last indexed.

    A file that is written in place is empty for a moment. A skill with such a reference would be indexed without it.
    """
    if job.fingerprint is None:
        return False
    if job.is_empty:
        return True
    if job.error is not None:
        return isinstance(job.error, BadFile)
    lost = len(job.plan.deletes)
    return lost > len(job.plan.upserts) and 2 * lost >= len(known)


def unsettled(job: Job, settle_milliseconds: int) -> Unsettled | None:
    """Return the error to wait with if the file is younger than it takes to settle."""
    if job.fingerprint is None:
        return None
    now = now_milliseconds()
    ages = [now - moment // 1_000_000 for moment in (job.fingerprint.mtime_ns, job.fingerprint.ctime_ns)]
    age = min((age for age in ages if age >= 0), default=None)  # a time in the future says nothing of the last write
    if age is None or age >= settle_milliseconds:
        return None
    wait_seconds = (settle_milliseconds - age) / 1000
    message = "the file may still be being written"
    return Unsettled(message, retry_after_seconds=wait_seconds, counts_as_retry=False)


def note_written(tx: Transaction, kind: str, job: Job) -> None:
    """Record in the ledger what the commit of the job's plan did."""
    written: set[str] = {entry.entry_id for entry in job.plan.upserts}
    moved: list[Entry] = [entry for entry in job.document.entries if entry.entry_id not in written]
    ledger.apply(
        tx,
        job.claim.md_path,
        kind,
        written=[
            (entry.entry_id, entry.content_hash, entry.line, entry.entry_id in job.refused)
            for entry in job.plan.upserts
        ],
        lines=[(entry.entry_id, entry.line) for entry in moved],
        deleted=job.plan.deletes,
    )
    ledger.warn(tx, job.claim.md_path, [f"{_at(one)}: {one.message}; {one.remedy}" for one in job.document.warnings])


def complaint(job: Job) -> str | None:
    """Return what a person must know of the change: its error, or its bad entries, a line each. None if all is well."""
    if job.error is not None:
        return clipped(str(job.error))
    if not job.problems:
        return None
    lines = [f"{_at(p)}: entry {quoted(p.entry_id)}: {p.message}; {p.remedy}" for p in job.problems[:20]]
    more = [f"and {len(job.problems) - 20} more"] if len(job.problems) > 20 else []
    return clipped("\n".join([*lines, *more]))


def _at(problem: Problem) -> str:
    return f"line {problem.line}" + (f", column {problem.column}" if problem.column else "")
