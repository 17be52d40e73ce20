"""The counter against counts made by hand, under every transformation a program goes through."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from effjax.cost import flops
from effjax.cost.flops import Flops, count, six_nd, xla_flops

D = 4
DOT = 2 * D**3  # one D x D x D product


def matrix(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape or (D, D), dtype)


def product(x, y):
    return x @ y


def layers(x, weights):
    """Three products, scanned."""
    return lax.scan(lambda carry, w: (jnp.tanh(carry @ w), None), x, weights)[0]


def remat_layers(x, weights):
    body = jax.checkpoint(lambda carry, w: (jnp.tanh(carry @ w), None))
    return lax.scan(body, x, weights)[0]


def outer_scan(x, weights):
    return lax.scan(lambda carry, _: (layers(carry, weights), None), x, length=5)[0]


@jax.custom_vjp
def custom(x, y):
    return x @ y


# Two products forward and three backward, so that counting a rule twice or never shows.
custom.defvjp(
    lambda x, y: (x @ y, (x @ x, y)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g @ saved[1]),
)


def twice(x, y):
    return lax.scan(lambda carry, _: (custom(carry, y), None), x, length=2)[0]


@jax.custom_jvp
def custom_tangent(x):
    return x @ x


custom_tangent.defjvp(lambda x, t: (custom_tangent(*x), x[0] @ t[0]))


def squared(f):
    """A loss whose gradient needs the forward pass."""
    return lambda *arguments: (f(*arguments) ** 2).sum()


def both(f, *argnums):
    return jax.grad(squared(f), argnums or (0, 1))


def choose(x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)


def equal_branches(x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x.T @ x, x)


def unrolled_scan(x):
    return lax.scan(lambda c, _: (c @ c, None), x, length=6, unroll=3)[0]


def linear_solve(x, b):
    """Its solver makes two products with x; the product that derivatives use is no part of it."""
    return lax.custom_linear_solve(lambda y: x @ y, b, lambda _, b: x @ (x @ b))


def loop(x):
    return lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)


def named_loop(x):
    return lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)


named_loop.__name__ = "named_loop_flops_777"


def multiply_kernel(x, y, out):
    out[...] = x[...] @ y[...]


def double_kernel(x, out):
    out[...] = x[...] * 2


def kernel(x, y, work=None):
    estimate = work and pl.CostEstimate(flops=work, transcendentals=0, bytes_accessed=0)
    call = pl.pallas_call(
        multiply_kernel, out_shape=matrix(), interpret=True, cost_estimate=estimate
    )
    return call(x, y)


def double(x):
    estimate = pl.CostEstimate(flops=16, transcendentals=0, bytes_accessed=0)
    return pl.pallas_call(
        double_kernel, out_shape=matrix(), interpret=True, cost_estimate=estimate
    )(x)


def sharded(axes, batch, shared):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    f = jax.shard_map(
        product, mesh=mesh, in_specs=(batch, shared), out_specs=batch, axis_names=axes
    )
    return jax.jit(f)


X, W = matrix(), matrix(3, D, D)
CASES = {
    "dot": (product, (X, X), DOT),
    "jit": (jax.jit(product), (X, X), DOT),
    "nested_jit": (lambda x: jax.jit(jax.jit(product))(x, x) @ x, (X,), 2 * DOT),
    "vmap": (jax.vmap(jax.jit(product)), (W, W), 3 * DOT),
    "scan": (layers, (X, W), 3 * DOT),
    "scan_of_none": (layers, (X, matrix(0, D, D)), 0),
    "nested_scan": (outer_scan, (X, W), 15 * DOT),
    "map": (lambda w: lax.map(lambda x: x @ x, w), (W,), 3 * DOT),
    "static_loop": (lambda x: lax.fori_loop(0, 7, lambda _, c: c @ c, x), (X,), 7 * DOT),
    "unrolled_scan": (unrolled_scan, (X,), 6 * DOT),
    "grad": (both(product), (X, X), 3 * DOT),
    "grad_of_one": (both(product, 1), (X, X), 2 * DOT),
    "grad_of_scan": (both(layers), (X, W), 9 * DOT),
    "grad_of_remat": (both(remat_layers), (X, W), 12 * DOT),
    "custom_vjp": (custom, (X, X), DOT),
    "custom_vjp_grad": (both(custom), (X, X), 5 * DOT),
    "custom_vjp_vmap": (jax.vmap(jax.jit(custom)), (W, W), 3 * DOT),
    # Twice: a product, then again with what the rule saves, then the rule's three.
    "custom_vjp_remat": (both(jax.checkpoint(twice)), (X, X), 2 * 6 * DOT),
    "custom_jvp": (custom_tangent, (X,), DOT),
    "custom_jvp_grad": (jax.grad(squared(custom_tangent)), (X,), 2 * DOT),
    "declared": (jax.jit(named_loop), (X,), 777),
    "declared_inside_scan": (
        lambda x: lax.scan(lambda c, _: (jax.jit(named_loop)(c), None), x, length=2)[0],
        (X,),
        2 * 777,
    ),
    "pallas": (functools.partial(kernel, work=99), (X, X), 99),
    "pallas_vmap": (jax.vmap(functools.partial(kernel, work=99)), (W, W), 3 * 99),
    "equal_branches": (equal_branches, (X,), DOT),
    "linear_solve": (linear_solve, (X, matrix(D)), 2 * 2 * D * D),
    "shard_map": (
        sharded({"a", "b"}, P("a", "b"), P("b")),
        (matrix(8, 8), matrix(8, D)),
        2 * 8 * 8 * D,
    ),
    "shard_map_one_axis": (sharded({"b"}, P("b"), P()), (matrix(8, D), X), 2 * 8 * D * D),
    "shard_map_replicated": (
        sharded({"a", "b"}, P("b"), P()),  # the two along "a" do the same work
        (matrix(8, D), X),
        2 * 2 * 8 * D * D,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_total_is_what_a_person_counts(name):
    f, arguments, expected = CASES[name]
    work = count(f, *arguments)
    assert work.unknown == ()
    assert work.total == expected == sum(work.by_primitive.values())


@pytest.mark.parametrize(
    ("container", "case"),
    [
        ("scan", "grad_of_remat"),
        ("shard_map", "shard_map"),
        ("custom_linear_solve", "linear_solve"),
    ],
)
def test_cases_catch_a_container_counted_once(monkeypatch, container, case):
    def once(equation, where):
        return flops._unfamiliar(equation, where)

    monkeypatch.setitem(flops._CONTAINERS, container, once)
    f, arguments, expected = CASES[case]
    assert count(f, *arguments).total != expected


def test_an_unfamiliar_primitive_is_counted_once_and_noted(monkeypatch):
    monkeypatch.setattr(flops, "CALLS", flops.CALLS - {"jit"})
    work = count(jax.jit(product), X, X)
    assert work.total == DOT
    assert work.unknown == ("jit: unfamiliar, counted once",)


def test_a_loop_without_a_known_count_is_unknown_and_says_so():
    work = count(jax.jit(loop), X)
    assert work.total == 0
    assert work.unknown == (f"while in loop: {DOT} FLOPs an iteration, trip count unknown",)
    inside = count(lambda x: lax.scan(lambda c, _: (loop(c) @ c, None), x, length=2)[0], X)
    assert inside.total == 2 * DOT
    assert len(inside.unknown) == 1


def test_an_elementwise_loop_leaves_the_total_known():
    work = count(lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x), X)
    assert work.total == 0
    assert work.unknown == ()
    assert work.elementwise > 0


def test_branches_that_differ_give_a_bound_and_nothing_unknown():
    work = count(lambda x: lax.scan(lambda c, _: (choose(c), None), x, length=3)[0], X)
    assert work.total == 3 * 2 * DOT
    assert work.bounded == (f"cond: {DOT} to {2 * DOT} FLOPs, the most is counted",)
    assert work.unknown == ()


def test_a_kernel_without_an_estimate_is_unknown():
    work = count(kernel, X, X)
    assert work.total == 0
    assert work.unknown == ("pallas_call: no cost_estimate",)


def test_an_elementwise_kernel_is_no_matrix_work():
    assert count(double, X) == Flops(elementwise=16)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: jnp.linalg.svd(x, compute_uv=False), "svd"),
        (lambda x: jnp.linalg.eigh(x @ x)[0], "eigh"),
        (lambda x: jax.pure_callback(lambda x: x, x, x), "pure_callback"),
    ],
)
def test_what_has_no_closed_form_is_unknown(f, name):
    work = count(f, X)
    assert any(note.startswith(name) for note in work.unknown)


def test_what_the_outputs_do_not_need_is_not_counted():
    def wasteful(x):
        extra = x @ x @ x
        return {"y": x @ x, "aux": extra}["y"]

    assert count(wasteful, X).total == DOT


def test_elementwise_work_is_apart():
    work = count(lambda x: jnp.exp(x @ x).sum(), X)
    assert work.total == DOT
    assert work.elementwise == 2 * D * D
    assert count(lambda x: x + 1, matrix(9, dtype=jnp.int32)).elementwise == 0
    assert count(jnp.argmax, matrix(9)).elementwise == 9
    assert count(lambda x: x.at[jnp.array([0, 0])].add(1.0), matrix(9)).elementwise == 2


def test_arguments_may_be_abstract_trees_and_anything_else():
    def f(params, how, *, scale=None):
        y = params["w"] @ params["w"] if how == "square" else params["w"]
        return y if scale is None else y * scale

    big = {"w": matrix(8192, 8192, dtype=jnp.bfloat16)}
    assert count(f, big, "square").total == 2 * 8192**3
    assert count(f, big, "none").total == 0
    assert count(f, big, "square", scale=2.0).elementwise == 8192**2


def test_flops_add_and_multiply():
    a = Flops(3, {"dot_general": 2, "fft": 1}, 4, ("x",))
    b = Flops(1, {"fft": 1}, 0, ("x", "y"), ("z",))
    assert a + b == Flops(4, {"dot_general": 2, "fft": 2}, 4, ("x", "y"), ("z",))
    assert (a + b).times(2) == Flops(8, {"dot_general": 4, "fft": 4}, 8, ("x", "y"), ("z",))
    assert a.times(0) == Flops()


def test_agrees_with_xla_where_xla_is_right_and_not_in_a_loop():
    """XLA adds element-wise work and counts a scan's body once."""

    def unrolled(x, weights):
        for w in weights:
            x = x @ w
        return x

    def scanned(x, weights):
        return lax.scan(lambda carry, w: (carry @ w, None), x, weights)[0]

    arguments = matrix(32, 64), matrix(3, 64, 64)
    ours = count(jax.grad(squared(unrolled), (0, 1)), *arguments)
    program = jax.jit(jax.grad(squared(unrolled), (0, 1))).lower(*arguments).compile()
    assert xla_flops(program) == pytest.approx(ours.total + ours.elementwise, rel=0.01)
    assert count(scanned, *arguments).total == 3 * 2 * 32 * 64 * 64
    loop_once = xla_flops(jax.jit(scanned).lower(*arguments).compile())
    assert loop_once < 2 * 2 * 32 * 64 * 64
    assert xla_flops(object()) is None


def test_six_nd():
    assert six_nd(10, 100) == 6000
