"""The descriptor laws under property-based stress: a state machine over real LanceDB through the engine's own Index.

    python -m fuzz.descriptors --minutes 5

Each example opens one Index with a random mode, cap and tables and runs random operations on it; after every step the
process' descriptors are listed and held against the laws in docs/descriptors.md. A failure shrinks to a short script.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import lancedb
import numpy as np
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from everos_engine.search import fuse
from everos_engine.settings import DescriptorMode, LanceDBSettings
from everos_engine.stores.index import Bridge, Index, open_index
from everos_engine.stores.lance import Hit, Model, Row, uri_of
from everos_engine.stores.session_pool import PooledSession
from everos_engine.system.slope import Learner
from everos_engine.text.kinds import Kind
from everos_engine.text.kinds.tables import Field
from fuzz.descriptors.threaded import Threaded
from fuzz.meter import Census, Meter, census
from fuzz.results import Run, write_result

MIB = 1 << 20
DEFAULT_CAP_BYTES = 16 * MIB
LIMIT = 1024
"""Soft limit of descriptors the stress runs under: what most Linux systems give."""
BUDGET = LIMIT // 2
"""The guard's soft budget."""
STEPS = 24
MIN_EXAMPLES, EXAMPLES_A_MINUTE = 10, 20
MAX_TABLES, MAX_COLUMNS, MAX_ROWS = 3, 3, 160
DIMENSION = 8
SLACK = 2
"""Descriptors a dropped Session may leave for a moment: a socket or an epoll of a runtime thread that is ending."""
ENTRY_BYTES = MIB
"""More than any one entry of these tables weighs in the cache."""
GROWTH = 2.0
"""Lance weighs an entry when it enters the cache, and readers grow as they load: measured, up to 1.78 times the cap."""
LEARNED_FACTOR = 2.0
"""The slope that the guard learns may be off by so much for the next pair: texts and metadata vary from step to step."""
JUDGED_PINS = 32
"""A Session that pins fewer is mostly metadata."""
SHAPES: Mapping[str, tuple[int, int, int]] = {"prose": (20, 40, 128), "tiny": (1, 3, 512)}
"""Least and most words of a text, and the calibrated ceiling: descriptors per MiB of cap (measured: 96 and 462)."""
MODEL = Model("stress", DIMENSION)
LOOKS, LOOK_SECONDS = 1000, 0.005
"""How long a thread of Lance may take to close what it no longer reads: seconds, where others use the processors. A leak stays."""
WORDS = tuple(f"w{number:04d}" for number in range(2000))


@dataclass(slots=True)
class Table:
    """What one table must hold, and how many index generations the Session in force has opened of it."""

    kind: Kind
    rows: dict[tuple[str, str], bytes] = field(default_factory=dict)
    built: bool = False
    sessions: int = 0
    past: list[int] = field(default_factory=list)

    def most_pinned(self) -> int:
        """The law: 4n - 1 per column after n generations, of this life of the table and of those dropped before."""
        return len(self.kind.fts_columns) * sum(max(0, 4 * count - 1) for count in (*self.past, self.sessions))


class DescriptorMachine(RuleBasedStateMachine):
    """Random lives of an Index; ``index_class`` is replaced by the planted leaks."""

    index_class: type[Index] = Index
    only_mode: DescriptorMode | None = None

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="everos-descriptors-"))
        self.threaded = Threaded()
        self.threaded.call(warm_up, self.threaded.bridge)
        self.base = census(self.directory).total
        self.tables: dict[str, Table] = {}
        self.random = np.random.default_rng(0)
        self.serial = 0
        self.peak = 0
        self.learner = Learner()

    @initialize(
        mode=st.sampled_from(["pinned", "reopen"]),
        cap=st.one_of(
            st.integers(1, 3).map(lambda mib: mib * MIB),  # small enough to be reached
            st.integers(1, 32).map(lambda mib: mib * MIB),
            st.just(DEFAULT_CAP_BYTES),
            st.just(0),
        ),
        columns=st.lists(st.integers(1, MAX_COLUMNS), min_size=1, max_size=MAX_TABLES),
        shape=st.sampled_from(sorted(SHAPES)),
        weighed=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def open(
        self,
        *,
        mode: DescriptorMode,
        cap: int,
        columns: list[int],
        shape: str,
        weighed: bool,
        seed: int,
    ) -> None:
        self.mode, self.cap, self.shape, self.random = self.only_mode or mode, cap, shape, np.random.default_rng(seed)
        self.weighed = weighed and self.index_class is Index
        lance = replace(LanceDBSettings(), descriptor_mode=self.mode, index_cache_size_bytes=cap)
        for number, count in enumerate(columns):
            names = tuple(f"text{at}" for at in range(count))
            kind = Kind(f"t{number}", tuple(Field(name, name) for name in names), names, ())
            self.tables[kind.name] = Table(kind)
        kinds = {name: table.kind for name, table in self.tables.items()}
        opened = open_index(self.threaded.bridge, lance, kinds=kinds, directory=self.directory, cap_bytes=cap)
        chosen = Weighed if self.weighed else self.index_class
        self.index = chosen(opened.bridge, opened.settings, opened.kinds, opened.directory, opened.cap_bytes)
        for name in self.tables:
            self.threaded.call(self.index.create, name, MODEL)

    def table(self, pick: int) -> tuple[str, Table]:
        name = f"t{pick % len(self.tables)}"
        return name, self.tables[name]

    def words(self, count: int) -> str:
        return " ".join(self.random.choice(WORDS, size=count))

    def row(self, table: Table, key: tuple[str, str]) -> Row:
        least, most, _ = SHAPES[self.shape]
        values: dict[str, object] = {
            name: self.words(int(self.random.integers(least, most + 1))) for name in table.kind.fts_columns
        }
        vector = self.random.standard_normal(DIMENSION).astype(np.float32)
        return Row(*key, self.random.bytes(16), values, vector)

    def commit(self, name: str, rows: Sequence[Row], deletes: Sequence[tuple[str, str]]) -> None:
        self.threaded.call(self.index.commit, name, rows, deletes)
        held = self.tables[name].rows
        held.update({(row.md_path, row.entry_id): row.content_hash for row in rows})
        for key in deletes:
            held.pop(key, None)

    @rule(pick=st.integers(0, 2), count=st.integers(1, MAX_ROWS))
    def add(self, pick: int, count: int) -> None:
        name, table = self.table(pick)
        keys = [(f"{(self.serial + at) % 7}.md", f"e{self.serial + at}") for at in range(count)]
        self.serial += count
        self.commit(name, [self.row(table, key) for key in keys], [])

    @rule(pick=st.integers(0, 2), count=st.integers(1, MAX_ROWS))
    def upsert(self, pick: int, count: int) -> None:
        name, table = self.table(pick)
        self.commit(name, [self.row(table, key) for key in list(table.rows)[:count]], [])

    @rule(pick=st.integers(0, 2), count=st.integers(1, MAX_ROWS))
    def delete(self, pick: int, count: int) -> None:
        name, table = self.table(pick)
        self.commit(name, [], list(table.rows)[-count:])

    @rule(pick=st.integers(0, 2), query=st.booleans())
    def optimize(self, pick: int, *, query: bool) -> None:
        name, table = self.table(pick)
        if sum(table.most_pinned() for table in self.tables.values()) > BUDGET:
            self.rotate()  # as the guard does
        self.threaded.call(self.index.optimize, name)
        table.sessions += 1
        table.built = True
        if query:
            self.query(pick, "fts", 2)

    @rule(
        pick=st.integers(0, 2),
        times=st.integers(1, 8),
        count=st.integers(20, MAX_ROWS),
        how=st.sampled_from(["fts", "hybrid"]),
    )
    def churn(self, pick: int, times: int, count: int, how: str) -> None:
        """A stretch of a daemon's life: new rows, optimize, queries, again and again."""
        for _ in range(times):
            self.add(pick, count)
            self.optimize(pick, query=False)
            self.query(pick, how, 2)
            self.laws_hold()

    @rule(pick=st.integers(0, 2))
    def prune(self, pick: int) -> None:
        """As optimize, with every older version gone at once: what is pinned of them stays as deleted files."""
        kept = self.index.settings
        self.index.settings = replace(kept, keep_versions_seconds=0.0)
        try:
            self.optimize(pick, query=False)
        finally:
            self.index.settings = kept

    @rule(pick=st.integers(0, 2))
    def rebuild(self, pick: int) -> None:
        """A new life of the table, its rows written again."""
        name, table = self.table(pick)
        self.threaded.call(self.index.create, name, MODEL)
        table.past.append(table.sessions)
        table.sessions, table.built = 0, False
        keys, table.rows = list(table.rows), {}
        if keys:
            self.commit(name, [self.row(table, key) for key in keys], [])

    @rule(pick=st.integers(0, 2), how=st.sampled_from(["fts", "vector", "hybrid"]), words=st.integers(1, 5))
    def query(self, pick: int, how: str, words: int) -> None:
        name, table = self.table(pick)
        for hit in self.threaded.call(self.search, name, how, self.words(words)):
            assert (hit.md_path, hit.entry_id) in table.rows

    @precondition(lambda self: self.has_something_to_drop())
    @rule()
    def rotate(self) -> None:
        self.threaded.call(self.rotate_now)
        self.began_a_session()
        found = settled(self.directory, most=self.base + SLACK)
        assert found.index == 0, f"{found.index} index descriptors outlive their Session"
        assert found.total <= self.base + SLACK, (
            f"{found.total} descriptors after the Session was dropped, {self.base} before"
        )

    @precondition(lambda self: self.has_something_to_drop())
    @rule(readers=st.integers(1, 6))
    def rotate_under_readers(self, readers: int) -> None:
        """Queries in flight all finish, and what the old Session held goes with the last of them."""
        self.threaded.call(self.search_and_rotate, readers)
        self.began_a_session()

    def has_something_to_drop(self) -> bool:
        return sum(table.sessions + sum(table.past) for table in self.tables.values()) >= MAX_TABLES

    def began_a_session(self) -> None:
        """The new Session opens what each table has on disk as its first generation."""
        for table in self.tables.values():
            table.past.clear()
            table.sessions = int(table.built)

    async def search(self, name: str, how: str, text: str) -> list[Hit]:
        rankings: dict[str, list[Hit]] = {}
        if how != "vector":
            rankings["fts"] = await self.index.search_text(name, text, where="", limit=10)
        if how != "fts":
            vector = np.ones(DIMENSION, dtype=np.float32)
            rankings["vector"] = await self.index.search_vector(name, vector, model=MODEL.name, where="", limit=10)
        return fuse(rankings)

    async def search_and_rotate(self, readers: int) -> None:
        texts = [self.words(2) for _ in range(readers)]
        async with trio.open_nursery() as nursery:
            for at, text in enumerate(texts):
                nursery.start_soon(self.search, f"t{at % len(self.tables)}", "hybrid", text)
            nursery.start_soon(self.rotate_now)

    async def rotate_now(self) -> None:
        self.index.rotate()

    @invariant()
    def laws_hold(self) -> None:
        if not self.tables:
            return
        nothing = self.mode == "reopen" or self.cap == 0
        found = settled(self.directory) if nothing else census(self.directory)
        self.peak = max(self.peak, found.total)
        most = sum(table.most_pinned() for table in self.tables.values())
        assert self.peak < LIMIT, f"{self.peak} descriptors: at the limit of {LIMIT}"
        if self.mode == "reopen":
            assert found.index == 0, f"mode reopen pins {found.index} index descriptors"
        elif self.cap == 0:
            assert found.index == 0, f"cap 0 pins {found.index} index descriptors"
        else:
            assert found.index <= most, f"{found.index} index descriptors are pinned, the law allows {most}"
            ceiling = (self.cap + ENTRY_BYTES) * SHAPES[self.shape][2] // MIB
            assert found.index <= ceiling, f"{found.index} index descriptors with cap {self.cap}: ceiling {ceiling}"
            self.learned_agrees(found.index)
        if self.weighed:
            held, bound = self.index.session_bytes(), GROWTH * self.cap + ENTRY_BYTES
            assert held <= bound, (
                f"{held} bytes in the index cache with cap {self.cap}, at most {bound:.0f} are allowed"
            )

    def learned_agrees(self, pinned: int) -> None:
        """What the guard would have learned up to here foretells what is counted now; then it learns that too."""
        session_bytes = self.index.session_bytes()
        learned = self.learner.slope()
        if learned is not None and pinned >= JUDGED_PINS:
            mebibytes = session_bytes / MIB
            least, most = learned.low * mebibytes / LEARNED_FACTOR, learned.high * mebibytes * LEARNED_FACTOR
            assert least <= pinned <= most, (
                f"{pinned} index descriptors, by the learned slope {least:.0f} to {most:.0f}"
            )
        self.learner.see(self.index.rotations, session_bytes, pinned)

    def teardown(self) -> None:
        try:
            if self.tables and sys.exc_info()[0] is None:
                for name, table in self.tables.items():
                    assert self.threaded.call(self.index.keys, name) == (table.rows, set())
                self.threaded.call(self.close)
                left = settled(self.directory, most=self.base + SLACK)
                assert left.index == 0, f"{left.index} index descriptors outlive the index"
                assert left.total <= self.base + SLACK
        finally:
            self.threaded.close()
            shutil.rmtree(self.directory)

    async def close(self) -> None:
        self.index.close()


class Weighed(Index):
    """With no metadata cache, so that the Session's bytes are those of the index cache alone."""

    async def _connect(self, session: PooledSession) -> lancedb.AsyncConnection:
        if session.connection is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            of_lancedb = lancedb.Session(index_cache_size_bytes=self.cap_bytes, metadata_cache_size_bytes=0)
            uri = uri_of(self.directory, self.settings.descriptor_mode)
            session.connection = await lancedb.connect_async(uri, session=of_lancedb)
            session.session = of_lancedb
        return session.connection


async def warm_up(bridge: Bridge) -> None:
    """Start LanceDB's runtime: its own descriptors are part of the base, not of a Session."""
    with tempfile.TemporaryDirectory() as directory:
        kind = Kind("warm", (Field("text", "text"),), ("text",), ())
        index = open_index(bridge, LanceDBSettings(), kinds={"warm": kind}, directory=Path(directory), cap_bytes=0)
        await index.create("warm", MODEL)
        await index.search_text("warm", "word", where="", limit=1)
        index.close()


def settled(directory: Path, *, most: int | None = None) -> Census:
    """A census once no index descriptor is left (and at most ``most`` in all), or the least there was in the time for that.

    A reader may be closing on a thread of Lance at this moment.
    """
    found = census(directory)
    for _ in range(LOOKS):
        if not found.index and (most is None or found.total <= most):
            break
        time.sleep(LOOK_SECONDS)
        again = census(directory)
        found = min(found, again, key=lambda one: (one.index, one.total))
    return found


def profile(
    examples: int, *, steps: int = STEPS, phases: Sequence[Phase] | None = None, derandomize: bool = True
) -> settings:
    """Settings of a run, by default the same each time; timings are not what is tested."""
    return settings(
        max_examples=examples,
        derandomize=derandomize,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=phases or (Phase.generate, Phase.target, Phase.shrink),
    )


def run_for(minutes: float) -> int:
    """One run of as many examples as usually fit; how many. Raises the first failure, shrunk. Only the shortest is repeatable."""
    examples = max(MIN_EXAMPLES, round(minutes * EXAMPLES_A_MINUTE))
    run_state_machine_as_test(DescriptorMachine, settings=profile(examples, derandomize=examples == MIN_EXAMPLES))
    return examples


@contextmanager
def limited(limit: int) -> Iterator[None]:
    """Run under a lower soft limit of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main(arguments: Sequence[str]) -> int:
    """Run, and leave a result; exit status 1 with the shrunk script on a failure."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.descriptors", description="Descriptor laws under property-based stress."
    )
    parser.add_argument("--minutes", type=float, default=5.0)
    minutes = parser.parse_args(arguments).minutes
    meter = Meter().start()
    examples = 0
    try:
        with limited(LIMIT):
            examples = run_for(minutes)
    finally:
        meter.stop()
        run = Run(meter.seconds, meter.counts, meter.rss, [], LIMIT)
        facts = {"examples": examples, "passed": examples > 0, "peak": meter.peak, "limit": LIMIT, "minutes": minutes}
        print(
            f"descriptors: {examples} examples, peak {meter.peak} of {LIMIT}, in {write_result('descriptors', facts, run)}"
        )
    assert meter.peak < LIMIT, f"{meter.peak} descriptors: at the limit of {LIMIT}"
    return 0
