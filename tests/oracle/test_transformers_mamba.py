"""Mamba equals transformers' MambaMixer with copied weights, and Griffin's recurrent block theirs.

Outputs and every gradient, of one document a row that starts at position 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers import RGLRU, Mamba
from effjax.models.sections import MambaConfig, RGLRUConfig

pytestmark = pytest.mark.oracle

B, T, D, P, R, W = 2, 21, 12, 5, 3, 4
LRU, BLOCKS = 18, 3
CONFIG = DecoderConfig(
    width=D,
    pattern=("mamba", "rg_lru"),
    mamba=MambaConfig(states=P, taps=W, rank=R, piece=8),
    rg_lru=RGLRUConfig(channels=LRU, blocks=BLOCKS, taps=W),
)
DRAW = np.random.default_rng(3)
X = DRAW.normal(size=(B, T, D)).astype(np.float32)
WEIGHT = DRAW.normal(size=(B, T, D)).astype(np.float32)  # of the outputs
OURS = {kind: functional(lambda r, k=kind: k(CONFIG, r)) for kind in (Mamba, RGLRU)}


def drawn(torch, module, size=0.7):
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=draw))
    return module


@pytest.fixture(scope="module")
def mamba(torch):
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig as Config

    config = Config(
        hidden_size=D, state_size=P, conv_kernel=W, expand=2, time_step_rank=R, num_hidden_layers=1
    )
    return drawn(torch, modeling.MambaMixer(config, layer_idx=0))


@pytest.fixture(scope="module")
def griffin(torch):
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    from transformers import RecurrentGemmaConfig

    config = RecurrentGemmaConfig(
        hidden_size=D,
        lru_width=LRU,
        num_attention_heads=BLOCKS,
        conv1d_width=W,
        num_hidden_layers=1,
        hidden_activation="gelu_pytorch_tanh",
    )
    return drawn(torch, modeling.RecurrentGemmaRecurrentBlock(config, layer_idx=0))


def of_mamba(values):
    """Their arrays, weights or gradients, by our names."""
    x, gate = np.split(values["in_proj.weight"].T, 2, axis=1)
    down, b, c = np.split(values["x_proj.weight"].T, [R, R + P], axis=1)
    matrices = {"x": x, "gate": gate, "b": b, "c": c, "dt_down": down}
    matrices |= {"dt_up": values["dt_proj.weight"].T, "o": values["out_proj.weight"].T}
    return {name: {"kernel": v} for name, v in matrices.items()} | {
        "a_log": values["A_log"],
        "dt_bias": values["dt_proj.bias"],
        "filter": values["conv1d.weight"][:, 0],
        "filter_bias": values["conv1d.bias"],
        "skip": values["D"],
    }


def of_griffin(values):
    matrices = {"x": "linear_x", "gate": "linear_y", "o": "linear_out"}
    gates = {"recurrence": "rg_lru.recurrent_gate", "input": "rg_lru.input_gate"}
    return {
        **{ours: {"kernel": values[f"{name}.weight"].T} for ours, name in matrices.items()},
        **{f"{ours}_bias": values[f"{name}.bias"] for ours, name in matrices.items()},
        **{f"{ours}_gate": {"kernel": values[f"{name}_weight"]} for ours, name in gates.items()},
        **{f"{ours}_bias": values[f"{name}_bias"].ravel() for ours, name in gates.items()},
        "filter": values["conv_1d.weight"][:, 0],
        "filter_bias": values["conv_1d.bias"],
        "decay": values["rg_lru.recurrent_param"],
    }


def theirs(torch, module, **rest):
    """y, and the gradients of its weighed sum by x and by every parameter."""
    module.zero_grad()
    x = torch.tensor(X, requires_grad=True)
    y = module(x, **rest)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.from_numpy(WEIGHT)).sum().backward()
    gradients = {name: v.grad.numpy() for name, v in module.named_parameters()}
    return y.detach().numpy(), x.grad.numpy(), gradients


def ours(kind, params, positions=None):
    """The same; whole rows, or by positions and segments that say nothing else."""
    context = Context.of(jnp.zeros((B, T), jnp.int32), positions, None, None, None)

    def loss(params, x):
        y = OURS[kind].apply(params, x, context)[0]
        return jnp.sum(y * WEIGHT), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, y), (by_params, by_x) = run(params, X)
    return y, by_x, by_params


def agree(got, want, rel=1e-4):
    paths = jax.tree_util.tree_leaves_with_path
    for (path, a), (other, b) in zip(paths(got), paths(want), strict=True):
        assert path == other
        assert a.shape == b.shape
        assert np.std(b) > 1e-4
        assert np.abs(a - b).max() <= rel * np.abs(b).max(), jax.tree_util.keystr(path)


def copied(module, names):
    return names({name: v.detach().numpy() for name, v in module.named_parameters()})


@pytest.mark.parametrize("aligned", [True, False])
def test_mamba_is_theirs_in_outputs_and_every_gradient(torch, mamba, aligned):
    y, by_x, gradients = theirs(torch, mamba)
    positions = None if aligned else jnp.tile(jnp.arange(T)[None], (B, 1))
    agree(ours(Mamba, copied(mamba, of_mamba), positions), (y, by_x, of_mamba(gradients)))


def test_griffins_block_is_theirs_in_outputs_and_every_gradient(torch, griffin):
    places = torch.arange(T)[None].repeat(B, 1)
    rest = {"position_ids": places, "attention_mask": None, "use_cache": False}
    y, by_x, gradients = theirs(torch, griffin, **rest)
    agree(ours(RGLRU, copied(griffin, of_griffin)), (y, by_x, of_griffin(gradients)))


def test_the_comparisons_catch_a_filter_that_is_turned_round(torch, mamba, griffin):
    places = torch.arange(T)[None].repeat(B, 1)
    rest = {"position_ids": places, "attention_mask": None, "use_cache": False}
    for kind, module, names, given in (
        (Mamba, mamba, of_mamba, {}),
        (RGLRU, griffin, of_griffin, rest),
    ):
        wrong = copied(module, names)
        wrong["filter"] = wrong["filter"][:, ::-1].copy()
        with pytest.raises(AssertionError):
            agree(ours(kind, wrong)[0], theirs(torch, module, **given)[0])
