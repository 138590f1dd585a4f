"""Keep the banned words out of code and docs, and make each docstring begin with a sentence."""

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
    "dear(er|est)?": "expensive",
    "(no|some)body": "no person, another program",
    "laid": "set, written",
    "beside": "while an engine is running, next to",
    "at once": "immediately, in parallel",
}
"""Words that have no ordinary technical use here -> what to write. A name such as `brake_ratio` does not count."""

WORDS = re.compile(rf"(?<![\w/`.-])({'|'.join(BANNED)})(?![\w/`-])", re.IGNORECASE)
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/**/*.md", "docs/*.toml", "changelog.d/*.md"),
    *("pyproject.toml", "noxfile.py"),
)
FOREIGN = {"docs/benchmarks.md"}
"""Names of benchmarks, which older figures are compared by."""


def in_text(name: str, text: str, *, first_line: int = 1) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), first_line):
        for found in WORDS.finditer(line):
            instead = next(words for word, words in BANNED.items() if re.fullmatch(word, found[0], re.IGNORECASE))
            yield f"{name}:{number}: {found[0]!r}: write {instead}"


def in_code(name: str, source: str) -> Iterator[str]:
    """Find words in strings and comments. Names in code are not looked at."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from in_text(name, node.value, first_line=node.lineno)
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s)# (.*)", line)
        if comment is not None:
            yield from in_text(name, comment[1], first_line=number)


def first_lines(name: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or ".").splitlines()[0]
            if ";" in first or not first.endswith("."):
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
