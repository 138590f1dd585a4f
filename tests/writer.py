"""Writes the EverOS format."""

from __future__ import annotations

from pathlib import Path


def fact(number: int, text: str, *, timestamp: str = "2025-02-27T09:25:00+00:00", owner: str = "u1") -> str:
    entry_id = f"af_20250227_{number:08d}"
    return (
        f"<!-- entry:{entry_id} -->\n## {entry_id}\n\n**owner_id**: {owner}\n**session_id**: s1\n**timestamp**: {timestamp}\n"
        f"**parent_type**: memcell\n**parent_id**: mc_{number}\n**sender_ids**: [u1, u2]\n\n### Fact\n{text}\n"
        f"<!-- /entry:{entry_id} -->\n"
    )


def facts(*entries: str, owner: str = "u1") -> str:
    return f"---\ntype: atomic_fact_daily\nuser_id: {owner}\n---\n" + "".join(entries)


def put(root: Path, key: str, text: str) -> Path:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


FACTS = "users/u1/.atomic_facts/atomic_fact-2025-02-27.md"
