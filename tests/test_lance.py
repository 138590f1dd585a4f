"""The door to LanceDB: what it takes, and what its errors become."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from everos_engine.engine import open_engine
from everos_engine.errors import Exhausted, Fatal, Transient, Unexpected
from everos_engine.settings import load
from everos_engine.stores import lance
from everos_engine.stores.lance import Model, Row
from everos_engine.testing import FakeEmbedder
from test_index import opened
from writer import put

WIDTH = 3
VECTOR = st.none() | st.lists(st.floats(-2, 2, width=32), min_size=WIDTH, max_size=WIDTH)


@settings(max_examples=15, deadline=None)
@given(batches=st.lists(st.lists(VECTOR, min_size=1, max_size=5), min_size=1, max_size=3))
def test_any_subset_of_a_batch_may_have_no_vector(batches: list[list[list[float] | None]]) -> None:
    async def write() -> None:
        with tempfile.TemporaryDirectory() as place:
            async with opened(Path(place) / "lance") as index:
                await index.create("letter", Model("m", WIDTH))
                expected: dict[str, list[float] | None] = {}
                for vectors in batches:
                    rows = []
                    for number, vector in enumerate(vectors):
                        expected[f"e{number}"] = vector
                        array = None if vector is None else np.array(vector, dtype=np.float32)
                        rows.append(Row("a.md", f"e{number}", b"h", {"text": "heron"}, array))
                    await index.commit("letter", rows, [])
                stored = {str(row["entry_id"]): row["vector"] for row in await index.rows("letter")}
                assert stored == expected
                ask = np.array([1, 0, 0], dtype=np.float32)
                near = await index.search_vector("letter", ask, model="m", where="", limit=10)
                assert {hit.entry_id for hit in near} <= {key for key, vector in expected.items() if vector is not None}
                assert len(await index.search_text("letter", "heron", where="", limit=10)) == len(expected)

    trio.run(write)


@pytest.mark.parametrize(
    "vector", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 0.0], [float("inf"), 0.0, 0.0]]
)
async def test_a_vector_that_does_not_fit_the_table_is_refused_before_the_write(
    vector: list[float], tmp_path: Path
) -> None:
    async with opened(tmp_path / "lance") as index:
        await index.create("letter", Model("m", WIDTH))
        with pytest.raises(Unexpected, match="3 wide"):
            await index.commit("letter", [Row("a.md", "e", b"h", {}, np.array(vector, dtype=np.float32))], [])
        assert await index.rows("letter") == []


async def test_a_profile_with_a_body_and_no_summary_is_indexed(root: Path) -> None:
    put(root, "users/u1/user.md", "---\ntype: user_profile\nuser_id: u1\n---\n\nDrinks tea with heron feathers.\n")
    chosen = load({"memory.root": str(root)}, environment={}, user_file=root / "none")
    async with open_engine(chosen, embedder=FakeEmbedder()) as engine:
        status = await engine.settle()
        assert status.counts.done == 1
        assert [hit.kind for hit in await engine.search("heron")] == ["user_profile"]


def _panic() -> BaseException:
    """What pyo3 raises for a panic of Rust code: not an Exception."""
    return type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("attempt to subtract with overflow")


@pytest.mark.parametrize(
    ("raised", "family", "counts"),
    [
        (RuntimeError("lance error: Not found: data/1.lance, src/io.rs:1:2"), Unexpected, False),
        (ValueError("Invalid input, nothing fits"), Unexpected, False),
        (OverflowError("out of range integral type conversion attempted"), Unexpected, False),
        (KeyError("x"), Unexpected, False),
        (NotImplementedError("some day"), Unexpected, False),
        (RecursionError(), Unexpected, False),
        (MemoryError(), Unexpected, False),
        (pa.ArrowInvalid("bad"), Unexpected, False),
        (type("Unheard", (Exception,), {})("of"), Unexpected, False),
        (_panic(), Unexpected, False),
        (RuntimeError("lance error: LanceError(IO): Too many open files (os error 24)"), Exhausted, False),
        (OSError(24, "Too many open files"), Exhausted, False),
        (RuntimeError("LanceError(IO): No space left on device (os error 28)"), Transient, False),
        (RuntimeError("LanceError(IO): Read-only file system (os error 30)"), Transient, False),
        (RuntimeError("lance error: Retryable commit conflict for version 5"), Transient, True),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_whatever_the_library_raises_becomes_one_of_our_families(
    raised: BaseException, family: type[Transient], *, counts: bool
) -> None:
    with pytest.raises(Transient) as caught, lance.sorted_troubles():
        raise raised
    assert type(caught.value) is family
    assert caught.value.counts_as_retry is counts
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3), Fatal("ours"), Unexpected("ours")])
def test_what_ends_the_process_and_our_own_errors_pass_through_the_door(raised: BaseException) -> None:
    with pytest.raises(type(raised)) as caught, lance.sorted_troubles():
        raise raised
    assert caught.value is raised


async def test_a_cancelled_task_stays_cancelled_in_the_door() -> None:
    with trio.move_on_after(0) as scope, lance.sorted_troubles():
        await trio.sleep_forever()
    assert scope.cancelled_caught
