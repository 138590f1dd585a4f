from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.errors import BadFile
from everos_engine.text import diff, kinds
from everos_engine.text.entries import Document, Entry, Problem
from everos_engine.text.kinds import parsers
from writer import fact, facts

LAYOUTS = {
    "users/u1/episodes/2025.md": ("episode", "user", "u1"),
    "users/u1/.atomic_facts/x.md": ("atomic_fact", "user", "u1"),
    "users/u1/.foresights/x.md": ("foresight", "user", "u1"),
    "users/u1/user.md": ("user_profile", "user", "u1"),
    "agents/a1/.cases/x.md": ("agent_case", "agent", "a1"),
    "agents/a1/skills/s1/SKILL.md": ("agent_skill", "agent", "a1"),
    "agents/a1/skills/s1/references/r.md": ("agent_skill", "agent", "a1"),
}
SPACES = {
    "": ("default", "default"),
    "default_app/default_project/": ("default", "default"),
    "acme/default_project/": ("acme", "default"),
    "default_app/bot/": ("default", "bot"),
    "acme/bot/": ("acme", "bot"),
    "users/agents/": ("users", "agents"),
    "a b/日本/": ("a b", "日本"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("space", SPACES)
def test_every_layout_is_recognised_with_and_without_app_and_project(layout: str, space: str) -> None:
    place = kinds.recognise(space + layout)
    assert place is not None
    assert (place.kind, place.owner_type, place.owner_id) == LAYOUTS[layout]
    assert (place.app_id, place.project_id) == SPACES[space]
    assert place.md_path == (space + layout).replace("references/r.md", "SKILL.md")


@pytest.mark.parametrize(
    "path",
    [
        "", ".md", "/", "/.md", "x.md", "users/u1.md", "users/u1/other.md", "users/u1/episodes/deep/x.md", "users//user.md",
        "one/users/u1/user.md", "a/b/c/users/u1/user.md", "users/u1/episodes/.hidden.md", "users/u1/episodes/~x.md",
        "users/u1/episodes/#x#.md", "users/u1/episodes/x.MD", "users/u1/episodes/x.md.swp", ".index/users/u1/user.md",
        ".git/x/users/u1/user.md", "x/.trash/users/u1/user.md", "agents/a/skills/SKILL.md", "agents/a/skills/s/other.md",
        "agents/a/skills/s/references/deep/r.md", "users/u1/USER.md", "agents/a1/user.md",
    ],
)  # fmt: skip
def test_anything_else_is_of_no_kind(path: str) -> None:
    assert kinds.recognise(path) is None


@given(
    st.text()
    | st.lists(st.sampled_from(["users", "agents", "u", ".md", "x.md", "/", ".", "", "\n", "\\"])).map("/".join)
)
def test_recognising_raises_at_nothing(path: str) -> None:
    place = kinds.recognise(path, note_globs=("**/*.md", "[", "*[!a"))
    assert place is None or kinds.recognise(place.md_path, note_globs=("**/*.md", "[", "*[!a")) == place


def document(key: str, text: str) -> Document:
    place = kinds.recognise(key)
    assert place is not None
    return kinds.parse(place, {key: text.encode()})


FACTS = "users/u1/.atomic_facts/x.md"


def daily(kind: str, *lines: str) -> Document:
    key = {"episode": "users/u1/episodes/x.md", "atomic_fact": FACTS, "foresight": "users/u1/.foresights/x.md", "agent_case": "agents/u1/.cases/x.md"}[kind]  # fmt: skip
    return document(key, "\n".join(["---", "a: 1", "---", "<!-- entry:e1 -->", *lines, "<!-- /entry:e1 -->"]))


@given(st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1)), st.integers(-23 * 60, 23 * 60))  # noqa: DTZ001 - the offset is the other
def test_times_become_utc_whatever_their_offset(moment: datetime, minutes: int) -> None:
    said = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    (entry,) = daily("atomic_fact", f"**timestamp**: {said.isoformat()}", "### Fact", "x").entries
    assert entry.values["timestamp"] == said
    assert entry.values["timestamp"].utcoffset() == timedelta(0)  # type: ignore[attr-defined]
    (naive,) = daily("atomic_fact", f"**timestamp**: {moment.isoformat()}", "### Fact", "x").entries
    assert naive.values["timestamp"] == moment.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("kind", "line", "column", "said"),
    [
        ("atomic_fact", "**timestamp**: yesterday", 16, "timestamp must be an ISO 8601 time, not 'yesterday'"),
        ("atomic_fact", "**timestamp**:   2025-13-01", 18, "timestamp must be"),
        ("atomic_fact", "**timestamp**: 0001-01-01T00:00:00+05:00", 16, "timestamp must be"),
        ("foresight", "**duration_days**: 3.5", 20, "duration_days must be a whole number"),
        ("foresight", "**duration_days**: 1_000", 20, "duration_days must be a whole number"),
        ("foresight", "**duration_days**: 99999999999999999999", 20, "at most 64 bits"),
        ("agent_case", "**quality_score**: nan", 20, "quality_score must be a finite number"),
        ("agent_case", "**quality_score**: high", 20, "quality_score must be a finite number, not 'high'"),
        ("atomic_fact", "**sender_ids**: a, b", 17, "sender_ids must be a list"),
        ("atomic_fact", '**sender_ids**: ["a" b]', 17, "sender_ids must be a list"),
    ],
)
def test_a_mistyped_field_is_named_with_line_and_column(kind: str, line: str, column: int, said: str) -> None:
    rest = [] if "timestamp" in line else ["**timestamp**: 2025-01-01T00:00:00"]
    sections = ["### Fact", "x", "### Foresight", "x", "### TaskIntent", "x", "### Approach", "x"]
    found = daily(kind, *rest, line, *sections)
    (problem,) = found.problems
    assert found.entries == ()
    assert said in problem.message
    assert (problem.entry_id, problem.line, problem.column) == ("e1", 5 + len(rest), column)


def test_a_mistyped_frontmatter_value_is_named_with_line_and_column() -> None:
    found = document("agents/a1/skills/s/SKILL.md", "---\nname: s\nconfidence:  high\n---\nbody")
    (problem,) = found.problems
    assert (problem.line, problem.column) == (3, 14)
    assert "confidence must be a finite number, not 'high'" in problem.message
    found = document("agents/a1/skills/s/SKILL.md", "---\nname: [s]\n---\nbody")
    assert (found.problems[0].line, found.problems[0].column) == (2, 7)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[]", []), ("[ ]", []), ("[a]", ["a"]), ("[a, b]", ["a", "b"]), ("['a, b', c]", ["a, b", "c"]),
        ('["a\\"b", \'it\\\'s\']', ['a"b', "it's"]), ("[o'neil, b]", ["o'neil", "b"]), ("[a,, b,]", ["a", "b"]),
        ("[a[1], b]", ["a[1]", "b"]), ('["日本" , x y ]', ["日本", "x y"]),
    ],
)  # fmt: skip
def test_lists_are_read_with_their_quotes(text: str, items: list[str]) -> None:
    (entry,) = daily("atomic_fact", "**timestamp**: 2025-01-01", f"**sender_ids**: {text}", "### Fact", "x").entries
    assert entry.values["sender_ids"] == items


def test_nothing_is_guessed_where_a_file_says_nothing() -> None:
    (entry,) = daily("episode", "**timestamp**: 2025-01-01T00:00:00", "### Content", "c").entries
    empty = ("session_id", "parent_type", "parent_id", "sender_ids", "subject", "summary")
    assert {name: entry.values[name] for name in empty} == dict.fromkeys(empty)
    (missing,) = daily("episode", "### Content", "c").problems
    assert "timestamp is missing" in missing.message
    (empty_section,) = daily("episode", "**timestamp**: 2025-01-01", "### Content", "", "  ").problems
    assert "`### Content` is missing or empty" in empty_section.message


def test_an_id_used_twice_names_both_lines_and_leaves_the_others() -> None:
    found = document(FACTS, facts(fact(1, "one"), fact(2, "two"), fact(1, "three")))
    (problem,) = found.problems
    first = problem.line
    assert f"lines {first} and " in problem.message
    assert [entry.values["fact"] for entry in found.entries] == ["two"]


@given(st.dictionaries(st.text(max_size=3), st.binary(max_size=1), max_size=8), st.data())
def test_a_plan_applied_gives_what_the_file_says_and_a_second_plan_is_empty(
    known: dict[str, bytes], data: st.DataObject
) -> None:
    ids = st.sampled_from(sorted(known)) | st.text(max_size=3) if known else st.text(max_size=3)
    said = data.draw(st.dictionaries(ids, st.binary(min_size=1, max_size=1), max_size=8))
    bad = data.draw(st.sets(ids, max_size=3)) - said.keys()
    entries = tuple(Entry(name, 1, {}, "", content) for name, content in said.items())
    document_ = Document(entries, tuple(Problem(name, "m", "r", 1) for name in bad))
    plan = diff.plan(document_, known)
    after = {name: content for name, content in known.items() if name not in plan.deletes}
    after |= {entry.entry_id: entry.content_hash for entry in plan.upserts}
    assert after == said | {name: known[name] for name in bad & known.keys()}
    again = diff.plan(document_, after)
    assert (again.upserts, again.deletes, again.unchanged) == ((), (), len(entries))


def test_a_file_of_ten_thousand_entries_is_parsed_at_once() -> None:
    text = facts(*(fact(number, f"fact {number}") for number in range(10_000)))
    began = time.process_time()
    assert len(document(FACTS, text).entries) == 10_000
    assert time.process_time() - began < 8


def test_ten_thousand_headings_of_one_name_have_ids_of_their_own() -> None:
    text = ("# Same\nx\n" * 10_000 + "# Same 2\ny\n").encode()
    place = kinds.recognise("notes/n.md", note_globs=("**/*.md",))
    assert place is not None
    began = time.process_time()
    ids = [entry.entry_id for entry in kinds.parse(place, {"notes/n.md": text}).entries]
    assert len(set(ids)) == 10_001
    assert time.process_time() - began < 8


@given(st.sampled_from(sorted(parsers.PARSERS)), st.binary(max_size=300))
def test_every_kind_reads_or_refuses_any_bytes(kind: str, data: bytes) -> None:
    key = next((key for key, (found, *_) in LAYOUTS.items() if found == kind), "n.md")
    place = kinds.recognise(key, note_globs=("*.md",))
    assert place is not None
    for text in (data, b"---\nname: x\n---\n<!-- entry:e -->\n" + data + b"\n<!-- /entry:e -->\n"):
        with suppress(BadFile):
            found = kinds.parse(place, {place.md_path: text})
            assert all(set(entry.values) == set(kinds.KINDS[kind].columns) for entry in found.entries)


def test_a_text_of_blanks_gets_no_vector() -> None:
    place = kinds.recognise("n.md", note_globs=("*.md",))
    assert place is not None
    found = kinds.parse(place, {"n.md": b"#  \n \n"})
    assert all(not entry.embed_text or entry.embed_text.strip() for entry in found.entries)


OWNERS = st.text(alphabet="abz1 .-é", min_size=1, max_size=8).filter(lambda name: name.strip() == name)


@given(OWNERS, st.none() | OWNERS, st.none() | OWNERS)
def test_an_entry_is_of_the_owner_it_names_and_a_mismatch_is_a_warning(
    folder: str, front: str | None, inline: str | None
) -> None:
    head = "---\ntype: log\n" + ("" if front is None else f"user_id: {json.dumps(front)}\n") + "---\n"
    named = "" if inline is None else f"**owner_id**: {inline}\n"
    fact = f"<!-- entry:e1 -->\n{named}**timestamp**: 2025-01-01T00:00:00\n### Fact\nx\n<!-- /entry:e1 -->\n"
    found = document(f"users/{folder}/.atomic_facts/a.md", head + fact)
    owner = inline or front or folder
    (entry,) = found.entries
    assert (entry.values["owner_id"], entry.values["id"]) == (owner, f"{owner}_e1")
    assert found.problems == ()
    differing = [name for name in (front, inline) if name not in {None, folder}]
    assert len(found.warnings) == len(differing)
    assert all(repr(folder) in warning.message for warning in found.warnings)


@pytest.mark.parametrize(
    ("path", "name"), [("users/u1/user.md", "user_id"), ("agents/a1/skills/s/SKILL.md", "agent_id")]
)
def test_a_profile_and_a_skill_are_of_the_owner_they_name(path: str, name: str) -> None:
    found = document(path, f"---\n{name}: other\nname: s\nsummary: s\n---\nbody")
    (entry,) = found.entries
    (warning,) = found.warnings
    assert entry.values["owner_id"] == "other"
    assert (warning.line, "it is indexed under 'other'" in warning.message) == (2, True)
    found = document(path, f"---\n{name}: [1]\nname: s\nsummary: s\n---\nbody")
    assert [entry.values["owner_id"] for entry in found.entries] == [path.split("/")[1]]
    assert len(found.warnings) == 1
