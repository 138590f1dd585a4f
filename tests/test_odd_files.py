"""Files as the world writes them: none fails a neighbour, none shows a traceback, each that fails says which line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from everos_engine.cli.main import main
from writer import put

NOTES = {
    "anchor": "---\nfirst: &one 1\nsecond: *one\n---\ntext\n",
    "unquoted colon": "---\ntitle: Plan: spring\n---\ntext\n",
    "repeated key": "---\ntags: [a]\ntags: [b]\n---\ntext\n",
    "escape sequences": "text \x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b1m \r over it\n",
    "fence in a list": "# One\n\n- ```sh\n  ls\n  ```\n\n# Two\n\ntext\n",
    "identifiers": "# Names\n" + "".join(f"part_{number}_of_{number}\n" for number in range(2000)),
    "rule first": "---\n\nA rule, and no second one.\n",
    "comment": "# A\n<!--\n# hidden\n-->\ntext\n",
    "picture": "# A\n![shot](data:image/png;base64," + "iVBORw0KGgoAAAANSUhE" * 20_000 + ")\nafter\n",
    "markup as an alias": "---\ntitle: *Title*\n---\ntext\n",
    "one long line": "# \u9577\n" + "\u5411\u91cf\u8cc7\u6599\u5eab\u3002" * 5000,
    "decomposed": "cafe\u0301 in Zu\u0308rich\n",
    "frontmatter alone": "---\ntitle: Only this\ntags: [a, b]\n---\n",
    "underlined headings": "One\n=====\ntext\n\nTwo\n---\nmore\n",
    "tab in a list": "---\ntags:\n\t- a\n---\ntext\n",
    "template": "---\ntitle: {{title}}\ndate: {{date}}\n---\ntext\n",
    "aliases": "---\ntitle: A title\naliases: [other]\n---\ntext\n",
    "wiki links": "---\nup: [[Home]], [[Work]]\n---\ntext\n",
}
HEAD = "**owner_id**: u1\n**timestamp**: 2025-03-01T08:20:00+00:00\n\n"
EPISODES = {
    "fence in a list": "### Content\n- ```sh\n  ls\n  ```\nafter\n",
    "unknown heading": "### Content\nfirst\n\n### Tomorrow\nsecond\n",
    "open fence": "### Content\n```sh\nls\n",
}


def test_no_odd_file_fails_a_neighbour(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(root, "everos-engine.toml", '[embedder]\nkind = "none"\n[note]\nglobs = ["notes/*.md"]\n')
    for name, text in NOTES.items():
        put(root, f"notes/{name}.md", text)
    for name, text in EPISODES.items():
        entries = "".join(f"<!-- entry:ep_{n} -->\n{HEAD}{text}<!-- /entry:ep_{n} -->\n" for n in (1, 2))
        put(root, f"users/u1/episodes/{name}.md", f"---\nuser_id: u1\n---\n{entries}")
    for number in range(3):
        put(root, f"notes/neighbour{number}.md", f"# Neighbour\nheron{number}\n")
    main(["--root", str(root), "sync"])
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "bug" not in said.out + said.err
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.out)
    failures = re.findall(r"^(\S.*\.md): failed retryable=FALSE.*\n {4}(.*)$", said.out, re.MULTILINE)
    assert all(reason.startswith("line ") and len(reason) < 600 for _, reason in failures), failures
    assert not any("neighbour" in path for path, _ in failures)
    for number in range(3):
        assert main(["--root", str(root), "search", f"heron{number}"]) == 0
        assert f"notes/neighbour{number}.md" in capsys.readouterr().out
