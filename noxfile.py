"""The workflow: `nox` runs lint, types, docs, tests, and bounded fuzz and stress runs; CONTRIBUTING.md says what each is for."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import nox

TYPED = "import everos_engine, pathlib; assert (pathlib.Path(everos_engine.__file__).parent / 'py.typed').exists()"

PROCESSES = "2"
"""Tests at a time. They measure time and count descriptors of their own processes, so more than there are cores would disturb them."""

SUBJECT = r"[a-z_]+(, [a-z_]+)*: \S.*[^.]"
SUBJECTS_SINCE = "b3ccf8c8072a"
"""The last commit before the rule."""

nox.options.sessions = ["lint", "types", "docs", "tests", "fuzz", "stress"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-q", "-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    unused = session.run("vulture", silent=True, success_codes=[0, 3]) or ""
    ours = [line for line in unused.splitlines() if line.startswith("engine")]  # tests are found by their names
    if ours:
        session.error("unused code:\n" + "\n".join(ours))
    _check_subjects(session)


def _check_subjects(session: nox.Session) -> None:
    """Check the commits since SUBJECTS_SINCE. A checkout without it, or without history, has none to check."""
    ask = {"external": True, "silent": True, "success_codes": [0, 1, 128], "log": False}
    if shutil.which("git") is None or session.run("git", "cat-file", "-t", SUBJECTS_SINCE, **ask).strip() != "commit":
        return
    subjects = session.run("git", "log", "--no-merges", "--format=%s", f"{SUBJECTS_SINCE}..HEAD", **ask).splitlines()
    bad = [subject for subject in subjects if len(subject) > 72 or not re.fullmatch(SUBJECT, subject)]
    if bad:
        session.error("write `area: what` in at most 72 characters:\n" + "\n".join(bad))


@nox.session
def types(session: nox.Session) -> None:
    session.install("-q", "-e", ".[lint]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Two tests at a time; `nox -s tests -- -n 0 tests/test_queue.py` runs some one by one."""
    session.install("-q", "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", PROCESSES, *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    session.install("-q", "-e", ".[test]")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report", "--skip-covered")


@nox.session
def surroundings(session: nox.Session) -> None:
    """Every command in every bad surrounding, some 500 processes; `nox -s tests` runs a part of the table."""
    session.install("-q", "-e", ".[test]")
    session.run(
        "python",
        "-m",
        "pytest",
        "-q",
        "-n",
        PROCESSES,
        "tests/test_surroundings.py",
        *session.posargs,
        env={"WHOLE_TABLE": "1"},
    )


@nox.session
def fuzz(session: nox.Session) -> None:
    session.install("-q", "-e", ".[test]")
    session.run("python", "fuzz/run.py", *session.posargs)


@nox.session
def stress(session: nox.Session) -> None:
    """File descriptors; `nox -s stress -- --minutes 10` for the long form with every limit."""
    session.install("-q", "-e", ".[test,plots]")
    session.run("python", "-m", "pytest", "-q", "fuzz/test_slope.py", "fuzz/test_planted.py")
    if session.posargs:
        session.run("python", "-m", "pytest", "-q", "fuzz/test_soak.py")
    session.run("python", "fuzz/stress.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    session.install("-q", "-e", ".")
    session.run("python", "tests/bench/run.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    session.install("-q", "-e", ".[docs,changelog]")
    session.run("python", "docs/generate.py", "--check")
    session.run(
        "towncrier", "build", "--draft", "--version", "next", silent=True
    )  # the fragments and their config hold
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-E", "-b", "html", "docs", "docs/_build/html")
    session.run("sphinx-build", "-W", "-q", "-E", "-b", "doctest", "docs", "docs/_build/doctest", silent=True)
    session.run("python", "docs/rehearse.py")


@nox.session
def changelog(session: nox.Session) -> None:
    session.install("-q", "-e", ".[changelog]")
    session.run("towncrier", "build", "--draft", "--version", "next")


@nox.session
def build(session: nox.Session) -> None:
    session.install("-q", "build")
    out = session.create_tmp()
    shutil.rmtree(out)
    session.run("python", "-m", "build", "--outdir", out)
    (wheel,) = Path(out).glob("*.whl")
    session.install("-q", "--force-reinstall", "--no-deps", str(wheel))
    session.install("-q", str(wheel))
    with tempfile.TemporaryDirectory() as elsewhere:
        root = Path(elsewhere, "memory")
        shutil.copytree("examples/memory", root, ignore=shutil.ignore_patterns(".index"))
        session.chdir(elsewhere)  # nothing but the wheel can be imported here
        session.run("everos-engine", "--version")
        session.run("everos-engine", "--help", silent=True)
        session.run("everos-engine", "--root", str(root), "sync")
        found = session.run("everos-engine", "--root", str(root), "search", "sourdough starter", silent=True)
        if not isinstance(found, str) or "ep_20250301_00000001" not in found:
            session.error(f"the example's episode was not found: {found}")
        session.run("python", "-c", TYPED)
