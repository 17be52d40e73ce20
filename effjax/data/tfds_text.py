"""TensorFlow Datasets as a corpus, read by index and without TensorFlow."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from effjax.data.documents import Corpus, Document, check_utf8, prefix
from effjax.data.tfds_source import data_source
from effjax.errors import DataError

_SPEC = re.compile(r"tfds:(?P<name>[^:]+?(:\d+\.\d+\.\d+)?)(:(?P<split>\D.*))?")


def tfds_text(
    spec: str, limit_bytes: int | None = None, data_dir: str | os.PathLike[str] | None = None
) -> Corpus:
    """Reads `tfds:NAME[/config][:version][:split]` (default split `train`) by `tfds.data_source`.

    A document is one example's feature `text`, or else all its text features in order of name, one
    a line. What is not prepared in `data_dir` (default: TFDS_DATA_DIR or `~/tensorflow_datasets`)
    is downloaded and prepared there as array records. Raises DataError that says whether the name,
    a Python package, TensorFlow, the network or the prepared data is missing.
    Source: https://www.tensorflow.org/datasets/data_source
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"corpus {spec!r}: wanted tfds:NAME[/config][:split]")
    name, split = match["name"], match["split"] or "train"
    source = data_source(f"corpus {spec!r}", name, split, data_dir)
    return Corpus(spec, prefix(_documents(spec, source), limit_bytes))


def _documents(spec: str, source: Sequence[Mapping[str, Any]]) -> Iterator[Document]:
    for index in range(len(source)):
        example = source[index]
        texts = {key: value for key, value in example.items() if isinstance(value, bytes | str)}
        if not texts:
            features = ", ".join(map(str, example))
            raise DataError(f"corpus {spec!r}: no feature is text, among {features}")
        chosen = [texts["text"]] if "text" in texts else [texts[key] for key in sorted(texts)]
        parts = [part.encode() if isinstance(part, str) else part for part in chosen]
        text = b"\n".join(parts)
        check_utf8(text, f"corpus {spec!r} example {index}")
        yield Document(f"{index:08d}", text)
