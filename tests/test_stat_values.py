"""No stat value and no name of a file voids a scan, or keeps a neighbour out of the index."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import trio
from hypothesis import example, given
from hypothesis import settings as profile
from hypothesis import strategies as st

from derived import described, indexed
from everos_engine.engine import open_engine, open_queue
from everos_engine.loops.deletion_guard import DeletionGuard
from everos_engine.loops.reconcile import reconcile_tree
from everos_engine.settings import Settings, load
from everos_engine.stores import queue
from everos_engine.system import files
from everos_engine.testing import FakeEmbedder
from everos_engine.text import kinds

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
ANY = st.integers(-(1 << 80), 1 << 80)
YEAR_2300_NS = 10_413_792_000 * 1_000_000_000
NAMES = st.binary(min_size=1, max_size=60).map(lambda name: name.replace(b"/", b"").replace(b"\0", b"").lstrip(b".~#"))


def stat_of(mtime_ns: int, size: int, ino: int, ctime_ns: int) -> os.stat_result:
    return os.stat_result(
        (0o100644, ino, 1, 1, 0, 0, size, 0, 0, 0), {"st_mtime_ns": mtime_ns, "st_ctime_ns": ctime_ns}
    )


@profile(max_examples=25)
@given(st.tuples(ANY, ANY, st.integers(0, 1 << 80), ANY))
@example((YEAR_2300_NS, 1, 1, YEAR_2300_NS))
@example((-1, 1 << 63, 1 << 63, -(1 << 63) - 1))
def test_any_stat_goes_through_the_queue(values: tuple[int, int, int, int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        settings = load({"memory.root": directory}, environment={}, user_file=Path(directory) / "none.toml")
        database = open_queue(settings)
        try:
            found = files.fingerprint_of(stat_of(*values))
            observation = queue.Observation("a.md", "note", found)
            assert database.write(lambda tx: queue.record(tx, [observation], source="scan", now_milliseconds=1))
            (claim,) = database.write(lambda tx: queue.claim(tx, "me", limit=1, now_milliseconds=1))
            database.write(lambda tx: queue.mark_done(tx, claim, found, racy=False, now_milliseconds=1))
            assert not database.write(lambda tx: queue.record(tx, [observation], source="scan", now_milliseconds=2))
        finally:
            database.close()


@given(INT64, INT64, st.integers(files.FUTURE_NS + 1, 1 << 62))
def test_a_time_far_in_the_future_keeps_no_file_racy(size: int, ino: int, ahead_ns: int) -> None:
    now = time.time_ns()
    ahead = files.fingerprint_of(stat_of(now + ahead_ns, size, abs(ino), now - 10 * files.COARSE_RACY_NS))
    assert not files.is_racy(ahead, now)
    assert files.is_racy(ahead._replace(ctime_ns=now), now)


@profile(max_examples=25)
@given(st.dictionaries(NAMES.filter(bool), ANY, min_size=1, max_size=4))
@example({b"caf\xe9\n\x1b[2J": YEAR_2300_NS, b"long" * 60: -1})
def test_any_name_and_time_is_swept_read_and_found_again(tree: dict[bytes, int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        flags = {"memory.root": directory, "note.globs": ["**/*.md"]}
        settings = load(flags, environment={}, user_file=Path(directory) / "none.toml")
        for name, mtime_ns in tree.items():
            path = os.path.join(os.fsencode(directory), name[:240] + b".md")
            Path(os.fsdecode(path)).write_bytes(b"# A\ntext")
            seconds = max(-(1 << 62), min(mtime_ns // 1_000_000_000, 1 << 62))
            os.utime(path, ns=(0, seconds * 1_000_000_000 + mtime_ns % 1_000_000_000))
        trio.run(swept, settings, len({name[:240] for name in tree}))


async def swept(settings: Settings, count: int) -> None:
    database = open_queue(settings)
    try:
        found = await reconcile_tree(settings, database, source="scan", deletion_guard=DeletionGuard(settings))
        assert (found.files, len(found.queued), found.blind) == (count, count, {})
        for claim in database.write(lambda tx: queue.claim(tx, "me", limit=count, now_milliseconds=1 << 62)):
            place = kinds.recognise(claim.md_path, note_globs=settings.note.globs)
            assert place is not None
            assert files.read(settings.root, place, max_file_bytes=1 << 20).sources == {claim.md_path: b"# A\ntext"}
    finally:
        database.close()


async def test_a_file_of_the_year_2300_is_indexed_and_at_rest(settings: Settings, root: Path) -> None:
    for name in ("a.md", "b.md"):
        (root / name).write_text("# A\ntext")
    os.utime(root / "a.md", ns=(YEAR_2300_NS, YEAR_2300_NS))
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        status = await engine.settle()
        assert (status.counts.done, status.counts.pending) == (2, 0)
        assert await indexed(engine) == described(settings)


def test_a_file_that_cannot_be_asked_for_leaves_its_neighbours_in_sight(settings: Settings, root: Path) -> None:
    deep = root
    while len(os.fsencode(deep)) < 4080:  # the longest path that the system takes has 4095 bytes
        deep /= "d" * min(200, 4088 - len(os.fsencode(deep)) - 1)
    deep.mkdir(parents=True)
    (root / "near.md").write_text("# A\ntext")
    directory = os.open(deep.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short, long = "s.md", "l" * 60 + ".md"
        inner = os.open(deep.name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        try:
            for name in (short, long):
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=inner))
        finally:
            os.close(inner)
    finally:
        os.close(directory)
    walked = files.walk(root, lambda key: kinds.recognise(key, note_globs=settings.note.globs))
    assert {key.rpartition("/")[2] for key in walked.found} == {"near.md", short}
    assert [key.rpartition("/")[2] for key in walked.blind] == [long]
