"""Leave no trace of files or of a text: `forget`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import trio

from everos_engine.cli.delegation import (
    SILENCE_SECONDS,
    run_or_delegate,
)
from everos_engine.cli.outcomes import OK
from everos_engine.diagnose.wording import shown, size
from everos_engine.engine import Engine
from everos_engine.errors import BadQuestion, Transient
from everos_engine.settings import Settings
from everos_engine.stores.database import Database
from everos_engine.stores.reports import Outcome
from everos_engine.system import files
from everos_engine.system.control import BUSY, SLOW_TALK_SECONDS, ask

if TYPE_CHECKING:
    import argparse


MIN_FORGOTTEN_CHARACTERS = 4


def command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    if arguments.text == bool(arguments.paths) or (arguments.text and arguments.delete):
        raise BadQuestion("name files, or give a text with --text. --delete is for files")
    text = None
    if arguments.text:
        text = sys.stdin.read().strip()
        if len(text) < MIN_FORGOTTEN_CHARACTERS:
            raise BadQuestion(
                f"the text on standard input has less than {MIN_FORGOTTEN_CHARACTERS} characters: too much would hold it"
            )

    saved = forget(settings, arguments.paths, text=text, delete=arguments.delete)
    print(
        f"forgotten: nothing below {shown(str(settings.index_directory))} holds it any more; {size(max(0, saved))} less"
    )
    return OK


def forget(settings: Settings, paths: Sequence[str], *, text: str | None, delete: bool) -> int:
    """Leave no trace of these files, or of a text, below the index. Returns by how many bytes it is smaller.

    Raises Transient if the running engine cannot do it now.
    """
    paths = [files.locate(settings.root, path) for path in paths]
    saved: list[int] = []

    async def own(engine: Engine) -> list[Outcome]:
        saved.append(await engine.forget(paths, text=text, delete=delete))
        return []

    async def hand_over(_: Database) -> list[Outcome]:
        details = {"paths": paths, "text": text, "delete": delete}
        answer = await trio.to_thread.run_sync(lambda: _ask_slowly(settings, details))
        if "error" in answer:
            raise BadQuestion(str(answer["error"]))
        saved.append(cast("int", answer["saved_bytes"]))
        return []

    run_or_delegate(settings, own, hand_over)
    return saved[-1]


def _ask_slowly(settings: Settings, details: Mapping[str, object]) -> dict[str, object]:
    try:
        answer = ask(settings.control_socket, "forget", details, deadline_seconds=SLOW_TALK_SECONDS + SILENCE_SECONDS)
    except TimeoutError:
        answer = None
    if answer is None or answer.get("error") == BUSY:
        raise Transient(
            "the running engine could not do this in time, or the question is too long: stop it, then run the command again"
        )
    return answer
