"""The text that ships with Python: what is in it, and what is not."""

import sys

import pytest

from effjax.data import python_text
from effjax.data.python_text import SOURCES_BYTES, python_sources, python_topics
from effjax.errors import DataError


@pytest.fixture(scope="module")
def sources():
    return python_sources()


def test_sources_are_a_fixed_size_prefix_of_many_things(sources):
    assert SOURCES_BYTES - 4 < sources.bytes <= SOURCES_BYTES
    names = [document.name for document in sources.documents]
    assert names == sorted(names)
    assert len(names) > 150
    sizes = {}
    for document in sources.documents:
        package = document.name.split("/")[0]
        sizes[package] = sizes.get(package, 0) + len(document.text)
    assert max(sizes.values()) < 0.2 * sources.bytes


def test_sources_hold_no_tests_packages_tables_or_machine_files(sources):
    for document in sources.documents:
        parts = document.name.split("/")
        assert not {"test", "tests", "idle_test", "site-packages", "encodings"} & set(parts)
        assert not parts[-1].startswith("_sysconfigdata")
        assert b"\r\n" not in document.text


def test_sources_and_topics_do_not_overlap(sources):
    topics = python_topics()
    assert 300_000 < topics.bytes < 1_000_000
    assert not [d.name for d in sources.documents if "pydoc_data" in d.name]
    names = [document.name for document in topics.documents]
    assert names == sorted(names)


def test_a_limit_shortens_both():
    assert python_sources(10_000).bytes == 10_000
    assert python_topics(10_000).bytes <= 10_000


def test_line_ends_and_the_order_of_topics_do_not_depend_on_the_machine(monkeypatch):
    from pydoc_data import topics as module

    sources, topics = python_sources(5000).digest, python_topics().digest
    read = python_text.read_text
    monkeypatch.setattr(python_text, "read_text", lambda p: read(p).replace(b"\n", b"\r\n"))
    monkeypatch.setattr(module, "topics", dict(reversed(module.topics.items())))
    assert python_sources(5000).digest == sources
    assert python_topics().digest == topics


def test_a_python_without_sources_or_topics_is_refused(monkeypatch):
    monkeypatch.setattr(python_text, "_source_names", lambda root: iter(()))
    with pytest.raises(
        DataError, match=r"standard library's sources are not in .*; give text files"
    ):
        python_sources()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="this Python has no pydoc_data"):
        python_topics()
