from __future__ import annotations

import json
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.errors import BadFile
from everos_engine.text import frontmatter
from everos_engine.text.frontmatter import MAX_BYTES, MAX_DEPTH, split

WORDS = st.from_regex(r"[A-Za-z][A-Za-z0-9 ]{0,15}[A-Za-z0-9]", fullmatch=True)
PLAIN = st.characters(exclude_categories=["Cc", "Cs", "Cn", "Co", "Zl", "Zp"], exclude_characters="\ufeff")
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(PLAIN, max_size=30)
LEAVES = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(WORDS, SCALARS, max_size=3)


def parsed(*yaml: str) -> dict[str, object]:
    return split(["---", *yaml, "---", "body"]).values


def refused(*yaml: str) -> BadFile:
    with pytest.raises(BadFile) as caught:
        parsed(*yaml)
    return caught.value


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=40), max_size=20))
def test_any_lines_are_read_or_refused_at_a_place_inside_them(lines: list[str]) -> None:
    try:
        front = split(["---", *lines, "---"])
    except BadFile as error:
        refusal = error
    else:
        assert set(front.values) == set(front.places)
        return
    assert refusal.line is not None
    assert 1 <= refusal.line <= len(lines) + 2
    assert refusal.column is None or refusal.column >= 1
    assert refusal.remedy


@given(st.dictionaries(WORDS, LEAVES, max_size=6))
def test_json_is_read_back_as_it_was_written(values: dict[str, object]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    front = split(["---", *lines, "---", "body"])
    assert front.values == values
    assert front.places == {key: (number, len(json.dumps(key)) + 3) for number, key in enumerate(values, start=2)}
    assert (front.body, front.first_line) == (["body"], len(lines) + 3)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("true", True), ("False", False), ("yes", "yes"), ("on", "on"),
        ("12", 12), ("-7", -7), ("+3", 3), ("007", 7), ("0x1f", "0x1f"), ("0o17", "0o17"), ("1_000", "1_000"),
        ("1.5", 1.5), (".5", 0.5), ("2.", 2.0), ("1e3", 1000.0), ("1e999", "1e999"), (".inf", ".inf"), (".nan", ".nan"),
        ("9223372036854775807", 2**63 - 1), ("9223372036854775808", "9223372036854775808"),
        ("123456789012345678901", "123456789012345678901"), ("2025-02-27", "2025-02-27"), ("12:30:45", "12:30:45"),
        ('"12"', "12"), ("'null'", "null"), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}), ('"\\u0041\\n"', "A\n"),
    ],
)  # fmt: skip
def test_plain_scalars_mean_what_yaml_1_2_says_and_nothing_is_guessed(text: str, value: object) -> None:
    found = parsed(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


def test_depth_is_bounded_however_deep_the_file() -> None:
    assert parsed("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    for deep in ("[" * 60_000, "[" * MAX_DEPTH + "]" * MAX_DEPTH, "{a: " * 15_000, "- " * 30_000, "? " * 30_000):
        assert str(MAX_DEPTH) in str(refused("a: " + deep)) or "malformed" in str(refused("a: " + deep))
    assert "16" in str(refused(*(" " * depth + "a:" for depth in range(300))))
    assert f"{MAX_BYTES} bytes" in str(refused("a: " + "[" * 100_000))


def test_a_bomb_of_aliases_is_refused_at_its_first_anchor() -> None:
    bomb = [
        "a: &a [x, x]",
        *(f"{name}: &{name} [*{below}, *{below}]" for name, below in zip("bcdefgh", "abcdefg", strict=True)),
    ]
    error = refused(*bomb)
    assert (error.line, error.column) == (2, 4)
    assert "anchors are not allowed" in str(error)
    assert "aliases are not allowed" in str(refused("a: *x"))
    assert "aliases are not allowed" in str(refused("*x : 1"))


@pytest.mark.parametrize(
    ("lines", "place", "said"),
    [
        (["a: 1", "b: 2", "a: 3"], (4, 1), "the key 'a' is there twice"),
        (["a:", "  b: 1", "  b: 2"], (4, 3), "'b' is there twice"),
        (["a: !!python/object/apply:os.system [ls]"], (2, 4), "python/object"),
        (["a: !x 1"], (2, 4), "tag '!x'"),
        (["a: [1, 2"], None, "malformed YAML"),
        (["a: b: c"], (2, 5), "malformed YAML"),
        (["a: [1", "b: 2", "c: 3"], (3, 2), "while parsing a flow sequence that begins in line 2"),
        (["\ta: 1"], (2, 1), "malformed YAML"),
        (["? [a]", ": b"], (2, 3), "a key must be a string"),
        (["- a"], (2, None), "not a mapping"),
        (["just text"], (2, None), "not a mapping"),
        (["a: \x07"], (2, 4), "U+0007"),
        (["ok: 1", "a: x\x00"], (3, 5), "U+0000"),
        (["a: 'one\u2028two'", "b: 1", "b: 2"], (4, 1), "twice"),
        (["a: 'one\x85two'", "c: 1", "c: 2"], (4, 1), "twice"),
    ],
)
def test_damage_is_named_with_its_line_and_column(
    lines: list[str], place: tuple[int, int | None] | None, said: str
) -> None:
    error = refused(*lines)
    assert said in str(error)
    if place is not None:
        assert (error.line, error.column) == place


def test_only_a_line_of_three_dashes_at_the_start_begins_it_and_only_one_ends_it() -> None:
    assert not split(["", "---", "a: 1", "---"]).present
    assert not split(["--- a", "---"]).present
    assert split(["--- ", "a: 1", "--- "]).values == {"a": 1}
    assert split(["---", "a: 1", "...", "rest"]).body == ["rest"]
    assert split(["---", "---"]).values == {}
    with pytest.raises(BadFile, match="never ends"):
        split(["---", "a: 1", " ---"])


def test_reading_takes_time_in_proportion_to_the_size() -> None:
    for lines in (["a: " + "[" * 60_000], ["a: " + "x " * 30_000], [f"k{number}: v" for number in range(6_000)]):
        began = time.process_time()
        with suppress(BadFile):
            frontmatter.split(["---", *lines, "---"])
        assert time.process_time() - began < 5
