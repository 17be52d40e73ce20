"""What a model trains on: one batch of packed rows."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Batch:
    """Four int32 arrays [B, T]; a pytree, so it also holds shapes, shardings and device arrays.

    tokens: ids, 0 on padding. targets: the id that follows, -1 where none is to be predicted.
    positions: counted from 0 within each segment, -1 on padding.
    segments: which piece of which document, counted from 0 within the row, -1 on padding.
    """

    tokens: Any
    targets: Any
    positions: Any
    segments: Any


jax.tree_util.register_dataclass(
    Batch, data_fields=["tokens", "targets", "positions", "segments"], meta_fields=[]
)
