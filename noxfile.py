"""Define the workflow. `nox` alone runs what CI runs. CONTRIBUTING.md says what each session is for."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import nox

TYPED = "import everos_engine, pathlib; assert (pathlib.Path(everos_engine.__file__).parent / 'py.typed').exists()"

PROCESSES = "2"
"""How many tests run in parallel. They measure time and count descriptors, so more than there are cores would
disturb each other."""

SUBJECT = r"[a-z_]+(, [a-z_]+)*: \S.*[^.]"
SUBJECTS_SINCE = "b3ccf8c8072a"
"""The last commit before the rule. Older subjects are not checked."""

nox.options.sessions = ["lint", "types", "docs", "tests", "fuzz", "stress"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-q", "-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    unused = session.run("vulture", silent=True, success_codes=[0, 3]) or ""
    ours = [line for line in unused.splitlines() if line.startswith("engine")]  # pytest finds tests by their names
    if ours:
        session.error("unused code:\n" + "\n".join(ours))
    _check_subjects(session)


def _check_subjects(session: nox.Session) -> None:
    """Check the subjects since SUBJECTS_SINCE. An sdist or a shallow clone does not have that commit, and passes."""
    if shutil.which("git") is None:
        return
    log = ["git", "log", "--no-merges", "--format=%s", f"{SUBJECTS_SINCE}..HEAD"]
    found = subprocess.run(log, capture_output=True, text=True, check=False)  # noqa: S603 - no outside value in it
    bad = [line for line in found.stdout.splitlines() if len(line) > 72 or not re.fullmatch(SUBJECT, line)]
    if bad:
        session.error(
            "write commit subjects as `area: what`, in at most 72 characters and without a full stop:\n"
            + "\n".join(bad)
        )


@nox.session
def types(session: nox.Session) -> None:
    session.install("-q", "-e", ".[lint]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run two tests at a time. `nox -s tests -- -n 0 tests/test_queue.py` runs some one by one."""
    session.install("-q", "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", PROCESSES, *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    session.install("-q", "-e", ".[test]")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report", "--skip-covered")


@nox.session
def surroundings(session: nox.Session) -> None:
    """Run every command in every bad environment, in about 500 processes. `nox -s tests` runs a part of them."""
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
    session.run("python", "-m", "fuzz", *session.posargs)


@nox.session
def stress(session: nox.Session) -> None:
    """Count file descriptors under load. `nox -s stress -- --minutes 10` is the long run, with every limit."""
    session.install("-q", "-e", ".[test,plots]")
    session.run("python", "-m", "pytest", "-q", "fuzz/soak/test_slope.py", "fuzz/descriptors/test_planted.py")
    if session.posargs:
        session.run("python", "-m", "pytest", "-q", "fuzz/soak/test_soak.py")
    session.run("python", "-m", "fuzz.stress", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    session.install("-q", "-e", ".")
    session.run("python", "tests/bench/run.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    session.install("-q", "-e", ".[docs,changelog]")
    session.run("python", "docs/generate.py", "--check")
    # fails for a fragment with a wrong name
    session.run("towncrier", "build", "--draft", "--version", "next", silent=True)
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
