"""What do the chunked recurrences cost against a scan, and what does packing cost them?

    python -m experiments.bench.recurrence                      # modes, retention, packed
    python -m experiments.bench.recurrence --workloads long     # L = 16384: takes 3 GB
    python -m experiments.bench.recurrence --workloads mamba2   # and transformers, if it is here
    python -m experiments.bench.recurrence --chunks 16 32 64 128

Cost: 3 minutes on one core that others share (`long`: 2). Each figure is process CPU seconds of a
forward and backward pass on one pinned core, median (low-high) over interleaved rounds, with the
speed relative to the first program round by round; `temp` is XLA's figure for temporaries. With

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=8589934592
    MALLOC_TRIM_THRESHOLD_=17179869184

programs with more than 32 MB of temporaries do not pay for fresh pages at each call, as they would
not inside a training step that is larger anyway: the fairer comparison, and the smaller ratios.

Expectation (float32, one core of an AMD EPYC Zen 5 that other programs share; seen with the
variables / without): a state space in chunks of 32 is at least 4 times as fast as `lax.scan`
(L = 1024: 4.7 / 8.2; L = 16384: 7.1 / 7.9) with a tenth of its temporaries at 16384, and an
associative scan slower than a scan (0.16 / 0.16); retention in chunks of 64 is 3 times as fast as
a scan (3.5 / 6.1), packed rows; three documents a row cost a state space 1.7 / 2.1 times aligned
rows, and twenty, which are run by token, 9 / 9 times. A layer of Mamba-2 (width 256, 8 heads of 64,
64 states, one text of 2048) in pieces of 256 tokens takes 21 MB of temporaries, and on a machine
that was shared by many programs (load 7 on 2 cores) was 1.43 (1.21-1.77) and 1.31 (0.99-1.67) times
as fast as transformers' in torch 2.13, in pieces of 512 1.32 times with 34 MB.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost import clock, memory
from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers import mamba2
from effjax.models.sections import Mamba2Config
from effjax.ops.recurrence.bookkeeping import rows_after, timeline
from effjax.ops.recurrence.layout import lay_out
from effjax.ops.recurrence.retention import (
    parallel_retention,
    recurrent_retention,
    retention,
)
from effjax.ops.recurrence.s4d import log_time_steps, s4d_lin
from effjax.ops.recurrence.state_space import diagonal_state_space, discretise

Thunks = dict[str, tuple[Callable[[], Any], float]]  # a program, and its temporaries in MB
MAMBA2 = DecoderConfig(width=256, mamba2=Mamba2Config(heads=8, head_dim=64, states=64))


def compiled(f: Callable, *arrays: Any) -> tuple[Callable[[], Any], float]:
    """The gradients of sum f^2 by all floating-point arguments, compiled; temporaries in MB."""
    wrt = tuple(i for i, x in enumerate(arrays) if jax.tree.leaves(x)[0].dtype == jnp.float32)
    gradients = jax.grad(lambda *x: jnp.sum(f(*x) ** 2), wrt)
    program = jax.jit(gradients).lower(*arrays).compile()
    temp = memory.compiled_memory(program).temporaries or 0
    return lambda: jax.block_until_ready(program(*arrays)), temp / 2**20


def system(D: int, P: int) -> dict[str, jax.Array]:
    log_a_real, a_imag = s4d_lin(D, P)
    c_real, c_imag, skip = (jax.random.normal(jax.random.key(i), (D, P)) for i in range(3))
    return {
        "log_dt": log_time_steps(jax.random.key(4), D), "log_a_real": log_a_real,
        "a_imag": a_imag, "c_real": c_real, "c_imag": c_imag, "skip": skip[:, 0],
    }  # fmt: skip


def scanned(parameters: dict[str, jax.Array], u: jax.Array, associative: bool) -> jax.Array:
    """What a reader of the paper writes: h = A h + u over time, in real pairs."""
    modes = discretise(**parameters)
    size, (w, v) = jnp.exp(modes.log_decay[0]), modes.weight
    a, b = size * jnp.cos(modes.log_decay[1]), size * jnp.sin(modes.log_decay[1])

    def step(h: Any, u: jax.Array) -> Any:
        h = a * h[0] - b * h[1] + u[..., None], a * h[1] + b * h[0]
        return h, jnp.sum(w * h[0] - v * h[1], axis=-1)

    def join(x: Any, y: Any) -> Any:
        (a, b, p, q), (c, d, r, s) = x, y
        return a * c - b * d, a * d + b * c, c * p - d * q + r, c * q + d * p + s

    if not associative:
        start = jnp.zeros((u.shape[0], *a.shape))
        y = jax.lax.scan(step, (start, start), u.swapaxes(0, 1))[1].swapaxes(0, 1)
    else:
        inputs = jnp.broadcast_to(u[..., None], (*u.shape, a.shape[1]))
        a, b = (jnp.broadcast_to(x, (1, u.shape[1], *a.shape)) for x in (a, b))
        *_, real, imag = jax.lax.associative_scan(
            join, (a, b, inputs, jnp.zeros_like(inputs)), axis=1
        )
        y = jnp.sum(w * real - v * imag, axis=-1)
    return y + modes.skip * u


def chunked(chunk: int, aligned: bool) -> Callable:
    def f(parameters: dict, u: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        y, _ = diagonal_state_space(
            u,
            positions=positions,
            segments=segments,
            chunk=chunk,
            aligned=aligned,
            **parameters,
        )
        return y

    return f


def plain_rows(B: int, T: int) -> tuple[jax.Array, jax.Array]:
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    return positions, jnp.zeros_like(positions)


def packed_rows(B: int, T: int, documents: int) -> tuple[jax.Array, jax.Array]:
    """Every row is so many documents, cut at random."""
    rng, index = np.random.default_rng(0), np.arange(T)
    cuts = np.sort([rng.choice(T - 1, documents - 1, replace=False) + 1 for _ in range(B)], axis=1)
    begins = np.concatenate([np.zeros((B, 1), int), cuts], axis=1)
    segments = (index[None, :, None] >= begins[:, None]).sum(-1) - 1
    positions = index[None] - np.take_along_axis(begins, segments, axis=1)
    return jnp.asarray(positions), jnp.asarray(segments)


def modes(L: int, chunks: list[int]) -> Thunks:
    """One text, 128 channels of 16 modes."""
    p, u = system(128, 16), jax.random.normal(jax.random.key(9), (1, L, 128))
    at = plain_rows(1, L)
    programs = {"lax.scan": compiled(partial(scanned, associative=False), p, u)}
    programs["associative_scan"] = compiled(partial(scanned, associative=True), p, u)
    for chunk in chunks:
        programs[f"chunk {chunk}"] = compiled(chunked(chunk, aligned=True), p, u, *at)
    return programs


def retained(chunks: list[int]) -> Thunks:
    """B = 4, T = 512, 4 heads of 64; three documents a row."""
    q, k, v = jax.random.normal(jax.random.key(9), (3, 4, 512, 4, 64))
    log_decay = jnp.log(1 - 2.0 ** (-5 - jnp.arange(4)))
    at = packed_rows(4, 512, 3)

    def f(form: Callable) -> Callable:
        return lambda q, k, v, positions, segments: form(
            q, k, v, log_decay, positions=positions, segments=segments
        )[0]

    programs = {"lax.scan": compiled(f(recurrent_retention), q, k, v, *at)}
    programs["parallel"] = compiled(f(parallel_retention), q, k, v, *at)
    for chunk in chunks:
        programs[f"chunk {chunk}"] = compiled(f(partial(retention, chunk=chunk)), q, k, v, *at)
    return programs


def packed(chunks: list[int]) -> Thunks:
    """B = 16, T = 256, 256 channels of 16 modes: what laying out rows costs, and what it saves."""
    p, u = system(256, 16), jax.random.normal(jax.random.key(9), (16, 256, 256))
    plain, three, many = plain_rows(16, 256), packed_rows(16, 256, 3), packed_rows(16, 256, 20)
    programs = {}
    for chunk in chunks:
        programs[f"aligned, chunk {chunk}"] = compiled(chunked(chunk, True), p, u, *plain)
        for documents, at in ((1, plain), (3, three), (20, many)):
            time = timeline(rows_after(None, *at))
            fits = bool(lay_out(time, jnp.full((16,), -1), chunk).fits)
            name = f"{documents} documents, chunk {chunk}" + ("" if fits else " (by token)")
            programs[name] = compiled(chunked(chunk, False), p, u, *at)
    return programs


def torch_mamba2(L: int) -> Callable[[], Any]:
    """The same layer in transformers, in plain torch."""
    import torch
    from transformers import Mamba2Config as Sizes
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.set_num_threads(1)
    sizes = Sizes(
        num_heads=8, head_dim=64, hidden_size=256, state_size=64, n_groups=1, conv_kernel=4,
        expand=2, chunk_size=64, num_hidden_layers=1,
    )  # fmt: skip
    layer, x = Mamba2Mixer(sizes, 0), torch.randn(1, L, 256, requires_grad=True)

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        (layer(x) ** 2).sum().backward()

    return step


def mamba2_layer(L: int, chunks: list[int]) -> Thunks:
    """One text, aligned, through a whole layer: projections, convolution, recurrence, norm."""
    programs: Thunks = {}
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        programs["transformers"] = torch_mamba2(L), 0.0
    x, at = jax.random.normal(jax.random.key(9), (1, L, 256)), plain_rows(1, L)
    for chunk in chunks:
        config = replace(MAMBA2, mamba2=replace(MAMBA2.mamba2, chunk=chunk))
        init, apply, _ = functional(partial(mamba2.Mamba2, config))
        params = jax.jit(init)(jax.random.key(0))
        for piece in (mamba2.SEGMENT, L):

            def layer(params: Any, x: jax.Array, piece: int = piece, apply: Any = apply) -> Any:
                usual, mamba2.SEGMENT = mamba2.SEGMENT, piece  # read while tracing
                try:
                    return apply(params, x, Context(*at, aligned=True))[0]
                finally:
                    mamba2.SEGMENT = usual

            programs[f"chunk {chunk}, pieces of {piece}"] = compiled(layer, params, x)
    return programs


WORKLOADS: dict[str, Callable[[list[int]], Thunks]] = {
    "modes": partial(modes, 1024),
    "retention": retained,
    "packed": packed,
    "long": partial(modes, 16384),
    "mamba2": partial(mamba2_layer, 2048),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS)[:3])
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before JAX starts its threads
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, core {core}", flush=True)
    for name in options.workloads:
        programs = WORKLOADS[name](options.chunks)
        calls = {title: run for title, (run, _) in programs.items()}
        timings = clock.interleave(calls, rounds=options.rounds)
        base = next(iter(timings))
        for title, timing in timings.items():
            speed = clock.ratio(timings[base], timing)
            print(
                f"{name:9} {title:32} {_show(timing.cpu, 1e3)} ms  x {base} {_show(speed)}"
                f"  temp {programs[title][1]:.0f} MB",
                flush=True,
            )


def _show(spread: clock.Spread, unit: float = 1.0) -> str:
    return f"{unit * spread.median:.2f} ({unit * spread.low:.2f}-{unit * spread.high:.2f})"


if __name__ == "__main__":
    main()
