"""RWKV's time and channel mixing equal transformers' RwkvBlock with copied weights.

Its layer norms are not the package's: they are applied in the test, to both.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.feedforwards import ChannelMixing
from effjax.models.functional import functional
from effjax.models.mixers import RWKV
from effjax.models.sections import RWKVConfig

pytestmark = pytest.mark.oracle

B, T, D, F = 2, 21, 12, 20
CONFIG = DecoderConfig(
    width=D,
    hidden=F,
    pattern=("rwkv",),
    feedforward="channel_mixing",
    rwkv=RWKVConfig(chunk=8),
)
DRAW = np.random.default_rng(3)
X = DRAW.normal(size=(B, T, D)).astype(np.float32)
WEIGHT = DRAW.normal(size=(B, T, D)).astype(np.float32)  # of the outputs
TIME, CHANNEL = (functional(lambda r, p=part: p(CONFIG, r)) for part in (RWKV, ChannelMixing))
NAMES = {
    "time_decay": "decay",
    "time_first": "bonus",
    "time_mix_key": "mu_k",
    "time_mix_value": "mu_v",
    "time_mix_receptance": "mu_r",
    "key.weight": "k",
    "value.weight": "v",
    "receptance.weight": "r",
    "output.weight": "o",
}
CHANNEL_NAMES = {
    "time_mix_key": "mu_key",
    "time_mix_receptance": "mu_receptance",
    "key.weight": "key",
    "value.weight": "value",
    "receptance.weight": "receptance",
}


@pytest.fixture(scope="module")
def block(torch):
    """Their second block with drawn weights; keys are large, so that exponents are needed."""
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    from transformers import RwkvConfig

    config = RwkvConfig(
        vocab_size=7, hidden_size=D, intermediate_size=F, num_hidden_layers=2, context_length=T
    )
    block = modeling.RwkvBlock(config, layer_id=1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if not name.startswith("ln"):
                size = 9.0 if name == "attention.key.weight" else 0.7
                parameter.copy_(size * torch.randn(parameter.shape, generator=draw))
    return block


def copied(module, names):
    """Their parameters by our names: matrices transposed, vectors flat."""
    made = {}
    for theirs, ours in names.items():
        value = module.get_parameter(theirs).detach().numpy()
        made[ours] = {"kernel": value.T} if theirs.endswith("weight") else value.ravel()
    return made


def normed(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)


@jax.jit
def ours(params, x, positions, state):
    """A block, and its state."""
    context = Context(positions, jnp.zeros_like(positions))
    state = (None, None) if state is None else state
    y, mixer, _ = TIME.apply(params[0], normed(x), context, state[0])
    x = x + y
    y, network, _ = CHANNEL.apply(params[1], normed(x), context, state[1])
    return x + y, (mixer, network)


def params_of(block):
    return copied(block.attention, NAMES), copied(block.feed_forward, CHANNEL_NAMES)


POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))


def test_a_block_is_theirs_with_gradients(torch, block):
    x = torch.tensor(X, requires_grad=True)
    wanted, _, _ = block(x)
    (wanted * torch.from_numpy(WEIGHT)).sum().backward()
    params = params_of(block)

    def weighed(params, x):
        y, _ = ours(params, x, POSITIONS, None)
        return (y * WEIGHT).sum(), y

    run = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1), has_aux=True))
    (_, y), (by_params, by_x) = run(params, X)
    assert wanted.std() > 0.1
    close(y, wanted.detach().numpy())
    close(by_x, x.grad.numpy())
    for ours_, theirs, names in (
        (by_params[0], block.attention, NAMES),
        (by_params[1], block.feed_forward, CHANNEL_NAMES),
    ):
        for name, own in names.items():
            grad = theirs.get_parameter(name).grad.numpy()
            got = ours_[own]["kernel"].T if name.endswith("weight") else ours_[own]
            close(got, grad.reshape(got.shape))


def test_pieces_with_a_state_are_theirs(torch, block):
    """Of one row: given one token, theirs adds each row's latest one to every row."""
    params = params_of(block)
    state = tuple(
        part.apply(p, 1, T, T, jnp.float32, method="init_state")
        for part, p in zip((TIME, CHANNEL), params, strict=True)
    )
    theirs = [torch.zeros(1, D, 2) for _ in range(5)]
    theirs[4] -= 1e30
    for part in (slice(0, 9), slice(9, 10), slice(10, T)):
        y, state = ours(params, X[:1, part], POSITIONS[:1, part], state)
        with torch.no_grad():
            wanted, theirs, _ = block(torch.from_numpy(X[:1, part]), state=theirs, use_cache=True)
        close(y, wanted.numpy())
    sums = state[0]
    for key, theirs_ in zip(("numerator", "denominator", "exponent"), theirs[2:], strict=True):
        close(sums[key], theirs_[:, :, 1].numpy())


def test_the_comparison_catches_a_bonus_that_is_lost(torch, block):
    time, channel = params_of(block)
    with torch.no_grad():
        wanted = block(torch.from_numpy(X))[0].numpy()
    y, _ = ours(({**time, "bonus": 0 * time["bonus"]}, channel), X, POSITIONS, None)
    assert np.abs(y - wanted).max() > 1e-2


def close(got, wanted):
    assert np.abs(np.asarray(got) - wanted).max() <= 1e-4 * np.abs(wanted).max()
