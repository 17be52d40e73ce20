"""The Long Range Arena's text and image tasks, through TensorFlow Datasets.

The first use of a data set needs the network; a later one reads what was prepared. ListOps and
Pathfinder are drawn, by the files beside this one.

Source: Tay et al. 2021, Long Range Arena, section 2.2, https://arxiv.org/abs/2011.04006, and its
code, https://github.com/google-research/long-range-arena (text_classification/input_pipeline.py,
image/input_pipeline.py).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effjax.config import require_positive, require_types
from effjax.data.examples import Examples
from effjax.data.tfds_source import data_source
from effjax.errors import ConfigError, DataError

Folder = str | os.PathLike[str] | None
SIDE = 32
GREY = (0.2989, 0.5870, 0.1140)
"""How much of the grey is red, green and blue."""


def arena_text(
    split: str = "train",
    *,
    length: int = 4000,
    limit: int | None = None,
    data_dir: Folder = None,
    dataset: str = "imdb_reviews",
) -> Examples:
    """Film reviews as bytes, cut off at `length`; at the last byte 1 is asked if it is a praise.

    limit: so many examples from the split's first on, None for all (25000 of `train`, and of
    `test`). dataset: another of texts and labels. Raises ConfigError for a length or limit below 1,
    DataError as `data_source` does and for examples without text or label.
    Source: this file's; its code counts bytes from 1, here they are themselves, without a mark.
    """
    found = _source(f"task text, {dataset}", dataset, split, data_dir, length=length, limit=limit)
    count = len(found) if limit is None else min(limit, len(found))
    tokens, targets = np.full((2, count, length), -1, np.int32)
    for row in range(count):
        text, label = _features(dataset, split, row, found[row], "text")
        written = text.encode() if isinstance(text, str) else text
        if not isinstance(written, bytes) or not written:
            raise DataError(f"{dataset} {split!r} example {row}: wanted a text, got {text!r}")
        ids = np.frombuffer(written[:length], np.uint8)
        tokens[row, : len(ids)], targets[row, len(ids) - 1] = ids, label
    return Examples(tokens, targets, f"{dataset}:{split}")


def arena_image(
    split: str = "train",
    *,
    limit: int | None = None,
    data_dir: Folder = None,
    dataset: str = "cifar10",
) -> Examples:
    """Pictures of 32 x 32 in grey, row by row; at the last of 1024 intensities the class is asked.

        grey = floor(255.5 / 255 * (0.2989 red + 0.5870 green + 0.1140 blue))

    limit: so many examples from the split's first on, None for all (50000 of `train`, 10000 of
    `test`). dataset: another of such pictures. Raises ConfigError for a limit below 1, DataError as
    `data_source` does and for examples that are no such pictures.
    Source: this file's; the grey is that of TensorFlow's `rgb_to_grayscale`, which its code calls.
    """
    found = _source(f"task image, {dataset}", dataset, split, data_dir, limit=limit)
    count = len(found) if limit is None else min(limit, len(found))
    tokens, targets = np.full((2, count, SIDE**2), -1, np.int32)
    for row in range(count):
        picture, label = _features(dataset, split, row, found[row], "image")
        pixels = np.asarray(picture)
        if pixels.shape != (SIDE, SIDE, 3) or pixels.dtype != np.uint8:
            raise DataError(
                f"{dataset} {split!r} example {row}: wanted uint8 ({SIDE}, {SIDE}, 3), got "
                f"{pixels.dtype} {pixels.shape}"
            )
        grey = pixels @ np.array(GREY) * (255.5 / 255)
        tokens[row], targets[row, -1] = grey.astype(np.int32).reshape(-1), label
    return Examples(tokens, targets, f"{dataset}:{split}")


@dataclass(frozen=True)
class ArenaText:
    """`arena_text` at this length, as a task. Source: this file's."""

    length: int = 4000

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "length")

    @property
    def vocab(self) -> int:
        """Bytes."""
        return 256

    def stored(self, split: str, limit: int | None = None) -> Examples:
        """The first `limit` examples of a split."""
        return arena_text(split, length=self.length, limit=limit)


@dataclass(frozen=True)
class ArenaImage:
    """`arena_image` as a task. Source: this file's."""

    @property
    def vocab(self) -> int:
        """Intensities."""
        return 256

    @property
    def length(self) -> int:
        """Pixels of a picture."""
        return SIDE**2

    def stored(self, split: str, limit: int | None = None) -> Examples:
        """The first `limit` examples of a split."""
        return arena_image(split, limit=limit)


def _source(
    asker: str, dataset: str, split: str, data_dir: Folder, **sizes: int | None
) -> Sequence[Mapping[str, Any]]:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{asker}: {name} must be at least 1, got {size}")
    return data_source(asker, dataset, split, data_dir)


def _features(
    dataset: str, split: str, row: int, example: Mapping[str, Any], name: str
) -> tuple[Any, int]:
    """What an example shows, and its class."""
    if missing := [wanted for wanted in (name, "label") if wanted not in example]:
        there = ", ".join(map(str, example))
        raise DataError(f"{dataset}: no feature {missing[0]!r}, among {there}")
    label = int(example["label"])
    if label < 0:
        raise DataError(f"{dataset} {split!r} example {row}: no class is given, got {label}")
    return example[name], label
