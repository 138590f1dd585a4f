"""Search the index: `search`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everos_engine.cli import lookup, terminal
from everos_engine.cli.outcomes import OK, program
from everos_engine.diagnose.wording import plural, printable, shown, with_root
from everos_engine.errors import BadQuestion, EngineError
from everos_engine.settings import Settings

if TYPE_CHECKING:
    import argparse


def command(settings: Settings, arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit status."""
    if not any(map(str.isalnum, "".join(arguments.query))):
        raise BadQuestion("the query has no word in it: name what to look for")
    results = lookup.search(settings, arguments)
    if results is None:
        results = find(settings, arguments)
    for missing in _not_searched(settings, program(settings, arguments), found=bool(results)):
        terminal.say(missing)
    if arguments.json:
        terminal.print_json(results)
        return OK
    for result in results:
        print(
            f"{result['score']:.3f}  {result['kind']}  {shown(str(result['md_path']))}:{result['line']}  {shown(str(result['entry_id']))}"
        )
        print(f"       {printable(str(result['snippet']))}")
    if not results:
        print("nothing found")
    return OK


def _not_searched(settings: Settings, program: str, *, found: bool) -> list[str]:
    """Say what a search could not look into.

    That is a damaged table and, if nothing was found, changes that are not indexed yet.
    """
    from everos_engine.diagnose import status

    try:
        seen = status.snapshot(settings)
    except EngineError:
        return []
    lines = []
    if seen.moment is not None and seen.engine.running:
        damaged = [note for note in seen.moment.conditions if note.code == "index_damaged"]
        lines += [f"results are incomplete: {note.message}; {with_root(note.remedy, program)}" for note in damaged]
    waiting = seen.counts.pending + seen.counts.processing if seen.counts else 0
    if waiting and not found:
        then = "" if seen.engine.running else f": `{program} sync` indexes {'it' if waiting == 1 else 'them'}"
        lines.append(f"{plural(waiting, 'change')} not indexed yet{then}")
    return lines


def find(settings: Settings, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Return results as plain data. The index is opened here, because no engine is running."""
    from everos_engine.cli.delegation import run_alone  # LanceDB is loaded only if no engine answers
    from everos_engine.cli.logs import set_up
    from everos_engine.engine import open_reader
    from everos_engine.search import Filter

    only = Filter(arguments.kind, arguments.owner, arguments.app, arguments.project)

    async def ask() -> list[dict[str, object]]:
        async with open_reader(settings) as engine:
            found = await engine.search(
                " ".join(arguments.query), mode=arguments.mode, only=only, limit=arguments.limit
            )
        return [result.as_data() for result in found]

    set_up(settings, reporting=True)
    return run_alone(ask)
