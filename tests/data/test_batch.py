"""A batch is a pytree of four arrays with names."""

import jax
import numpy as np

from effjax.data.batch import Batch


def test_batch_is_a_pytree_with_names():
    batch = Batch(*np.arange(16).reshape(4, 2, 2))
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [
        ".tokens",
        ".targets",
        ".positions",
        ".segments",
    ]
    halves = jax.tree.map(lambda array: array[:1], batch)
    assert isinstance(halves, Batch)
    assert halves.segments.tolist() == [[12, 13]]
