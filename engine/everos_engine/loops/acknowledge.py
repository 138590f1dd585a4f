"""Record what became of claimed changes, in one transaction with the ledger: done, failed, or to be tried later."""

from __future__ import annotations

import random
from typing import NamedTuple

from loguru import logger

from everos_engine.errors import Transient, Unavailable, clipped, disk_full
from everos_engine.loops.context import Context, now_milliseconds
from everos_engine.loops.job import Job, Unsettled, blamed, complaint, note_written, values_to_blame
from everos_engine.stores import ledger, queue
from everos_engine.stores.database import Transaction
from everos_engine.stores.versions import Version


class Written(NamedTuple):
    """A commit: the table's incarnation, and its version after the commit."""

    incarnation: str
    version: Version


def mark(tx: Transaction, *, context: Context, kind: str, jobs: list[Job], written: Written | None) -> None:
    """Record in ledger and queue what became of one batch's jobs of one kind.

    ``written`` is None if nothing was committed.
    """
    now, values = now_milliseconds(), _values(context)
    if written is not None and ledger.incarnations(tx).get(kind, ("",))[0] != written.incarnation:
        for job in jobs:  # the table was recreated after the commit, and what was written went with the old one
            job.error = job.error or Transient(f"the table {kind!r} was made again meanwhile", counts_as_retry=False)
        written = None
    for job in jobs:
        if isinstance(job.error, Transient):
            _try_later(tx, context, job, job.error, now)
            continue
        if job.error is None:
            note_written(tx, kind, job)
        message = complaint(job)
        if job.deferred is not None:
            _try_later(tx, context, job, job.deferred, now)
            continue
        if message is None:
            queue.mark_done(
                tx,
                job.claim,
                job.fingerprint,
                racy=job.racy,
                digest=job.digest,
                settle_milliseconds=context.settings.settle_milliseconds,
                now_milliseconds=now,
            )
            continue
        queue.mark_failed(
            tx,
            job.claim,
            message,
            retryable=False,
            fingerprint=job.fingerprint,
            racy=job.racy,
            digest=job.digest,
            failed_for={name: values[name] for name in blamed(job)},
            now_milliseconds=now,
        )
        logger.warning("change_failed path={!r} error={!r}", job.claim.md_path, message)
    if written is not None:
        ledger.moved_on(tx, kind, written.incarnation, version=written.version)


async def retry_for_settings(context: Context) -> None:
    """Queue what failed because of a setting that has another value since."""
    again = await context.database.awrite(
        lambda tx: queue.requeue_for_settings(tx, _values(context), now_milliseconds=now_milliseconds())
    )
    if again:
        logger.info("settings_changed requeued={}", len(again))


def _values(context: Context) -> dict[str, str]:
    breaker = context.vectors.breaker
    return values_to_blame(context.settings, "" if breaker is None else breaker.embedder.model)


def _try_later(tx: Transaction, context: Context, job: Job, error: Transient, now: int) -> None:
    settings, breaker = context.settings, context.vectors.breaker
    said = clipped(str(error))
    if job.error is None:
        where = job.deferred_for if error.counts_as_retry else ""
        said = clipped("\n".join(filter(None, [f"{where}{error}", complaint(job)])))
    counts = error.counts_as_retry and not disk_full(error)
    if counts and job.claim.retry_count >= settings.worker_max_retry:
        message = f"{said} (after {job.claim.retry_count} retries); `everos-engine fix --apply` tries again"
        queue.mark_failed(tx, job.claim, message, retryable=True, now_milliseconds=now)
        logger.warning("change_failed path={!r} retryable=true error={!r}", job.claim.md_path, message)
        return
    delay = backoff_seconds(
        job.claim.retry_count,
        seed=settings.worker_retry_backoff_seconds,
        most=settings.worker_retry_backoff_max_seconds,
        asked=error.retry_after_seconds,
    )
    if isinstance(error, Unsettled):
        delay = error.retry_after_seconds or 0.0
    if isinstance(error, Unavailable) and breaker is not None and breaker.down.value is not None:
        # its return wakes what waits for it, and reading the files again before that would be useless
        delay = max(delay, settings.worker_retry_backoff_max_seconds)
    not_before = now + max(1, int(delay * 1000))
    queue.postpone(
        tx,
        job.claim,
        None if isinstance(error, Unsettled) else said,
        not_before=not_before,
        now_milliseconds=now,
        waits_for="disk" if disk_full(error) else error.waits_for,
        counts_as_retry=counts,
    )


def backoff_seconds(retries: int, *, seed: float, most: float, asked: float | None) -> float:
    """Return the delay before the next attempt, in seconds.

    It doubles with each retry, with up to 25 % of jitter on top. It is never shorter than the service asked for.
    """
    jitter = 1 + random.random() / 4  # noqa: S311 - spreads retries, guards nothing
    return max(min(seed * float(2**retries) * jitter, most), asked or 0.0)
