"""Recall tasks: every target follows from its row by a rule that is written down here again."""

import numpy as np

from effjax.data.tasks import (
    AssociativeRecall,
    Copying,
    InductionHeads,
    Reversing,
    SelectiveCopying,
    examples,
)


def test_associative_recall_asks_the_value_of_a_key_that_comes_again():
    task = AssociativeRecall(vocab=64, length=40, pairs=5)
    made = examples(task, 200, 0)
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        keys, values = tokens[:10:2], tokens[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert 0 < keys.min() <= keys.max() < 32 <= values.min()
        table = dict(zip(keys, values, strict=True))
        places = np.flatnonzero(targets >= 0)
        assert (places % 2 == 0).all()
        assert places.min() >= 10
        assert {tokens[at]: targets[at] for at in places} == table
    noise = made.tokens[:, 10:][made.targets[:, 10:] < 0]
    assert len(np.unique(noise)) == 64


def test_associative_recall_comes_back_soon_at_a_small_power():
    mean = {}
    for power in (0.01, 1.0):
        task = AssociativeRecall(length=200, pairs=2, power=power)
        places = np.nonzero(examples(task, 500, 1).targets >= 0)[1]
        mean[power] = places.mean()
    even = 4 + 2 * (98 - 1) / 2
    assert abs(mean[1.0] - even) < 6  # every gap alike
    assert mean[0.01] < 70


def test_selective_copying_asks_the_symbols_in_their_order():
    task = SelectiveCopying(vocab=7, context=30, symbols=4)
    made = examples(task, 300, 0)
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        np.testing.assert_array_equal(tokens[30:], 1)
        np.testing.assert_array_equal(targets[30:], tokens[:30][tokens[:30] > 1])
        assert (targets[:30] == -1).all()
    share = (made.tokens[:, :30] > 1).mean(axis=0)
    assert abs(share - 4 / 30).max() < 0.08  # any place


def test_induction_heads_ask_what_followed_the_special_token():
    made = examples(InductionHeads(vocab=8, length=20), 400, 0)
    places = []
    for tokens, targets in zip(made.tokens, made.targets, strict=True):
        first, last = np.flatnonzero(tokens == 7)
        assert last == 19
        assert targets[last] == tokens[first + 1] != 7
        assert (targets[:last] == -1).all()
        places.append(first)
    assert set(places) == set(range(18))


def test_copying_and_reversing_ask_the_string_again():
    for task in (Copying(vocab=5, longest=6), Reversing(vocab=5, longest=6)):
        made = examples(task, 100, 0)
        sizes = set()
        for tokens, targets in zip(made.tokens, made.targets, strict=True):
            size = int(np.flatnonzero(tokens == 0)[0])
            string, answer = tokens[:size], targets[size : 2 * size]
            np.testing.assert_array_equal(answer, string[::-1] if "Rev" in made.name else string)
            np.testing.assert_array_equal(tokens[size + 1 : 2 * size], answer[:-1])
            assert (tokens[2 * size :] == -1).all()
            assert (targets >= 0).sum() == size
            sizes.add(size)
        assert sizes == set(range(1, 7))
