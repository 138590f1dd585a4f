"""The workflow: `nox` runs lint, types, tests, and bounded fuzz and stress runs."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "types", "tests", "fuzz", "stress"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    session.install("-q", "-e", ".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    session.install("-q", "-e", ".[lint]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    session.install("-q", "-e", ".[test]")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "report", "--skip-covered")


@nox.session
def fuzz(session: nox.Session) -> None:
    session.install("-q", "-e", ".[test]")
    session.run("python", "fuzz/run.py", *session.posargs)


@nox.session
def stress(session: nox.Session) -> None:
    """File descriptors; `nox -s stress -- --minutes 10` for the long form with every limit."""
    session.install("-q", "-e", ".[test,plots]")
    session.run("python", "-m", "pytest", "-q", "fuzz/test_slope.py", "fuzz/test_planted.py")
    session.run("python", "fuzz/stress.py", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    session.install("-q", "-e", ".")
    session.run("python", "tests/bench/run.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    session.install("-q", "build")
    session.run("python", "-m", "build")
