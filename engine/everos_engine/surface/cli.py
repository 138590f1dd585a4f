"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from everos_engine.errors import BadQuestion, EngineError
from everos_engine.settings import describe, load
from everos_engine.surface import arguments as grammar
from everos_engine.surface.paint import ago, json_text, plural, printable, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from everos_engine.settings import Settings
    from everos_engine.stores.census import Outcome

OK, TROUBLE, USAGE = 0, 1, 2
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
AS_THE_ENGINE = "run the command as the user the engine runs as"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 1 something is not in order, 2 it could not be tried."""
    arguments = parser().parse_args(argv)
    arguments.is_program = argv is None
    flags = {
        "memory.root": arguments.at or arguments.root,
        "log_format": getattr(arguments, "log_format", None),
        "watch.mode": "poll" if getattr(arguments, "poll", False) else None,
    }
    try:
        if arguments.command is _trust:  # the settings are not in force before the file is trusted
            return int(_trust(flags, arguments))
        settings = load(flags)
        return int(arguments.command(settings, arguments))
    except BrokenPipeError:
        return OK
    except EngineError as error:
        print(f"everos-engine: {printable(str(error), lines=True)}", file=sys.stderr)
        return USAGE
    except OSError as error:
        if error.errno not in FORBIDDEN:
            raise
        print(f"everos-engine: {error.filename}: {error.strerror}: {AS_THE_ENGINE}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    return grammar.build(
        {
            "run": _run,
            "sync": _sync,
            "search": _search,
            "status": _status,
            "explain": _explain,
            "kinds": _kinds,
            "settings": _settings,
            "fds": _fds,
            "fds calibrate": _calibrate,
            "doctor": _doctor,
            "fix": _fix,
            "release": _release,
            "trust": _trust,
        }
    )


def _run(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.system import memory  # noqa: PLC0415 - the other commands need none of it

    if arguments.is_program:
        memory.begin_again(os.environ)
    from everos_engine.surface.daemon import run  # noqa: PLC0415 - imports LanceDB

    return run(settings)


def _sync(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface.oneshot import sync  # noqa: PLC0415 - imports LanceDB

    if arguments.audit:
        from everos_engine.surface.oneshot import audit  # noqa: PLC0415 - imports LanceDB

        found = audit(settings)
        for path in found:
            print(f"{shown(path)}: its content had changed unseen, now in step")
        print(f"audit done: {len(found)} differed")
        return OK
    return _report(
        sync(settings, arguments.paths), everything=bool(arguments.paths), settings=settings, arguments=arguments
    )


def _status(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface import status  # noqa: PLC0415 - not needed by --help
    from everos_engine.surface.paint import paint_for

    found = status.snapshot(settings)
    if arguments.json:
        print(json.dumps(status.as_json(found), indent=2))
    else:
        print(status.as_text(found, paint_for(sys.stdout), program=program(settings, arguments)))
    return OK


def _explain(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface.explain import as_json, explain  # noqa: PLC0415 - not needed by --help
    from everos_engine.surface.explain_text import as_text
    from everos_engine.surface.paint import paint_for

    found = explain(settings, arguments.path, program=program(settings, arguments), rows=arguments.rows)
    if arguments.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print(as_text(found, paint_for(sys.stdout)))
    return OK if found.judgement.verdict == "searchable" else TROUBLE


def _doctor(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface import doctor  # noqa: PLC0415 - imports LanceDB where there is an index
    from everos_engine.surface.paint import paint_for

    if arguments.bundle is not None:
        from everos_engine.surface import bundle

        written = bundle.write(
            settings, Path(arguments.bundle or bundle.default_name(time.time())), offline=arguments.offline
        )
        print(f"{written}: no memory content, file names hashed; look into it before you send it")
        return OK
    checks = doctor.examine(settings, arguments.checks, program=program(settings, arguments), offline=arguments.offline)
    if arguments.json:
        print(json.dumps(doctor.as_json(settings, checks), indent=2))
    else:
        print(doctor.as_text(checks, paint_for(sys.stdout)))
    return doctor.worst(checks)


def _fix(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface import status  # noqa: PLC0415 - not needed by --help

    if arguments.apply:
        from everos_engine.surface.oneshot import fix  # noqa: PLC0415 - imports LanceDB

        return _report(fix(settings), everything=True, settings=settings, arguments=arguments)
    failed = status.failed(settings)
    for outcome in failed:
        _show(outcome)
    print(f"{len(failed)} failed")
    return TROUBLE if failed else OK


def _release(settings: Settings, _arguments: argparse.Namespace) -> int:
    from everos_engine.surface.oneshot import release  # noqa: PLC0415 - imports LanceDB

    outcomes = release(settings)
    for outcome in outcomes:
        _show(outcome)
    print(f"{len(outcomes)} released")
    return TROUBLE if any(outcome.status == "failed" for outcome in outcomes) else OK


def _trust(flags: Mapping[str, object], arguments: argparse.Namespace) -> int:
    from everos_engine.surface import trusting  # noqa: PLC0415 - not needed by --help

    if arguments.remove:
        return trusting.remove(flags)
    return trusting.show(flags) if arguments.show else trusting.give(flags)


def _search(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface import lookup  # noqa: PLC0415 - not needed by --help

    if not any(map(str.isalnum, "".join(arguments.query))):
        message = "the query has no word in it: name what to look for"
        raise BadQuestion(message)
    results = lookup.search(settings, arguments)
    if results is None:
        from everos_engine.surface.oneshot import search  # noqa: PLC0415 - imports LanceDB

        results = search(settings, arguments)
    if arguments.json:
        print(json_text(results))
        return OK
    for result in results:
        print(
            f"{result['score']:.3f}  {result['kind']}  {shown(str(result['md_path']))}:{result['line']}  {shown(str(result['entry_id']))}"
        )
        print(f"       {printable(str(result['snippet']))}")
    if not results:
        print("nothing found")
    return OK


def _calibrate(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface.calibrate import calibrate  # noqa: PLC0415 - not needed by --help

    return calibrate(settings, quick=arguments.quick, output=Path(arguments.output))


def _fds(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.surface import fds  # noqa: PLC0415 - not needed by --help

    return fds.show(settings, watch=arguments.watch, as_json=arguments.json)


def _kinds(settings: Settings, _arguments: argparse.Namespace) -> int:
    from everos_engine.text.kinds.layout import PLACES  # noqa: PLC0415 - not needed by --help

    print(f"below {shown(str(settings.root))}, with or without <app>/<project>/ in front:")
    for place, kind in PLACES.items():
        print(f"{kind:<14}{place}")
    globs = ", ".join(map(repr, settings.note.globs))
    print(f"{'note':<14}" + (f"any other markdown that matches {globs}" if globs else "off: note.globs is empty"))
    return OK


def _settings(settings: Settings, _arguments: argparse.Namespace) -> int:
    for name, value in describe(settings).items():
        print(f"{name} = {json.dumps(value)}")
    return OK


def _report(outcomes: list[Outcome], *, everything: bool, settings: Settings, arguments: argparse.Namespace) -> int:
    """Say what became of each; 1 if anything is failed."""
    bad = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in outcomes if everything else bad:
        _show(outcome)
    if not everything:
        from everos_engine.surface import status  # noqa: PLC0415 - not needed by --help

        found = status.snapshot(settings)
        held = sum(one.count for one in found.moment.held) if found.moment else 0
        waits = f", {plural(held, 'deletion')} held: `{program(settings, arguments)} status` says why" if held else ""
        print(
            f"in step: {found.counts.done if found.counts else 0} files, {sum(found.rows.values())} rows, {len(bad)} failed{waits}"
        )
    return TROUBLE if bad else OK


def _show(outcome: Outcome) -> None:
    word: str = outcome.status or "no such file; no rows of it are left"
    if outcome.status == "failed":
        seconds = max(0.0, time.time() - outcome.updated / 1000)
        word = f"failed retryable={str(outcome.retryable).upper()} retries={outcome.retry_count}, last attempt {ago(seconds)} ago"
    print(f"{shown(outcome.md_path)}: {word}")
    for line in (outcome.error or "").split("\n") if outcome.error and outcome.status == "failed" else []:
        print(f"    {printable(line)}")


def program(settings: Settings, arguments: argparse.Namespace) -> str:
    """How to call this program again on the same root."""
    named = getattr(arguments, "at", None) or arguments.root
    return shlex.join(["everos-engine", "--root", str(settings.root)]) if named else "everos-engine"
