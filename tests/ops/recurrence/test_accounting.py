"""The closed forms of FLOPs and bytes against the jaxpr counter and real arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost.flops import count
from effjax.cost.memory import stored_bytes
from effjax.ops.recurrence import accounting
from effjax.ops.recurrence.retention import retention, retention_state
from effjax.ops.recurrence.state_space import diagonal_state_space, state_space_state

B, N, H, HV, D, P = 2, 3, 8, 4, 6, 4
SIZES = [(40, 8), (19, 8), (5, 64)]  # length, chunk


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def counted(f, wrt: tuple[int, ...], *arrays) -> accounting.Flops:
    """Forward and backward FLOPs; nothing may be unknown."""
    forward = count(f, *arrays)
    both = count(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), wrt), *arrays)
    assert not both.unknown
    return accounting.Flops(forward.total, both.total - forward.total)


def within(got: accounting.Flops, want: accounting.Flops) -> None:
    for a, b in zip(got, want, strict=True):
        assert abs(a - b) <= 0.01 * b, (got, want)


def retention_counted(T: int, chunk: int) -> accounting.Flops:
    where = jnp.zeros((B, T), jnp.int32)

    def f(q, k, v, log_decay):
        return retention(q, k, v, log_decay, positions=where, segments=where, chunk=chunk)[0]

    keys, values = f32(B, T, N, H), f32(B, T, N, HV)
    return counted(f, (0, 1, 2), keys, keys, values, f32(N))


def state_space_counted(T: int, chunk: int, aligned: bool) -> accounting.Flops:
    where = jnp.zeros((B, T), jnp.int32)

    def f(u, log_dt, modes, skip):
        names = ("log_a_real", "a_imag", "c_real", "c_imag")
        return diagonal_state_space(
            u, log_dt=log_dt, **dict(zip(names, modes, strict=True)), skip=skip,
            positions=where, segments=where, chunk=chunk, aligned=aligned,
        )[0]  # fmt: skip

    return counted(f, (0, 1, 2, 3), f32(B, T, D), f32(D), (f32(D, P),) * 4, f32(D))


@pytest.mark.parametrize(("T", "chunk"), SIZES)
def test_retention_is_counted_as_written(T, chunk):
    within(retention_counted(T, chunk), accounting.retention_flops(B, T, N, H, HV, chunk))


@pytest.mark.parametrize(("T", "chunk"), SIZES)
@pytest.mark.parametrize("aligned", [False, True])
def test_the_state_space_is_counted_as_written(T, chunk, aligned):
    want = accounting.state_space_flops(B, T, D, P, chunk, aligned=aligned)
    within(state_space_counted(T, chunk, aligned), want)


def test_the_count_catches_a_wrong_chunk():
    with pytest.raises(AssertionError):
        within(retention_counted(40, 8), accounting.retention_flops(B, 40, N, H, HV, 10))
    with pytest.raises(AssertionError):
        within(state_space_counted(40, 8, True), accounting.state_space_flops(B, 40, D, P, 8))


@pytest.mark.parametrize(("T", "chunk"), SIZES)
def test_what_the_method_asks_for_leaves_out_masked_pairs_and_filling(T, chunk):
    q, k = np.mgrid[:T, :T]
    pairs = ((k <= q) & (q // chunk == k // chunk)).sum()
    exact = accounting.exact_retention_flops(B, T, N, H, HV, chunk)
    assert exact.forward == 2 * B * N * (pairs * (H + HV) + 2 * T * H * HV)
    modes = accounting.exact_state_space_flops(B, T, D, P, chunk)
    assert modes.forward == 2 * B * D * (pairs + 4 * T * P)
    for of_method, written in (
        (exact, accounting.retention_flops(B, T, N, H, HV, chunk)),
        (modes, accounting.state_space_flops(B, T, D, P, chunk, aligned=True)),
    ):
        assert of_method.backward == 2 * of_method.forward
        assert of_method.forward < written.forward


def test_the_last_chunk_is_counted_by_its_own_tokens():
    whole = accounting.exact_retention_flops(1, 8, N, H, HV, 8)
    rest = accounting.exact_retention_flops(1, 3, N, H, HV, 8)
    both = accounting.exact_retention_flops(1, 11, N, H, HV, 8)
    assert both.forward == whole.forward + rest.forward


def test_states_are_as_large_as_counted():
    assert stored_bytes(retention_state(B, N, H, HV)) == accounting.retention_state_bytes(
        B, N, H, HV
    )
    assert stored_bytes(state_space_state(B, D, P)) == accounting.state_space_state_bytes(B, D, P)
