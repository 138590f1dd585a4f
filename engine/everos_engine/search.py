"""Search over all kinds: full text, vectors, or both fused by weighted reciprocal ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import trio
from loguru import logger
from numpy.typing import NDArray

from everos_engine.errors import BadQuestion, BadText, Transient, quoted
from everos_engine.stores import ledger
from everos_engine.stores.database import Database
from everos_engine.stores.index import Index
from everos_engine.stores.lance import Hit, Model, TableDamaged, text_literal
from everos_engine.text import kinds

if TYPE_CHECKING:
    from everos_engine.loops.vectors import Vectors

Mode = Literal["fts", "vector", "hybrid"]
RRF_K = 60
"""The constant of reciprocal rank fusion: Cormack, Clarke and Buettcher, SIGIR 2009."""
WEIGHTS: Mapping[str, float] = {"fts": 1.0, "vector": 1.0}
SNIPPET_CHARACTERS = 200
SNIPPET_WORDS = 32
SNIPPET_LOOKS_AT = 1 << 20
MAX_WORDS = 256
"""Words of a query that are looked for. A whole document pasted as a query costs no more than a long paragraph."""
MAX_QUERY_CHARACTERS = 1 << 14
_WORD = re.compile(r"\w+")
MAX_RESULTS = 1000
OVERSAMPLE = 3


@dataclass(frozen=True, slots=True)
class Result:
    """One entry found. ``line`` is 1-based in the file, None if the ledger does not know it."""

    kind: str
    md_path: str
    entry_id: str
    line: int | None
    score: float
    snippet: str
    values: Mapping[str, object]

    def as_data(self) -> dict[str, object]:
        """Return what a person is shown, as plain data: everything but the row's own columns."""
        return {name: getattr(self, name) for name in ("kind", "md_path", "entry_id", "line", "score", "snippet")}


@dataclass(frozen=True, slots=True)
class Filter:
    """What rows must match. None means any."""

    kind: str | None = None
    owner: str | None = None
    app: str | None = None
    project: str | None = None

    def where(self) -> str:
        """Return the filter in SQL."""
        wanted = {"owner_id": self.owner, "app_id": self.app, "project_id": self.project}
        return " AND ".join(
            f"{column} = {text_literal(encodable(value))}" for column, value in wanted.items() if value is not None
        )


async def search(
    index: Index, database: Database, vectors: Vectors, query: str, *, mode: Mode, only: Filter, limit: int
) -> list[Result]:
    """Return the best ``limit`` entries for ``query``, best first.

    The query is words only, and quotes and operators mean nothing.
    """
    query = encodable(query)
    wanted = bounded(query)
    chosen = [only.kind] if only.kind else [kind for kind in index.kinds if kind not in index.shunned]
    if only.kind in index.shunned:
        raise TableDamaged(f"the table {only.kind!r} is damaged: {index.shunned[only.kind]}")
    where, depth = only.where(), limit * OVERSAMPLE
    rankings: dict[str, list[Hit]] = {}
    if mode != "vector":
        found = [await index.search_text(kind, wanted, where=where, limit=depth) for kind in chosen]
        rankings["fts"] = _ranked(found)
    embedded = None if mode == "fts" else await _embedded(vectors, query, alone=mode == "vector")
    if embedded is None:
        mode = "fts"
    else:
        vector, model = embedded
        found = [await index.search_vector(kind, vector, model=model.name, where=where, limit=depth) for kind in chosen]
        rankings["vector"] = _ranked(found)
    best = fuse(rankings)[:limit] if mode == "hybrid" else rankings[mode][:limit]
    lines = await database.aread(lambda tx: ledger.lines(tx, [(hit.md_path, hit.entry_id) for hit in best]))
    words = snippet_words(query)

    def results() -> list[Result]:
        return [
            Result(
                hit.kind,
                hit.md_path,
                hit.entry_id,
                lines.get((hit.md_path, hit.entry_id)),
                hit.score,
                snippet([str(hit.values.get(column) or "") for column in index.kinds[hit.kind].fts_columns], words),
                hit.values,
            )
            for hit in best
        ]

    return await trio.to_thread.run_sync(results)  # entries may be long, and a loop that reads them all would not move


async def _embedded(vectors: Vectors, query: str, *, alone: bool) -> tuple[NDArray[np.float32], Model] | None:
    """Return the query's vector and its model.

    None if the embedder has trouble and words can answer, not vectors ``alone``.

    Raises what the embedder raises, and Transient if it does not answer within ``embedder.deadline_seconds``.
    """
    trouble: Transient | BadText = Transient(
        f"the embedder did not answer the query within {vectors.deadline_seconds:g} s"
    )
    try:
        with trio.move_on_after(vectors.deadline_seconds):
            return await vectors.query(query), await vectors.model()
    except (Transient, BadText) as error:
        trouble = error
    if alone or vectors.breaker is None:
        raise trouble
    logger.warning("search_without_vectors error={!r}", str(trouble))
    return None


def check_question(mode: str | None, kind: str | None, limit: int) -> None:
    """Raise BadQuestion for what cannot be answered.

    That is an unknown mode or kind, or a limit that is not from 1 to MAX_RESULTS.
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_RESULTS:
        raise BadQuestion(
            f"limit={str(limit)[:80]} is refused: it must be a whole number, at least 1 and at most {MAX_RESULTS}"
        )
    if mode is not None and mode not in get_args(Mode):
        raise BadQuestion(f"there is no mode {quoted(mode)}: choose one of {', '.join(get_args(Mode))}")
    if kind is not None and kind not in kinds.KINDS:
        raise BadQuestion(f"there is no kind {quoted(kind)}: choose one of {', '.join(kinds.KINDS)}")


def encodable(text: str) -> str:
    """Return ``text`` without the lone surrogates that non-UTF-8 bytes of a command line become."""
    return text.encode("utf-8", "replace").decode()


def fuse(rankings: Mapping[str, Sequence[Hit]]) -> list[Hit]:
    """Fuse rankings by weighted reciprocal ranks. A hit scores the sum of weight / (60 + rank) over its rankings."""
    scores: dict[tuple[str, str], float] = {}
    hits: dict[tuple[str, str], Hit] = {}
    for name, ranking in rankings.items():
        for rank, hit in enumerate(ranking, start=1):
            key = (hit.md_path, hit.entry_id)
            scores[key] = scores.get(key, 0.0) + WEIGHTS[name] / (RRF_K + rank)
            hits.setdefault(key, hit)
    order = sorted(scores, key=lambda key: (-scores[key], key))
    return [Hit(hits[key].kind, *key, scores[key], hits[key].values) for key in order]


def bounded(query: str) -> str:
    """Return the first ``MAX_WORDS`` different words of a query as it was written. A shorter query stays as it is."""
    query = query[:MAX_QUERY_CHARACTERS]
    seen: set[str] = set()
    for match in _WORD.finditer(query):
        if len(seen) == MAX_WORDS and match[0] not in seen:
            return query[: match.start()]
        seen.add(match[0])
    return query


def snippet_words(query: str) -> list[str]:
    """Return the words that a snippet looks for: the first 32 different ones of two characters or more, folded."""
    words = (match[0] for match in _WORD.finditer(query[:MAX_QUERY_CHARACTERS].casefold()))
    return list(islice(dict.fromkeys(word for word in words if len(word) > 1), SNIPPET_WORDS))


def snippet(texts: Sequence[str], words: Sequence[str]) -> str:
    """Return about 200 characters around the first of ``words`` that occurs, on one line.

    Only the first million characters of a text are searched.
    """
    chosen, at = next((text for text in texts if not text.isspace() and text), ""), 0
    for text in texts:
        seen = text[:SNIPPET_LOOKS_AT]
        folded = seen.casefold()
        places = [place for place in (folded.find(word) for word in words) if place >= 0]
        if places:
            chosen, at = text, _unfolded(seen, folded, min(places))
            break
    start = max(0, at - SNIPPET_CHARACTERS // 3)
    cut = " ".join(chosen[start : start + SNIPPET_CHARACTERS].split())
    return ("…" if start else "") + cut + ("…" if start + SNIPPET_CHARACTERS < len(chosen) else "")


def _unfolded(text: str, folded: str, place: int) -> int:
    """Return where in ``text`` the character is that stands at ``place`` in it once it is ``folded``."""
    if len(text) == len(folded):
        return place
    ends = accumulate(len(character.casefold()) for character in text)
    return next(at for at, end in enumerate(ends) if end > place)


def _ranked(found: Iterable[Sequence[Hit]]) -> list[Hit]:
    return sorted((hit for hits in found for hit in hits), key=lambda hit: (-hit.score, hit.md_path, hit.entry_id))
