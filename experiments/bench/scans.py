"""Which form of the diagonal recurrence is the fastest, and what does a Mamba layer cost?

    python -m experiments.bench.scans                             # forms, mamba
    python -m experiments.bench.scans --workloads transformers    # needs the extra 'oracle'
    python -m experiments.bench.scans --write                     # experiments/results/scans.json

Cost: 4 minutes on one core. Each figure is process CPU seconds of a forward and backward pass on
one pinned core, median (low-high) over interleaved rounds, with the speed relative to the first
program round by round; `temp` is XLA's figure for temporaries.

Expectation (float32, one core of an AMD EPYC Zen 5 under a load of 10 on two cores): of the
diagonal recurrence, one token after the other with the adjoint is the fastest form at every shape,
1.1 to 2.9 times as fast as autodiff of the same scan; an associative scan takes 1.3 to 2.1 times as
long, chunks 1.4 to 1.8, a chunk as a matrix 17 to 60. A Mamba layer (width 256, 512 channels of 16
states, L = 2048) is 3 times as fast as with autodiff of its own `lax.scan`, in 82 MB instead of
280; at L = 512 it is 55 times as fast as transformers' in PyTorch.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost import clock, memory
from effjax.models.configs import DecoderConfig
from effjax.models.context import Context
from effjax.models.functional import functional
from effjax.models.mixers import Mamba
from effjax.models.sections import MambaConfig
from effjax.ops.convolution.short import short_convolution
from effjax.ops.recurrence.diagonal import FORMS, diagonal_recurrence

RESULTS = Path(__file__).parents[1] / "results" / "scans.json"
WIDTH, LENGTH, SHORT = 256, 2048, 512
SHAPES = {
    "B=1 T=2048 D=512": (1, 2048, 512),
    "B=16 T=256 D=256": (16, 256, 256),
    "B=8 T=2048 D=128": (8, 2048, 128),
    "B=1 T=2048 D=32": (1, 2048, 32),
    "B=1 T=16384 D=32": (1, 16384, 32),
}

Thunks = dict[str, tuple[Callable[[], Any], float | None]]  # a program, its temporaries in MB


def compiled(f: Callable, *arrays: Any) -> tuple[Callable[[], Any], float | None]:
    """The gradients of sum f^2 by all arguments, compiled; temporaries in MB."""
    gradients = jax.grad(lambda *x: jnp.sum(f(*x) ** 2), tuple(range(len(arrays))))
    program = jax.jit(gradients).lower(*arrays).compile()
    temp = memory.compiled_memory(program).temporaries or 0
    return lambda: jax.block_until_ready(program(*arrays)), temp / 2**20


def matrix(log_a: jax.Array, b: jax.Array, chunk: int = 8) -> jax.Array:
    """A chunk as one triangular matrix a channel, of sums that do not cancel."""
    B, T, D = b.shape
    log_a, b = (x.reshape(B, -1, chunk, D) for x in (log_a, b))
    t, s = np.arange(chunk)[:, None], np.arange(chunk)[None, :]
    sums = jnp.cumsum(jnp.where((t > s)[..., None], log_a[:, :, :, None], 0), axis=2)
    inner = jnp.sum(jnp.where((t >= s)[..., None], jnp.exp(sums), 0) * b[:, :, None], axis=3)
    kept = jnp.exp(jnp.cumsum(log_a, axis=2))

    def meet(h: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return part[0] * h + part[1], h

    left, own = (x[:, :, -1].swapaxes(0, 1) for x in (kept, inner))
    _, met = jax.lax.scan(meet, jnp.zeros((B, D)), (left, own))
    return (inner + kept * met.swapaxes(0, 1)[:, :, None]).reshape(B, T, D)


def autodiff(log_a: jax.Array, b: jax.Array) -> jax.Array:
    """What a reader of the equation writes."""

    def step(h: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = jnp.exp(token[0]) * h + token[1]
        return h, h

    tokens = log_a.swapaxes(0, 1), b.swapaxes(0, 1)
    return jax.lax.scan(step, jnp.zeros_like(b[:, 0]), tokens)[1].swapaxes(0, 1)


def forms(shape: tuple[int, int, int]) -> Thunks:
    """Every form of the engine on rows of one document, beside autodiff and matrices of 8."""
    keys = jax.random.split(jax.random.key(0), 2)
    log_a = -jax.random.exponential(keys[0], shape) / 8
    b = jax.random.normal(keys[1], shape)
    where = jnp.broadcast_to(jnp.arange(shape[1])[None], shape[:2])
    segments = jnp.zeros_like(where)

    def run(form: str, chunk: int) -> Callable:
        def f(log_a: jax.Array, b: jax.Array) -> jax.Array:
            h, _ = diagonal_recurrence(
                log_a, b, positions=where, segments=segments, form=form, chunk=chunk
            )
            return h

        return f

    programs: Thunks = {"lax.scan, autodiff": compiled(autodiff, log_a, b)}
    for form in FORMS:
        for chunk in (16, 64) if form == "chunked" else (16,):
            title = f"{form} {chunk}" if form == "chunked" else form
            programs[title] = compiled(run(form, chunk), log_a, b)
    if np.prod(shape) <= 2**20:
        programs["matrix 8"] = compiled(matrix, log_a, b)
    return programs


def mamba_config(piece: int = 64) -> DecoderConfig:
    return DecoderConfig(width=WIDTH, pattern=("mamba",), mamba=MambaConfig(piece=piece))


def mamba_inputs(length: int) -> tuple[Any, jax.Array]:
    init = functional(partial(Mamba, mamba_config())).init
    return init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (1, length, WIDTH))


def context_of(x: jax.Array) -> Context:
    return Context.of(jnp.zeros(x.shape[:2], jnp.int32), None, None, None, None)


def plain_layer(params: Any, x: jax.Array) -> jax.Array:
    """The same layer around what a reader of the paper writes: a `lax.scan` over tokens."""
    p, at = params, context_of(x)
    u, _ = short_convolution(
        x @ p["x"]["kernel"],
        p["filter"],
        p["filter_bias"],
        positions=at.positions,
        segments=at.segments,
        aligned=True,
    )
    u = jax.nn.silu(u)
    dt = jax.nn.softplus(u @ p["dt_down"]["kernel"] @ p["dt_up"]["kernel"] + p["dt_bias"])
    A = -jnp.exp(p["a_log"])

    def step(h: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u, dt, b, c = token
        h = jnp.exp(dt[..., None] * A) * h + (dt * u)[..., None] * b[:, None]
        return h, jnp.einsum("bdp,bp->bd", h, c)

    tokens = (u, dt, u @ p["b"]["kernel"], u @ p["c"]["kernel"])
    start = jnp.zeros((x.shape[0], *A.shape))
    _, y = jax.lax.scan(step, start, tuple(v.swapaxes(0, 1) for v in tokens))
    y = y.swapaxes(0, 1) + p["skip"] * u
    return (y * jax.nn.silu(x @ p["gate"]["kernel"])) @ p["o"]["kernel"]


def our_layer(piece: int) -> Callable:
    apply = functional(partial(Mamba, mamba_config(piece))).apply
    return lambda params, x: apply(params, x, context_of(x))[0]


def mamba(pieces: tuple[int, ...] = (16, 32, 64, 128, 256)) -> Thunks:
    """One text of 2048 tokens through one layer: PERFORMANCE's row 9."""
    given = mamba_inputs(LENGTH)
    programs: Thunks = {"lax.scan, autodiff": compiled(plain_layer, *given)}
    for piece in pieces:
        programs[f"pieces of {piece}"] = compiled(our_layer(piece), *given)
    return programs


def transformers() -> Thunks:
    """One text of 512 tokens through one layer of ours and one of transformers' in PyTorch."""
    import torch
    from transformers import MambaConfig as Config
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.set_num_threads(1)
    layer = MambaMixer(Config(hidden_size=WIDTH, num_hidden_layers=1), layer_idx=0)
    x = torch.randn(1, SHORT, WIDTH, requires_grad=True)

    def theirs() -> None:
        layer.zero_grad()
        (layer(x) ** 2).sum().backward()

    given = mamba_inputs(SHORT)
    return {
        "transformers, PyTorch": (theirs, None),
        "lax.scan, autodiff": compiled(plain_layer, *given),
        "pieces of 64": compiled(our_layer(64), *given),
    }


WORKLOADS: dict[str, Callable[[], Thunks]] = {
    **{f"forms {name}": partial(forms, shape) for name, shape in SHAPES.items()},
    "mamba": mamba,
    "transformers": transformers,
}
FAMILIES = ("forms", "mamba", "transformers")


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """One line a program: milliseconds, speed against the first one, temporaries."""
    programs = WORKLOADS[name]()
    timings = clock.interleave({t: run for t, (run, _) in programs.items()}, rounds=rounds)
    base, lines = next(iter(timings)), []
    for title, timing in timings.items():
        cpu, speed = timing.cpu, clock.ratio(timings[base], timing)
        temp = programs[title][1]
        lines.append(
            {
                "workload": name,
                "program": title,
                "ms": [round(1e3 * x, 2) for x in (cpu.median, cpu.low, cpu.high)],
                "speed": [round(x, 2) for x in (speed.median, speed.low, speed.high)],
                "temp_mb": None if temp is None else round(temp, 1),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", choices=FAMILIES, default=list(FAMILIES)[:2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help=f"add the lines to {RESULTS.name}")
    options = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before JAX starts its threads
    device = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, one core"
    load = os.getloadavg()[0]
    names = [name for name in WORKLOADS if name.split()[0] in options.workloads]
    lines = [line for name in names for line in measure(name, options.rounds)]
    for line in lines:
        line |= {"device": device, "load": round(load, 1)}
    if options.write:
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        kept = [line for line in old if line["workload"] not in names]
        text = ",\n".join(json.dumps(line) for line in kept + lines)
        RESULTS.write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
