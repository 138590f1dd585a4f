"""Writes the pages that are made from the code: settings, commands, columns, log events and conditions.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from everos_engine.cli.main import parser
from everos_engine.settings import choices, setters, table
from everos_engine.text.kinds import tables

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "engine" / "everos_engine"
MEANINGS = DOCS / "events.toml"
LEVELS = ("debug", "info", "warning", "error")
CONDITION_WORDS = (
    "every condition is logged as a warning with its code when it begins, and as `<code>_over` when it ends"
)


def main() -> int:
    """Write the pages, or with --check say which are stale; 1 if any is."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    flags.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    check = flags.parse_args().check
    stale = 0
    for name, text in pages().items():
        path = DOCS / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old == text:
            continue
        stale += 1
        if check:
            print(f"docs/{name} is stale: run `python docs/generate.py` and commit what it writes")
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), "now", "due", n=0))
        else:
            path.write_text(text, encoding="utf-8")
            print(f"written: docs/{name}")
    return int(check and stale > 0)


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    return {
        "settings.md": settings_page(),
        "commands.md": commands_page(),
        "events.md": events_page(),
        "columns.md": columns_page(),
    }


def settings_page() -> str:
    """Every setting, its variable, its default and what it does."""
    lines = [
        "# Settings",
        "",
        "Each setting has a dotted name for TOML files, and an environment variable. Later sources win:",
        "",
        "1. the default,",
        "2. `$XDG_CONFIG_HOME/everos-engine/settings.toml` (without that variable `~/.config/everos-engine/settings.toml`),",
        "3. `<root>/everos-engine.toml`,",
        "4. the environment,",
        "5. command line flags.",
        "",
        "The file of a root may come from somewhere else: a vault that was cloned or synchronised. So it may set only what is about its content and",
        "its limits. What says where text and keys go, or names a file outside the root, is marked *user* in the last column. In a root's file it is",
        "refused until you trust the file as it is: `everos-engine trust --show` shows what it sets, `everos-engine trust` trusts it. After a change it",
        "must be trusted again. What is trusted is remembered for each user, outside the root. A key is sent only to an address that its own source,",
        "or one with the same rights, has set: a key of the environment never goes to an address that only a root's file names.",
        "",
        "An unknown name, a value of the wrong type or one out of bounds is refused at the start with its source. So is an environment variable that is",
        "almost one of these, or names a section of ours: other `EVEROS_*` variables belong to other programs and are ignored. Sizes in bytes accept",
        "`8MB` or `1.5GiB` (binary units). A list is separated by `:` in the environment. `everos-engine settings` prints what is in force, and names",
        "every fault.",
        "",
        "```toml",
        "scan_interval_seconds = 10",
        "",
        "[note]",
        'globs = ["**/*.md"]',
        "```",
    ]
    groups: dict[str, list[str]] = defaultdict(list)
    may_be, who = choices(), setters()
    for name, variable, default, doc in table():
        allowed = f" One of {', '.join(f'`{choice}`' for choice in may_be[name])}." if name in may_be else ""
        line = f"| `{name.rpartition('.')[2]}` | {doc}{allowed} `{variable}` | `{default}` | {who[name]} |"
        groups[name.rpartition(".")[0]].append(line)
    for group, rows in sorted(groups.items()):
        title = f"`[{group}]`" if group else "The engine"
        lines += [
            "",
            f"## {title}",
            "",
            "| setting | what, and its environment variable | default | set by |",
            "|---|---|---|---|",
            *rows,
        ]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Every command with its arguments and options, as its help has them."""
    top = parser()
    lines = ["# Commands", "", top.description or "", "", f"    {_usage(top)}", "", *_arguments(top)]
    lines += ["", top.epilog or ""]
    for command, helped in _commands(top):
        lines += ["", f"## `{command.prog}`", "", command.description or helped, "", f"    {_usage(command)}"]
        rows = _arguments(command)
        lines += ["", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _commands(parent: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    for action in parent._actions:  # noqa: SLF001 - argparse has no other way to list them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            helped = {choice.dest: choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            for name, command in action.choices.items():
                yield command, helped.get(name, "")
                yield from _commands(command)


def _usage(command: argparse.ArgumentParser) -> str:
    return f"{command.prog} " + " ".join(
        _call(action) if action.required and action.nargs not in ("?", "*") else f"[{_call(action)}]"
        for action in command._actions  # noqa: SLF001
    )


def _call(action: argparse.Action) -> str:
    """An argument as it is written on the command line."""
    if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
        return f"{action.metavar} ..."
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    if isinstance(action.nargs, str):
        value = {"?": f"[{value}]", "*": f"{value} ...", "+": f"{value} ..."}[action.nargs]
    if not action.option_strings:
        return value.strip("[]") if action.nargs == "?" else str(value)
    name = action.option_strings[-1]
    return name if action.nargs == 0 else f"{name} {value}"


def _arguments(command: argparse.ArgumentParser) -> list[str]:
    rows = [
        f"| `{_call(action)}` | {action.help} |"
        for action in command._actions  # noqa: SLF001
        if not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction))  # noqa: SLF001
    ]
    missing = [row for row in rows if "| None |" in row]
    if missing:
        message = f"{command.prog}: give every argument a help text: {missing[0]}"
        raise SystemExit(message)
    return ["| argument | what |", "|---|---|", *rows] if rows else []


ENTRIES = {"episode", "atomic_fact", "foresight", "agent_case"}
"""Kinds whose entries stand between markers; the others take their fields from the frontmatter."""
MADE = {
    "id": "owner and entry id, for people",
    "app_id": "the path; `default` where it has none",
    "project_id": "the path; `default` where it has none",
    "owner_type": "the path: `user` or `agent`",
    "owner_id": "the entry, else the frontmatter, else the folder",
    "terms": "the words inside identifiers of the texts",
}


def columns_page() -> str:
    """The columns of each kind's table, and where their values come from."""
    lines = [
        "# Columns",
        "",
        "What the table of each [kind](kinds.md) holds, and what a file must say for it. Every table has `md_path`, `entry_id`, `content_hash` and, with",
        "an embedder, `vector`. Types: `strings` is a list, `timestamp` is kept in UTC. A field marked *required* makes the entry bad if it is missing.",
        "",
        "## Every kind",
        "",
        "| column | from |",
        "|---|---|",
        *(f"| `{column}` | {source} |" for column, source in MADE.items()),
    ]
    for kind in tables.KINDS.values():
        inline = (*tables.INLINE, *kind.inline) if kind.name in ENTRIES else ()
        sources = {field.column: f"`**{field.source}**:`{_must(field)}" for field in inline}
        named = "`### {}`" if kind.name in ENTRIES else "frontmatter `{}`"
        sources |= {field.column: named.format(field.source) + _must(field) for field in kind.own}
        sources |= {column: "the file" for column, _ in kind.extra}
        lines += [
            "",
            f"## `{kind.name}`",
            "",
            "| column | type | from | searched | embedded |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| `{column}` | {kind.columns[column]} | {source} | {_mark(column in kind.text_columns)} | {_mark(column in kind.embed_columns)} |"
            for column, source in sources.items()
        ]
    return "\n".join(lines) + "\n"


def _must(field: tables.Field) -> str:
    return ", *required*" if field.required else ""


def _mark(given: bool) -> str:  # noqa: FBT001 - one word
    return "yes" if given else ""


def events_page() -> str:
    """Every log event and condition with its level, its fields and its meaning."""
    meanings = tomllib.loads(MEANINGS.read_text(encoding="utf-8"))
    events, conditions = found()
    _complete("events", events, meanings["events"])
    _complete("conditions", conditions, meanings["conditions"])
    lines = [
        "# Log events and conditions",
        "",
        "The log goes to standard error. A line is a time, a level, the event's name, and `field=value` pairs; `--log-format json` writes one",
        "JSON object a line, the same text in `text`. On a terminal only warnings show, above the status line.",
        "",
        "## Events",
        "",
        "| event | level | fields | meaning |",
        "|---|---|---|---|",
    ]
    for name, (levels, fields) in sorted(events.items()):
        shown = ", ".join(f"`{one}`" for one in sorted(fields)) or "none"
        lines.append(f"| `{name}` | {', '.join(sorted(levels))} | {shown} | {meanings['events'][name]} |")
    lines += [
        "",
        "## Notes",
        "",
        f"A condition lasts: `status` and `doctor` show it until it is over, with its message and its remedy; {CONDITION_WORDS}.",
        "",
        "| code | meaning |",
        "|---|---|",
    ]
    lines += [f"| `{code}` | {meanings['conditions'][code]} |" for code in sorted(conditions)]
    return "\n".join(lines) + "\n"


def found() -> tuple[dict[str, tuple[set[str], set[str]]], set[str]]:
    """({event: (levels, fields)}, condition codes) of all that the package logs and says."""
    events: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    conditions: set[str] = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr in (*LEVELS, "log") and _is_logger(call.func.value):
                by_level = call.func.attr == "log"
                (text,) = _words(call.args[int(by_level)], constants, path)
                name = text.split(" ", 1)[0]
                if not name.startswith("{"):  # forwards another library's record, or a condition
                    levels = _words(call.args[0], constants, path) if by_level else [call.func.attr]
                    events[name][0].update(level.lower() for level in levels)
                    events[name][1].update(re.findall(r"(\w+)=", text))
            elif call.func.attr == "say" and ast.unparse(call.func.value).endswith("conditions"):
                conditions.update(_words(call.args[0], constants, path))
    return events, conditions


def _is_logger(node: ast.expr) -> bool:
    """``logger``, or ``logger.opt(...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    return isinstance(node, ast.Name) and node.id == "logger"


def _constants(tree: ast.Module) -> dict[str, set[str]]:
    """Every string that each name of a module is ever given."""
    given: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and node.value is not None:
                given[target.id] |= _strings(node.value)
    return given


def _strings(node: ast.expr) -> set[str]:
    if isinstance(node, ast.IfExp):
        return _strings(node.body) | _strings(node.orelse)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def _words(node: ast.expr, constants: dict[str, set[str]], path: Path) -> list[str]:
    """The texts an argument can be. Ends the program if the source does not show them."""
    words = constants.get(node.id, set()) if isinstance(node, ast.Name) else _strings(node)
    if not words:
        message = (
            f"{path.name}:{node.lineno}: cannot tell the event or code from `{ast.unparse(node)}`: write it as a string"
        )
        raise SystemExit(message)
    return sorted(words)


def _complete(section: str, named: dict[str, object] | set[str], meanings: dict[str, str]) -> None:
    for name in sorted(set(named) - set(meanings)):
        message = f"docs/events.toml: say under [{section}] what {name!r} means, and run `python docs/generate.py`"
        raise SystemExit(message)
    for name in sorted(set(meanings) - set(named)):
        message = f"docs/events.toml: [{section}] explains {name!r}, which the engine never says: take it out"
        raise SystemExit(message)


if __name__ == "__main__":
    sys.exit(main())
