"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from everos_engine.cli import parser as grammar
from everos_engine.cli import terminal
from everos_engine.cli.outcomes import INTERRUPTED, OK, TROUBLE, USAGE, program
from everos_engine.diagnose.wording import program_at, quoted, shown, with_root
from everos_engine.errors import EngineError, exhausted
from everos_engine.settings import Settings, describe, load
from everos_engine.system import private

AS_THE_ENGINE = "run the command as the user the engine runs as"
NO_ROOM = "free disk space, then run the command again; `everos-engine doctor disk` shows what is left"
REMEDIES = {
    errno.EACCES: AS_THE_ENGINE,
    errno.EPERM: AS_THE_ENGINE,
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: NO_ROOM,
    errno.EMFILE: "raise the limit (`ulimit -n 1024`), then run the command again",
    errno.ENFILE: "the whole system has none left: close other programs, then run the command again",
}
BUG = "this is a bug of everos-engine"
ELSE = "`everos-engine doctor` looks for the cause"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status.

    0 is done, 1 something is not in order, 2 it could not be tried, 130 interrupted.
    """
    is_program = argv is None
    if is_program:
        terminal.prepare()
    try:
        status = _run_command(argv)
    except SystemExit as end:  # argparse has said why
        if not is_program:
            raise
        status = end.code if isinstance(end.code, int) else USAGE
    except BrokenPipeError:
        status = OK
    except BaseException as ended:  # noqa: BLE001 - a user gets one line for any error, and Rust's panics are not Exceptions
        status = _failed(ended, _called(argv))
    if is_program:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over: an interrupt now would only spoil its end
    if is_program and (error := terminal.finish()) is not None and status in {OK, TROUBLE}:
        status = _failed(error, _called(argv))
    if is_program:
        terminal.leave(status)
    return status


def _run_command(argv: Sequence[str] | None) -> int:
    grammar_of_all = parser()
    arguments = grammar_of_all.parse_args(argv)
    arguments.is_program = argv is None
    arguments.root = _root_named(grammar_of_all, arguments)
    flags = {
        "memory.root": arguments.root,
        "log_format": getattr(arguments, "log_format", None),
        "watch.mode": "poll" if getattr(arguments, "poll", False) else None,
    }
    if arguments.command is _trust:  # the settings are not in force before the file is trusted
        return int(_trust(flags, arguments))
    if arguments.command is _settings:
        return int(_settings(flags))
    settings = load(flags)
    if arguments.is_program:
        os.umask(0o777 & ~private.mode_of(settings))  # what LanceDB creates in the index is for its owner too
    return int(arguments.command(settings, arguments))


def _root_named(grammar_of_all: argparse.ArgumentParser, arguments: argparse.Namespace) -> str | None:
    """Return the root that the words name, None if they name none. Ends the program if they name two."""
    named = [root for root in (arguments.at, arguments.root_too, arguments.root) if root is not None]
    if len({os.path.realpath(os.path.expanduser(root)) for root in named}) > 1:
        grammar_of_all.error(f"two memory roots are named, {' and '.join(map(shown, named))}: name one")
    return named[0] if named else None


def _called(argv: Sequence[str] | None) -> str:
    """Return how to call this program again on the root that the words name."""
    with suppress(Exception, SystemExit):
        grammar_of_all = parser()
        named = _root_named(grammar_of_all, grammar_of_all.parse_args(argv))
        return program_at(None if named is None else os.path.realpath(os.path.expanduser(named)))
    return program_at(None)


def _failed(error: BaseException, program: str) -> int:
    """Say in one line what ended a command, and what to do. ``program`` is how to call this program again."""
    if isinstance(error, BaseExceptionGroup):
        from everos_engine.errors import unwrap

        error = unwrap(error)
    if isinstance(error, KeyboardInterrupt):
        terminal.say(with_root(str(error), program) or "interrupted")
        return INTERRUPTED
    if isinstance(error, EngineError):
        terminal.say(with_root(str(error), program))
    elif exhausted(error):
        terminal.say(f"no file descriptor is left: {REMEDIES[errno.EMFILE]}")
    elif isinstance(error, terminal.OutputLost):
        terminal.say(
            f"standard output cannot be written: {error.strerror}: send it to a file or a terminal that takes it"
        )
    elif isinstance(error, OSError):
        what = "" if error.filename is None else f"{shown(os.fsdecode(error.filename))}: "
        terminal.say(f"{what}{error.strerror or error}: {with_root(_remedy(error), program)}")
    elif isinstance(error, MemoryError):
        terminal.say("no memory is left: close other programs, or raise the limit, then run the command again")
    else:
        if os.environ.get("EVEROS_LOG_LEVEL") == "DEBUG":
            traceback.print_exception(error)
        terminal.say(
            f"{BUG}: {type(error).__name__}: {shown(str(error))[:400]}: please report it with what "
            "`EVEROS_LOG_LEVEL=DEBUG` in front of the command shows"
        )
    return USAGE


def _remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT and error.filename is None:
        return "the current directory was removed: change to one that exists"
    if error.errno == errno.EROFS and error.filename is not None:
        from everos_engine.system import limits

        remount = quoted("mount", "-o", "remount,rw", limits.mount_of(error.filename).point)
        return f"mount it for writing, `{remount}`. Meanwhile `search`, `status` and `explain` work"
    return REMEDIES.get(error.errno or 0, ELSE)


def parser() -> argparse.ArgumentParser:
    """Return the commands and their flags."""
    return grammar.build(
        {
            "run": _run,
            "sync": _in_module("sync"),
            "search": _in_module("search"),
            "status": _status,
            "explain": _explain,
            "kinds": _kinds,
            "settings": _settings,
            "fds": _fds,
            "fds calibrate": _calibrate,
            "doctor": _doctor,
            "fix": _in_module("fix"),
            "release": _in_module("release"),
            "trust": _trust,
            "forget": _in_module("forget"),
        }
    )


def _in_module(name: str) -> Callable[[Settings, argparse.Namespace], int]:
    """Return the command of that module, which is imported when the command runs."""

    def run(settings: Settings, arguments: argparse.Namespace) -> int:
        status: int = importlib.import_module(f"everos_engine.cli.{name}").command(settings, arguments)
        return status

    return run


def _run(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.system import memory

    if arguments.is_program:
        memory.restart_tuned(os.environ)
    from everos_engine.cli.run import run
    from everos_engine.engine import check_root

    check_root(settings, may_make=arguments.create or settings.root == Settings().root)
    return run(settings)


def _status(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.diagnose import status
    from everos_engine.diagnose.wording import style_for

    found = status.snapshot(settings)
    if arguments.json:
        terminal.print_json(status.as_json(found))
    else:
        print(status.as_text(found, style_for(sys.stdout), program=program(settings, arguments)))
    return OK


def _explain(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.cli.explain import as_text
    from everos_engine.diagnose.explain import as_json, explain
    from everos_engine.diagnose.wording import style_for

    found = explain(settings, arguments.path, program=program(settings, arguments), rows=arguments.rows)
    if arguments.json:
        terminal.print_json(as_json(found))
    else:
        print(as_text(found, style_for(sys.stdout)))
    return OK if found.diagnosis.verdict == "searchable" else TROUBLE


def _doctor(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.diagnose import doctor
    from everos_engine.diagnose.wording import style_for

    if arguments.bundle is not None:
        from everos_engine.diagnose import bundle

        written = bundle.write(
            settings, Path(arguments.bundle or bundle.default_name(time.time())), offline=arguments.offline
        )
        print(f"{written}: it has no memory content, and file names are hashed. Read it before you send it")
        return OK
    checks = doctor.examine(settings, arguments.checks, program=program(settings, arguments), offline=arguments.offline)
    if arguments.json:
        terminal.print_json(doctor.as_json(settings, checks))
    else:
        print(doctor.as_text(checks, style_for(sys.stdout)))
    return doctor.worst(checks)


def _trust(flags: Mapping[str, object], arguments: argparse.Namespace) -> int:
    from everos_engine.cli import trust

    if arguments.remove:
        return trust.remove(flags)
    return trust.show(flags) if arguments.show else trust.give(flags)


def _calibrate(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.calibrate.experiment import calibrate

    return calibrate(settings, quick=arguments.quick, output=Path(arguments.output))


def _fds(settings: Settings, arguments: argparse.Namespace) -> int:
    from everos_engine.cli import fds

    return fds.show(settings, watch=arguments.watch, as_json=arguments.json, program=program(settings, arguments))


def _kinds(settings: Settings, _arguments: argparse.Namespace) -> int:
    from everos_engine.text.kinds.layout import PLACES

    print(f"below {shown(str(settings.root))}, with or without <app>/<project>/ in front:")
    for place, kind in PLACES.items():
        print(f"{kind:<14}{place}")
    globs = ", ".join(map(repr, settings.note.globs))
    print(f"{'note':<14}" + (f"any other markdown that matches {globs}" if globs else "off: note.globs is empty"))
    return OK


def _settings(flags: Mapping[str, object]) -> int:
    """Show every setting. A source with a fault is named, and its wrong values are left out."""
    faults: list[str] = []
    for name, value in describe(load(flags, faults=faults)).items():
        print(f"{name} = {json.dumps(value)}")
    for fault in dict.fromkeys(faults):
        terminal.say(fault)
    return USAGE if faults else OK
