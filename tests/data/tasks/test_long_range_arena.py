"""The arena's stored tasks, from real data sets built on the spot, without TensorFlow or network.

No test reads the films' reviews or CIFAR-10 themselves: nothing is downloaded.
"""

import socket
import sys

import numpy as np
import pytest

from effjax.data.loader import ArrayLoader
from effjax.data.tasks import ArenaImage, ArenaText, arena_image, arena_text, learned_and_held_out
from effjax.errors import ConfigError, DataError

tfds = pytest.importorskip("tensorflow_datasets")

TEXTS = {"train": ["good é", "bad film, too long", "x"], "test": ["fine"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data of the shape of the arena's, prepared by its first use."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path_factory.mktemp("tfds")

    class EffjaxTinyReviews(tfds.core.GeneratorBasedBuilder):
        """Four reviews."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = path

        def _info(self):
            classes = tfds.features.ClassLabel(names=["neg", "pos"])
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": classes})
            return tfds.core.DatasetInfo(builder=self, description="x", features=features)

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in TEXTS}

        def _generate_examples(self, split):
            for i, text in enumerate(TEXTS[split]):
                yield i, {"text": text, "label": len(text) % 2}

    class EffjaxTinyPictures(tfds.core.GeneratorBasedBuilder):
        """Three pictures of one colour each but for a corner."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = path

        def _info(self):
            picture = tfds.features.Image(shape=(32, 32, 3))
            classes = tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": picture, "label": classes})
            return tfds.core.DatasetInfo(builder=self, description="x", features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield i, {"image": image.fromarray(picture(7 + i)), "label": 7 + i}

    return path


def picture(label):
    """[32, 32, 3] whose first pixels are known colours, the rest follows from the label."""
    made = np.full((32, 32, 3), 20 * label, np.uint8)
    made[0, :5] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [12, 200, 77]]
    return made


def test_reviews_are_bytes_and_the_class_is_asked_at_the_last(folder):
    made = arena_text(length=8, data_dir=folder, dataset="effjax_tiny_reviews")
    assert made.tokens.shape == (3, 8)
    rows = {bytes(row[row >= 0].tolist()): row for row in made.tokens}
    assert set(rows) == {b"good \xc3\xa9", b"bad film", b"x"}
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        (place,) = np.flatnonzero(targets >= 0)
        assert place == (tokens >= 0).sum() - 1
        whole = {"good": 0, "bad ": 0, "x": 1}  # by the length of the text, cut or not
        assert targets[place] == whole[bytes(tokens[tokens >= 0].tolist())[:4].decode()]
    assert np.isfinite(next(ArrayLoader(made, 2, 0)).tokens).all()
    held_out = arena_text("test", length=8, data_dir=folder, dataset="effjax_tiny_reviews")
    assert held_out.count == 1
    assert held_out.digest != made.digest
    again = arena_text(length=8, limit=2, data_dir=folder, dataset="effjax_tiny_reviews")
    np.testing.assert_array_equal(again.tokens, made.tokens[:2])
    assert "tensorflow" not in sys.modules


def test_pictures_are_grey_row_by_row_and_the_class_is_asked_at_the_last_pixel(folder):
    made = arena_image(data_dir=folder, dataset="effjax_tiny_pictures", limit=9)
    assert made.tokens.shape == (3, 1024)
    assert sorted(made.targets[:, -1]) == [7, 8, 9]
    assert (made.targets[:, :-1] == -1).all()
    for tokens, label in zip(made.tokens, made.targets[:, -1], strict=True):
        # By hand: 0.2989 * 255.5 = 76.4, 0.5870 * 255.5 = 149.98, 0.1140 * 255.5 = 29.1;
        # (0.2989 * 12 + 0.5870 * 200 + 0.1140 * 77) * 1.00196 = 130.0188.
        assert tokens[:5].tolist() == [76, 149, 29, 255, 130]
        assert tokens[5:].tolist() == [20 * label] * 1019  # a grey stays what it is


@pytest.fixture
def source(monkeypatch):
    """Puts a list, or an error, in the place of what `tfds.data_source` would open."""
    asked = []

    def use(answer):
        def data_source(name, **kwargs):
            asked.append((name, kwargs["split"]))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(tfds, "data_source", data_source)
        return asked

    return use


def test_tasks_read_no_more_than_they_are_asked_for(source):
    asked = source([{"text": b"abc", "label": np.int64(1)}] * 600)
    learned, held_out = learned_and_held_out(ArenaText(length=5), 20, 0)
    assert (learned.count, held_out.count, learned.length) == (20, 512, 5)
    source([{"image": picture(1), "label": 1}] * 3)
    learned, _ = learned_and_held_out(ArenaImage(), 20, 0)
    assert (learned.count, learned.length, ArenaImage().vocab) == (3, 1024, 256)
    assert asked == [
        ("imdb_reviews", "train"),
        ("imdb_reviews", "test"),
        ("cifar10", "train"),
        ("cifar10", "test"),
    ]


@pytest.mark.parametrize(
    ("read", "answer", "message"),
    [
        (arena_text, socket.gaierror(-2, "x"), "task text, imdb_reviews: .* needs the network"),
        (arena_image, ConnectionError("x"), "task image, cifar10: .* needs the network"),
        (arena_text, [], "split 'train' has no examples"),
        (arena_text, [{"label": 1}], "no feature 'text', among label"),
        (arena_image, [{"image": picture(1)}], "no feature 'label', among image"),
        (arena_text, [{"text": b"a", "label": -1}], "'train' example 0: no class is given"),
        (arena_text, [{"text": b"", "label": 1}], "example 0: wanted a text, got b''"),
        (arena_text, [{"text": 3, "label": 1}], "example 0: wanted a text, got 3"),
        (arena_image, [{"image": picture(1)[:9], "label": 1}], r"got uint8 \(9, 32, 3\)"),
        (arena_image, [{"image": picture(1) / 255, "label": 1}], "got float64"),
    ],
)
def test_what_is_missing_is_said(source, read, answer, message):
    source(answer)
    with pytest.raises(DataError, match=message):
        read()


def test_names_and_sizes_are_refused():
    with pytest.raises(DataError, match="has no 'imdb_review'; did you mean 'imdb_reviews'"):
        arena_text(dataset="imdb_review")
    with pytest.raises(DataError, match="has no 'cifar_10'; did you mean 'cifar10'"):
        arena_image(dataset="cifar_10")
    for read in (arena_text, arena_image):
        with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
            read(limit=0)
    with pytest.raises(ConfigError, match="length must be at least 1, got 0"):
        arena_text(length=0)
    with pytest.raises(ConfigError, match=r"ArenaText.length"):
        ArenaText(length=0)
