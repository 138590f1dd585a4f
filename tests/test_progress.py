"""What a terminal shows."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from everos_engine.cli.progress import BAR_CHARACTERS, CLEAR, Bar, Screen
from patience import HANG_SECONDS
from writer import FACTS, fact, facts, put


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_a_bar_is_as_full_as_the_work_is_done(waiting: list[int]) -> None:
    bar = Bar()
    for count in waiting:
        text = bar.text(count)
        if text is not None:
            done, most = bar.most - count, bar.most
            assert text.count("#") == BAR_CHARACTERS * done // most
            assert f"] {done}/{most} files" in text


def test_the_line_stays_below_the_log() -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    screen.show("pending 0")
    screen.write("a message\n")
    screen.show("pending 0")
    assert stream.getvalue() == f"{CLEAR}pending 0{CLEAR}a message\npending 0"


def test_a_terminal_shows_the_line_and_a_signal_ends_it_well(root: Path) -> None:
    put(root, FACTS, facts(fact(1, "one")))
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "everos_engine", "run", str(root)]
    env = {**os.environ, "EVEROS_EMBEDDER__KIND": "none", "XDG_CONFIG_HOME": str(root)}
    env["EVEROS_SHUTDOWN_GRACE_SECONDS"] = str(HANG_SECONDS)
    with subprocess.Popen(command, stderr=terminal, env=env) as process:
        os.close(terminal)
        seen = b"".join(until_closed(controller, process, until=b"rows 1"))
        assert process.wait(HANG_SECONDS) == 0
    os.close(controller)
    assert b"Traceback" not in seen


def until_closed(controller: int, process: subprocess.Popen[bytes], *, until: bytes) -> Iterator[bytes]:
    """All that is shown, to the end: a terminal that nobody reads makes its writer wait. ``until`` is answered with a signal."""
    seen, asked = b"", False
    while True:
        try:
            part = os.read(controller, 4096)
        except OSError:  # EIO: its other end is closed
            return
        yield part
        seen += part
        if until in seen and not asked:
            asked = True
            process.send_signal(signal.SIGINT)
