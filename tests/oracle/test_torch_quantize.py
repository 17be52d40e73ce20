"""Round-to-nearest codes equal torch.quantize_per_channel's at the same scales and zero points."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.transforms import round_to_nearest
from effjax.weights import Axes

# torch announces the end of its quantised tensors; the pinned version still has them.
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]

D, F = 31, 12
W = np.random.default_rng(0).standard_normal((D, F)).astype(np.float32) * 3
AXES = {"w": Axes(("embed",), ("mlp",))}


def torch_codes(torch, scale, zero):
    quantized = torch.quantize_per_channel(
        torch.tensor(W), torch.tensor(scale), torch.tensor(zero), axis=1, dtype=torch.qint8
    )
    return quantized.int_repr().numpy(), quantized.dequantize().numpy()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_and_values_are_torchs(torch, symmetric):
    leaf = round_to_nearest({"w": jnp.asarray(W)}, AXES, bits=8, symmetric=symmetric)["w"]
    scale = np.asarray(leaf.scale, np.float64)[0]
    zero = np.zeros(F, np.int64) if symmetric else np.asarray(leaf.zero, np.int64)[0]
    codes, values = torch_codes(torch, scale, zero)
    got = np.asarray(leaf.codes, np.int32)
    assert len(np.unique(codes)) > 100
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_allclose(leaf.materialize(), values, rtol=1e-6, atol=1e-6)


def test_the_comparison_catches_another_scale(torch):
    leaf = round_to_nearest({"w": jnp.asarray(W)}, AXES, bits=8)["w"]
    scale = 1.02 * np.asarray(leaf.scale, np.float64)[0]
    codes, _ = torch_codes(torch, scale, np.zeros(F, np.int64))
    assert (codes != np.asarray(leaf.codes, np.int32)).mean() > 0.1
