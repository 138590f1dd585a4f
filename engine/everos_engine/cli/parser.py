"""The command line's grammar and help texts. docs/commands.md is made from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from everos_engine.diagnose.wording import printable

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

Command = Callable[..., int]
JSON_HELP = "print one JSON document with stable field names instead of text"


def build(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser. ``arguments.command`` is one of ``commands``, which are by name."""
    top = _Parser(
        prog="everos-engine",
        description="Keeps a LanceDB index in step with a tree of markdown, the memory root.",
        epilog="Exit status of every command unless it says otherwise: 0 all is well, 1 something failed or is not in order, "
        "2 the command could not be tried.",
    )
    top.add_argument(
        "--root",
        metavar="DIR",
        help="the memory root. Default: EVEROS_ROOT, memory.root of the settings file, or ~/.everos",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    top.set_defaults(at=None, root_too=None, create=False)
    group = top.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, help_text: str, more: str = "") -> argparse.ArgumentParser:
        text = f"{help_text[0].upper()}{help_text[1:]}. {more}".strip()
        added = group.add_parser(name, help=help_text, description=text)
        added.add_argument("--root", dest="root_too", metavar="DIR", help="the memory root")
        added.set_defaults(command=commands[name])
        return added

    _add_engine(add)
    _add_questions(add)
    _add_descriptors(add, commands["fds calibrate"])
    _add_repairs(add)
    return top


class _Add(Protocol):
    def __call__(self, name: str, help_text: str, more: str = "") -> argparse.ArgumentParser: ...


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print the words of a command line in a form that is fit for a terminal."""
        super()._print_message(printable(message, lines=True), file)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            print(f"everos-engine {metadata.version('everos-engine')}")
        except metadata.PackageNotFoundError:
            print("everos-engine (from source, not installed)")
        parser.exit()


def _add_engine(add: _Add) -> None:
    run = add(
        "run",
        "watch the memory root and keep its index in step, until a signal",
        "SIGINT or SIGTERM stops it within shutdown_grace_seconds. A second one stops it immediately (exit status 130). There is one engine per root.",
    )
    run.add_argument("at", nargs="?", metavar="ROOT", help="the memory root, same as --root")
    run.add_argument(
        "--create",
        action="store_true",
        help="make the memory root if there is none. Without it only ~/.everos is made",
    )
    run.add_argument(
        "--log-format",
        choices=["auto", "text", "json"],
        help="auto: a status line on a terminal, text lines elsewhere (log_format)",
    )
    run.add_argument(
        "--poll",
        action="store_true",
        help="scan every watch.poll_interval_seconds instead of listening for file events",
    )
    sync = add(
        "sync",
        "bring the index in step once, or just these paths, and say what became of them",
        "Returns when the work is done. A running engine does it. Without one this command does.",
    )
    sync.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="a file, from the root or from here, that is indexed again in any state. Without one: all files",
    )
    sync.add_argument("--audit", action="store_true", help="read every file and compare by content, not by its times")


def _add_questions(add: _Add) -> None:
    search = add(
        "search", "search the memory", "Works with or without a running engine. Quotes and operators are plain text."
    )
    search.add_argument("query", nargs="+", metavar="QUERY", help="what to look for, in words")
    search.add_argument("--kind", help="only entries of this kind, such as episode or note")
    search.add_argument("--owner", help="only entries of this user or agent")
    search.add_argument("--app", help="only entries of this app")
    search.add_argument("--project", help="only entries of this project")
    search.add_argument(
        "--limit", type=_positive, default=10, metavar="N", help="at most so many results, up to 1000 (default: 10)"
    )
    search.add_argument(
        "--mode",
        choices=["fts", "vector", "hybrid"],
        help="by words, by meaning, or both. Default: hybrid with an embedding service, else fts",
    )
    search.add_argument("--json", action="store_true", help=JSON_HELP)
    status = add(
        "status",
        "the queue, the watermark and the rows, in numbers",
        "Reads the queue's database only. Exits with 0, or with 2 if it cannot read the settings or the database. `doctor` says whether all is well.",
    )
    status.add_argument("--json", action="store_true", help=JSON_HELP)
    explain = add(
        "explain",
        "why one path is or is not searchable, and what to do",
        "Writes nothing. Exit status 0 if it is searchable, 1 if not.",
    )
    explain.add_argument("path", metavar="PATH", help="a path from the root or from here. It need not exist")
    explain.add_argument(
        "--rows", action="store_true", help="count its rows in the index itself too, which takes a second"
    )
    explain.add_argument("--json", action="store_true", help=JSON_HELP)
    add("kinds", "which files are indexed, and where each kind of them stands")
    add("settings", "every setting and its value here", "Secrets are masked.")


def _add_descriptors(add: _Add, calibrating: Command) -> None:
    fds = add("fds", "the engine's file descriptors by class, against its limit, budgets and ceiling")
    fds.add_argument("--watch", action="store_true", help="again every second, until interrupted")
    fds.add_argument("--json", action="store_true", help=JSON_HELP)
    text = "measure on this machine what each cap of the index cache costs, and offer the setting to use"
    calibrate = fds.add_subparsers(metavar="WHAT").add_parser(
        "calibrate", help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    calibrate.add_argument(
        "--quick", action="store_true", help="fewer caps and cycles: an impression, in half a minute"
    )
    calibrate.add_argument(
        "--output",
        default="everos-calibration",
        metavar="DIR",
        help="where calibration.json and calibration.png go (default: everos-calibration)",
    )
    calibrate.set_defaults(command=calibrating)


def _add_repairs(add: _Add) -> None:
    doctor = add(
        "doctor",
        "check everything that can be wrong, each with its remedy",
        "Changes nothing. Exit status 0 all ok, 1 a warning, 2 a failure.",
    )
    doctor.add_argument("checks", nargs="*", metavar="CHECK", help="only these checks, by name")
    doctor.add_argument("--json", action="store_true", help=JSON_HELP)
    doctor.add_argument(
        "--bundle",
        nargs="?",
        const="",
        metavar="FILE",
        help="write an archive for a bug report, without memory content. Default name: everos-engine-doctor-TIME.tar.gz",
    )
    doctor.add_argument("--offline", action="store_true", help="make no call to the embedder")
    fix = add(
        "fix",
        "list what failed and why. --apply tries the retryable ones again",
        "What is retryable=FALSE needs an edit of the file named. Exit status 1 while anything is failed.",
    )
    fix.add_argument(
        "--apply", action="store_true", help="queue every failed retryable=TRUE change again, and wait for it"
    )
    add(
        "release",
        "apply the deletions that are held because they looked like an accident",
        "`status` and `doctor held` say what is held and why.",
    )
    forget = add(
        "forget",
        "erase every trace that deleted text has left in the index",
        "Old versions of tables, vectors, copies that were set aside, and free pages hold text that no file holds any more. This "
        "command removes it now. A running engine does so automatically, see lancedb.erase_after_hours. Text that is still in a file is refused.",
    )
    forget.add_argument("paths", nargs="*", metavar="PATH", help="a file that was deleted, from the root or from here")
    forget.add_argument("--delete", action="store_true", help="delete these files too")
    forget.add_argument(
        "--text", action="store_true", help="read a text from standard input: no entry, name or error with it is kept"
    )
    trust = add(
        "trust",
        "trust the memory root's own settings file, as it is now",
        "Needed once when that file says where text and keys go, or names a file outside the root, and again after each change of it. "
        "What is trusted is remembered in $XDG_STATE_HOME/everos-engine, for this user.",
    )
    choice = trust.add_mutually_exclusive_group()
    choice.add_argument(
        "--show",
        action="store_true",
        help="change nothing. The exit status is 0 if the file is trusted or needs no trust, else 1",
    )
    choice.add_argument("--remove", action="store_true", help="trust the file of this root no more")


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text[:80]!r}")
    return number
