"""Bits per byte: what a language model needs to encode a text, whatever its tokeniser."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from effjax.errors import DataError
from effjax.evaluate.bootstrap import ratio_interval


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of text, its 95% interval where there are rows, and what it was counted from.

    `nats` is the summed loss over `tokens` predicted targets, which encode `bytes` bytes.
    """

    value: float
    low: float | None
    high: float | None
    nats: float
    tokens: int
    bytes: int


def bits_per_byte(
    loss_and_count: Callable[[Any], tuple[Any, Any]],
    batches: Iterable[Any],
    bytes: int | None = None,
    *,
    seed: int = 0,
) -> BitsPerByte:
    """Scores held-out batches in bits per byte of the text that their targets encode.

        value = sum of nats / (ln 2 * bytes)

    `loss_and_count(batch)`, jitted by the caller, gives the summed loss in nats and the number of
    targets that it summed over, padding in neither: for the whole batch ([]) or row by row ([B]).
    `bytes` is the size of the text that those targets encode; None is for byte tokens, one each.

    Given rows, the interval is the 95% percentile bootstrap over them: rows are drawn again with
    replacement, 1000 times, and each draw is scored as sum(nats) / sum(targets), scaled to bytes.
    A row counts as one draw of text, so where documents are longer than a row the interval is too
    narrow, and it says nothing of the spread over training seeds. With fewer than two rows it is
    None.

    Raises DataError where nothing is predicted, and FloatingPointError where a loss is not finite.

    Source: Gao et al. 2020, "The Pile", section 3.1 (https://arxiv.org/abs/2101.00027); Efron 1979,
    "Bootstrap methods", for the interval.
    """
    # Every batch is dispatched before the first result is awaited.
    pairs = jax.device_get([loss_and_count(batch) for batch in batches])
    rows = all(np.ndim(nats) == 1 for nats, _ in pairs)
    nats, counts = _joined(nats for nats, _ in pairs), _joined(counts for _, counts in pairs)
    tokens = round(counts.sum())
    if not tokens:
        raise DataError(f"the held-out text has no target to predict in {len(pairs)} batches")
    if not np.isfinite(nats).all():
        raise FloatingPointError(f"the held-out loss of row {np.argmin(np.isfinite(nats))} is NaN")
    size = tokens if bytes is None else bytes
    if size < 1:
        raise DataError(f"bytes of the held-out text must be above 0, got {size}")
    bits = 1 / (math.log(2) * size)
    live = counts > 0
    low, high = None, None
    if rows and live.sum() > 1:
        low, high = ratio_interval(nats[live], counts[live], tokens * bits, seed)
    return BitsPerByte(float(nats.sum() * bits), low, high, float(nats.sum()), tokens, size)


def _joined(parts: Iterable[Any]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *(np.atleast_1d(part).astype(float) for part in parts)])
