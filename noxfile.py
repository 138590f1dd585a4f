"""The workflow: `nox` runs lint, types, tests and a bounded fuzz run."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "types", "tests", "fuzz"]
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
def build(session: nox.Session) -> None:
    session.install("-q", "build")
    session.run("python", "-m", "build")
