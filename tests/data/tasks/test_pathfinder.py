"""Pathfinder: what the label says can be seen in the picture."""

import numpy as np
import pytest
from scipy import ndimage

from effjax.data.tasks import Pathfinder, examples
from effjax.errors import ConfigError


def test_dots_are_connected_where_the_label_says_so():
    """Without gaps or distractors a curve is one connected blot, so that a flood fill decides."""
    task = Pathfinder(side=32, dashes=7, dash=1.6, gap=0.2, distractors=0, clearance=3.8)
    random = np.random.default_rng(0)
    for connected in (True, False) * 8:
        image = task.image(random, connected)
        blots, count = ndimage.label(image > 60, structure=np.ones((3, 3)))
        dots = ndimage.uniform_filter(image, 3) > 185  # ink over 3 x 3 pixels
        found = set(blots[dots])
        assert 0 not in found
        assert count == 2
        assert len(found) == (1 if connected else 2)


def test_labels_are_even_and_both_have_as_much_ink():
    """No count of pixels gives the answer away."""
    made = examples(Pathfinder(side=32, dashes=6, distractors=1), 150, 0)
    labels = made.targets[:, -1]
    assert 0.35 < labels.mean() < 0.65
    assert (made.targets[:, :-1] == -1).all()
    ink = (made.tokens > 127).sum(axis=1)
    assert abs(ink[labels == 1].mean() - ink[labels == 0].mean()) < 0.1 * ink.mean()
    assert 0.02 < ink.mean() / 1024 < 0.2


def test_path_x_has_the_length_that_it_is_known_for():
    task = Pathfinder(side=128, dashes=20, dash=5.0, gap=3.0, clearance=5.0)
    assert task.length == 16384
    assert examples(task, 1, 0).tokens.shape == (1, 16384)


def test_curves_without_room_are_refused_and_do_not_hang():
    task = Pathfinder(side=20, dashes=12, turn=0.0, dash=1.0, gap=0.2, clearance=0.5)
    with pytest.raises(ConfigError, match="found no room for all"):
        Pathfinder(side=20, dashes=16, turn=0.0, dash=1.0, gap=0.2, clearance=0.5).image(
            np.random.default_rng(0), True
        )
    assert task.image(np.random.default_rng(0), True).shape == (20, 20)
