"""Magnitude pruning keeps what torch.nn.utils.prune.l1_unstructured keeps."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.transforms import magnitude
from effjax.weights import Axes

pytestmark = pytest.mark.oracle

W = np.random.default_rng(0).standard_normal((23, 11)).astype(np.float32)
AXES = {"w": Axes(("embed",), ("mlp",))}


def torch_weights(torch, *amounts):
    """A linear layer's weight after pruning it by each amount in turn, and its mask."""
    import torch.nn.utils.prune as prune

    layer = torch.nn.Linear(W.shape[0], W.shape[1], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(W.T.copy()))
    for amount in amounts:
        prune.l1_unstructured(layer, "weight", amount=amount)
    return layer.weight.detach().numpy().T, layer.weight_mask.numpy().T.astype(bool)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_the_same_weights_are_kept(torch, sparsity):
    leaf = magnitude({"w": jnp.asarray(W)}, AXES, sparsity=sparsity)["w"]
    values, mask = torch_weights(torch, sparsity)
    np.testing.assert_array_equal(leaf.mask, mask)
    np.testing.assert_array_equal(leaf.materialize(), values)


def test_pruning_again_counts_of_all_where_torch_counts_of_the_rest(torch):
    half = magnitude({"w": jnp.asarray(W)}, AXES, sparsity=0.5)
    more = magnitude(half, AXES, sparsity=0.75)["w"]
    kept = W.size - round(0.5 * W.size)
    _, mask = torch_weights(torch, 0.5, round(0.75 * W.size) - (W.size - kept))
    np.testing.assert_array_equal(more.mask, mask)


def test_the_comparison_catches_a_signed_order(torch):
    _, mask = torch_weights(torch, 0.5)
    signed = np.argsort(np.argsort(W.ravel())).reshape(W.shape) >= round(0.5 * W.size)
    assert (signed != mask).mean() > 0.1
