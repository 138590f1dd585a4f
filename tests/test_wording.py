from __future__ import annotations

import io
import os
import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st

from everos_engine.diagnose.wording import Style, ago, commands_in, printable, quoted, shown, size, style_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_needs_a_terminal_that_wants_it() -> None:
    assert style_for(Terminal(), {"TERM": "xterm"}).colour
    assert not style_for(Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}).colour
    assert not style_for(Terminal(), {"TERM": "dumb"}).colour
    assert not style_for(io.StringIO(), {"TERM": "xterm"}).colour


@given(st.text(), st.integers(40, 120))
def test_text_without_colour_is_only_made_printable(text: str, columns: int) -> None:
    assert Style(colour=False, columns=columns)(text, "red") == printable(text)


@given(st.lists(st.text("ab c", min_size=1, max_size=30), min_size=1, max_size=8), st.integers(40, 100))
def test_wrapping_never_breaks_a_command_and_loses_no_word(words: list[str], columns: int) -> None:
    text = " ".join(f"do `run {word}x` now" for word in words)
    wrapped = Style(colour=True, columns=columns).wrap(text, indent=4, first="\x1b[31mfail\x1b[0m ")
    assert commands_in(wrapped) == commands_in(text)
    assert wrapped.split() == ["\x1b[31mfail\x1b[0m", *text.split()]


@settings(max_examples=25)
@given(st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name), min_size=1, max_size=4))
def test_a_quoted_command_is_one_line_that_bash_reads_back(names: list[bytes]) -> None:
    words = [os.fsdecode(name) for name in names]
    command = quoted("printf", "%s\\0", *words)
    assert command.isprintable()
    assert "`" not in command
    assert commands_in(f"type `{command}` now") == [command]
    told = subprocess.run(["bash", "-c", command], check=True, capture_output=True, timeout=30).stdout
    assert told == b"".join(name + b"\0" for name in names)


@given(st.text())
def test_a_shown_path_is_one_printable_line(path: str) -> None:
    assert shown(path).isprintable()
    shown(path).encode()


def test_durations_and_sizes_read_well() -> None:
    assert [ago(seconds) for seconds in (0.04, 9.96, 59, 300, 7300, 200_000)] == [
        "0.0 s", "10.0 s", "59 s", "5 min", "2 h", "2 days",
    ]  # fmt: skip
    assert [size(count) for count in (0, 1023, 1024, 20 << 20, 3 << 30)] == [
        "0 bytes", "1,023 bytes", "1.0 KiB", "20 MiB", "3.0 GiB",
    ]  # fmt: skip
