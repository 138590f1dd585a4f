"""Turn texts into vectors: the model's identity, the cache, and the calls that are still needed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import numpy as np
import trio
from loguru import logger
from numpy.typing import NDArray

from everos_engine.embed.batcher import Batcher, open_batcher
from everos_engine.embed.circuit_breaker import CircuitBreaker
from everos_engine.embed.protocol import Embedder, check_embedder, similar
from everos_engine.errors import BadText, EngineError, Fatal, Transient, Unavailable
from everos_engine.loops.context import now_milliseconds
from everos_engine.settings import EmbedderSettings
from everos_engine.stores import embeddings, models
from everos_engine.stores.database import Database, Transaction
from everos_engine.stores.embeddings import Cache
from everos_engine.stores.lance import Model

T = TypeVar("T")
MAX_DAYS = 1000
_NOTHING: dict[str, NDArray[np.float32]] = {}
NO_MODEL = Model("none", 0)
MODEL_CHANGED = "the embedding service changed its model meanwhile: embedded again with the new one"


class Vectors:
    """Vectors by text. Without an embedder there are none. Get one from ``open_vectors``.

    ``registry`` is engine.db, which keeps the models that made the tables' vectors. The cache may be lost at any time.
    """

    def __init__(self, cache: Cache, breaker: CircuitBreaker | None, *, deadline_seconds: float = math.inf) -> None:
        self.cache = cache
        self.registry: Database | None = None
        self.breaker = breaker
        self.deadline_seconds = deadline_seconds
        self.epoch = 0
        self._batcher: Batcher | None = None
        self._model = NO_MODEL
        self._number = 0
        self._name = ""
        self._probe: NDArray[np.float32] = np.empty(0, dtype=np.float32)
        self._lock = trio.Lock()
        self._days: deque[tuple[float, int]] = deque(maxlen=MAX_DAYS)

    async def model(self) -> Model:
        """Return which model answers. The vector of a fixed sentence distinguishes it from every earlier model.

        ``epoch`` changes whenever another model answers. Raises Unavailable if no model was ever seen and the service is
        down.
        """
        if self.breaker is None:
            return NO_MODEL
        if self.epoch == 0 or self.epoch != self.breaker.epoch:
            async with self._lock:
                probe = await self.breaker.identify()
                if self.epoch != self.breaker.epoch:
                    await self._recognise(probe, self.breaker.epoch)
        return self._model

    async def cached(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return text -> vector for the known texts, all of one ``epoch``."""
        if self.breaker is None or not texts:
            return {}
        await self.model()
        now = self._today()
        return await self._use(
            lambda tx, number: embeddings.get(tx, number, texts, now_milliseconds=now), otherwise=_NOTHING
        )

    async def embed(self, texts: Sequence[str]) -> list[NDArray[np.float32] | Transient | BadText]:
        """Return one outcome for each text, in the same order."""
        if self._batcher is None:
            raise Transient("there is no embedder: set embedder.kind to local or http")
        return await self._batcher.embed(texts)

    async def query(self, text: str) -> NDArray[np.float32]:
        """Return the vector of a search text, shape (dimension,). Raises what the embedder raises."""
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
        if self.breaker is not None:
            self.breaker.raise_if_down(longer_than_seconds=longer_than_seconds)

    async def keep(self, epoch: int, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Put vectors into the cache under the model of ``epoch``.

        Raises Unavailable if another model answers by now.
        """
        await self.model()
        if epoch != self.epoch:
            raise Unavailable(MODEL_CHANGED)
        now = self._today()
        await self._use(lambda tx, number: embeddings.put(tx, number, vectors, now_milliseconds=now), otherwise=None)

    async def _use(self, work: Callable[[Transaction, int], T], *, otherwise: T) -> T:
        """Use the cache for the model that answers now."""
        number, name, probe = self._number, self._name, self._probe

        def known(tx: Transaction) -> T:
            embeddings.know_model(tx, number, name, probe, same=similar)
            return work(tx, number)

        return await self.cache.use(known, otherwise=otherwise)

    def _today(self) -> int:
        """Return the wall clock in milliseconds, and remember the days it showed.

        The clock may be set in either direction.
        """
        now = now_milliseconds()
        day = now - now % embeddings.USED_GRAIN_MILLISECONDS
        if not self._days or self._days[-1][1] != day:
            self._days.append((trio.current_time(), day))
        return now

    def _first_day(self, seconds: float) -> int:
        """Return the earliest day that the wall clock showed to the cache within the last ``seconds``."""
        since, days = trio.current_time() - seconds, list(self._days)
        ends = [began for began, _ in days[1:]] + [trio.current_time()]
        shown = [day for (_, day), end in zip(days, ends, strict=True) if end >= since]
        return min([*shown, now_milliseconds() - int(seconds * 1000)])

    async def _recognise(self, probe: NDArray[np.float32], epoch: int) -> None:
        if self.breaker is None:
            raise AssertionError
        name, last = self.breaker.embedder.model, self._number
        if last:
            since = self._first_day(self.breaker.unsure_seconds)

            def distrust(tx: Transaction) -> bool:
                embeddings.distrust(tx, last, since_milliseconds=since)
                return True

            if not await self.cache.use(distrust, otherwise=False):
                await self.cache.drop()  # another model's vectors in it would be taken for this one's
        self._number = await self._number_of(name, probe)
        self._name, self._probe = name, probe
        self._model = Model(f"{name}#{self._number}", int(probe.shape[0]))
        self.epoch = epoch
        if last:
            logger.warning("embedder_model_changed model={} dimension={}", self._model.name, self._model.dimension)

    async def _number_of(self, name: str, probe: NDArray[np.float32]) -> int:
        """Return the number of a model: from the registry, else from the cache, else a new one.

        The registry is written first.
        """
        registry = self.registry
        known = {} if registry is None else await registry.aread(models.known)
        nothing: dict[int, tuple[str, NDArray[np.float32]]] = {}
        cached = await self.cache.use(embeddings.models, otherwise=nothing)

        def find(among: Mapping[int, tuple[str, NDArray[np.float32]]]) -> int | None:
            same = (at for at, (its_name, seen) in among.items() if its_name == name and similar(seen, probe))
            return next(same, None)

        number = find(known) or find({at: model for at, model in cached.items() if at not in known})
        if number is None:
            number = max([0, *known, *cached]) + 1
        if registry is not None and number not in known:
            with suppress(Fatal):  # a search on a read-only file system
                await registry.awrite(lambda tx: models.add(tx, number, name, probe))
        return number


@asynccontextmanager
async def open_vectors(cache: Cache, embedder: Embedder | None, settings: EmbedderSettings) -> AsyncIterator[Vectors]:
    """Yield vectors for the length of the block, through a circuit breaker and a batcher.

    Without an embedder there are none.
    """
    if embedder is None:
        yield Vectors(cache, None)
        return
    check_embedder(embedder)
    breaker = CircuitBreaker(embedder, settings)
    vectors = Vectors(cache, breaker, deadline_seconds=settings.deadline_seconds)
    async with open_batcher(breaker, settings, vectors.keep) as vectors._batcher:  # noqa: SLF001 - each needs the other
        yield vectors
