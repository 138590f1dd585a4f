"""What failed because of a setting is tried again when that setting changes, and what has no vector is found by words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from everos_engine.diagnose.explain import explain
from everos_engine.engine import open_engine
from everos_engine.errors import BadText
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder
from writer import put

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LONG = "# A\nfine\n# B\nheron " + "x" * 300


class Limited(FakeEmbedder):
    """Refuses texts of more than ``most`` characters, as a service does over its model's token limit."""

    def __init__(self, most: int, model: str = "limited") -> None:
        super().__init__(model=model)
        self.most = most

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if any(len(text) > self.most for text in texts):
            message = "HTTP 400: too many tokens"
            raise BadText(message)
        return await super().embed(texts)


def chosen(root: Path, **flags: object) -> Settings:
    base = {"memory.root": str(root), "note.globs": ["**/*.md"], "settle_milliseconds": 20, "watch.mode": "off"}
    return load({**base, **flags}, environment={}, user_file=root / "none.toml")  # type: ignore[arg-type]


async def vectors_of(settings: Settings, embedder: FakeEmbedder) -> tuple[int, int, int]:
    """Bring the root in step: rows with a vector, rows without, changes failed."""
    async with open_engine(settings, embedder=embedder, watching=False) as engine:
        failed = (await engine.settle()).counts.failed_permanent
        rows = await engine.context.index.rows("note")
        found = await engine.search("heron", mode="fts")
        assert [result.md_path for result in found] == ["a.md"]
    return sum(row["vector"] is not None for row in rows), sum(row["vector"] is None for row in rows), failed


async def test_a_refused_text_is_found_by_words_and_listed(root: Path) -> None:
    settings = chosen(root)
    put(root, "a.md", LONG)
    assert await vectors_of(settings, Limited(100)) == (1, 1, 1)
    found = explain(settings, "a.md").diagnosis
    assert (found.verdict, found.code) == ("partly", "words_only")
    assert "found by words only" in found.cause
    assert "too many tokens" in found.cause


async def test_it_stays_listed_when_another_entry_of_its_file_is_edited(root: Path) -> None:
    settings = chosen(root)
    put(root, "a.md", LONG)
    await vectors_of(settings, Limited(100))
    put(root, "a.md", LONG.replace("fine", "finer"))
    assert await vectors_of(settings, Limited(100)) == (1, 1, 1)
    put(root, "a.md", LONG[:40])
    assert await vectors_of(settings, Limited(100)) == (2, 0, 0)


@pytest.mark.parametrize("what", ["model", "url", "max_characters"])
async def test_a_text_refused_is_tried_again_when_a_setting_of_the_embedder_changes(what: str, root: Path) -> None:
    put(root, "a.md", LONG)
    first = Limited(100)
    assert await vectors_of(chosen(root), first) == (1, 1, 1)
    calls = len(first.calls)
    assert await vectors_of(chosen(root), first) == (1, 1, 1)
    assert {text for call in first.calls[calls:] for text in call if "heron" in text} == set()
    changed = {"max_characters": {"embedder.max_characters": 5000}, "url": {"embedder.url": "http://127.0.0.1:9/v1"}}
    second = Limited(10_000, model="larger" if what == "model" else "limited")
    assert await vectors_of(chosen(root, **changed.get(what, {})), second) == (2, 0, 0)


async def test_a_file_too_large_is_tried_again_when_the_bound_is_raised(root: Path) -> None:
    put(root, "a.md", LONG)
    put(root, "b.md", "# other\nheron")
    async with open_engine(chosen(root, max_file_bytes=100), embedder=FakeEmbedder(), watching=False) as engine:
        assert (await engine.settle()).counts.failed_permanent == 1
    async with open_engine(chosen(root, max_file_bytes=100), embedder=FakeEmbedder(), watching=False) as engine:
        assert (await engine.settle()).counts.failed_permanent == 1
    async with open_engine(chosen(root, max_file_bytes=10_000), embedder=FakeEmbedder(), watching=False) as engine:
        assert (await engine.settle()).counts.failed_permanent == 0
        assert len(await engine.context.index.rows("note")) == 3
