from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everos_engine.errors import BadFile
from everos_engine.text.markdown import blocks, decode, fields, headings, outside_fences

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=30)
IDS = st.from_regex(r"[A-Za-z0-9_.:-]{1,20}", fullmatch=True)


def is_harmless(line: str) -> bool:
    return not line.strip(" \t").startswith(("<!--", "```", "~~~"))


BODY = st.lists(LINE.filter(is_harmless), max_size=6)


@given(st.lists(st.tuples(IDS, BODY), max_size=6), BODY, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_entries_that_were_written_are_read_back(
    entries: list[tuple[str, list[str]]],
    between: list[str],
    end: str,
    bom: bool,  # noqa: FBT001
) -> None:
    lines = list(between)
    wanted = []
    for entry_id, body in entries:
        wanted.append((entry_id, len(lines) + 1, body))
        lines += [f"<!-- entry:{entry_id} -->", *body, f"<!-- /entry:{entry_id} -->", *between]
    data = (b"\xef\xbb\xbf" if bom else b"") + end.join(lines).encode()
    found = blocks(decode(data), 1)
    assert [(block.entry_id, block.line, block.lines) for block in found] == wanted


@given(
    st.lists(st.sampled_from(["```", "````", "~~~", "~~~~~", "   ```", "    ```", "``` py", "```x`", "text", "\t```"]))
)
def test_a_fence_is_closed_only_by_its_like_and_else_lasts_to_the_end(lines: list[str]) -> None:
    opened = ""
    for number, (line, (at, same, fence)) in enumerate(zip(lines, outside_fences(lines, 1), strict=True), start=1):
        assert (at, same) == (number, line)
        bare, indent = line.strip(), len(line) - len(line.lstrip(" "))
        assert bool(fence) == bool(
            opened
            or (indent < 4 and bare[:3] in {"```", "~~~"} and "`x`" not in bare and line[0] != "\t" and bare != "```x`")
        )
        if opened:
            if indent < 4 and bare.startswith(opened) and set(bare) == {opened[0]}:
                opened = ""
        elif fence:
            opened = bare[: len(bare) - len(bare.lstrip(bare[0]))]


MARK = "<!-- entry:e2 -->"


@pytest.mark.parametrize(
    "inside",
    [
        ["```", MARK, "### Fact", "```"],
        ["~~~", MARK, "### Fact", "~~~"],
        ["````", "```", MARK, "```", "### Fact", "````"],
        ["~~~", "```", MARK, "```", "~~~"],
        ["```", "~~~", MARK, "~~~", "```"],
        ["   ```python", MARK, "   ```"],
        ["```", MARK, "    ```", "```"],
        ["``` info", MARK, "```  "],
        ["~~~ `info`", MARK, "~~~~~~"],
    ],
)
def test_markers_and_headings_inside_fences_are_text(inside: list[str]) -> None:
    (block,) = blocks(["<!-- entry:e1 -->", "### Content", *inside, "tail", "<!-- /entry:e1 -->"], 1)
    assert block.lines == ["### Content", *inside, "tail"]
    said = fields(block)
    assert list(said.sections) == ["Content"]
    assert said.sections["Content"][0] == "\n".join([*inside, "tail"])


@pytest.mark.parametrize("inside", [["    ```"], ["```x`"], ["``"], ["`` ` ``"], ["\t~~~"]])
def test_what_only_looks_like_a_fence_hides_no_marker(inside: list[str]) -> None:
    found = blocks(["<!-- entry:e1 -->", *inside, "<!-- /entry:e1 -->", MARK, "<!-- /entry:e2 -->"], 1)
    assert [block.entry_id for block in found] == ["e1", "e2"]


@pytest.mark.parametrize(
    ("lines", "line", "said"),
    [
        ([MARK], 1, "entry 'e2' is never closed"),
        (["x", MARK, "```", "<!-- /entry:e2 -->"], 2, "the code fence of line 3 is never closed"),
        ([MARK, "", "<!-- entry:e3 -->"], 3, "opens inside entry 'e2' of line 1"),
        (["<!-- /entry:e2 -->"], 1, "no entry is open"),
        ([MARK, "<!-- /entry:e3 -->"], 2, "entry 'e2' of line 1 is open"),
        (["<!-- entry: -->"], 1, "no usable id"),
        (["<!-- entry:" + "x" * 201 + " -->"], 1, "no usable id"),
        (["<!-- entry:a\x1bb -->"], 1, "no usable id"),
    ],
)
def test_damaged_markers_are_named_with_both_their_lines(lines: list[str], line: int, said: str) -> None:
    with pytest.raises(BadFile) as caught:
        blocks(lines, 1)
    assert caught.value.line == line
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"\xff", (1, 1)),
        (b"ab\ncd\xc3", (2, 3)),
        ("日本\n語x".encode() + b"\xed\xa0\x80", (2, 3)),
        (b"\xef\xbb\xbfab\xff", (1, 3)),
        (b"a\r\nb\rc\x00", (3, 2)),
        (b"\xef\xbb\xbf\x00", (1, 1)),
    ],
)
def test_bytes_that_are_no_text_are_named_with_their_place(data: bytes, place: tuple[int, int]) -> None:
    with pytest.raises(BadFile) as caught:
        decode(data)
    assert (caught.value.line, caught.value.column) == place


@pytest.mark.parametrize(
    ("line", "level", "title"),
    [
        ("# One", 1, "One"), ("###### Six ######", 6, "Six"), ("   ## Two ##  ", 2, "Two"), ("#", 1, ""), ("# #", 1, ""),
        ("# C#", 1, "C#"), ("# a # b", 1, "a # b"), ("##\tTab", 2, "Tab"), ("#nospace", 0, ""), ("    # code", 0, ""),
        ("####### seven", 0, ""), ("text", 0, ""), ("# trailing   ", 1, "trailing"), ("## ##", 2, ""),
    ],
)  # fmt: skip
def test_headings_are_those_of_commonmark(line: str, level: int, title: str) -> None:
    assert list(headings([line], 5)) == [(5, level, title, line)]


def test_inline_values_stand_before_the_first_section_and_the_first_of_a_name_counts() -> None:
    inside = [
        "**a**: 1 ",
        "**b**:2",
        "**a**: again",
        "```",
        "**c**: code",
        "```",
        "### S",
        "**d**: text",
        "### S",
        "second",
    ]
    (block,) = blocks(["<!-- entry:e -->", *inside, "<!-- /entry:e -->"], 10)
    said = fields(block)
    assert said.inline == {"a": ("1", 11, 8), "b": ("2", 12, 7)}
    assert said.sections == {"S": ("**d**: text", 17, 1)}


HOSTILE = {
    "an open marker of blanks": "<!-- entry:" + " " * 200_000,
    "a marker of blanks": "<!--" + " \t" * 100_000 + "-->",
    "hashes apart": "### " + "# " * 100_000 + "x",
    "hashes together": "### x" + "#" * 200_000 + "y",
    "blanks in a heading": "### x" + " " * 200_000 + "y",
    "ticks": "`" * 200_000 + "x`",
    "stars": "**" * 100_000 + ": x",
    "a long name": "**" + "a" * 200_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_line_takes_more_than_time_in_proportion(name: str) -> None:
    began = time.process_time()
    (block,) = blocks(["<!-- entry:e -->", HOSTILE[name], "<!-- /entry:e -->"], 1)
    fields(block)
    list(headings(block.lines, 1))
    assert time.process_time() - began < 0.5


def test_many_lines_take_time_in_proportion() -> None:
    def seconds(count: int) -> float:
        lines = [
            line
            for number in range(count)
            for line in (f"<!-- entry:e{number} -->", "```", "x", "```", f"<!-- /entry:e{number} -->")
        ]
        began = time.process_time()
        assert len(blocks(lines, 1)) == count
        return time.process_time() - began

    seconds(1_000)
    assert min(seconds(20_000) for _ in range(3)) < 40 * min(seconds(2_000) for _ in range(3)) + 0.1


def test_the_place_of_a_bad_byte_is_right_behind_a_byte_order_mark() -> None:
    with pytest.raises(BadFile) as refused:
        decode(b"\xef\xbb\xbfone\ntwo \xfe")
    assert str(refused.value).startswith("line 2, column 5: byte 0xfe")
