"""No text of a file, a name, an error or a question reaches a terminal or a log as anything but printable text."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from everos_engine.cli import logs, terminal
from everos_engine.cli.main import main
from everos_engine.diagnose.wording import Style, json_text, printable
from everos_engine.settings import EmbedderSettings, Settings
from patience import HANG_SECONDS
from writer import fact, facts, put

OVERRIDES = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
UNSAFE = "".join(
    char
    for char in map(chr, range(sys.maxunicode + 1))
    if unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} or unicodedata.bidirectional(char) in OVERRIDES
)
WORDS = st.text(st.characters() | st.sampled_from(UNSAFE[:100] + "\u202e\u2066\u2028"), max_size=30)
SGR = re.compile(r"\x1b\[\d+m")
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\x85\u202egnp.exe\u2066\x08\x0b\x7f\r"


def unsafe_in(text: str, *, allowed: str = "\n") -> set[str]:
    return (set(text) & set(UNSAFE)) - set(allowed)


@given(WORDS)
def test_printable_text_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    assert not unsafe_in(printable(text), allowed="")
    assert not unsafe_in(printable(text, lines=True))
    printable(text).encode()
    assert printable(text) == text or unsafe_in(text, allowed="") or printable(text, lines=True) != text


def test_every_unsafe_character_is_escaped_and_ordinary_text_stays() -> None:
    assert printable(UNSAFE).isascii()
    ordinary = "naïve 日本語 שלום سلام می‌خواهم 👩‍👩‍👧 a\u00a0b ﷺ"
    assert printable(ordinary) == ordinary


@given(WORDS, st.sampled_from(["red", "bold"]), st.integers(40, 100))
def test_painted_and_wrapped_text_holds_only_our_own_colours(text: str, code: str, columns: int) -> None:
    style = Style(colour=True, columns=columns)
    for drawn in (style(text, code), style.wrap(text, indent=4, first=style(text, code))):
        assert not unsafe_in(SGR.sub("", drawn))


@given(WORDS)
def test_below_all_sources_a_net_lets_only_our_colours_through(text: str) -> None:
    painted = Style(colour=True)("word", "red")
    assert not unsafe_in(terminal._net(text + painted + text, terminal=False))
    drawn = terminal._net(text + painted + text, terminal=True)
    assert painted in drawn
    assert not unsafe_in(terminal.OURS.sub("", drawn))


@given(st.dictionaries(WORDS, WORDS, max_size=3))
def test_json_for_people_is_safe_and_says_the_same(value: dict[str, str]) -> None:
    text = json_text(value)
    assert not unsafe_in(text)
    assert json.loads(text) == value


@contextmanager
def logging_to(known: Settings) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    try:
        with redirect_stderr(stream):
            logs.set_up(known)
            yield stream
    finally:
        logger.remove()
        logger.add(sys.__stderr__)


def int_of(text: str) -> None:
    raise ValueError(text)


@settings(max_examples=30)
@given(WORDS, WORDS, st.sampled_from(["text", "json"]))
def test_no_text_breaks_the_log(message: str, cause: str, form: str) -> None:
    with logging_to(dataclasses.replace(Settings(), log_format=form)) as stream:
        logger.warning("change_failed error={}", message)
        try:
            int_of(cause)
        except ValueError:
            logger.exception("unit_failed what={}", message)
    told = stream.getvalue()
    assert not unsafe_in(told)
    told.encode()
    lines = told.removesuffix("\n").split("\n")
    if form == "json":
        assert [json.loads(line)["record"]["level"]["name"] for line in lines] == ["WARNING", "ERROR"]
    else:
        heads = [line for line in lines if not line.startswith(logs.CONTINUED)]
        assert [line.split()[2] for line in heads] == ["WARNING", "ERROR"]


@settings(max_examples=30)
@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20), st.sampled_from(["text", "json"]))
def test_no_log_and_no_traceback_shows_a_key(secret: str, form: str) -> None:
    secret = f"sEcReT{secret}"
    embedder = EmbedderSettings(kind="http", url=f"https://me:{secret}@h.example/v1", model="m", api_key=secret)
    known = dataclasses.replace(Settings(), log_format=form, embedder=embedder)
    with logging_to(known) as stream:
        logger.warning("call_failed url={} settings={!r}", embedder.url, known)
        try:
            int_of(secret)
        except ValueError:
            logger.exception("unit_failed")
    assert "sEcReT" not in stream.getvalue()


@pytest.fixture
def hostile(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every place a text can come from holds what a terminal would obey."""
    monkeypatch.setenv("EVEROS_EMBEDDER__KIND", "none")
    monkeypatch.setenv("EVEROS_NOTE__GLOBS", "**/*.md")
    monkeypatch.setenv("XDG_CONFIG_HOME", os.fspath(root / "none"))
    name = HOSTILE.replace("/", "")
    put(root, f"notes/a{name}.md", f"# heading {HOSTILE}\n\nword1 {HOSTILE} \u2028 word2\n")
    put(root, f"users/{name}/.atomic_facts/fine.md", facts(fact(1, f"word1 {HOSTILE}")).replace(": u1", f": '{name}'"))
    put(root, f"users/u1/.atomic_facts/b{name}.md", f"---\nbad{HOSTILE}: [\n---\n")
    put(root, "users/u1/.atomic_facts/ids.md", facts(fact(2, "word1")).replace("af_2", f"af{HOSTILE}_2"))
    put(
        root, "users/u1/.atomic_facts/owner.md", facts(fact(3, "x")).replace("owner_id: u1", f'owner_id: "u{name[:3]}"')
    )
    return root


COMMANDS = [
    ["sync"],
    ["sync", "FILE"],
    ["sync", f"nope{HOSTILE}.md"],
    ["search", "word1"],
    ["search", f"word1 {HOSTILE}"],
    ["search", "word1", "--kind", HOSTILE],
    ["search", "word1", "--owner", HOSTILE, "--json"],
    ["search", "word1", "--json"],
    ["status"],
    ["explain", "FILE"],
    ["explain", "BAD"],
    ["explain", f"nope{HOSTILE}.md"],
    ["kinds"],
    ["settings"],
    ["doctor", "--offline"],
    ["doctor", HOSTILE],
    ["fix"],
    ["fix", "--apply"],
    ["release"],
    ["trust"],
    [f"no{HOSTILE}"],
    ["status", HOSTILE],
    ["--root", f"/no{HOSTILE}", "sync"],
    ["--root", f"/no{HOSTILE}", "settings"],
]


def test_no_command_prints_what_a_terminal_obeys(hostile: Path) -> None:
    files = {"FILE": next((hostile / "notes").iterdir()), "BAD": next((hostile / "users/u1/.atomic_facts").glob("b*"))}
    program = "import sys\nfrom everos_engine.cli.main import main\nfor line in {commands!r}:\n    try:\n        main(line)\n    except SystemExit:\n        pass\n"
    commands = [
        ["--root", os.fspath(hostile), *(os.fspath(files.get(word, word)) for word in line)] for line in COMMANDS
    ]
    done = subprocess.run(
        [sys.executable, "-c", program.format(commands=commands)],
        capture_output=True,
        check=False,
        timeout=HANG_SECONDS,
    )
    told = done.stdout.decode() + done.stderr.decode()
    assert "word1" in told
    assert "retryable=FALSE" in told
    assert not unsafe_in(told), [line for line in told.split("\n") if unsafe_in(line)]


def test_an_error_of_the_command_line_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["status", HOSTILE])
    told = capsys.readouterr()
    assert not unsafe_in(told.out + told.err)
