"""Texts to vectors: the model's identity, the cache, and the calls that are still needed."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio
from loguru import logger

from everos_engine.embed.batch import open_batcher
from everos_engine.embed.gate import Gate
from everos_engine.embed.protocol import check_embedder, similar
from everos_engine.errors import BadText, EngineError, Transient, Unavailable
from everos_engine.loops.desk import now_milliseconds
from everos_engine.stores import embeddings
from everos_engine.stores.lance import Model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from everos_engine.embed.batch import Batcher
    from everos_engine.embed.protocol import Embedder
    from everos_engine.settings import EmbedderSettings
    from everos_engine.stores.database import Database, Transaction

NO_MODEL = Model("none", 0)
MODEL_CHANGED = "the embedding service changed its model meanwhile: embedded again with the new one"


class Vectors:
    """Vectors by text; without an embedder there are none. Get one from ``open_vectors``."""

    def __init__(self, cache: Database, gate: Gate | None, *, deadline_seconds: float = math.inf) -> None:
        self.cache = cache
        self.gate = gate
        self.deadline_seconds = deadline_seconds
        self.life = 0
        self._batcher: Batcher | None = None
        self._model = NO_MODEL
        self._number = 0
        self._lock = trio.Lock()

    async def model(self) -> Model:
        """Which model answers: told apart from every earlier one by the vector of a fixed sentence.

        ``life`` moves whenever it is another than before. Raises Unavailable while none was ever seen and the service is down.
        """
        if self.gate is None:
            return NO_MODEL
        if self.life == 0 or self.life != self.gate.life:
            async with self._lock:
                probe = await self.gate.identify()
                if self.life != self.gate.life:
                    await self._recognise(probe, self.gate.life)
        return self._model

    async def cached(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Text -> vector of those known, all of one ``life``."""
        if self.gate is None or not texts:
            return {}
        await self.model()
        number = self._number
        return await self.cache.awrite(
            lambda tx: embeddings.get(tx, number, texts, now_milliseconds=now_milliseconds())
        )

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | Transient | BadText]:
        """One outcome per text, in order."""
        if self._batcher is None:
            message = "there is no embedder: set embedder.kind to local or http"
            raise Transient(message)
        return await self._batcher.embed(texts)

    async def query(self, text: str) -> NDArray[np.float32]:
        """The vector of a search text, shape (dimension,); raises what the embedder says."""
        text = text.encode("utf-8", "replace").decode()  # a command line may hand over bytes that are none
        await self.model()
        known = await self.cached([text])
        if text in known:
            return known[text]
        (outcome,) = await self.embed([text])
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def raise_if_down(self, *, longer_than_seconds: float) -> None:
        """Raise Unavailable if the embedding service has been down for so long."""
        if self.gate is not None:
            self.gate.raise_if_down(longer_than_seconds=longer_than_seconds)

    async def keep(self, life: int, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Put vectors into the cache under the model of ``life``. Raises Unavailable if another model answers by now."""
        await self.model()
        if life != self.life:
            raise Unavailable(MODEL_CHANGED)
        number = self._number
        await self.cache.awrite(lambda tx: embeddings.put(tx, number, vectors, now_milliseconds=now_milliseconds()))

    async def _recognise(self, probe: NDArray[np.float32], life: int) -> None:
        if self.gate is None:
            raise AssertionError
        name, last = self.gate.embedder.model, self._number
        since = now_milliseconds() - int(self.gate.unsure_seconds * 1000)

        def number_of(tx: Transaction) -> int:
            if last:
                embeddings.distrust(tx, last, since_milliseconds=since)
            for number, known_name, known_probe in embeddings.models(tx):
                if known_name == name and similar(known_probe, probe):
                    return number
            return embeddings.add_model(tx, name, probe)

        self._number = await self.cache.awrite(number_of)
        self._model = Model(f"{name}#{self._number}", int(probe.shape[0]))
        self.life = life
        if last:
            logger.warning("embedder_model_changed model={} dimension={}", self._model.name, self._model.dimension)


@asynccontextmanager
async def open_vectors(
    cache: Database, embedder: Embedder | None, settings: EmbedderSettings
) -> AsyncIterator[Vectors]:
    """Vectors for the length of the block, through a gate and a batcher; without an embedder none."""
    if embedder is None:
        yield Vectors(cache, None)
        return
    check_embedder(embedder)
    gate = Gate(embedder, settings)
    vectors = Vectors(cache, gate, deadline_seconds=settings.deadline_seconds)
    async with open_batcher(gate, settings, vectors.keep) as vectors._batcher:  # noqa: SLF001 - each needs the other
        yield vectors
