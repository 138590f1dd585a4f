"""Any query over real LanceDB: quotes, operators, NUL and lone surrogates mean nothing, and what is written is read back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from everos_engine.engine import Engine, open_engine
from everos_engine.search import Filter, Mode
from everos_engine.settings import load
from everos_engine.stores.lance import Model, Row
from everos_engine.testing import FakeEmbedder
from everos_engine.text import kinds

pytestmark = pytest.mark.filterwarnings("ignore")
OPERATORS = ['"', "'", "*", "^2", "~", "+", "-", "(", ")", "[", "]", "{", "}", ":", "AND", "OR", "NOT", "content:x", "\\", "/",
             "--", ";", "%", "_", "\0", "\n", "\u200b", "🦦", "e\u0301", "ß", "İ", "\udcff", "heron", "x" * 5000, "--mode", ""]  # fmt: skip
QUERIES = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(OPERATORS), max_size=8).map(" ".join),
    st.lists(st.sampled_from(OPERATORS), max_size=8).map("".join),
)


class Served:
    """An engine in a thread of its own."""

    def __init__(self, engine: Engine, portal: BlockingPortal, root: Path) -> None:
        self.engine, self.portal, self.root = engine, portal, root


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as name, start_blocking_portal("trio") as portal:
        root = Path(name)
        (root / "a.md").write_text('# Bird\nThe heron eats fish\n# Odd\nit\'s "quoted" AND more OR less\n')
        flags = {"memory.root": name, "note.globs": ["*.md"], "watch.mode": "off"}
        configured = load(flags, environment={}, user_file=root / "none")
        with portal.wrap_async_context_manager(open_engine(configured, embedder=FakeEmbedder())) as engine:
            portal.call(engine.settle)
            yield Served(engine, portal, root)


@settings(suppress_health_check=list(HealthCheck), max_examples=150)
@given(query=QUERIES, mode=st.sampled_from(["fts", "vector", "hybrid"]), owner=st.none() | QUERIES)
@example(query="\udcff", mode="hybrid", owner=None)
@example(query="", mode="vector", owner="'")
def test_no_query_breaks_search(served: Served, query: str, mode: Mode, owner: str | None) -> None:
    only = Filter(owner=owner)
    found = served.portal.call(lambda: served.engine.search(query, mode=mode, only=only, limit=3))
    assert len(found) <= 3
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    if owner not in {None, ""}:
        assert found == []


@settings(suppress_health_check=list(HealthCheck), max_examples=60)
@given(left=st.sampled_from(OPERATORS[:22]), right=st.sampled_from(OPERATORS[:22]))
def test_a_word_is_found_whatever_stands_around_it(served: Served, left: str, right: str) -> None:
    found = served.portal.call(lambda: served.engine.search(f"{left} heron {right}", mode="fts"))
    assert "bird" in [hit.entry_id for hit in found]


TEXTS = st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=12)
KEYS = st.tuples(
    st.sampled_from(["a.md", "it's.md", 'q".md', "a\nb.md", "%.md", "\\.md", "🦦.md", "' OR 1=1 --.md"]) | TEXTS,
    st.sampled_from(["e1", "it's", '"', "\\", "') OR ('", "é"]) | TEXTS.filter(str.isprintable),
)
STEPS = st.lists(
    st.tuples(st.dictionaries(KEYS, TEXTS, max_size=4), st.lists(KEYS, max_size=3)), min_size=1, max_size=4
)


@settings(suppress_health_check=list(HealthCheck), max_examples=25)
@given(steps=STEPS)
def test_the_index_holds_just_what_was_committed(
    served: Served, steps: list[tuple[dict[tuple[str, str], str], list[tuple[str, str]]]]
) -> None:
    index, model = served.engine.context.index, {}

    async def commit(upserts: dict[tuple[str, str], str], deletes: list[tuple[str, str]]) -> None:
        rows = [Row(*key, b"\1", values(text), np.ones(4, dtype=np.float32)) for key, text in upserts.items()]
        await index.commit("atomic_fact", rows, deletes)

    served.portal.call(index.create, "atomic_fact", Model("m", 4))
    for upserts, wanted in steps:
        deletes = [key for key in wanted if key not in upserts]
        if not upserts and not deletes:
            continue
        served.portal.call(commit, upserts, deletes)
        model |= upserts
        for key in deletes:
            model.pop(key, None)
        rows = served.portal.call(index.rows, "atomic_fact")
        assert {(row["md_path"], row["entry_id"]): row["fact"] for row in rows} == model
        assert len(rows) == len(model)


def values(text: str) -> dict[str, object]:
    return dict.fromkeys(kinds.KINDS["atomic_fact"].columns) | {"fact": text}
