"""What an embedder is, and how its answers are checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from everos_engine.errors import Transient

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROBE_SENTENCE = "The quick brown fox remembers where the lazy dog sleeps."
"""Embedded once per start: two models that give it the same vector are the same model."""
SAME_COSINE = 0.999


class Embedder(Protocol):
    """Texts to vectors. ``hedged`` says whether a slow call may be split and asked again."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def dimension(self) -> int:
        """Width of the vectors; 0 until known."""

    @property
    def concurrency(self) -> int:
        """Most calls in flight."""

    @property
    def batch_size(self) -> int:
        """Most texts in one call."""

    @property
    def hedged(self) -> bool:
        """Whether a slow call may be split."""

    async def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (n, dimension). Raises Transient, or BadText where the service refuses the texts."""


def check(vectors: NDArray[np.float32], *, count: int, dimension: int) -> NDArray[np.float32]:
    """``vectors`` if they have shape (count, dimension) and are finite; ``dimension`` 0 takes any. Raises Transient."""
    if vectors.ndim != 2 or vectors.shape[0] != count or vectors.shape[1] == 0:  # noqa: PLR2004 - a matrix
        message = f"the embedder answered with shape {vectors.shape} for {count} texts"
        raise Transient(message)
    if dimension and vectors.shape[1] != dimension:
        message = (
            f"the embedder answered with {vectors.shape[1]}-wide vectors, {dimension} are expected: "
            "set embedder.dimension and embedder.model to what the service serves"
        )
        raise Transient(message)
    if not np.isfinite(vectors).all():
        message = "the embedder answered with numbers that are not finite"
        raise Transient(message)
    return vectors


def similar(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether two probe vectors, of shape (dimension,), are of the same model: a cosine of at least 0.999."""
    if one.shape != other.shape:
        return False
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return norms > 0 and float(one @ other) / norms >= SAME_COSINE
