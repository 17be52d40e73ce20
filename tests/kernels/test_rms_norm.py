"""The RMSNorm kernels in interpret mode against float64, and lowered for the machines they are for.

Interpret mode runs on any machine and shows that results are right; lowering runs the TPU's and the
GPU's front ends, which refuse what their compilers have no form for. Neither shows speed.
"""

import contextlib
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from effjax_kernels.rms_norm import cost, gpu, tpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, use_abstract_mesh

from effjax.cost.flops import count

EPS = 1e-6
KERNELS = {
    "gpu": (gpu, gpu.Tiles(rows=4, programs=3, warps=4)),
    "tpu": (tpu, tpu.Tiles(rows=16)),
}
H100 = AbstractMesh(
    (1,), ("device",), abstract_device=AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
)
SHAPES = [(1, 128), (7, 200), (63, 200)]  # one row; an odd width; several tiles and a partial one


@functools.cache
def interpreted(name):
    module, tiles = KERNELS[name]
    return functools.partial(module.rms_norm, eps=EPS, tiles=tiles, interpret=True)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return interpreted(request.param)


def draw(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=shape) for _ in range(2))
    x[0] *= 1e-3
    return tuple(jnp.asarray(a, dtype) for a in (x, rng.normal(size=shape[-1]), dy))


def reference(x, scale, dy):
    """y, dx and dscale in float64 numpy, from the equations in the kernel's package."""
    x, scale, dy = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, scale, dy))
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    n, g = x * r, dy * scale
    dx = r * (g - n * (g * n).mean(-1, keepdims=True))
    return {"y": n * scale, "x": dx, "scale": (dy * n).reshape(-1, x.shape[-1]).sum(0)}


@functools.partial(jax.jit, static_argnums=0)
def run(kernel, x, scale, dy):
    y, pull = jax.vjp(kernel, x, scale)
    return dict(zip(("y", "x", "scale"), (y, *pull(dy)), strict=True))


def check(got, want, rtol=1e-5, atol=2e-5):
    for name, array in got.items():
        array = np.asarray(array.astype(jnp.float32))
        assert array.std() > 1e-3
        np.testing.assert_allclose(array, want[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_result_and_each_gradient_equal_float64(kernel, shape):
    arguments = draw(shape)
    check(run(kernel, *arguments), reference(*arguments))


def test_bfloat16_is_rounded_once(kernel):
    arguments = draw((7, 200), jnp.bfloat16)
    got = run(kernel, *arguments)
    assert {a.dtype for a in got.values()} == {jnp.bfloat16.dtype}
    check(got, reference(*arguments), rtol=2.0**-8, atol=1e-6)


def test_poisoned_neighbours_reach_nothing(kernel):
    """NaN in one row spoils that row and the scale's gradient alone."""
    x, scale, dy = draw((63, 200))
    got = run(kernel, x.at[62].set(jnp.nan), scale, dy)
    want = reference(x, scale, dy)
    for name in ("y", "x"):
        np.testing.assert_allclose(got[name][:62], want[name][:62], rtol=1e-5, atol=2e-5)
        assert jnp.isnan(got[name][62]).all()


def test_two_runs_agree_bit_for_bit(kernel):
    arguments = draw((63, 200))
    first, second = run(kernel, *arguments), run(kernel, *arguments)
    assert all((first[name] == second[name]).all() for name in first)


def test_inside_vmap_remat_scan_and_shard_map(kernel):
    x, scale, dy = draw((8, 7, 200))
    want = reference(x, scale, dy)

    def loss(f):
        return jax.grad(lambda x, scale: (f(x, scale) * dy).sum(), (0, 1))

    def scanned(x, scale):
        return jax.lax.scan(lambda _, row: (None, jax.checkpoint(kernel)(row, scale)), None, x)[1]

    devices = Mesh(np.array(jax.devices()[:8]), ("data",))
    P = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        kernel, mesh=devices, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False
    )
    forms = {"vmap": jax.vmap(kernel, (0, None)), "scan of remat": scanned, "shard_map": sharded}
    for name, form in forms.items():
        got = dict(zip(("x", "scale"), jax.jit(loss(form))(x, scale), strict=True))
        for part, array in got.items():
            np.testing.assert_allclose(
                array, want[part], rtol=1e-4, atol=5e-5, err_msg=f"{name}: {part}"
            )


def test_vmap_over_the_scale(kernel):
    x, _, _ = draw((7, 128))
    scales = jnp.stack([jnp.ones(128), jnp.full(128, 2.0)])
    y = jax.jit(jax.vmap(kernel, (None, 0)))(x, scales)
    np.testing.assert_allclose(y[1], 2 * y[0], rtol=1e-6)


def test_catches_a_sum_over_rows_past_the_end(monkeypatch):
    """The mutant counts the garbage that a partial block holds (NaN in interpret mode)."""
    source = inspect.getsource(tpu._backward_kernel)
    assert "jnp.where(row < rows, dy * n, 0.0)" in source
    mutant = source.replace("jnp.where(row < rows, dy * n, 0.0)", "dy * n")
    exec(mutant, tpu.__dict__, scope := {})
    monkeypatch.setattr(tpu, "_backward_kernel", scope["_backward_kernel"])
    arguments = draw((63, 200))
    kernel = functools.partial(tpu.rms_norm, eps=EPS, tiles=tpu.Tiles(16), interpret=True)
    with pytest.raises(AssertionError):
        check(run(kernel, *arguments), reference(*arguments))


@pytest.mark.parametrize("name", KERNELS)
def test_refuses_what_it_cannot_take_and_says_what_it_needs(name):
    module, _ = KERNELS[name]
    ones = jnp.ones
    with pytest.raises(NotImplementedError, match=r"needs x of float32 or .*, got int32"):
        module.accept(ones((2, 128), jnp.int32), ones(128))
    with pytest.raises(NotImplementedError, match=r"needs scale of shape \(128,\), got \(64,\)"):
        module.accept(ones((2, 128)), ones(64))
    with pytest.raises(NotImplementedError, match=r"needs at least one row.*\(0, 128\)"):
        module.accept(ones((0, 128)), ones(128))
    wide = module.WIDEST + 1
    with pytest.raises(NotImplementedError, match=f"needs width at most .*, got {wide}"):
        module.accept(ones((1, wide)), ones(wide))


@pytest.mark.parametrize("width", [1, 128, 200, 4096, 8192])
def test_the_heuristic_fills_the_machine_and_fits_it(width):
    chosen = gpu.choose_tiles(width)
    elements = chosen.rows * (1 << (width - 1).bit_length())
    assert chosen.rows.bit_count() == 1, "Triton's sizes are powers of two"
    assert elements <= 64 * 32 * chosen.warps, "at most 64 elements a thread"
    rows = tpu.choose_tiles(width).rows
    assert rows % tpu.ROW_MULTIPLE == 0
    assert rows >= tpu.ROW_MULTIPLE
    assert rows * width <= tpu.BLOCK_ELEMENTS
    assert dataclasses.is_dataclass(chosen)


def lowered(module, platform, transform, dtype):
    x, scale, _ = draw((3, 63, 200), dtype)

    def loss(x, scale):
        return module.rms_norm(x, scale).astype(jnp.float32).sum()

    forms = {
        "forward": module.rms_norm,
        "backward": jax.grad(loss, (0, 1)),
        "vmap": jax.vmap(jax.grad(loss, (0, 1)), (0, None)),
    }
    with use_abstract_mesh(H100) if platform == "cuda" else contextlib.nullcontext():
        traced = jax.jit(forms[transform]).trace(x, scale)
        return traced.lower(lowering_platforms=(platform,)).as_text()


# JAX 0.12 announces the end of this lowering; kernels/README.md says what follows it.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", ["forward", "backward", "vmap"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("name", "platform"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_lowers_for_the_real_machine_on_any_machine(name, platform, transform, dtype):
    text = lowered(KERNELS[name][0], platform, transform, dtype)
    assert {"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}[platform] in text


@pytest.mark.parametrize("name", KERNELS)
def test_the_counter_hears_what_the_kernels_cost(name):
    module, _ = KERNELS[name]
    x, scale, dy = draw((4000, 200))
    forward = count(module.rms_norm, x, scale)
    both = count(lambda x, s, dy: jax.vjp(module.rms_norm, x, s)[1](dy), x, scale, dy)
    assert forward.elementwise == cost.forward_flops(x.shape)
    assert not both.unknown
    # Going backward may add the sum over the programs' shares of the scale's gradient.
    want = cost.backward_flops(x.shape)
    assert want <= both.elementwise <= 1.1 * want


def test_the_cost_counts_a_row_by_hand():
    x, scale = jnp.ones((3, 8), jnp.bfloat16), jnp.ones(8)
    estimate = cost.backward_estimate(x, scale, partials=2)
    assert cost.forward_estimate(x, scale).bytes_accessed == 2 * (3 * 8 * 2) + 8 * 4
    assert estimate.bytes_accessed == 3 * (3 * 8 * 2) + 8 * 4 + 2 * 8 * 4
    assert (estimate.flops, estimate.transcendentals) == (11 * 24, 3)
