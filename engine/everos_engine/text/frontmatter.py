"""Read YAML frontmatter with our own builder, which refuses aliases, tags, repeated keys and deep nesting.

It reads PyYAML's event stream, because the C loader's constructor recurses, and deep nesting crashes the interpreter.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

import yaml

from everos_engine.errors import BadFile, quoted

MAX_BYTES = 64 << 10
MAX_DEPTH = 16
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_END = re.compile(r"^(?:---|\.\.\.)[ \t]*$")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z")
_NOT_YAML = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INT64 = 1 << 63
REMEDY = "correct the frontmatter and save"


@dataclass(frozen=True, slots=True)
class Frontmatter:
    """Hold the values of a frontmatter by key, and the lines after it.

    ``places`` are the 1-based line and column of each value. ``first_line`` is the number of the first line of
    ``body``.
    """

    values: dict[str, object]
    places: dict[str, tuple[int, int]]
    body: list[str]
    first_line: int
    present: bool


def split(lines: list[str]) -> Frontmatter:
    """Split ``lines`` of a file into frontmatter and body.

    Raises BadFile with the line and column in the file. Scalars are null, booleans, integers, floats or strings as in
    YAML 1.2's core schema. Timestamps stay strings.
    """
    if not lines or lines[0].rstrip() != "---":
        return Frontmatter({}, {}, lines, 1, present=False)
    for number, line in enumerate(lines[1:], start=1):
        if _END.match(line):
            values, places = _parse("\n".join(lines[1:number]) + "\n")
            return Frontmatter(values, places, lines[number + 1 :], number + 2, present=True)
    raise BadFile("the frontmatter that starts here never ends", remedy="close it with a line `---`", line=1)


def _parse(text: str) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    if len(text.encode()) > MAX_BYTES:
        raise BadFile(
            f"the frontmatter is larger than {MAX_BYTES} bytes", remedy="move the text below the frontmatter", line=1
        )
    if wrong := _NOT_YAML.search(text):
        line, column = _place(text, wrong.start())
        raise BadFile(
            f"the character U+{ord(wrong[0]):04X} is not allowed in YAML",
            remedy="remove it, or write it as an escape in double quotes",
            line=line,
            column=column,
        )
    loader = _LOADER(text)
    try:
        return _build(loader, text)
    except _Refused as error:
        line, column = _place(text, error.index)
        raise BadFile(str(error), remedy=REMEDY, line=line, column=column) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = _place(text, mark.index) if mark else (1, 1)
        message = f"malformed YAML: {error.problem or error.context}"
        begun = _place(text, error.context_mark.index)[0] if error.problem and error.context_mark else at[0]
        if begun != at[0]:  # the mistake is in an earlier line than the error
            message += f" {error.context} that begins in line {begun}"
        raise BadFile(message, remedy=REMEDY, line=at[0], column=at[1]) from None
    except yaml.YAMLError as error:
        raise BadFile(f"malformed YAML: {error}".split("\n", 1)[0], remedy=REMEDY, line=1) from None
    finally:
        loader.dispose()


def _place(text: str, index: int) -> tuple[int, int]:
    """Return the 1-based line and column in the file of an index into its frontmatter.

    The marks of YAML are not used, since YAML counts more characters as line ends.
    """
    return text.count("\n", 0, index) + 2, index - text.rfind("\n", 0, index)


def _build(loader: yaml.SafeLoader, text: str) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    root: object = None
    places: dict[str, tuple[int, int]] = {}
    stack: list[tuple[dict[str, object] | list[object], list[str]]] = []
    documents = 0
    starts = [0, *(end.end() for end in re.finditer("\n", text))]

    def put(value: object, event: yaml.Event) -> None:
        nonlocal root
        if not stack:
            root = value
            return
        container, pending = stack[-1]
        if isinstance(container, list):
            container.append(value)
        elif pending:
            key = pending.pop()
            container[key] = value
            if len(stack) == 1:
                line = bisect_right(starts, event.start_mark.index)
                places[key] = line + 1, event.start_mark.index - starts[line - 1] + 1
        else:
            key = _key(event)
            if key in container:
                raise _Refused(event, f"the key {quoted(key)} is there twice")
            pending.append(key)

    while True:
        event = loader.get_event()
        if event is None or isinstance(event, yaml.StreamEndEvent):
            break
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused(event, "there is more than one YAML document")
        elif isinstance(event, yaml.AliasEvent):
            raise _Refused(event, "aliases are not allowed")
        elif isinstance(event, yaml.ScalarEvent):
            _check(event)
            put(_scalar(event) if _is_value(stack) else event.value, event)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            _check(event)
            if len(stack) >= MAX_DEPTH:
                raise _Refused(event, f"nested deeper than {MAX_DEPTH}")
            container: dict[str, object] | list[object] = {} if isinstance(event, yaml.MappingStartEvent) else []
            put(container, event)
            stack.append((container, []))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            stack.pop()
    if root is None:
        return {}, {}
    if not isinstance(root, dict):
        raise BadFile("the frontmatter is not a mapping", remedy="write `key: value` lines", line=2)
    return root, places


def _is_value(stack: list[tuple[dict[str, object] | list[object], list[str]]]) -> bool:
    return not stack or isinstance(stack[-1][0], list) or bool(stack[-1][1])


def _key(event: yaml.Event) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise _Refused(event, "a key must be a string")
    return str(event.value)


def _check(event: yaml.Event) -> None:
    if getattr(event, "anchor", None):
        raise _Refused(event, "anchors are not allowed")
    if getattr(event, "tag", None) not in {None, "!"}:
        raise _Refused(event, f"the tag {quoted(event.tag)} is not allowed")


def _scalar(event: yaml.ScalarEvent) -> object:
    text = str(event.value)
    if not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= 20 and _INT.match(text):
        number = int(text)
        return number if -_INT64 <= number < _INT64 else text
    if len(text) < 64 and _FLOAT.match(text):
        value = float(text)
        return value if value not in {float("inf"), float("-inf")} else text
    return text


class _Refused(Exception):
    def __init__(self, event: yaml.Event, message: str) -> None:
        super().__init__(message)
        self.index: int = event.start_mark.index
