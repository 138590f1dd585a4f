from __future__ import annotations

import multiprocessing
import re
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everos_engine.errors import EngineError
from everos_engine.stores import queue, reports
from everos_engine.stores.database import Database, Transaction
from everos_engine.stores.queue import Observation
from patience import HANG_SECONDS

ONE, TWO = (1, 1, 1, 1), (2, 2, 2, 2)
TURNS = 2000
"""Of each of two processes."""


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "engine.db", schema=queue.SCHEMA)


def record(tx: Transaction, path: str, fingerprint: queue.Fingerprint4 | None, *, force: bool = False) -> list[str]:
    seen = [Observation(path, "note", fingerprint)]
    return queue.record(tx, seen, source="watch", now_milliseconds=1, force=force)


def claim(tx: Transaction, limit: int = 10) -> list[queue.Claim]:
    return queue.claim(tx, "me", limit=limit, now_milliseconds=10)


def test_a_repeated_fingerprint_writes_nothing(database: Database) -> None:
    assert database.write(lambda tx: record(tx, "a", ONE)) == ["a"]
    assert database.write(lambda tx: record(tx, "a", ONE)) == []
    assert database.read(queue.newest) == 1


def test_an_edit_while_claimed_goes_back_to_pending_behind_what_was_applied(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    database.write(lambda tx: record(tx, "a", TWO))
    assert database.write(claim) == []
    database.write(lambda tx: queue.mark_done(tx, held, ONE, racy=False, now_milliseconds=2))
    (again,) = database.write(claim)
    assert (again.claim_lsn, again.pos) == (2, 2)


def test_a_mark_of_an_old_claim_changes_nothing(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (old,) = database.write(claim)
    database.write(lambda tx: queue.recover(tx, ["me"]))
    (new,) = database.write(claim)
    database.write(lambda tx: queue.mark_done(tx, old, ONE, racy=False, now_milliseconds=2))
    assert database.read(reports.counts).processing == 1
    assert new.claim_no != old.claim_no


def test_a_racy_file_at_rest_is_queued_again(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    database.write(lambda tx: queue.mark_done(tx, held, ONE, racy=True, now_milliseconds=2))
    assert database.write(lambda tx: record(tx, "a", ONE)) == ["a"]


def test_a_deleted_file_is_forgotten_and_may_come_back_with_its_old_fingerprint(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    database.write(lambda tx: queue.mark_done(tx, held, None, racy=False, now_milliseconds=2))
    assert database.read(lambda tx: reports.outcomes(tx, ["a"]))[0].status is None
    assert database.write(lambda tx: record(tx, "a", ONE)) == ["a"]


def test_a_postponed_change_waits_for_its_time_and_holds_the_watermark(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    database.write(lambda tx: queue.postpone(tx, held, "later", not_before=50, now_milliseconds=2))
    assert database.write(claim) == []
    assert database.read(queue.watermark) == 0
    (again,) = database.write(lambda tx: queue.claim(tx, "me", limit=1, now_milliseconds=50))
    assert again.retry_count == 1


def test_fix_gives_retryable_failures_a_fresh_lsn(database: Database) -> None:
    for path, retryable in (("a", True), ("b", False)):
        database.write(lambda tx, p=path: record(tx, p, ONE))
        (held,) = database.write(claim)
        database.write(lambda tx, h=held, r=retryable: queue.mark_failed(tx, h, "no", retryable=r, now_milliseconds=2))
    assert database.read(queue.watermark) == 2
    assert database.write(lambda tx: queue.requeue_failed(tx, now_milliseconds=3)) == ["a"]
    assert database.write(claim)[0].claim_lsn == 3


def test_claims_are_served_by_the_ready_index(database: Database) -> None:
    plan = database.read(lambda tx: list(tx.execute("EXPLAIN QUERY PLAN " + queue.CLAIM, (1, "me", 1, 5))))
    assert any("change_ready" in str(row) for row in plan)


def test_an_edit_of_a_change_that_waits_for_an_outage_is_tried_at_once(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    database.write(
        lambda tx: queue.postpone(tx, held, "waiting", not_before=300_000, now_milliseconds=1, counts_as_retry=False)
    )
    edit = queue.Observation("a", "note", TWO)
    database.write(lambda tx: queue.record(tx, [edit], source="watch", now_milliseconds=2, settle_milliseconds=250))
    assert [again.md_path for again in database.write(claim)] == ["a"]


@pytest.mark.parametrize("name", ["FORGET", "DONE", "FAILED", "POSTPONE"])
def test_marks_look_their_change_up_by_key(name: str, database: Database) -> None:
    sql = str(getattr(queue, name))
    count = sql.count("?") if name == "FORGET" else max(int(number) for number in re.findall(r"\?(\d+)", sql))
    plan = database.read(lambda tx: list(tx.execute("EXPLAIN QUERY PLAN " + sql, (1,) * count)))
    assert all("md_path=?" in str(row) for row in plan), plan


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["edit", "delete", "claim", "done", "fail", "later", "recover"]), st.integers(0, 3)),
        max_size=40,
    )
)
def test_no_edit_is_ever_lost_whatever_the_order(steps: list[tuple[str, int]]) -> None:
    database = Database(Path(":memory:"), schema=queue.SCHEMA)
    disk: dict[str, queue.Fingerprint4 | None] = {}
    applied: dict[str, queue.Fingerprint4 | None] = {}
    held: dict[int, tuple[queue.Claim, queue.Fingerprint4 | None]] = {}

    def settle(name: str, which: int) -> None:
        if not held:
            return
        number = sorted(held)[which % len(held)]
        change, read = held.pop(number)
        if name == "done":
            applied[change.md_path] = read
            database.write(lambda tx: queue.mark_done(tx, change, read, racy=False, now_milliseconds=1))
        elif name == "fail":
            database.write(lambda tx: queue.mark_failed(tx, change, "x", retryable=True, now_milliseconds=1))
        else:
            database.write(lambda tx: queue.postpone(tx, change, "x", not_before=1, now_milliseconds=1))

    for step, (name, which) in enumerate(steps, start=1):
        path = f"p{which}"
        if name in {"edit", "delete"}:
            disk[path] = (step, step, step, step) if name == "edit" else None
            database.write(lambda tx, p=path: record(tx, p, disk[p]))
        elif name == "claim":
            for change in database.write(lambda tx: claim(tx, 2)):
                held[change.claim_no] = (change, disk[change.md_path])
        elif name == "recover":
            held.clear()
            database.write(lambda tx: queue.recover(tx, ["me"]))
        else:
            settle(name, which)
        counts = database.read(reports.counts)
        assert counts.watermark <= counts.lsn_max
    database.write(lambda tx: queue.recover(tx, ["me"]))
    database.write(lambda tx: queue.requeue_failed(tx, now_milliseconds=1))
    while changes := database.write(claim):
        for change in changes:
            applied[change.md_path] = disk[change.md_path]
            read = disk[change.md_path]
            database.write(lambda tx, c=change, r=read: queue.mark_done(tx, c, r, racy=False, now_milliseconds=1))
    assert {path: found for path, found in applied.items() if found} == {p: found for p, found in disk.items() if found}
    assert database.read(queue.watermark) == database.read(queue.newest)
    database.close()


def _compete(
    path: Path, owner: str, begin: Barrier, results: multiprocessing.Queue[tuple[list[int], list[int]]]
) -> None:
    database = Database(path, schema=queue.SCHEMA)
    claims, lsns = [], []
    begin.wait(HANG_SECONDS)
    for acquire in range(TURNS):
        name = f"{owner}-{acquire % 7}"
        database.write(lambda tx, n=name, t=acquire: record(tx, n, (t, t, t, t)))
        for held in database.write(lambda tx: queue.claim(tx, owner, limit=5, now_milliseconds=1)):
            claims.append(held.claim_no)
            lsns.append(held.claim_lsn)
            database.write(lambda tx, h=held: queue.mark_done(tx, h, ONE, racy=False, now_milliseconds=1))
    results.put((claims, lsns))


def test_two_processes_never_claim_the_same_change(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[list[int], list[int]]] = context.Queue()
    begin = context.Barrier(2)
    processes = [context.Process(target=_compete, args=(tmp_path / "q.db", f"o{n}", begin, results)) for n in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=HANG_SECONDS) for _ in processes]
    for process in processes:
        process.join()
    claims = [number for numbers, _ in found for number in numbers]
    lsns = [number for _, numbers in found for number in numbers]
    assert len(claims) > 20
    assert len(set(claims)) == len(claims)
    assert len(set(lsns)) == len(lsns)


def test_a_change_says_in_a_column_why_it_waits_and_only_those_are_hurried(database: Database) -> None:
    for path in ("a", "b"):
        database.write(lambda tx, p=path: record(tx, p, ONE))
    reasons: list[queue.WaitsFor] = ["embedder", "root"]
    for held, reason in zip(database.write(claim), reasons, strict=True):
        text = "the embedder is down" if reason == "root" else "not deleted"  # the text decides nothing
        postponed = partial(queue.postpone, held=held, error=text, not_before=500, now_milliseconds=2, waits_for=reason)
        database.write(postponed)
    assert database.read(lambda tx: queue.refused(tx, 2)) == "b: the embedder is down"
    database.write(lambda tx: queue.hurry(tx, "embedder"))
    assert [again.md_path for again in database.write(claim)] == ["a"]


@pytest.mark.parametrize(
    "change",
    [
        "waits_for = 'bored', not_before = 5",
        "waits_for = NULL, not_before = 5",
        "waits_for = 'retry', not_before = 0",
        "waits_for = 'retry', not_before = 5, status = 'done'",
        "failed_for = '{}'",
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change: str, database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    with pytest.raises(EngineError) as refused:
        database.write(lambda tx: list(tx.execute(f"UPDATE md_change_state SET {change}")))
    assert "CHECK constraint failed" in str(refused.value)


def test_no_change_waits_longer_than_the_longest_delay_whatever_its_row_says(database: Database) -> None:
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    database.write(lambda tx: queue.postpone(tx, held, "x", not_before=1 << 50, now_milliseconds=10))
    assert database.read(lambda tx: queue.next_due(tx, now_milliseconds=20, longest_wait_milliseconds=1000)) == 20
    taken = database.write(
        lambda tx: queue.claim(tx, "me", limit=1, now_milliseconds=20, longest_wait_milliseconds=1000)
    )
    assert [one.md_path for one in taken] == ["a"]


@pytest.mark.parametrize("jump", [-86_400_000, -1000, 0, 86_400_000])
def test_a_clock_that_was_set_makes_no_change_wait_longer_than_its_delay(jump: int, database: Database) -> None:
    before, delay = 200_000_000, 500
    database.write(lambda tx: record(tx, "a", ONE))
    (held,) = database.write(claim)
    later = before + delay
    database.write(lambda tx: queue.postpone(tx, held, "x", not_before=later, now_milliseconds=before))
    now = before + jump
    due = database.read(lambda tx: queue.next_due(tx, now_milliseconds=now))
    assert due is not None
    assert due <= now + delay
    assert database.write(lambda tx: queue.claim(tx, "me", limit=1, now_milliseconds=max(now, due)))


def test_what_failed_for_a_setting_is_queued_again_when_the_setting_changes(database: Database) -> None:
    blamed: dict[str, dict[str, str] | None] = {"a": {"max_file_bytes": "10"}, "b": {"embedder": "m"}, "c": None}
    for path, failed_for in blamed.items():
        database.write(lambda tx, p=path: record(tx, p, ONE))
        (held,) = database.write(claim)
        failed = partial(queue.mark_failed, held=held, error="no", retryable=False, now_milliseconds=2)
        database.write(partial(failed, failed_for=failed_for))
    again = partial(queue.requeue_for_settings, now_milliseconds=3)
    assert database.write(partial(again, values={"max_file_bytes": "10", "embedder": "m"})) == []
    assert database.write(partial(again, values={"max_file_bytes": "20", "embedder": "m"})) == ["a"]
    assert database.write(claim)[0].claim_lsn == 4
    assert database.write(partial(again, values={"max_file_bytes": "30", "embedder": "m"})) == []
