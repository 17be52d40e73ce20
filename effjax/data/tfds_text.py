"""TensorFlow Datasets as a corpus, read by index and without TensorFlow."""

import contextlib
import importlib
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from effjax.data.documents import Corpus, Document, check_utf8, prefix
from effjax.errors import DataError, near

_SPEC = re.compile(r"tfds:(?P<name>[^:]+?(:\d+\.\d+\.\d+)?)(:(?P<split>\D.*))?")
_FAMILIES = ("text", "question_answering", "summarization", "text_simplification", "translate")
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
_NETWORK_MODULES = {"requests", "urllib3", "urllib", "http", "aiohttp", "gcsfs"}
# The library's 10 doubling waits are minutes of silence on a machine without network.
_RETRIES = 3


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
    source = _data_source(spec, name, split, data_dir)
    if not len(source):
        raise DataError(f"corpus {spec!r}: split {split!r} has no examples")
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


def _data_source(
    spec: str, name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> Sequence[Mapping[str, Any]]:
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        _register(tfds, name)
        with _few_retries():
            source = tfds.data_source(
                name, split=split, data_dir=data_dir, builder_kwargs={"file_format": "array_record"}
            )
    except Exception as error:
        folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        raise DataError(f"corpus {spec!r}: {_reason(error, name, str(folder))}") from error
    return cast("Sequence[Mapping[str, Any]]", source)


def _register(tfds: Any, name: str) -> None:
    """Imports the families of text datasets one by one where the library's own lookup stops short.

    It imports all families in one go and gives up, silently, at the first that lacks a package
    (TensorFlow, mostly); the text families need none.
    """
    known = tfds.list_builders(with_community_datasets=False)
    if re.split(r"[/:]", name)[0] in known:
        return
    for family in _FAMILIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"tensorflow_datasets.{family}")


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    downloader: Any = importlib.import_module("tensorflow_datasets.core.download.downloader")
    before = getattr(downloader, "MAX_RETRIES", None)
    if before is None:
        yield
        return
    downloader.MAX_RETRIES = _RETRIES
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before


def _reason(error: BaseException, name: str, folder: str) -> str:
    """What is missing, in one line, from the chain of causes."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    unprepared = f"the prepared data is not in {folder}, and preparing it needs"
    for link in chain:
        if type(link).__name__ == "DatasetNotFoundError":
            known = importlib.import_module("tensorflow_datasets").list_builders(
                with_community_datasets=False
            )
            return f"TensorFlow Datasets has no {name!r}{near(re.split(r'[/:]', name)[0], known)}"
        if isinstance(link, ImportError):
            package = (link.name or str(link)).partition(".")[0]
            if package == "tensorflow":
                return f"{unprepared} TensorFlow: pip install tensorflow"
            return f"the Python package {package!r} is missing: pip install {package}"
        if isinstance(link, _NETWORK) or type(link).__module__.split(".")[0] in _NETWORK_MODULES:
            return f"{unprepared} the network: {type(link).__name__}"
        if isinstance(link, NotImplementedError):
            return f"the data prepared in {folder} has no random access; give another data_dir"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
