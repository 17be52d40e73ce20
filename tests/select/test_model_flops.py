"""Closed forms against counting: the masks cell by cell, the products from their jaxprs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.select import model_flops as flops


def products(f, *shapes) -> int:
    """2 * the multiply-adds of every dot_general of a function, from its jaxpr."""
    jaxpr = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2
                * int(np.prod(equation.outvars[0].aval.shape))
                * int(np.prod([left[axis] for axis in contracted]))
            )
    return total


@pytest.mark.parametrize("length", [1, 2, 7, 64])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 64, 100])
def test_mean_keys_counts_the_live_cells_of_the_mask(length, window):
    q, k = np.mgrid[:length, :length]
    live = (k <= q) & (q - k < (window or length))
    assert flops.mean_keys(length, window) == pytest.approx(live.sum() / length, rel=1e-12)


def test_the_mask_count_catches_the_full_square():
    assert flops.mean_keys(64) != 64


def test_attention_against_its_dense_form():
    T, N, H = 5, 3, 4

    def form(q, k, v):
        return jnp.einsum("nts,snh->tnh", jnp.einsum("tnh,snh->nts", q, k), v)

    counted = products(form, *[(T, N, H)] * 3)
    assert T * flops.attention(T, N, H) == counted
    assert flops.attention(flops.mean_keys(T), N, H) == flops.attention(T, N, H) * (T + 1) / (2 * T)


def test_retention_against_its_chunked_form():
    C, N, H, F = 6, 3, 4, 5

    def chunk(q, k, v, state):
        within = jnp.einsum("ncs,snf->cnf", jnp.einsum("cnh,snh->ncs", q, k), v)
        across = jnp.einsum("cnh,nhf->cnf", q, state)
        return within + across, state + jnp.einsum("cnh,cnf->nhf", k, v)

    counted = products(chunk, (C, N, H), (C, N, H), (C, N, F), (N, H, F))
    dead = N * 2 * (H + F) * (C * C - C * (C + 1) // 2)
    assert C * flops.retention(C, N, H, F) == pytest.approx(counted - dead)

    def step(q, k, v, state):
        return jnp.einsum("nh,nhf->nf", q, state + jnp.einsum("nh,nf->nhf", k, v))

    assert flops.retention_step(N, H, F) == products(step, (N, H), (N, H), (N, F), (N, H, F))


class Counted(float):
    """A real number that counts the sums and products made of it."""

    made = 0

    def __add__(self, other):
        Counted.made += 1
        return Counted(float(self) + other)

    def __mul__(self, other):
        Counted.made += 1
        return Counted(float(self) * other)

    __sub__ = __add__


def test_state_space_counts_each_real_operation():
    D, P = 3, 4
    for _ in range(D):
        u, y = Counted(0.3), None
        for _ in range(P):
            ar, ai, hr, hi, cr, ci = (Counted(0.1 * i) for i in range(6))
            hr, hi = ar * hr - ai * hi + u, ar * hi + ai * hr
            term = cr * hr - ci * hi
            y = term if y is None else y + term
        y = y + Counted(2.0) * u
    assert flops.diagonal_state_space(D, P) == Counted.made


def decoder(mixer: float) -> float:
    L, D, F, V = 4, 128, 512, 256
    block = 4 * flops.dense(D, D) + mixer + flops.feedforward(D, F)
    return flops.decoder([block] * L, D, V)


def test_a_decoder_costs_six_operations_a_weight_and_its_mixer():
    L, D, F, V, T = 4, 128, 512, 256, 256
    weights = L * (4 * D * D + 2 * D * F) + D * V
    mixer = flops.attention(flops.mean_keys(T), 4, 32)
    assert flops.training(decoder(mixer)) == pytest.approx(6 * weights + 3 * L * mixer)


def test_switch_costs_one_expert_and_the_router():
    dense, sparse = flops.feedforward(8, 32), flops.switch(8, 32, 4)
    assert sparse - dense == 2 * 8 * 4
    assert flops.feedforward(8, 32, matrices=3) == 1.5 * dense
    assert flops.switch(8, 32, 4, matrices=3) - sparse == dense / 2


def test_a_frozen_weight_has_no_gradient_of_its_own():
    def loss(base, a, b, x):
        return (x @ base + (x @ a) @ b).sum()

    def passes(argnums):
        return products(jax.value_and_grad(loss, argnums), (4, 6), (4, 2), (2, 6), (3, 4))

    base, adapter = flops.dense(4, 6), flops.dense(4, 2) + flops.dense(2, 6)
    assert passes((0, 1, 2, 3)) == 3 * flops.training(base + adapter)
    assert passes((1, 2, 3)) == 3 * flops.training(adapter, frozen=base)
