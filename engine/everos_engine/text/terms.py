"""Find the words inside identifiers.

A tokenizer sees `run_standup` and `parseHTML` as one word each, but a person may search for a part of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_CHARACTERS = 4096
_COMPOUND = re.compile(r"\w+(?:[.:]\w+)*")
_JOINT = re.compile(r"[_.:]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def terms(texts: Iterable[str]) -> str | None:
    """Return the parts of every compound identifier in ``texts``, each once, in order, joined by spaces.

    Parts are joined by ``_``, ``.`` or ``:``, or by a change from small to capital letters. The result has at most
    4096 characters, and is None if there is no compound.
    """
    found: dict[str, None] = {}
    for text in texts:
        for match in _COMPOUND.finditer(text):
            parts = [part for part in _JOINT.split(match[0]) if len(part) > 1]
            if len(parts) > 1 or (parts and parts[0] != match[0]):
                found.update(dict.fromkeys(part.casefold() for part in parts if not part.isdigit()))
    joined = " ".join(found)[:MAX_CHARACTERS]
    return joined or None
