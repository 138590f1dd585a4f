"""Define the columns of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ColumnType = Literal["string", "int", "float", "timestamp", "strings"]
_COMMON: dict[str, ColumnType] = {
    "id": "string",
    "app_id": "string",
    "project_id": "string",
    "owner_type": "string",
    "owner_id": "string",
    "session_id": "string",
    "timestamp": "timestamp",
    "parent_type": "string",
    "parent_id": "string",
    "sender_ids": "strings",
}


@dataclass(frozen=True, slots=True)
class Field:
    """Describe a typed value of an entry.

    ``source`` is the name of an inline value, a section or a frontmatter key.
    """

    source: str
    column: str
    type: ColumnType = "string"
    required: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """Describe a kind: its columns in table order, and those whose text is searched or embedded."""

    name: str
    own: tuple[Field, ...]
    text_columns: tuple[str, ...]
    embed_columns: tuple[str, ...]
    inline: tuple[Field, ...] = ()
    extra: tuple[tuple[str, ColumnType], ...] = ()

    @property
    def columns(self) -> Mapping[str, str]:
        """Return column -> type. Every table has md_path, entry_id, content_hash and vector."""
        own: dict[str, str] = {field.column: field.type for field in (*self.inline, *self.own)}
        return {**_COMMON, **own, **dict(self.extra), "terms": "string"}

    @property
    def fts_columns(self) -> tuple[str, ...]:
        """Return the columns with a full-text index: the texts, and the words inside their identifiers."""
        return (*self.text_columns, "terms")


INLINE = (
    Field("session_id", "session_id"),
    Field("timestamp", "timestamp", "timestamp", required=True),
    Field("parent_type", "parent_type"),
    Field("parent_id", "parent_id"),
    Field("sender_ids", "sender_ids", "strings"),
)
_KINDS = (
    Kind(
        "episode",
        (Field("Subject", "subject"), Field("Summary", "summary"), Field("Content", "content", required=True)),
        text_columns=("subject", "content"),
        embed_columns=("subject", "content"),
    ),
    Kind("atomic_fact", (Field("Fact", "fact", required=True),), text_columns=("fact",), embed_columns=("fact",)),
    Kind(
        "foresight",
        (Field("Foresight", "foresight", required=True), Field("Evidence", "evidence")),
        text_columns=("foresight", "evidence"),
        embed_columns=("foresight", "evidence"),
        inline=(
            Field("start_time", "start_time", "timestamp"),
            Field("end_time", "end_time", "timestamp"),
            Field("duration_days", "duration_days", "int"),
        ),
    ),
    Kind(
        "agent_case",
        (
            Field("TaskIntent", "task_intent", required=True),
            Field("Approach", "approach", required=True),
            Field("KeyInsight", "key_insight"),
        ),
        text_columns=("task_intent", "approach", "key_insight"),
        embed_columns=("task_intent", "approach", "key_insight"),
        inline=(Field("quality_score", "quality_score", "float"),),
    ),
    Kind(
        "agent_skill",
        (
            Field("name", "name", required=True),
            Field("description", "description"),
            Field("confidence", "confidence", "float"),
            Field("maturity_score", "maturity_score", "float"),
            Field("source_case_ids", "source_case_ids", "strings"),
            Field("cluster_id", "cluster_id"),
            Field("created_at", "created_at", "timestamp"),
            Field("updated_at", "updated_at", "timestamp"),
        ),
        text_columns=("name", "description", "content", "references"),
        embed_columns=("name", "description", "content"),
        extra=(("content", "string"), ("references", "string")),
    ),
    Kind(
        "user_profile",
        (Field("summary", "summary"),),
        text_columns=("summary", "explicit_info", "implicit_traits", "content"),
        embed_columns=("summary", "explicit_info", "implicit_traits"),
        extra=(
            ("explicit_info", "string"),
            ("implicit_traits", "string"),
            ("profile_timestamp", "timestamp"),
            ("content", "string"),
        ),
    ),
    Kind(
        "note",
        (Field("title", "title"),),
        text_columns=("heading", "content"),
        embed_columns=("heading", "content"),
        extra=(("heading", "string"), ("content", "string")),
    ),
)
KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _KINDS})
