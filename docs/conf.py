"""Sphinx: markdown by MyST, no network, warnings are errors (`nox -s docs`)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "everos-engine"
author = "the everos-engine authors"
release = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "version"
]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"everos-engine {release}"
html_show_copyright = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

TOCTREE = re.compile(r"(```\{toctree\}\n(?::[^\n]*\n)*)(.*?)(```)", re.DOTALL)


def setup(app: Sphinx) -> None:
    """Keep the table of contents whole however pages come and go."""
    app.connect("source-read", _whole_contents)


def _whole_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """In the index, leave out missing pages, and put unnamed ones into the last list."""
    if docname != "index":
        return
    there = {path.stem for path in Path(app.srcdir).glob("*.md")} - {"index"}
    named = {line.strip() for lists in TOCTREE.findall(source[0]) for line in lists[1].splitlines()}
    rest = "".join(f"{name}\n" for name in sorted(there - named))

    def filled(match: re.Match[str]) -> str:
        lines = match[2].replace("REST\n", rest).splitlines(keepends=True)
        return match[1] + "".join(line for line in lines if "/" in line or line.strip() in there) + match[3]

    source[0] = TOCTREE.sub(filled, source[0])
