"""A realistic memory, made by chance, and its small edits: users and an agent with daily logs, skills and profiles.

Its shape (files of each kind, entries a file, lengths of texts, two languages) is that of a memory of two chat groups over
half a year. Words are made up, with the frequencies of a natural language: a few are everywhere, most are rare.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

ROWS = 1600
"""Rows of the memory when it is planted, about."""
USERS = tuple(f"user_{number}" for number in range(101, 109))
AGENT = "sales_assistant"
DAYS, VOCABULARY, IDEOGRAPHS = 180, 6000, 1500
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in ("a", "e", "i", "o", "u", "ai", "ou")]
SHARE_CHINESE = 0.3
PER_DAY = {"atomic_fact": (4, 14), "episode": (1, 2), "foresight": (1, 1), "agent_case": (1, 3)}
"""Least and most entries of one day's file."""
FOLDERS = {"atomic_fact": ".atomic_facts", "episode": "episodes", "foresight": ".foresights", "agent_case": ".cases"}
IDS = {"atomic_fact": "af", "episode": "ep", "foresight": "fs", "agent_case": "ac"}
EDITS = (
    "append",
    "append",
    "append",
    "replace",
    "replace",
    "replace",
    "remove",
    "new file",
    "remove file",
    "rename",
    "profile",
)


@dataclass(slots=True)
class Log:
    """One daily log: its kind, its owner, its date, and its entries by id."""

    kind: str
    owner: str
    date: str
    entries: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Memory:
    """A memory below ``root``. ``plant`` writes the first files, ``edit`` changes one of them as an agent or a person does."""

    root: Path
    chance: random.Random
    rows: int = ROWS
    logs: dict[Path, Log] = field(default_factory=dict)
    serial: int = 0
    edits: int = 0
    _words: list[str] = field(default_factory=list)
    _weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        while len(self._words) < VOCABULARY:
            self._words.append("".join(self.chance.choices(SYLLABLES, k=self.chance.randint(1, 4))))
        self._weights = list(accumulate(1 / (rank + 3) for rank in range(VOCABULARY)))

    def plant(self) -> None:
        """Write daily logs until there are enough rows, then profiles and skills."""
        while sum(len(log.entries) for log in self.logs.values()) < self.rows:
            self.add_file()
        for user in USERS:
            self.write_profile(user)
        for number in range(8):
            self.write_skill(number)

    def edit(self) -> None:
        """Change one file. The memory keeps its size: what removes is as likely as what adds."""
        self.edits += 1
        held = sum(len(log.entries) for log in self.logs.values())
        how = self.chance.choice(EDITS)
        if held > 1.05 * self.rows:
            how = self.chance.choice(["remove", "remove file"])
        elif held < 0.95 * self.rows:
            how = self.chance.choice(["append", "new file"])
        path = self.chance.choice(list(self.logs))
        log = self.logs[path]
        if how == "new file":
            self.add_file()
        elif how == "profile":
            self.chance.choice(
                [
                    lambda: self.write_profile(self.chance.choice(USERS)),
                    lambda: self.write_skill(self.chance.randrange(8)),
                ]
            )()
        elif how == "rename":
            moved = path.with_name(f"{log.kind}-{self.new_date()}.md")
            if moved not in self.logs:
                path.rename(moved)
                self.logs[moved] = self.logs.pop(path)
        elif how == "remove file" or (how == "remove" and len(log.entries) == 1):
            path.unlink()
            del self.logs[path]
        else:
            if how != "append":
                del log.entries[self.chance.choice(list(log.entries))]
            if how != "remove":
                self.add_entry(log)
            self.write(path)

    def add_file(self) -> None:
        """Write a new day of a random owner."""
        kind = self.chance.choices(list(PER_DAY), weights=(10, 10, 4, 5))[0]
        owner = AGENT if kind == "agent_case" else self.chance.choice(USERS)
        log = Log(kind, owner, self.new_date())
        track = "agents" if kind == "agent_case" else "users"
        path = self.root / "acme" / "sales_bot" / track / owner / FOLDERS[kind] / f"{kind}-{log.date}.md"
        if path in self.logs:
            return
        for _ in range(self.chance.randint(*PER_DAY[kind])):
            self.add_entry(log)
        self.logs[path] = log
        self.write(path)

    def add_entry(self, log: Log) -> None:
        """Add an entry with an id of its own."""
        self.serial += 1
        entry_id = f"{IDS[log.kind]}_{log.date.replace('-', '')}_{self.serial:08d}"
        inline = f"**owner_id**: {log.owner}\n**session_id**: team_chat_{self.serial % 40}\n**timestamp**: {log.date}T09:25:00+00:00\n"
        inline += f"**parent_type**: memcell\n**parent_id**: mc_{self.serial:012x}\n"
        subject = self.text(8, 12)
        if log.kind == "atomic_fact":
            body = f"### Fact\n{self.text(4, 20)}\n"
        elif log.kind == "episode":
            body = f"### Subject\n{subject}\n\n### Summary\n{self.text(25, 35)}\n\n### Content\n{self.text(30, 160)}\n"
        elif log.kind == "foresight":
            span = f"**start_time**: {log.date}T06:00:00+00:00\n**end_time**: {log.date}T07:00:00+00:00\n**duration_days**: 7\n"
            inline, body = inline + span, f"### Foresight\n{self.text(20, 50)}\n\n### Evidence\n{self.text(20, 40)}\n"
        else:
            inline += "**quality_score**: 0.6\n"
            body = f"### TaskIntent\n{subject}\n\n### Approach\n{self.text(60, 120)}\n\n### KeyInsight\n{self.text(15, 30)}\n"
        log.entries[entry_id] = (
            f"<!-- entry:{entry_id} -->\n## {entry_id}\n\n{inline}\n{body}<!-- /entry:{entry_id} -->\n"
        )

    def write(self, path: Path) -> None:
        """Save a log."""
        log = self.logs[path]
        who = (
            f"agent_id: {log.owner}\ntrack: agent" if log.kind == "agent_case" else f"user_id: {log.owner}\ntrack: user"
        )
        head = f"---\ntype: {log.kind}_daily\nschema_version: 1\n{who}\ndate: '{log.date}'\nentry_count: {len(log.entries)}\n---\n"
        save(path, head + "".join(log.entries.values()))

    def write_profile(self, user: str) -> None:
        """Save a user's profile, with a new summary."""
        head = f"---\nid: user_profile_{user}\ntype: user_profile\nuser_id: {user}\ntrack: user\nsummary: '{self.text(10, 20)}'\n---\n"
        save(self.root / "acme" / "sales_bot" / "users" / user / "user.md", f"{head}# {user}\n\n{self.text(20, 60)}\n")

    def write_skill(self, number: int) -> None:
        """Save a skill and the page it refers to."""
        name = f"skill_{number}"
        place = self.root / "acme" / "sales_bot" / "agents" / AGENT / "skills" / name
        head = f"---\nid: {name}\ntype: agent_skill\nagent_id: {AGENT}\ntrack: agent\nname: {name}\ndescription: '{self.text(6, 12)}'\nconfidence: 0.8\n---\n"
        save(place / "references" / "background.md", f"# Background\n\n{self.text(60, 120)}\n")
        save(place / "SKILL.md", f"{head}## Steps\n\n{self.text(60, 120)}\n")

    def text(self, least: int, most: int) -> str:
        """So many words, or as many pairs of ideographs."""
        count = self.chance.randint(least, most)
        if self.chance.random() < SHARE_CHINESE:
            return "".join(chr(0x4E00 + int(IDEOGRAPHS * self.chance.random() ** 2)) for _ in range(2 * count)) + "。"
        return " ".join(self.chance.choices(self._words, cum_weights=self._weights, k=count)) + "."

    def question(self) -> str:
        """A few words that somebody may ask for."""
        return self.text(1, 4)

    def new_date(self) -> str:
        """A day of half a year."""
        day = self.chance.randrange(DAYS)
        return f"2025-{1 + day // 28:02d}-{1 + day % 28:02d}"


def save(path: Path, text: str) -> None:
    """Save whole, as an editor does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
