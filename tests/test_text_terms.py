"""Whoever searches for a part of an identifier finds it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.engine import open_engine
from everos_engine.settings import Settings
from everos_engine.testing import FakeEmbedder
from everos_engine.text.terms import MAX_CHARACTERS, terms
from writer import FACTS, fact, facts, put


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_standup_en", "run standup en"),
        ("parseHTMLTable and fooBar", "parse html table foo bar"),
        ("see os.path.join", "os path join"),
        ("__init__", "init"),
        ("at 10:30 on 2025_01", None),
        ("plain words, CAPITALS and Capitals", None),
        ("产品需求", None),
        ("", None),
    ],
)
def test_compounds_fall_into_their_words(text: str, expected: str | None) -> None:
    assert terms([text]) == expected


@given(st.lists(st.text()))
def test_terms_are_bounded_and_each_stands_in_the_text(texts: list[str]) -> None:
    found = terms(texts)
    assert found is None or 0 < len(found) <= MAX_CHARACTERS
    folded = "\n".join(texts).casefold()
    assert all(part in folded for part in (found or "").split(" ") if len(found or "") < MAX_CHARACTERS)


async def test_a_part_of_a_name_finds_the_skill(settings: Settings, root: Path) -> None:
    put(
        root, "agents/a1/skills/run_standup/SKILL.md", "---\nname: run_standup\ndescription: uses parseNotes\n---\nbody"
    )
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        for query in ("standup", "run_standup", "Notes", "parseNotes"):
            (hit,) = await engine.search(query)
            assert hit.entry_id == "run_standup"


@pytest.mark.parametrize("word", ["not", "IT", "C", "1", "the", "uno", "über", "我", "的"])
async def test_the_most_common_words_are_found_too(word: str, settings: Settings, root: Path) -> None:
    put(root, FACTS, facts(fact(1, f"heron {word} otter"), fact(2, "badger")))
    async with open_engine(settings, embedder=FakeEmbedder(), watching=False) as engine:
        await engine.settle()
        assert [result.entry_id for result in await engine.search(word)] == ["af_20250227_00000001"]
