"""TensorFlow Datasets: a real one built on the spot without TensorFlow, and every way to fail."""

import socket
import sys

import numpy as np
import pytest

from effjax.data.corpora import load
from effjax.data.tfds_text import tfds_text
from effjax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def source(monkeypatch):
    """Puts a list in the place of what `tfds.data_source` would open; records how it was asked."""
    asked = {}

    def use(answer):
        def data_source(name, **kwargs):
            asked.update(name=name, **kwargs)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(tfds, "data_source", data_source)
        return asked

    return use


def test_names_configs_versions_and_splits_are_asked_for(source):
    asked = source([{"text": b"a"}])
    for spec, name, split in [
        ("tfds:lm1b", "lm1b", "train"),
        ("tfds:lm1b:test", "lm1b", "test"),
        ("tfds:paws_wiki/labeled_final:train[:10%]", "paws_wiki/labeled_final", "train[:10%]"),
        ("tfds:lm1b:1.1.0", "lm1b:1.1.0", "train"),
        ("tfds:lm1b:1.1.0:test", "lm1b:1.1.0", "test"),
    ]:
        assert load(spec).name == spec
        assert (asked["name"], asked["split"]) == (name, split)
    for spec in ("tfds:", "tfds::train", "tfds:x:"):
        with pytest.raises(DataError, match="wanted tfds:NAME"):
            load(spec)


def test_text_features(source):
    source([{"label": 1, "text": b"one"}, {"label": 0, "text": "zwé", "title": b"t"}])
    assert [d.text for d in load("tfds:lm1b").documents] == [b"one", "zwé".encode()]
    source([{"b": b"2", "n": np.int64(3), "a": b"1"}])
    assert [d.text for d in load("tfds:lm1b").documents] == [b"1\n2"]
    source([{"text": b"abc"}] * 10)
    corpus = load("tfds:lm1b", 7)
    assert [(d.name, d.text) for d in corpus.documents] == [
        ("00000000", b"abc"),
        ("00000001", b"abc"),
        ("00000002", b"a"),
    ]


def test_data_that_is_no_text(source):
    source([{"image": np.zeros(3), "label": 1}])
    with pytest.raises(DataError, match="no feature is text, among image, label"):
        load("tfds:lm1b")
    source([{"text": b"ok"}, {"text": b"\xff"}])
    with pytest.raises(DataError, match="'tfds:lm1b' example 1 is not UTF-8 text: byte 0 is 0xff"):
        load("tfds:lm1b")
    source([])
    with pytest.raises(DataError, match="split 'test' has no examples"):
        load("tfds:lm1b:test")


def chained(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow"),
            "needs TensorFlow",
        ),
        (
            chained(RuntimeError("x"), ModuleNotFoundError("x", name="tensorflow.io")),
            "the prepared data is not in .*, and preparing it needs TensorFlow",
        ),
        (ModuleNotFoundError("x", name="apache_beam"), "package 'apache_beam' is missing"),
        (chained(OSError("x"), socket.gaierror(-2, "x")), "needs the network: gaierror"),
        (TimeoutError("x"), "needs the network: TimeoutError"),
        (NotImplementedError("Random access"), "has no random access"),
        (ValueError("Unknown split 'x'.\nOne of train"), r"Unknown split 'x'. One of train$"),
    ],
)
def test_the_error_says_what_is_missing(source, error, message):
    source(error)
    with pytest.raises(DataError, match=f"corpus 'tfds:lm1b': .*{message}") as refusal:
        load("tfds:lm1b")
    assert "\n" not in str(refusal.value)


def test_an_interrupt_is_not_swallowed(source):
    source(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        load("tfds:lm1b")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match="package 'tensorflow_datasets' is missing: pip install"):
        load("tfds:lm1b")


def test_a_real_name_that_does_not_exist():
    with pytest.raises(
        DataError, match=r"has no 'tiny_shakespear'; did you mean 'tiny_shakespeare'"
    ):
        load("tfds:tiny_shakespear")


def test_a_real_dataset_without_network_or_tensorflow(tmp_path):
    class EffjaxTinyText(tfds.core.GeneratorBasedBuilder):
        """Five lines."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int64)}
            )
            return tfds.core.DatasetInfo(builder=self, description="x", features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, {"text": f"line {i} é", "label": i}

    corpus = tfds_text("tfds:effjax_tiny_text", data_dir=tmp_path)
    assert sorted(d.text.decode() for d in corpus.documents) == [f"line {i} é" for i in range(5)]
    assert tfds_text("tfds:effjax_tiny_text", data_dir=tmp_path).digest == corpus.digest
    assert len(tfds_text("tfds:effjax_tiny_text:train[:2]", data_dir=tmp_path).documents) == 2
    with pytest.raises(DataError, match="Unknown split 'nope'"):
        tfds_text("tfds:effjax_tiny_text:nope", data_dir=tmp_path)
    assert "tensorflow" not in sys.modules
