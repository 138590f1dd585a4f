from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from everos_engine.cli.main import main
from everos_engine.text import kinds
from everos_engine.text.kinds.layout import LAYOUTS, PLACES, nearest

PART = st.text("abAB.~# _é'", min_size=1, max_size=6).filter(lambda part: part not in {".", ".."})
WORD = st.sampled_from(
    ["users", "agents", "episodes", "skills", "SKILL.md", ".cases", "user.md", "references", ".index"]
)


@example(["A", ".index", "users", "A"])
@given(st.lists(PART | WORD, min_size=1, max_size=8))
def test_a_suggested_path_is_always_of_a_kind(parts: list[str]) -> None:
    found = nearest("/".join(parts))
    assert found is None or kinds.recognise(found.path) is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_path_of_the_layout_is_nearest_to_itself(layout: str) -> None:
    path = layout.replace("<", "my").replace(">", "")
    assert kinds.recognise(path) is not None
    assert nearest(path) is not None
    assert nearest(path).path == path  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("users/u1/episode/x.md", "users/u1/episodes/x.md"),
        ("users/u1/Episodes/x.md", "users/u1/episodes/x.md"),
        ("user/u1/episodes/x.md", "users/u1/episodes/x.md"),
        ("users/u1/episodes/2025/x.md", "users/u1/episodes/x.md"),
        ("users/u1/atomic_facts/x.md", "users/u1/.atomic_facts/x.md"),
        ("users/u1/User.md", "users/u1/user.md"),
        ("agents/a/skills/bake/skill.md", "agents/a/skills/bake/SKILL.md"),
        ("agents/a/skills/bake/reference/flour.md", "agents/a/skills/bake/references/flour.md"),
        ("shop/users/u1/episodes/x.md", "shop/default_project/users/u1/episodes/x.md"),
        ("users/u1/episodes/x.txt", "users/u1/episodes/x.md"),
        ("users/u1/episodes/.x.md", "users/u1/episodes/x.md"),
    ],
)
def test_a_slip_is_seen_for_what_was_meant(path: str, meant: str) -> None:
    assert kinds.recognise(path) is None
    found = nearest(path)
    assert found is not None
    assert found.path == meant


@pytest.mark.parametrize(
    "path", ["README.md", "notes/2025/plan.md", "notes/b.md", "plans/tea.md", "a/b/c/d/e/f/g/h.md"]
)
def test_plain_markdown_is_near_nothing(path: str) -> None:
    assert nearest(path) is None


def test_the_command_shows_each_kind_at_a_place_of_its_own(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(root), "kinds"]) == 0
    said = capsys.readouterr().out
    for place, kind in PLACES.items():
        found = kinds.recognise(place.replace("<", "my").replace(">", ""))
        assert found is not None
        assert found.kind == kind
        assert any(line.split() == [kind, place] for line in said.splitlines())
    assert set(PLACES.values()) | {"note"} == set(kinds.KINDS)
    assert "note.globs is empty" in said
