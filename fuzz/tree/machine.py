"""The whole engine over a real tree under random operations: whenever it has settled, the index is what the writer remembers.

    python -m fuzz.tree --operations 1000 --seed 1 [--shrink]

The operations are drawn first, from the seed and the writer's model alone; each one that does not apply is skipped.
That is why a failing run can be shrunk by leaving operations out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from everos_engine.engine import Engine, open_engine
from everos_engine.settings import Settings, load
from everos_engine.testing import FakeEmbedder
from everos_engine.text import kinds
from fuzz.tree.model import FOLDER, GONE, SECTIONS, Account, Content, Link, Row, Said, Tree, kind_of, replace

Operation = tuple[str, tuple[str, ...], int]
"""Its name, the keys or directories it is about, and the seed of everything else."""
HOMES = {
    "users": ["users/u1", "users/it's u2", "app one/project/users/u3", "default_app/default_project/users/ü4"],
    "agents": ["agents/a1", "agents/a 2", "app one/project/agents/a3"],
}
NAMES = [
    "one.md",
    "two words.md",
    "q'uote\".md",
    "%41#?.md",
    "new\nline.md",
    "🦦.md",
    "e\u0301.md",
    "$(x).md",
    "x" * 120 + ".md",
]
STRANGE = ["README.txt", "loose.md", "users/readme.md", "users/u1/episodes/.hidden.md", "users/u1/episodes/~draft.md"]
DAMAGE = {"note": ["frontmatter", "utf-8", "nul", "empty"], "reference": ["utf-8", "nul"], "other": ["nul"]}
DAMAGE |= {kind: ["yaml", "marker", "frontmatter", "utf-8", "nul", "empty"] for kind in SECTIONS}
DAMAGE |= {kind: ["yaml", "frontmatter", "utf-8", "nul", "empty"] for kind in ("agent_skill", "user_profile")}
SETTLE_SECONDS = 300
"""No settling takes a tenth of it: what takes longer hangs."""


class Mismatch(AssertionError):
    """The index is not what the tree says."""


class Writer:
    """Draws and applies operations, on disk and in the model alike."""

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self.tree = Tree()
        self.number = 0

    # drawing

    def draw(self, chance: random.Random) -> Operation:
        """An operation that applies to the tree as it is."""
        name = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        files, directories = self.tree.files(), self.tree.directories()
        keys: tuple[str, ...] = ()
        if name in {"write", "replace", "make_directory", "move_in"} or not files:
            name = name if name in {"write", "replace", "make_directory", "move_in"} else "write"
            keys = (self._fresh(chance),)
        elif name in {"rename", "copy", "link"}:
            source = chance.choice(files)
            keys = (source, self._like(chance, source))
        elif name in {"rename_directory", "remove_directory"}:
            if not directories:
                return self.draw(chance)
            source = chance.choice(directories)
            self.number += 1
            keys = (source, f"{source.rpartition('/')[0]}/moved{chance.randrange(10**6)}")
        elif name == "link_directory":
            skills = [key[: -len("/SKILL.md")] for key in self.tree.files("agent_skill")]
            if not directories:
                return self.draw(chance)
            target = f"{chance.choice(directories)}/linked{chance.randrange(10**6)}"
            keys = (
                chance.choice(directories),
                f"{chance.choice(skills)}/references" if skills and chance.random() < 0.3 else target,
            )
        elif name == "through_link":
            links = [(key, node.target) for key, node in sorted(self.tree.nodes.items()) if isinstance(node, Link)]
            ways = [
                (real, key + real[len(to) :])
                for key, to in links
                for real in self.tree.files()
                if real.startswith(to + "/")
            ]
            if not ways:
                return self.draw(chance)
            keys = chance.choice(ways)
        elif name == "reference":
            skills = self.tree.files("agent_skill")
            if not skills:
                return self.draw(chance)
            keys = (f"{chance.choice(skills)[: -len('SKILL.md')]}references/{chance.choice(['a', 'b c', 'ü'])}.md",)
        else:
            keys = (chance.choice(files),)
        return name, keys, chance.randrange(1 << 30)

    def _fresh(self, chance: random.Random) -> str:
        kind = chance.choice([*FOLDER, *FOLDER, "agent_skill", "user_profile", "note", "note", "other"])
        if kind == "other":
            return chance.choice(STRANGE)
        if kind == "note":
            return f"notes/{chance.choice(['', 'deep/', 'very/deep/'])}{chance.choice(NAMES)}"
        if kind == "user_profile":
            return f"{chance.choice(HOMES['users'])}/user.md"
        home = chance.choice(HOMES["agents" if kind.startswith("agent") else "users"])
        if kind == "agent_skill":
            return f"{home}/skills/{chance.choice(['bake', 'fix a bug'])}/SKILL.md"
        return f"{home}/{FOLDER[kind]}/{chance.choice(NAMES)}"

    def _like(self, chance: random.Random, source: str) -> str:
        """A key of the same kind, of the same or another owner."""
        want = kind_of(source)
        for _ in range(60):
            key = self._fresh(chance)
            if kind_of(key) == want and key != source:
                return key
        return source

    # applying

    def apply(self, operation: Operation) -> bool:
        """Do it; False where it does not apply (any more)."""
        name, keys, seed = operation
        chance = random.Random(seed)
        return bool(getattr(self, f"do_{name}")(chance, *keys))

    def do_write(self, chance: random.Random, key: str) -> bool:
        if isinstance(self.tree.nodes.get(key), Link):
            return False
        return self._save(key, self._content(chance, key))

    def do_replace(self, chance: random.Random, key: str) -> bool:
        content = self._content(chance, key)
        self.tree.nodes[key] = content
        if self.root is not None:
            path = self.path(key)
            temporary = path.with_name(f".{chance.randrange(10**9)}.tmp")
            temporary.write_bytes(content.data)
            os.replace(temporary, path)
        return True

    def do_append(self, chance: random.Random, key: str) -> bool:
        content = self._file(key)
        if content is None or content.kind not in {*SECTIONS, "note"} or content.damage:
            return False
        return self._save(key, replace(content, said=(*content.said, self._said(chance, content.kind, key))))

    def do_edit_entry(self, chance: random.Random, key: str) -> bool:
        content = self._file(key)
        if content is None or not content.said:
            return False
        at = chance.randrange(len(content.said))
        new = replace(self._said(chance, content.kind, key), name=content.said[at].name)
        return self._save(key, replace(content, said=(*content.said[:at], new, *content.said[at + 1 :])))

    def do_remove_entry(self, chance: random.Random, key: str) -> bool:
        content = self._file(key)
        if content is None or len(content.said) < 2:
            return False
        at = chance.randrange(len(content.said))
        return self._save(key, replace(content, said=(*content.said[:at], *content.said[at + 1 :])))

    def do_break_entry(self, chance: random.Random, key: str) -> bool:
        content = self._file(key)
        if content is None or not content.said or content.kind in {"note", "reference", "other"}:
            return False
        at, how = chance.randrange(len(content.said)), chance.choice(["time", "missing", "twice"])
        said = content.said[at]
        if how == "twice" and content.kind in SECTIONS:
            return self._save(key, replace(content, said=(*content.said, replace(said, number=said.number + 1))))
        broken = replace(said, broken="time" if how == "twice" else how)
        return self._save(key, replace(content, said=(*content.said[:at], broken, *content.said[at + 1 :])))

    def do_damage(self, chance: random.Random, key: str) -> bool:
        content = self._file(key)
        return content is not None and self._save(key, replace(content, damage=chance.choice(DAMAGE[content.kind])))

    def do_heal(self, chance: random.Random, key: str) -> bool:
        hurt = [
            key
            for key, node in sorted(self.tree.nodes.items())
            if isinstance(node, Content) and (node.damage or any(said.broken for said in node.said))
        ]
        if not hurt:
            return False
        key = chance.choice(hurt)
        content = self._file(key)
        if content is None:
            return False
        whole = {said.name: replace(said, broken=None) for said in content.said}
        return self._save(key, replace(content, damage=None, said=tuple(whole.values())))

    def do_same_size_and_time(self, _chance: random.Random, key: str) -> bool:
        """An edit that leaves size and mtime as they were."""
        content = self._file(key)
        if content is None or content.damage or not content.said:
            return False
        said = content.said[0]
        new = replace(said, texts=(said.texts[0].translate(str.maketrans("mnz", "nzm")), *said.texts[1:]))
        before = self.path(key).stat() if self.root is not None else None
        self._save(key, replace(content, said=(new, *content.said[1:])))
        if before is not None:
            os.utime(self.path(key), ns=(before.st_atime_ns, before.st_mtime_ns))
            if self.path(key).stat().st_size != before.st_size:
                message = "the edit was to keep the size"
                raise AssertionError(message)
        return True

    def do_touch(self, _chance: random.Random, key: str) -> bool:
        if self._file(key) is None:
            return False
        if self.root is not None:
            os.utime(self.path(key))
        return True

    def do_delete(self, _chance: random.Random, key: str) -> bool:
        if self.tree.nodes.pop(key, None) is None:
            return False
        if self.root is not None:
            self.path(key).unlink()
        return True

    def do_rename(self, _chance: random.Random, key: str, target: str) -> bool:
        if self._file(key) is None or key == target:
            return False
        self.tree.nodes[target] = self.tree.nodes.pop(key)
        if self.root is not None:
            os.replace(self.path(key), self.path(target))
        return True

    def do_copy(self, chance: random.Random, key: str, target: str) -> bool:
        content = self._file(key)
        if content is None or key == target or isinstance(self.tree.nodes.get(target), Link):
            return False
        self.tree.nodes[target] = content
        if self.root is not None:
            chance.choice([shutil.copy2, shutil.copyfile])(self.path(key), self.path(target))
        return True

    def do_link(self, _chance: random.Random, key: str, target: str) -> bool:
        """A symbolic link at ``target`` to ``key``, where nothing is yet."""
        if self._file(key) is None or target in self.tree.nodes or kind_of(key) not in {*SECTIONS, "note"}:
            return False
        self.tree.nodes[target] = Link(key)
        if self.root is not None:
            self.path(target).symlink_to(self.path(key))
        return True

    def do_link_directory(self, _chance: random.Random, source: str, target: str) -> bool:
        """A symbolic link to a directory: what lies behind it is not part of the tree."""
        if target in self.tree.nodes or self.tree.below(target) or not self.tree.below(source):
            return False
        self.tree.nodes[target] = Link(source)
        if self.root is not None:
            path = self.path(target)
            if path.is_dir():
                path.rmdir()  # its files went
            path.symlink_to(self.root / source)
        return True

    def do_through_link(self, chance: random.Random, key: str, way: str) -> bool:
        """An edit by a path that goes through a link to a directory."""
        content = self._file(key)
        if content is None or not content.said or (self.root is not None and not (self.root / way).is_file()):
            return False
        new = replace(self._said(chance, content.kind, key), name=content.said[0].name)
        self.tree.nodes[key] = content = replace(content, said=(new, *content.said[1:]))
        if self.root is not None:
            (self.root / way).write_bytes(content.data)
        return True

    def do_rename_directory(self, _chance: random.Random, source: str, target: str) -> bool:
        below = self.tree.below(source)
        if not below or (self.root is not None and (self.root / target).exists()):
            return False
        for key in below:
            self.tree.nodes[target + key[len(source) :]] = self.tree.nodes.pop(key)
        if self.root is not None:
            (self.root / source).rename(self.root / target)
        return True

    def do_remove_directory(self, chance: random.Random, source: str, _target: str) -> bool:
        below = self.tree.below(source)
        if not below or (len(below) > 6 and chance.random() < 0.8):
            return False
        for key in below:
            del self.tree.nodes[key]
        if self.root is not None:
            shutil.rmtree(self.root / source)
        return True

    def do_make_directory(self, chance: random.Random, key: str) -> bool:
        """A directory made and filled at once."""
        folder = f"notes/made{chance.randrange(10**6)}/sub"
        for number in range(chance.randint(1, 8)):
            self._save(f"{folder}/{number}.md", self._content(chance, "notes/x.md"))
        return key != ""

    def do_move_in(self, chance: random.Random, _key: str) -> bool:
        """A directory filled elsewhere and moved in whole."""
        folder = f"notes/moved{chance.randrange(10**6)}"
        contents = [self._content(chance, "notes/x.md") for _ in range(chance.randint(1, 5))]
        self.tree.nodes |= {f"{folder}/d/{number}.md": content for number, content in enumerate(contents)}
        if self.root is not None:
            aside = self.root.parent / f"aside{chance.randrange(10**9)}"
            (aside / "d").mkdir(parents=True)
            for number, content in enumerate(contents):
                (aside / "d" / f"{number}.md").write_bytes(content.data)
            (self.root / "notes").mkdir(exist_ok=True)
            aside.rename(self.root / folder)
        return True

    def do_reference(self, chance: random.Random, key: str) -> bool:
        if isinstance(self.tree.nodes.get(key), Link) or key.rpartition("/")[0] in self.tree.nodes:
            return False
        if key in self.tree.nodes and chance.random() < 0.3:
            return self.do_delete(chance, key)
        return self._save(key, Content("reference", (Said("", (self._words(chance),)),)))

    def path(self, key: str) -> Path:
        """Where a key is on disk, its directory made."""
        if self.root is None:
            raise AssertionError
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _file(self, key: str) -> Content | None:
        node = self.tree.nodes.get(key)
        return node if isinstance(node, Content) else None

    def _save(self, key: str, content: Content) -> bool:
        self.tree.nodes[key] = content
        if self.root is not None:
            self.path(key).write_bytes(content.data)
        return True

    def _content(self, chance: random.Random, key: str) -> Content:
        kind = kind_of(key)
        many = chance.randint(0, 5) if kind in SECTIONS else chance.randint(1, 4) if kind == "note" else 1
        said = tuple(self._said(chance, kind, key) for _ in range(many))
        return Content(kind, said, style=chance.choice(["lf", "lf", "crlf", "bom"]))

    def _said(self, chance: random.Random, kind: str, key: str) -> Said:
        number = chance.randrange(10**8)
        owner = None
        if kind in {*SECTIONS, "user_profile"} and kind == kind_of(key) and chance.random() < 0.5:
            parts = key.split("/")
            owner = parts[parts.index("users" if "users" in parts else "agents") + 1]
        if kind in {"agent_skill", "user_profile"}:
            name = f"name{number}"
            return Said(name, (self._words(chance), self._text(chance)), number % 10, owner)
        name = f"Heading {number}" if kind == "note" else f"e_{number:08d}"
        texts = tuple(self._text(chance) for _ in SECTIONS.get(kind, ("one",)))
        return Said(name, texts, number, owner)

    def _words(self, chance: random.Random) -> str:
        return " ".join(f"m{chance.randrange(10**7)}n" for _ in range(chance.randint(1, 3))) + " zebra"

    def _text(self, chance: random.Random) -> str:
        text = self._words(chance)
        if chance.random() < 0.2:
            text += "\n```\n<!-- entry:e_1 -->\n# no heading\n### Fact\n```\nafter"
        return text + (" 🦦 naïve 'q' \"q\" -- \\" if chance.random() < 0.2 else "")


WEIGHTS = {
    "write": 10, "replace": 6, "append": 12, "edit_entry": 16, "remove_entry": 5, "break_entry": 4, "damage": 4,
    "heal": 8, "same_size_and_time": 6, "touch": 4, "delete": 6, "rename": 6, "copy": 6, "link": 2,
    "rename_directory": 2, "remove_directory": 1, "make_directory": 1, "move_in": 1, "reference": 6,
    "link_directory": 2, "through_link": 4,
}  # fmt: skip


def drawn(seed: int, count: int) -> list[Operation]:
    """The operations of a seed."""
    chance, writer = random.Random(seed), Writer(None)
    operations: list[Operation] = []
    while len(operations) < count:
        operation = writer.draw(chance)
        if writer.apply(operation):
            operations.append(operation)
    return operations


async def run(operations: Sequence[Operation], seed: int, *, told: Callable[[str], None] = lambda _: None) -> int:
    """Apply the operations with an engine running, checking whenever it settles; how often that was. Raises Mismatch."""
    with tempfile.TemporaryDirectory(prefix="everos-tree-") as directory:
        root = Path(directory) / "a root, 100% #1"
        root.mkdir()
        return await _Run(root, seed).through(operations, told)


class _Run:
    def __init__(self, root: Path, seed: int) -> None:
        self.chance = random.Random(seed + 1)
        self.writer, self.account, self.root = Writer(root), Account(), root
        self.embedder = FakeEmbedder()
        flags = {
            "memory.root": str(root),
            "note.globs": ["notes/**/*.md", "notes/*.md"],
            "worker_retry_backoff_seconds": 0.01,
            "brake_ratio": 1.0,  # what this writer deletes is meant to be gone
            "lancedb.optimize_after_commits": 8,
            "lancedb.optimize_idle_seconds": 0.05,
        }
        self.settings: Settings = load(flags, environment={}, user_file=root / "none.toml")
        self.checks = 0

    async def through(self, operations: Sequence[Operation], told: Callable[[str], None]) -> int:
        waiting = list(operations)
        while waiting:
            async with AsyncExitStack() as stack:
                engine = await stack.enter_async_context(open_engine(self.settings, embedder=self.embedder))
                for _ in range(self.chance.randint(4, 12)):
                    await self._burst(waiting)
                    await self._check(engine)
                    told(f"{len(operations) - len(waiting)} operations, {self.checks} checks")
                    if not waiting:
                        break
            for _ in range(self.chance.randint(0, 4)):  # while no engine runs
                if waiting:
                    self._do(waiting.pop(0))
            if self.chance.random() < 0.2:
                shutil.rmtree(self.settings.lancedb_directory, ignore_errors=True)
                self.account.history = {key: [GONE, *past] for key, past in self.account.history.items()}
        return self.checks

    async def _burst(self, waiting: list[Operation]) -> None:
        for _ in range(self.chance.randint(1, 12)):
            if not waiting:
                return
            self._do(waiting.pop(0))
            if self.chance.random() < 0.3:
                await trio.sleep(self.chance.random() * 0.1)  # let it land anywhere in the engine's work
            else:
                await trio.lowlevel.checkpoint()

    def _do(self, operation: Operation) -> None:
        try:
            self.writer.apply(operation)
        except OSError as error:
            message = f"{operation} could not be done: {error}"
            raise RuntimeError(message) from error
        self.account.saw(self.writer.tree.states())

    async def _check(self, engine: Engine) -> None:
        with trio.move_on_after(SETTLE_SECONDS) as scope:
            status = await engine.settle()
        if scope.cancelled_caught:
            message = f"not settled within {SETTLE_SECONDS} s: {await engine.status()}"
            raise Mismatch(message)
        index = await rows_of(engine)
        standing = await engine.context.database.aread(
            lambda tx: dict(tx.execute("SELECT md_path, status FROM md_change_state"))  # type: ignore[arg-type]
        )
        wrong = self.account.check(index, standing)
        told = {kind: count for kind, count in status.rows.items() if count}
        have: dict[str, int] = {}
        for key, rows in index.items():
            place = kinds.recognise(key, note_globs=self.settings.note.globs)
            have[place.kind if place else ""] = have.get(place.kind if place else "", 0) + len(rows)
        if told != have:
            wrong.append(f"status says {told}, the index has {have}")
        wrong += await self._searches(engine, index)
        self.checks += 1
        if wrong:
            raise Mismatch("\n".join(wrong[:20]))

    async def _searches(self, engine: Engine, index: dict[str, dict[str, Row]]) -> list[str]:
        places: dict[str, set[tuple[str, str]]] = {}
        for key, rows in index.items():
            place = kinds.recognise(key, note_globs=self.settings.note.globs)
            for name, row in rows.items():
                for column, value in row:
                    if place and column in kinds.KINDS[place.kind].fts_columns and isinstance(value, str):
                        for word in value.split():
                            if word[0] == "m" and word[-1] == "n" and word[1:-1].isdigit():
                                places.setdefault(word, set()).add((key, name))
        wrong = []
        for word in [*self.chance.sample(sorted(places), min(3, len(places))), "m99999999n"]:
            found = {(hit.md_path, hit.entry_id) for hit in await engine.search(word, limit=100)}
            if found != places.get(word, set()):
                wrong.append(f"search {word!r} found {found}, should find {places.get(word)}")
        return wrong


async def rows_of(engine: Engine) -> dict[str, dict[str, Row]]:
    """Key -> entry id -> row, of the whole index. Raises Mismatch for a key that is there twice."""
    found: dict[str, dict[str, Row]] = {}
    for kind in engine.context.index.open_kinds():
        for row in await engine.context.index.rows(kind):
            key, name = str(row.pop("md_path")), str(row.pop("entry_id"))
            for column in ("content_hash", "vector"):
                row.pop(column, None)
            if name in found.setdefault(key, {}):
                message = f"{key!r} {name!r} is there twice"
                raise Mismatch(message)
            found[key][name] = tuple(sorted(row.items(), key=lambda item: item[0]))
    return found


def shrink(operations: list[Operation], seed: int) -> list[Operation]:
    """Fewer operations that still fail, by leaving out ever smaller runs of them."""
    size = len(operations) // 2
    while size:
        start = 0
        while start < len(operations):
            fewer = operations[:start] + operations[start + size :]
            if _fails(fewer, seed):
                operations = fewer
                print(f"still fails with {len(operations)} operations", file=sys.stderr, flush=True)
            else:
                start += size
        size //= 2
    return operations


def _fails(operations: list[Operation], seed: int) -> str | None:
    try:
        trio.run(run, operations, seed)
    except Mismatch as error:
        return str(error)
    return None


def main() -> int:
    """Run it; exit status 1 on a mismatch, with the way to see it again."""
    parser = argparse.ArgumentParser(
        prog="python -m fuzz.tree", description=__doc__.split("\n", 1)[0] if __doc__ else ""
    )
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--shrink", action="store_true")
    arguments = parser.parse_args()
    operations = drawn(arguments.seed, arguments.operations)
    started = time.monotonic()
    try:
        checks = trio.run(run, operations, arguments.seed)
    except Mismatch as error:
        print(f"seed {arguments.seed}: {error}", file=sys.stderr)
        print(f"again: python -m fuzz.tree --operations {len(operations)} --seed {arguments.seed} --shrink")
        if arguments.shrink:
            for operation in shrink(operations, arguments.seed):
                print(json.dumps(operation))
        return 1
    seconds = time.monotonic() - started
    print(
        f"tree_machine: seed {arguments.seed}: {len(operations)} operations, {checks} checks, {seconds:.0f} s: in step"
    )
    return 0
