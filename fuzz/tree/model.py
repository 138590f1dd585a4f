"""A writer's memory of a tree: what it wrote where, and so which rows there must be. Shares no code with the engine's parsers."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

Row = tuple[tuple[str, object], ...]
SECTIONS = {
    "episode": ("Subject", "Summary", "Content"),
    "atomic_fact": ("Fact",),
    "foresight": ("Foresight", "Evidence"),
    "agent_case": ("TaskIntent", "Approach", "KeyInsight"),
}
COLUMN = {
    "Subject": "subject", "Summary": "summary", "Content": "content", "Fact": "fact", "Foresight": "foresight",
    "Evidence": "evidence", "TaskIntent": "task_intent", "Approach": "approach", "KeyInsight": "key_insight",
}  # fmt: skip
FOLDER = {"episode": "episodes", "atomic_fact": ".atomic_facts", "foresight": ".foresights", "agent_case": ".cases"}
START = 1_740_000_000


@dataclass(frozen=True)
class Said:
    """One entry of a daily log, or one section of a note, as written; ``broken`` is how it was spoilt."""

    name: str
    texts: tuple[str, ...]
    number: int = 0
    owner: str | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Content:
    """One file as written. ``damage`` spoils its structure; ``style`` is how its lines end."""

    kind: str
    said: tuple[Said, ...] = ()
    damage: str | None = None
    style: str = "lf"

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        text = RENDER[self.kind](self)
        if self.damage == "yaml":
            text = text.replace("---\n", "---\nbroken: [1\n", 1)
        elif self.damage == "frontmatter":
            text = "---\nnever: ends\n"
        elif self.damage == "marker":
            text += "<!-- entry:open -->\n"
        data = text.encode("utf-8")
        if self.style == "crlf":
            data = data.replace(b"\n", b"\r\n")
        elif self.style == "bom":
            data = b"\xef\xbb\xbf" + data
        if self.damage == "utf-8":
            data += b"\xff"
        elif self.damage == "nul":
            data += b"\0"
        elif self.damage == "empty":
            data = b" \n"
        return data


@dataclass(frozen=True)
class State:
    """What one path must have: ``rows`` exactly; ``held`` ids keep what they had; ``all_held``: every id does."""

    rows: Mapping[str, Row] = field(default_factory=dict)
    held: frozenset[str] = frozenset()
    all_held: bool = False

    @property
    def failed(self) -> bool:
        """Whether the path is listed as failed."""
        return self.all_held or bool(self.held)


@dataclass(frozen=True)
class Link:
    """A symbolic link to another key."""

    target: str


GONE = State()
Node = Content | Link


class Tree:
    """The tree: key -> what was written there."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def files(self, *kinds: str) -> list[str]:
        """Keys of files (no links), of these kinds or any."""
        return sorted(
            key for key, node in self.nodes.items() if isinstance(node, Content) and (not kinds or node.kind in kinds)
        )

    def below(self, directory: str) -> list[str]:
        """Keys below a directory."""
        return sorted(key for key in self.nodes if key.startswith(directory + "/"))

    def directories(self) -> list[str]:
        """Every directory that holds something, except the topmost ones."""
        found: set[str] = set()
        for key in self.nodes:
            parent = posixpath.dirname(key)
            while "/" in parent:
                found.add(parent)
                parent = posixpath.dirname(parent)
        return sorted(found)

    def states(self) -> dict[str, State]:
        """What every change key must have now."""
        found = {}
        for key in self.nodes:
            content = self.resolve(key)
            if content is not None and kind_of(key) not in {"reference", "other"}:
                found[key] = self._state(key, content)
        return found

    def resolve(self, key: str) -> Content | None:
        """What reading ``key`` gives; None where it dangles."""
        for _ in range(8):
            node = self.nodes.get(key)
            if isinstance(node, Content) or node is None:
                return node
            key = node.target
        return None

    def _state(self, key: str, content: Content) -> State:
        if content.damage == "empty":
            return GONE
        if content.damage is not None:
            return State(all_held=True)
        if content.kind == "agent_skill":
            folder = posixpath.dirname(key) + "/references"
            references = {name: self.resolve(f"{folder}/{name}") for name in self._names(folder)}
            if any(found is not None and found.damage in {"utf-8", "nul"} for found in references.values()):
                return State(all_held=True)
            return _skill(key, content, {name: found for name, found in references.items() if found is not None})
        if content.kind == "user_profile":
            return _profile(key, content)
        return State(*_note(key, content) if content.kind == "note" else _daily(key, content))

    def _names(self, folder: str) -> Iterator[str]:
        for key in sorted(self.nodes):
            if posixpath.dirname(key) == folder:
                yield posixpath.basename(key)


def kind_of(key: str) -> str:
    """What a key is by the documented layout: a kind, ``reference`` or ``other``."""
    parts, name = key.split("/"), posixpath.basename(key)
    if not name.endswith(".md") or name[0] in ".~#":
        return "other"
    if parts[0] == "notes":
        return "note"
    if len(parts) > 2 and parts[2] in {"users", "agents"}:
        parts = parts[2:]
    match parts:
        case ["users", _, "user.md"]:
            return "user_profile"
        case ["users", _, folder, _] | ["agents", _, folder, _] if folder in FOLDER.values():
            kind = next(kind for kind, named in FOLDER.items() if named == folder)
            return kind if (kind == "agent_case") == (parts[0] == "agents") else "other"
        case ["agents", _, "skills", _, "SKILL.md"]:
            return "agent_skill"
        case ["agents", _, "skills", _, "references", _]:
            return "reference"
    return "other"


def place(key: str) -> dict[str, object]:
    """What a path says of its owner."""
    parts = key.split("/")
    at = next(number for number, part in enumerate(parts) if part in {"users", "agents"})
    app, project = (parts[0], parts[1]) if at == 2 else ("default", "default")
    return {
        "app_id": "default" if app == "default_app" else app,
        "project_id": "default" if project == "default_project" else project,
        "owner_type": parts[at][:-1],
        "owner_id": parts[at + 1],
    }


def moment(number: int) -> datetime:
    """The time an entry says."""
    return datetime.fromtimestamp(START + 60 * number, UTC)


def _row(values: Mapping[str, object]) -> Row:
    return tuple(sorted(values.items(), key=lambda item: item[0]))


def _daily(key: str, content: Content) -> tuple[dict[str, Row], frozenset[str]]:
    rows, held = {}, set()
    names = [said.name for said in content.said]
    for said in content.said:
        if said.broken or names.count(said.name) > 1:
            held.add(said.name)
            continue
        owner = said.owner or place(key)["owner_id"]
        values = dict(zip((COLUMN[name] for name in SECTIONS[content.kind]), said.texts, strict=True))
        rows[said.name] = _row(
            values
            | place(key)
            | {
                "owner_id": owner,
                "id": f"{owner}_{said.name}",
                "session_id": f"s{said.number % 7}",
                "timestamp": moment(said.number),
                "parent_type": "memcell",
                "parent_id": f"mc_{said.number}",
                "sender_ids": ["u1", f"u{said.number}"],
            }
        )
    return rows, frozenset(held)


def _note(key: str, content: Content) -> tuple[dict[str, Row], frozenset[str]]:
    title = posixpath.basename(key).removesuffix(".md")
    return {
        said.name.casefold().replace(" ", "-"): _row(
            {"title": title, "heading": said.name, "content": said.texts[0], "owner_id": ""}
        )
        for said in content.said
    }, frozenset()


def _skill(key: str, content: Content, references: Mapping[str, Content]) -> State:
    name = posixpath.basename(posixpath.dirname(key))
    (said,) = content.said
    if said.broken:
        return State(held=frozenset({name}))
    told = "\n\n".join(f"{name}\n{found.said[0].texts[0]}" for name, found in sorted(references.items()))
    values = {"name": said.name, "description": said.texts[0], "content": said.texts[1], "references": told or None}
    return State({name: _row(values | place(key) | {"confidence": said.number / 10})})


def _profile(key: str, content: Content) -> State:
    (said,) = content.said
    if said.broken:
        return State(held=frozenset({"profile"}))
    owner = said.owner or place(key)["owner_id"]
    values = {"summary": said.texts[0], "content": said.texts[1]} | place(key)
    return State({"profile": _row(values | {"owner_id": owner, "id": f"{owner}_profile"})})


def _render_daily(content: Content) -> str:
    blocks = ["---\ntype: log\n---\n# a log\n\n"]
    for said in content.said:
        lines = [f"<!-- entry:{said.name} -->", f"## {said.name}", ""]
        if said.owner is not None:
            lines.append(f"**owner_id**: {said.owner}")
        when = "yesterday" if said.broken == "time" else moment(said.number).isoformat()
        lines += [f"**session_id**: s{said.number % 7}", f"**timestamp**: {when}", "**parent_type**: memcell"]
        lines += [f"**parent_id**: mc_{said.number}", f"**sender_ids**: [u1, u{said.number}]", ""]
        for name, text in zip(SECTIONS[content.kind], said.texts, strict=True):
            lines += [f"### {name}", "" if said.broken == "missing" else text, ""]
        lines += [f"<!-- /entry:{said.name} -->", "", ""]
        blocks.append("\n".join(lines))
    return "".join(blocks)


def _render_note(content: Content) -> str:
    return "".join(f"# {said.name}\n\n{said.texts[0]}\n\n" for said in content.said)


def _render_skill(content: Content) -> str:
    (said,) = content.said
    confidence = "high" if said.broken else said.number / 10
    return f"---\nname: {said.name}\ndescription: {said.texts[0]}\nconfidence: {confidence}\n---\n{said.texts[1]}\n"


def _render_profile(content: Content) -> str:
    (said,) = content.said
    owner = "" if said.owner is None else f"user_id: {said.owner}\n"
    stamp = "profile_timestamp_ms: soon\n" if said.broken else ""
    return f"---\n{owner}{stamp}summary: {said.texts[0]}\n---\n{said.texts[1]}\n"


def _render_plain(content: Content) -> str:
    return content.said[0].texts[0] + "\n"


RENDER = dict.fromkeys(SECTIONS, _render_daily) | {
    "note": _render_note,
    "agent_skill": _render_skill,
    "user_profile": _render_profile,
    "reference": _render_plain,
    "other": _render_plain,
}


class Account:
    """What each path went through since the index was last known, and so what it may hold now."""

    def __init__(self) -> None:
        self.history: dict[str, list[State]] = {}
        self.now: dict[str, State] = {}

    def saw(self, states: Mapping[str, State]) -> None:
        """The tree's states after one operation."""
        for key in self.now.keys() | states.keys():
            state = states.get(key, GONE)
            if state != self.now.get(key, GONE):
                self.history.setdefault(key, [State()]).append(state)
        self.now = dict(states)

    def check(self, index: Mapping[str, Mapping[str, Row]], standing: Mapping[str, str]) -> list[str]:
        """What is wrong with an index that has settled, given key -> entry id -> row, and key -> status in the queue.

        Remembers the index as known. A late event may have queued a racy file again; its standing is not judged.
        """
        wrong = []
        for key in sorted(self.history.keys() | index.keys() | self.now.keys()):
            wrong += self._wrong(key, index.get(key, {}))
            want = "failed" if self.now.get(key, GONE).failed else "done"
            if standing.get(key, want) not in {want, "pending", "processing"} or (
                want == "failed" and key not in standing
            ):
                wrong.append(f"{key!r}: is {standing.get(key)}, should be {want}")
        self.history = {
            key: [State(dict(index.get(key, {}))), *([state] if state.failed else [])]
            for key, state in self.now.items()
        }
        return wrong

    def _wrong(self, key: str, rows: Mapping[str, Row]) -> list[str]:
        state, history = self.now.get(key, GONE), self.history.get(key, [State()])
        wrong = [
            f"{key!r} {name!r}: has {rows.get(name)}, should be {row}"
            for name, row in state.rows.items()
            if not _same(rows.get(name), row)
        ]
        extra = sorted(rows.keys() - state.rows.keys() - state.held) if not state.all_held else []
        wrong += [f"{key!r} {name!r}: has {rows[name]}, should not be" for name in extra]
        doubtful = set(state.held)
        if state.all_held:
            doubtful |= {name for past in history for name in past.rows} | set(rows)
        for name in sorted(doubtful):
            allowed = [past.rows.get(name) for past in history if not past.all_held and name not in past.held]
            if not any(_same(rows.get(name), row) for row in allowed):
                wrong.append(f"{key!r} {name!r}: has {rows.get(name)}, should be one of {allowed}")
        return wrong


def _same(have: Row | None, want: Row | None) -> bool:
    """``have`` has every column of ``want``."""
    if have is None or want is None:
        return have is want
    columns = dict(have)
    return all(columns.get(name) == value for name, value in want)


__all__ = [
    "FOLDER",
    "GONE",
    "SECTIONS",
    "Account",
    "Content",
    "Link",
    "Row",
    "Said",
    "State",
    "Tree",
    "kind_of",
    "replace",
]
