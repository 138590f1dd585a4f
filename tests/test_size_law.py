"""Work, memory and output grow no faster than the size of the input, for any kind of input."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from loguru import logger

from everos_engine import search
from everos_engine.cli.logs import set_up
from everos_engine.engine import open_engine
from everos_engine.errors import (
    MAX_ERROR_CHARACTERS,
    MAX_QUOTED_CHARACTERS,
    BadFile,
    BadQuestion,
    SettingsError,
    clipped,
    quoted,
)
from everos_engine.loops.job import Job, complaint
from everos_engine.search import MAX_WORDS, SNIPPET_WORDS, bounded, check_question, snippet, snippet_words
from everos_engine.settings import Settings, load, parse_size
from everos_engine.stores.queue import Claim
from everos_engine.system import files
from everos_engine.testing import FakeEmbedder
from everos_engine.text import diff, kinds
from everos_engine.text.entries import Document, Place
from everos_engine.text.kinds.layout import nearest
from everos_engine.text.markdown import MAX_ENTRIES
from everos_engine.text.terms import terms
from patience import HANG_SECONDS
from writer import fact, put

PLACES = {
    "note": Place("n.md", "note", "default", "default", "", ""),
    "atomic_fact": Place("users/u/.atomic_facts/x.md", "atomic_fact", "default", "default", "user", "u"),
    "agent_case": Place("agents/u/.cases/x.md", "agent_case", "default", "default", "agent", "u"),
    "agent_skill": Place("agents/u/skills/s/SKILL.md", "agent_skill", "default", "default", "agent", "u"),
    "user_profile": Place("users/u/user.md", "user_profile", "default", "default", "user", "u"),
}
OPENED = "---\n---\n<!-- entry:a -->\n**timestamp**: 2025-01-01\n"
CLOSED = "\n<!-- /entry:a -->\n"


def repeated(part: str, *, before: str = "", after: str = "") -> Callable[[int], str]:
    return lambda size: before + part * (size // len(part)) + after


SHAPES: dict[str, tuple[str, Callable[[int], str]]] = {
    "a long heading above many": ("note", lambda size: f"# {'x' * (size // 2)}\n" + "## a\n" * (size // 10)),
    "six long headings above many": (
        "note",
        lambda size: "".join(f"{'#' * level} {'y' * (size // 12)}\n" for level in range(1, 6))
        + "###### a\n" * (size // 18),
    ),
    "headings ever deeper": ("note", repeated("# a\n## b\n### c\n#### d\n##### e\n###### f\n")),
    "the same heading": ("note", repeated("# a\n")),
    "a long title above many": ("note", lambda size: f"---\ntitle: {'t' * min(size // 2, 60_000)}\n---\n" + "# a\n" * (size // 8)),
    "fences": ("note", repeated("```\n")),
    "fences of both sorts": ("note", repeated("```\n~~~\n")),
    "backticks": ("note", repeated("`", after=" x `")),
    "tildes": ("note", repeated("~")),
    "hashes": ("note", repeated("#")),
    "blanks": ("note", repeated(" ", after="# x")),
    "tabs": ("note", repeated("\t")),
    "carriage returns": ("note", repeated("\r")),
    "combining characters": ("note", repeated("\u0301", before="# e")),
    "joined words": ("note", repeated("a_B.c:D")),
    "dots": ("note", repeated("a.")),
    "capitals": ("note", repeated("aA")),
    "keys": ("note", lambda size: "---\n" + "".join(f"k{n}: {n}\n" for n in range(min(size, 60_000) // 14)) + "---\nx"),
    "nested keys": ("note", repeated("- ", before="---\na: ", after="\n---\nx")),
    "a quote that never ends": ("note", repeated("x\n", before='---\na: "', after="\n---\n")),
    "frontmatter that never ends": ("note", repeated("a: b\n", before="---\n")),
    "entries": (
        "atomic_fact",
        lambda size: "---\n---\n" + "".join(fact(n, "x", owner="u") for n in range(size // 250)),
    ),
    "empty entries": (
        "atomic_fact",
        lambda size: "---\n---\n" + "".join(f"<!-- entry:{n} -->\n<!-- /entry:{n} -->\n" for n in range(size // 40)),
    ),
    "one id": ("atomic_fact", repeated("<!-- entry:a -->\n<!-- /entry:a -->\n", before="---\n---\n")),
    "a marker of one line": ("atomic_fact", repeated("x", before="---\n---\n<!-- entry:", after=" -->\n")),
    "a closing marker of one line": ("atomic_fact", repeated("x", before="---\n---\n<!-- /entry:", after=" -->\n")),
    "an entry that never ends": ("atomic_fact", repeated("x\n", before=OPENED)),
    "an owner of one line": ("atomic_fact", repeated("o", before=OPENED + "**owner_id**: ", after=CLOSED)),
    "stars": ("atomic_fact", repeated("*", before=OPENED, after=CLOSED)),
    "a long inline key": ("atomic_fact", repeated("k", before=OPENED + "**", after="**: v" + CLOSED)),
    "blanks in a marker": ("atomic_fact", repeated(" ", before="---\n---\n<!--", after="entry:a -->\n")),
    "sections": ("atomic_fact", repeated("### Fact\n", before=OPENED, after=CLOSED)),
    "a number of one line": ("agent_case", repeated("1", before=OPENED + "**quality_score**: ", after="x" + CLOSED)),
    "a list of one line": ("agent_case", repeated("a,", before=OPENED + "**sender_ids**: [", after="]" + CLOSED)),
    "an open quote in a list": ("agent_case", repeated("a", before=OPENED + '**sender_ids**: ["', after="]" + CLOSED)),
    "odd quotes in a list": ("agent_case", repeated(' "a', before=OPENED + "**sender_ids**: [", after="]" + CLOSED)),
    "escapes in a list": ("agent_case", repeated("\\'", before=OPENED + "**sender_ids**: ['", after="x]" + CLOSED)),
    "blanks in a list": ("agent_case", repeated(" ", before=OPENED + '**sender_ids**: ["a"', after="y]" + CLOSED)),
    "a skill of one line": ("agent_skill", repeated("x", before="---\nname: s\n---\n")),
    "a profile of one value": ("user_profile", lambda size: f"---\nprofile_timestamp_ms: {[0] * min(size // 3, 20_000)}\n---\n"),
}  # fmt: skip


def outcome(kind: str, text: str) -> Document | BadFile:
    try:
        return kinds.parse(PLACES[kind], {PLACES[kind].md_path: text.encode()})
    except BadFile as error:
        return error


def parsed_in_full(kind: str, text: str) -> object:
    """Everything that is made of a file before it is written."""
    found = outcome(kind, text)
    if isinstance(found, BadFile):
        return str(found)
    job = Job(Claim("x.md", kind, 1, 1, 1, 0, 0, "scan"), document=found, problems=list(found.problems))
    return diff.plan(found, {}), complaint(job)


def entries(found: object) -> int:
    return len(found.entries) + len(found.problems) if isinstance(found, Document) else 0


def made(found: object) -> int:
    """How many characters a document has beyond its structure."""
    if isinstance(found, BadFile):
        return len(str(found))
    assert isinstance(found, Document)
    texts = [len(str(value)) for entry in found.entries for value in entry.values.values()]
    return sum(texts) + sum(len(entry.embed_text) + len(entry.entry_id) for entry in found.entries)


def cost(work: Callable[[], object]) -> tuple[int, int]:
    """How many functions ``work`` calls, of Python and of C, and the bytes of memory it takes at its peak."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    threading.setprofile(None)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    tracemalloc.start()
    try:
        work()
        return calls, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


SMALL, TIMES = 4_000, 4
CALLS, BYTES, CHARACTERS = 40, 1600, 1000
"""The most for a byte of input. The dearest shape is a file of the shortest headings: a row for every four bytes."""


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_parser_does_and_makes_grows_with_its_input_and_no_faster(shape: str) -> None:
    kind, write = SHAPES[shape]
    small, large = write(SMALL), write(SMALL * TIMES)
    parsed_in_full(kind, small)  # what is made once is there
    (few, little), (many, much) = (cost(lambda text=text: parsed_in_full(kind, text)) for text in (small, large))
    growth = 1.3 * len(large) / len(small)
    assert many <= growth * few + 500
    assert much <= growth * little + 50_000
    assert (many <= CALLS * len(large) + 2000, much <= BYTES * len(large) + 100_000) == (True, True), (many, much)
    assert made(outcome(kind, large)) <= min(CHARACTERS * len(large), 2 * growth * made(outcome(kind, small)) + 10_000)


IN_SECONDS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
from test_size_law import SHAPES, entries, outcome, parsed_in_full, searched
for shape, (kind, write) in SHAPES.items():
    print(shape, flush=True)
    if entries(outcome(kind, write(4_000))) < 10:  # what many rows take is counted, and needs no patience
        parsed_in_full(kind, write(1_000_000))
print("a query", flush=True)
searched(1_000_000)
print("all", flush=True)
"""


def searched(size: int) -> None:
    """A snippet of a long text for a long query, and the other readers of what a person types."""
    words = " ".join(f"word{number}" for number in range(size // 9))
    snippet(["x" * size, "ẞ" * size], snippet_words(words))
    bounded(words)
    bounded("a " * (size // 2))
    terms([words, "a_b" * (size // 3)])
    nearest("a/" * (size // 2) + "x.md")
    for text in (" " * size + "x", "1" * size + "x", "1" + " " * size + "!"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


def test_no_shape_of_a_megabyte_makes_a_regular_expression_go_back_without_end() -> None:
    """Processor time, a hundred times what all of it takes: what is quadratic takes hours for one shape."""
    seconds = str(int(HANG_SECONDS))
    script = [sys.executable, "-c", IN_SECONDS, str(Path(__file__).parent), seconds]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all"), done.stderr[-2000:]


def test_further_headings_of_a_note_with_very_many_are_text_of_its_last_row() -> None:
    found = outcome("note", "# a\n" * MAX_ENTRIES + "# the heron\nfish\n")
    assert isinstance(found, Document)
    assert len(found.entries) == MAX_ENTRIES
    assert "the heron\nfish" in str(found.entries[-1].values["content"])


def test_a_daily_log_with_too_many_entries_says_where_to_split_it() -> None:
    marked = "".join(f"<!-- entry:{number} -->\n<!-- /entry:{number} -->\n" for number in range(MAX_ENTRIES + 1))
    found = outcome("atomic_fact", "---\n---\n" + marked)
    assert (
        str(found)
        == f"line {2 * MAX_ENTRIES + 3}: there are more than {MAX_ENTRIES} entries in one file; split the file"
    )


def test_a_heading_has_its_own_name_in_full_and_those_above_in_short() -> None:
    found = outcome("note", f"# {'above ' * 100}\n## {'own ' * 100}\ntext")
    assert isinstance(found, Document)
    above, own = str(found.entries[1].values["heading"]).split(" › ")
    assert (len(above), above[-1], own) == (120, "…", ("own " * 100).strip())


LINES = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), max_size=5) | st.sampled_from(
    ["<!-- entry:", " -->", "<!-- /entry:a -->", "**owner_id**: ", "**timestamp**: ", "**sender_ids**: [", "### Fact", "a: ", "!!x ", "&a ", '"', "'", "---"]
)  # fmt: skip


@given(
    kind=st.sampled_from(sorted(PLACES)),
    parts=st.lists(st.tuples(LINES, st.integers(0, 3000)), max_size=8),
    data=st.data(),
)
@budget(max_examples=300)
def test_the_errors_of_a_file_are_short_whatever_it_says(
    kind: str, parts: list[tuple[str, int]], data: st.DataObject
) -> None:
    filler = data.draw(st.sampled_from("x1 [,'\"#é"))
    text = data.draw(st.sampled_from(["", "---\n", "---\n---\n", OPENED])) + "\n".join(
        part + filler * length for part, length in parts
    )
    found = outcome(kind, text)
    if isinstance(found, BadFile):
        assert len(str(found)) <= 500
        return
    assert all(len(problem.message) <= 500 for problem in found.problems)
    job = Job(Claim("x.md", kind, 1, 1, 1, 0, 0, "scan"), problems=list(found.problems))
    assert len(complaint(job) or "") <= MAX_ERROR_CHARACTERS


@given(value=st.text() | st.binary() | st.lists(st.integers()) | st.integers(), times=st.integers(0, 200))
def test_a_quoted_value_is_short_and_a_short_one_is_whole(value: object, times: int) -> None:
    long = value * times  # type: ignore[operator]  # each of these can be repeated
    assert len(quoted(long)) <= MAX_QUOTED_CHARACTERS + 1
    assert len(repr(long)) > MAX_QUOTED_CHARACTERS or quoted(long) == repr(long)


def test_a_clipped_error_keeps_its_beginning_and_its_remedy() -> None:
    text = clipped("what happened " + "x" * 10**6 + "; what to do")
    assert len(text) <= MAX_ERROR_CHARACTERS
    assert text.startswith("what happened")
    assert text.endswith("; what to do")


@pytest.mark.parametrize("name", ["worker_batch_size", "lancedb.index_cache_size_bytes", "watch.mode"])
def test_a_setting_of_any_length_is_quoted_in_short(name: str, root: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load({"memory.root": str(root), name: "v" * 10_000}, environment={}, user_file=root / "none")
    assert len(str(caught.value)) < 600


def test_a_question_of_any_length_is_quoted_in_short() -> None:
    for refused in ({"mode": "m" * 9000, "kind": None}, {"mode": None, "kind": "k" * 9000}):
        with pytest.raises(BadQuestion) as caught:
            check_question(refused["mode"], refused["kind"], 10)
        assert len(str(caught.value)) < 300


def test_a_query_keeps_its_first_words() -> None:
    assert bounded("a b c " * 1000) == "a b c " * 1000
    long = " ".join(f"w{number}" for number in range(2000))
    assert bounded(long).split() == [f"w{number}" for number in range(MAX_WORDS)]
    assert len(snippet_words(long)) == SNIPPET_WORDS
    assert snippet_words("The heron; the HERON a") == ["the", "heron"]


@given(st.text(alphabet="aßẞﬁŉ xİ", max_size=60))
def test_a_snippet_shows_the_word_wherever_folding_moves_it(before: str) -> None:
    text = before * 20 + " heron"
    assert "heron" in snippet(["", text], ["heron"])


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_of_the_log_is_short_whatever_it_quotes(
    form: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(load({"memory.root": str(root), "log_format": form}, environment={}, user_file=root / "none"))
    logger.warning("change_failed error={!r}", "é\x1b" * 1_000_000)
    try:
        raise ValueError("x" * 1_000_000)  # noqa: TRY301 - a text of a megabyte is the point
    except ValueError:
        logger.exception("unit_failed")
    said = capsys.readouterr().err
    assert len(said) < 300_000
    assert "change_failed" in said
    if form == "json":
        assert [json.loads(line)["record"]["level"]["name"] for line in said.splitlines()] == ["WARNING", "ERROR"]


async def test_the_event_loop_reads_no_entry_for_its_snippet(
    root: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root, "long.md", "# Long\n" + "heron eats fish " * 10_000)
    threads = set()
    real = search.snippet

    def noted(*what: object) -> str:
        threads.add(threading.current_thread())
        return real(*what)  # type: ignore[arg-type]  # passed on as they are

    monkeypatch.setattr(search, "snippet", noted)
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        await engine.settle()
        (found,) = await engine.search("heron " + " ".join(f"word{number}" for number in range(3000)), mode="fts")
        assert "heron" in found.snippet
    assert threads
    assert threading.main_thread() not in threads


ODD = [
    "SKILL.md", "folder/SKILL.md", "folder/references/a.md", "folder/references/SKILL.md", "folder/references/sub/a.md",
    "agents/a/skills/s/SKILL.md", "agents/a/skills/s/references/a.md", "agents/a/skills/s/references/SKILL.md",
    "agents/a/skills/s/references/.hidden.md", "agents/a/skills/s/references/sub/a.md", "agents/a/skills/t/references/a.md",
    "x/agents/a/skills/s/SKILL.md", "x/agents/a/skills/s/references/b.md", "x/y/agents/a/skills/s/SKILL.md",
    "x/y/agents/a/skills/s/references/b.md", "agents/a/skills/SKILL.md", "agents/a/skills/references/a.md",
    "users/u1/SKILL.md", "users/u1/references/a.md", "users/SKILL.md", "references/a.md", "references/SKILL.md",
]  # fmt: skip


@given(st.sets(st.sampled_from(ODD), min_size=1))
@budget(max_examples=60)
def test_a_scan_and_a_read_see_the_same_fingerprint_of_each_file(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name in names:
        put(root, name, "# x\n")

    def recognise(key: str) -> Place | None:
        return kinds.recognise(key, note_globs=("**/*.md",))

    for place, seen in files.walk(root, recognise).found.values():
        assert files.fingerprint(root, place) == seen, place
        assert files.read(root, place, max_file_bytes=1000).fingerprint == seen, place


async def test_a_note_named_like_a_skill_is_not_queued_by_every_scan(root: Path, settings: Settings) -> None:
    put(root, "folder/SKILL.md", "# Skill\ntext")
    put(root, "folder/references/a.md", "# Reference\ntext")
    async with open_engine(settings, embedder=FakeEmbedder()) as engine:
        status = await engine.settle()
        newest = status.counts.lsn_max
        assert (status.rows, status.counts.done) == ({"note": 2}, 2)
        await trio.sleep(0.1)  # a file that is younger than a tick of its file system is looked at once more
        for _ in range(3):
            await engine.settle()
        assert (await engine.status()).counts.lsn_max == newest
