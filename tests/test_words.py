"""The code and the docs are in plain words: no word of BANNED, and a sentence as each docstring's first line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
BANNED = {
    r"mend(s|ed|ing)?": "fix, correct",
    "anew": "again, recreated",
    "(who|what|where)ever": "who, anything that, any",
    "for want of": "without",
    "of no kind": "does not match any kind",
    "ever (more|rarer)": "more and more",
    "told": "reported",
    "sweeps?|swept": "full scan",
    "brake": "deletion guard",
    "desk": "context",
    "(no|some)body": "no person, another program",
    "laid": "set, written",
    "beside": "while an engine is running, next to",
    "at once": "immediately, in parallel",
}
"""Words that have no ordinary technical use here -> what to write. Names in code such as `brake_ratio` are no words."""

WORDS = re.compile(rf"(?<![\w/`.-])({'|'.join(BANNED)})(?![\w/`-])", re.IGNORECASE)
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/**/*.md", "docs/*.toml", "changelog.d/*.md")
FOREIGN = {"docs/benchmarks.md"}
"""Names of benchmarks, which older figures are compared by."""


def in_text(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for found in WORDS.finditer(line):
            instead = next(words for word, words in BANNED.items() if re.fullmatch(word, found[0], re.IGNORECASE))
            yield f"{name}:{number}: {found[0]!r}: write {instead}"


def in_code(name: str, source: str) -> Iterator[str]:
    """Strings and comments, not names."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (_at(name, node.lineno, one) for one in in_text(name, node.value))
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s)# (.*)", line)
        if comment is not None:
            yield from (_at(name, number, one) for one in in_text(name, comment[1]))


def _at(name: str, line: int, found: str) -> str:
    where, _, what = found.removeprefix(f"{name}:").partition(": ")
    return f"{name}:{line + int(where) - 1}: {what}"


def first_lines(name: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or ".").splitlines()[0]
            if ";" in first or not first.endswith((".", ":")):
                yield f"{name}:{getattr(node, 'lineno', 1)}: {first!r}: write one sentence with a full stop"


def code() -> list[Path]:
    return sorted(HERE.glob("engine/**/*.py"))


def test_no_banned_word_is_in_the_code() -> None:
    assert [found for path in code() for found in in_code(str(path.relative_to(HERE)), path.read_text("utf-8"))] == []


def test_no_banned_word_is_in_the_docs() -> None:
    pages = {path for pattern in PAGES for path in HERE.glob(pattern) if "_build" not in path.parts}
    names = sorted(str(path.relative_to(HERE)) for path in pages)
    assert {"README.md", "CONTRIBUTING.md", "docs/runbook.md"} <= set(names)
    assert [
        found for name in names if name not in FOREIGN for found in in_text(name, (HERE / name).read_text("utf-8"))
    ] == []


def test_the_first_line_of_a_docstring_is_one_sentence() -> None:
    assert [
        found for path in code() for found in first_lines(str(path.relative_to(HERE)), path.read_text("utf-8"))
    ] == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('"""Mended."""', ["x.py:1: 'Mended': write fix, correct"]),
        ('a = """\nb\nit was told\n"""', ["x.py:3: 'told': write reported"]),
        ("a = 1  # whoever comes", ["x.py:1: 'whoever': write who, anything that, any"]),
        ("brake_ratio = lay = 1", []),
        ("a = f'{b} runs beside it'", ["x.py:1: 'beside': write while an engine is running, next to"]),
    ],
)
def test_a_banned_word_is_found(source: str, found: list[str]) -> None:
    assert list(in_code("x.py", source)) == found


@pytest.mark.parametrize(("text", "is_bad"), [("Do this.", False), ("Do this; or that.", True), ("A thing", True)])
def test_a_bad_first_line_is_found(text: str, *, is_bad: bool) -> None:
    assert bool(list(first_lines("x.py", f'"""{text}"""'))) == is_bad
