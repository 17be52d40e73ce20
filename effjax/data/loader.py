"""Batches in an order that is a pure function of (seed, step), so that a run resumes exactly."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effjax.data.batch import Batch
from effjax.data.examples import RowSource
from effjax.errors import CheckpointError, ConfigError, DataError

# Part of every position: an order made by another algorithm is another order.
ORDER = "philox-sort-1"


class ArrayLoader:
    """Endless shuffled batches of packed rows or examples; (seed, e) permutes those of epoch e.

    Batches flow over the epoch's edge: when the batch does not divide the rows, the batch at the
    edge ends one epoch and begins the next, so each row comes exactly once an epoch and none is
    dropped. `position` says where the next batch begins and `restore` goes there. With
    `process_count` processes each gets its equal share of the same global batches, whatever their
    number.

    Raises ConfigError for a batch that the processes do not divide, DataError (with the numbers)
    for fewer rows than one batch.
    """

    def __init__(
        self,
        packed: RowSource,
        batch: int,
        seed: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        _check(packed, batch, seed, process_index, process_count)
        self.packed = packed
        self.batch = batch
        self.seed = seed
        self.step = 0
        share = batch // process_count
        self._share = slice(process_index * share, (process_index + 1) * share)
        self._orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's rows [R]: the sorting permutation of Philox(seed, epoch)'s 64-bit words.

        Counter-based, so that any epoch is reached at once; raw words, because numpy promises
        their stream for ever and that of `Generator.permutation` only until it is improved.
        Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 4;
        https://numpy.org/neps/nep-0019-rng-policy.html
        """
        if epoch not in self._orders:
            words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64))
            order = np.argsort(words.random_raw(self.packed.count), kind="stable")
            # A batch meets two epochs at most, so two orders are enough to keep.
            recent = {key: self._orders[key] for key in list(self._orders)[-1:]}
            self._orders = {**recent, epoch: order}
        return self._orders[epoch]

    def rows_at(self, step: int) -> np.ndarray:
        """Which rows [batch] the global batch of this step holds."""
        epoch, index = divmod(step * self.batch, self.packed.count)
        rows = self.order(epoch)[index : index + self.batch]
        if len(rows) < self.batch:
            rows = np.concatenate([rows, self.order(epoch + 1)[: self.batch - len(rows)]])
        return rows

    def batch_at(self, step: int) -> Batch:
        """This process's part of the batch of any step: a pure function of (seed, step)."""
        return self.packed.rows(self.rows_at(step)[self._share])

    @property
    def position(self) -> dict[str, Any]:
        """Where the next batch begins, for JSON: epoch, index in it, and what they refer to."""
        epoch, index = divmod(self.step * self.batch, self.packed.count)
        return {"epoch": epoch, "index": index, **self._identity()}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes on at a position of a loader with the same data, tokeniser, seed and batch size.

        Raises CheckpointError that names every field that differs, or a damaged one.
        """
        identity = self._identity()
        differing = [
            f"{name} was {position.get(name)!r}, is {value!r}"
            for name, value in identity.items()
            if position.get(name) != value
        ]
        differing += [
            f"{name} was {position[name]!r}, is unknown here"
            for name in sorted(set(position) - set(identity) - {"epoch", "index"})
        ]
        if differing:
            raise CheckpointError(
                f"the data position belongs to another run: {'; '.join(differing)}"
            )
        epoch, index = position.get("epoch"), position.get("index")
        if type(epoch) is not int or type(index) is not int:
            raise CheckpointError(
                f"data position: epoch {epoch!r}, index {index!r} must be integers"
            )
        step, within = divmod(epoch * self.packed.count + index, self.batch)
        if epoch < 0 or not 0 <= index < self.packed.count or within:
            raise CheckpointError(
                f"data position: epoch {epoch}, index {index} is not where a batch of {self.batch} "
                f"begins among {self.packed.count} rows"
            )
        self.step = step

    def take(self, count: int) -> Iterator[Batch]:
        """The next `count` batches, moving the position past each as it is handed out."""
        for _ in range(count):
            yield next(self)

    def __iter__(self) -> "ArrayLoader":
        return self

    def __next__(self) -> Batch:
        batch = self.batch_at(self.step)
        self.step += 1
        return batch

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch": self.batch,
            "length": self.packed.length,
            "rows": self.packed.count,
            "order": ORDER,
            "digest": self.packed.digest,
            **self.packed.source,
        }


def in_order(packed: RowSource, batch: int) -> Iterator[Batch]:
    """Every row exactly once, in order; rows of padding fill the last batch. For evaluation."""
    if batch < 1:
        raise ConfigError(f"batch must be at least 1 row, got {batch}")
    for start in range(0, packed.count, batch):
        index = np.arange(start, start + batch)
        yield packed.rows(np.where(index < packed.count, index, -1))


def _check(
    packed: RowSource, batch: int, seed: int, process_index: int, process_count: int
) -> None:
    if batch < 1:
        raise ConfigError(f"batch must be at least 1 row, got {batch}")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed must lie between 0 and 2**64 - 1, got {seed}")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} must lie in 0 to {process_count - 1}")
    if batch % process_count:
        lower = batch - batch % process_count
        raise ConfigError(
            f"batch {batch} does not divide by {process_count} processes; nearest: "
            f"{lower or process_count} or {lower + process_count}"
        )
    if packed.count < batch:
        raise DataError(
            f"corpus {packed.name} is shorter than one batch: its {packed.size} ids make "
            f"{packed.count} rows of {packed.length}, wanted {batch}"
        )
