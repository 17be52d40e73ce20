"""Mamba-2 equals transformers' Mamba2Mixer with copied weights: values, gradients, pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers.mamba2 import Mamba2
from effjax.models.sections import Mamba2Config

pytestmark = pytest.mark.oracle

B, T, D, N, H, G, P, W = 2, 37, 16, 4, 8, 2, 6, 4
SIZES = {"gate": N * H, "x": N * H, "b": G * P, "c": G * P, "dt": N}
SHAPES = {"gate": (N, H), "x": (N, H), "b": (G, P), "c": (G, P), "dt": (N,)}
CONFIG = DecoderConfig(
    width=D, layers=1, pattern=("mamba2",), mamba2=Mamba2Config(N, H, P, G, W, chunk=8)
)
MIXER = functional(lambda rngs: Mamba2(CONFIG, rngs))
DRAW = np.random.default_rng(5)
X, WEIGHT = DRAW.normal(size=(2, B, T, D)).astype(np.float32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))


@pytest.fixture(scope="module")
def mixer(torch):
    pytest.importorskip("transformers")
    from transformers import Mamba2Config as TheirConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = TheirConfig(
        num_heads=N, head_dim=H, hidden_size=D, state_size=P, n_groups=G, conv_kernel=W,
        expand=N * H // D, chunk_size=16, num_hidden_layers=1, use_bias=False,
    )  # fmt: skip
    made = Mamba2Mixer(config, layer_idx=0).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
        made.norm.weight.add_(1.0)
    return made


def copied(value_of):
    """Their parameters, or their gradients, by our names."""
    made, at, conv = {}, 0, 0
    for name, size in SIZES.items():
        rows = value_of("in_proj.weight")[at : at + size]
        made[name] = {"kernel": rows.T.reshape(D, *SHAPES[name])}
        at += size
        if name in ("x", "b", "c"):
            part = slice(conv, conv + size)
            taps = value_of("conv1d.weight")[part, 0]
            made[f"filter_{name}"] = taps.reshape(*SHAPES[name], W)
            made[f"bias_{name}"] = value_of("conv1d.bias")[part].reshape(SHAPES[name])
            conv += size
    made["o"] = {"kernel": value_of("out_proj.weight").T.reshape(N, H, D)}
    for ours, theirs in {"dt_bias": "dt_bias", "log_a": "A_log", "skip": "D"}.items():
        made[ours] = value_of(theirs)
    return made | {"scale": value_of("norm.weight").reshape(N, H)}


def params_of(mixer):
    return copied(lambda name: mixer.get_parameter(name).detach().numpy())


@jax.jit
def ours(params, x, positions, state=None):
    return MIXER.apply(params, x, Context(positions, jnp.zeros_like(positions)), state)[:2]


def close(got, want):
    assert np.abs(want).std() > 1e-3
    assert np.abs(np.asarray(got) - want).max() <= 1e-4 * max(1.0, np.abs(want).max())


def test_a_layer_is_theirs_with_gradients(torch, mixer):
    x = torch.tensor(X, requires_grad=True)
    wanted = mixer(x)
    (wanted * torch.from_numpy(WEIGHT)).sum().backward()

    def weighed(params, x):
        y, _ = ours(params, x, POSITIONS)
        return (y * WEIGHT).sum(), y

    run = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))
    (_, y), (by_params, by_x) = run(params_of(mixer), X)
    close(y, wanted.detach().numpy())
    close(by_x, x.grad.numpy())
    theirs = copied(lambda name: mixer.get_parameter(name).grad.numpy())
    assert jax.tree.structure(by_params) == jax.tree.structure(theirs)
    jax.tree.map(close, by_params, theirs)


def test_pieces_with_a_state_are_their_whole(torch, mixer):
    params = params_of(mixer)
    state = MIXER.apply(params, B, T, T, jnp.float32, method="init_state")
    with torch.no_grad():
        wanted = mixer(torch.from_numpy(X)).numpy()
    for part in (slice(0, 20), slice(20, 21), slice(21, T)):
        y, state = ours(params, X[:, part], POSITIONS[:, part], state)
        close(y, wanted[:, part])


def test_the_comparison_catches_a_step_that_is_off(torch, mixer):
    params = params_of(mixer)
    with torch.no_grad():
        wanted = mixer(torch.from_numpy(X)).numpy()
    with pytest.raises(AssertionError):
        close(ours(params | {"dt_bias": params["dt_bias"] + 0.01}, X, POSITIONS)[0], wanted)
