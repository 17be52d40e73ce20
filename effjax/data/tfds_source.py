"""Opens data sets of TensorFlow Datasets by index, without TensorFlow; says what is missing."""

import contextlib
import importlib
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from effjax.errors import DataError, near

_FAMILIES = (
    "text",
    "question_answering",
    "summarization",
    "text_simplification",
    "translate",
    "image_classification",
)
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror)
_NETWORK_MODULES = {"requests", "urllib3", "urllib", "http", "aiohttp", "gcsfs"}
# The library's 10 doubling waits are minutes of silence on a machine without network.
_RETRIES = 3


def data_source(
    asker: str, name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> Sequence[Mapping[str, Any]]:
    """Opens a split of `NAME[/config][:version]` by `tfds.data_source`: examples by index.

    What is not prepared in `data_dir` (default: TFDS_DATA_DIR or `~/tensorflow_datasets`) is
    downloaded and prepared there as array records. Raises DataError that begins with `asker` and
    says whether the name, a Python package, TensorFlow, the network, the prepared data or every
    example is missing.
    Source: https://www.tensorflow.org/datasets/data_source
    """
    try:
        tfds = importlib.import_module("tensorflow_datasets")
        _register(tfds, name)
        with _few_retries():
            source = tfds.data_source(
                name, split=split, data_dir=data_dir, builder_kwargs={"file_format": "array_record"}
            )
    except Exception as error:
        folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        raise DataError(f"{asker}: {_reason(error, name, str(folder))}") from error
    if not len(source):
        raise DataError(f"{asker}: split {split!r} has no examples")
    return cast("Sequence[Mapping[str, Any]]", source)


def _register(tfds: Any, name: str) -> None:
    """Imports the families in use one by one where the library's own lookup stops short.

    It imports all families in one go and gives up, silently, at the first that lacks a package
    (TensorFlow, mostly); those of texts and of classes of images need none.
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
