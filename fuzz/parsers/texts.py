"""Bytes from everywhere meet the pure parsers: they answer or refuse with a place, and never anything else."""

from __future__ import annotations

import json
from datetime import datetime

import pyarrow as pa
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from everos_engine.errors import BadFile
from everos_engine.text import kinds, markdown
from everos_engine.text.entries import Document, Place
from everos_engine.text.frontmatter import Frontmatter, split

FRAGMENTS = [
    b"---\n", b"---", b"...\n", b"\n", b"\r\n", b"\r", b"\xef\xbb\xbf", b"key: value\n", b"key: [1, 2\n", b"- a\n", b"? ", b"&a ",
    b"*a", b"!!python/object:x ", b"<<: *a\n", b"|\n  text\n", b"'", b'"', b'"\\ud800"', b'"\\0"', b"k: 1e400\n", b"k: 0x1F\n",
    b"\t", b"  ", b"{a: b}", b"a: b: c\n", b"%YAML 1.1\n", b"#", b"# h\n", b"## h ##\n", b"### Fact\n", b"### Content\n",
    b"<!-- entry:e1 -->\n", b"<!-- /entry:e1 -->\n", b"<!-- entry:e2 -->\n", b"<!-- /entry:e2 -->\n", b"<!-- entry: -->\n",
    b"```\n", b"````x\n", b"~~~\n", b"    ```\n", b"**timestamp**: 2025-01-01T00:00:00Z\n", b"**timestamp**: 0001-01-01T00:00:00+14:00\n",
    b"**timestamp**: 9999-12-31T23:59:59-14:00\n", b"**owner_id**: u1\n", b"**sender_ids**: [a, 'b']\n", b"**quality_score**: nan\n",
    b"**duration_days**: 9223372036854775808\n", b"name: n\n", b"confidence: .5\n", b"profile_timestamp_ms: 1740000000000\n",
    b"explicit_info: {a: [1, {b: null}]}\n", b"text\n", "é\u2028\u0085\x0b\x0c".encode(), b"\x00", b"\xff",
]  # fmt: skip
ANYTHING = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(b"".join),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=6)), max_size=30).map(b"".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(lambda parts: b"---\nname: n\n---\n" + b"".join(parts)),
)
PATHS = {
    "episode": "users/u1/episodes/a.md",
    "atomic_fact": "users/u1/.atomic_facts/a.md",
    "foresight": "users/u1/.foresights/a.md",
    "agent_case": "agents/u1/.cases/a.md",
    "agent_skill": "agents/u1/skills/s/SKILL.md",
    "user_profile": "users/u1/user.md",
    "note": "notes/a.md",
}
ARROW = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "strings": pa.list_(pa.string()),
}


def place(kind: str) -> Place:
    found = kinds.recognise(PATHS[kind], note_globs=("**/*.md",))
    assert found is not None
    assert found.kind == kind
    return found


def lines_of(data: bytes) -> list[str] | None:
    try:
        return markdown.decode(data)
    except BadFile as error:
        sound(error, data.count(b"\n") + data.count(b"\r") + 1)
        return None


def sound(error: BadFile, lines: int) -> None:
    """A refusal names a line there is, and says what to do."""
    assert error.remedy
    assert error.line is None or 1 <= error.line <= lines + 1
    assert error.column is None or error.column >= 1


@given(ANYTHING)
def test_frontmatter_answers_or_refuses(data: bytes) -> None:
    lines = lines_of(data)
    if lines is None:
        return
    try:
        front = split(lines)
    except BadFile as error:
        sound(error, len(lines))
        return
    assert isinstance(front, Frontmatter)
    assert lines[front.first_line - 1 :] == front.body
    assert front.values.keys() == front.places.keys()
    assert all(1 < line < front.first_line for line, _ in front.places.values())
    json.dumps(front.values, ensure_ascii=False, allow_nan=False).encode()


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**62), 2**62), st.text(max_size=20))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)  # fmt: skip


@given(st.dictionaries(st.text(min_size=1, max_size=10), VALUES, max_size=5))
def test_what_a_yaml_writer_writes_is_read_back(values: dict[str, object]) -> None:
    dumped = yaml.safe_dump(values, allow_unicode=False, default_style='"', width=10**6)
    lines = ["---", *dumped.split("\n")[:-1], "---", "body"]
    tagged = "!!" in dumped  # numbers and nulls in this style carry a tag, which we refuse
    if tagged:
        with pytest.raises(BadFile, match="tag"):
            split(lines)
        return
    front = split(lines)
    assert front.values == values
    assert front.body == ["body"]


@given(ANYTHING)
def test_entries_are_where_they_are_said_to_be(data: bytes) -> None:
    lines = lines_of(data)
    if lines is None:
        return
    try:
        found = markdown.blocks(lines, 1)
    except BadFile as error:
        sound(error, len(lines))
        return
    end = 0
    for block in found:
        assert block.line > end
        end = block.line + len(block.lines) + 1
        assert lines[block.line : end - 1] == block.lines
        assert f"/entry:{block.entry_id}" in lines[end - 1]
        said = markdown.fields(block)
        for value, line, _ in said.inline.values():
            assert lines[line - 1].rstrip().endswith(value)
        for name, (_, line, _) in said.sections.items():
            assert name in lines[line - 1]


@given(st.sampled_from(sorted(PATHS)), ANYTHING, ANYTHING)
@example("atomic_fact", b"---\nuser_id: u1\n---\n" + b"<!-- entry:e1 -->\n" * 30_000, b"")
@example("episode", b"---\na: " + b"[" * 60_000 + b"\n---\n", b"")
def test_every_kind_answers_or_refuses_and_its_rows_can_be_written(kind: str, data: bytes, reference: bytes) -> None:
    at = place(kind)
    sources = {at.md_path: data}
    if kind == "agent_skill":
        sources["agents/u1/skills/s/references/r.md"] = reference
    try:
        document = kinds.parse(at, sources)
    except BadFile as error:
        sound(error, max(map(len, (data, reference))) + 1)
        return
    names = [entry.entry_id for entry in document.entries] + [problem.entry_id for problem in document.problems]
    assert len(set(names)) >= len(document.entries)
    assert len({entry.entry_id for entry in document.entries}) == len(document.entries)
    lines = len(markdown.decode(data))
    for problem in document.problems:
        assert 1 <= problem.line <= lines
        assert problem.remedy
    for entry in document.entries:
        assert 1 <= entry.line <= max(lines, 1)
        for column, type_ in kinds.KINDS[kind].columns.items():
            written = pa.array([entry.values[column]], ARROW[type_]).to_pylist()
            assert written == [entry.values[column]]
        entry.embed_text.encode()
    assert identities(kinds.parse(at, sources)) == identities(document)


@given(st.sampled_from(sorted(PATHS)), ANYTHING)
def test_line_ends_and_a_bom_change_nothing(kind: str, data: bytes) -> None:
    at = place(kind)
    plain = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removeprefix(b"\xef\xbb\xbf")
    told = [outcome(at, form) for form in (plain, plain.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + plain)]
    if not plain.startswith(b"\xef\xbb\xbf"):
        assert told[0] == told[1] == told[2]


def outcome(at: Place, data: bytes) -> object:
    try:
        return identities(kinds.parse(at, {at.md_path: data}))
    except BadFile as error:
        return error.args[0]


def identities(document: Document) -> object:
    return (
        [(entry.entry_id, entry.line, entry.content_hash) for entry in document.entries],
        [(problem.entry_id, problem.line, problem.message) for problem in document.problems],
    )


@given(st.datetimes(), st.text(max_size=5))
def test_a_time_is_read_as_written_or_refused(moment: datetime, tail: str) -> None:
    at = place("atomic_fact")
    head = "---\na: 1\n---\n<!-- entry:e -->\n"
    text = f"{head}**timestamp**: {moment.isoformat()}{tail}\n### Fact\nx\n<!-- /entry:e -->\n"
    try:
        document = kinds.parse(at, {at.md_path: text.encode("utf-8", "replace")})
    except BadFile:
        return
    for entry in document.entries:
        value = entry.values["timestamp"]
        assert isinstance(value, datetime)
        assert value.utcoffset() is not None
        if not tail.strip():
            assert value.replace(tzinfo=None) == moment
