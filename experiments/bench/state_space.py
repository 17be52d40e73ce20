"""What does a state space in chunks cost against a scan, and against a convolution by FFT?

    python -m experiments.bench.state_space                  # S4D over one text of 16384 tokens
    python -m experiments.bench.state_space --length 1024 --kinds s4d s4
    python -m experiments.bench.state_space --chunks 16 32 64

Cost: 3 minutes and 4 GB. Process CPU seconds of a forward and backward pass (gradients of the sum
of squares by inputs and parameters) on one pinned core, 128 channels of 16 modes, float32; the
speed is taken round by round, relative to the last program: `torch FFT`, the Vandermonde kernel and
a padded FFT as PyTorch's users write S4D (extra `oracle`; left out, by name, without it), or else
`lax.scan`. `temp` is XLA's figure for temporaries. For S4 the convolution is the paper's: Cauchy
products at the roots of unity, then a padded FFT.

Expectation (S4D, L = 16384): the floors are 18 times torch's FFT and 4 times `lax.scan`; the goals
25 and 6, with memory linear in L.

Seen, on one core of an AMD EPYC Zen 5 while other programs kept both busy (a load of 9), JAX
0.10.2, torch 2.13; seconds, and times as fast as the peers:

                        chunk 32    chunk 64    against
    S4D, L = 16384      0.095       0.080       torch FFT 30.1 (28.4-35.0), 37.6 (33.8-38.4)
                                                lax.scan   8.0  (6.8-9.8),   9.2  (8.9-11.0)
        temp, MB        53          38          lax.scan 536
    S4D, L = 1024       0.0069      0.0105      lax.scan   7.2  (6.3-7.6),   4.6  (4.3-4.9)
    S4,  L = 1024       0.020       0.030       Cauchy and FFT 4.8 (4.1-5.0), 3.3 (2.7-3.6)
    S4,  L = 8192       0.089       -           Cauchy and FFT 6.2 (5.5-8.3)
"""

import argparse
from collections.abc import Callable
from typing import Any

from experiments.bench import pinned  # isort: skip  (pins the core before XLA counts them)

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost.memory import compiled_memory
from effjax.ops.recurrence.hippo import legs_normal_plus_low_rank
from effjax.ops.recurrence.s4 import cauchy_kernel, s4
from effjax.ops.recurrence.s4d import log_time_steps, s4d_lin
from effjax.ops.recurrence.state_space import diagonal_state_space, discretise

D, P = 128, 16
Arrays = dict[str, jax.Array]


def s4d_system() -> Arrays:
    log_a_real, a_imag = s4d_lin(D, P)
    c_real, c_imag, skip = (jax.random.normal(jax.random.key(i), (D, P)) for i in range(3))
    return {
        "log_dt": log_time_steps(jax.random.key(4), D), "log_a_real": log_a_real,
        "a_imag": a_imag, "c_real": c_real, "c_imag": c_imag, "skip": skip[:, 0],
    }  # fmt: skip


def s4_system() -> Arrays:
    return s4d_system() | legs_normal_plus_low_rank(D, P)._asdict()


def chunked(op: Callable, chunk: int) -> Callable:
    def f(p: Arrays, u: jax.Array) -> jax.Array:
        positions = jnp.arange(u.shape[1])[None]
        where = {"positions": positions, "segments": jnp.zeros_like(positions)}
        return op(u, **p, **where, chunk=chunk, aligned=True)[0]

    return f


def scanned(p: Arrays, u: jax.Array) -> jax.Array:
    """What a reader of the paper writes: h = A h + u over time, in real pairs."""
    modes = discretise(**p)
    size, (w, v) = jnp.exp(modes.log_decay[0]), modes.weight
    a, b = size * jnp.cos(modes.log_decay[1]), size * jnp.sin(modes.log_decay[1])

    def step(h: Any, u: jax.Array) -> Any:
        h = a * h[0] - b * h[1] + u[:, None], a * h[1] + b * h[0]
        return h, jnp.sum(w * h[0] - v * h[1], axis=-1)

    y = jax.lax.scan(step, (jnp.zeros_like(a),) * 2, u[0])[1]
    return y[None] + modes.skip * u


def convolved(p: Arrays, u: jax.Array) -> jax.Array:
    """S4 as the paper trains it."""
    L = u.shape[1]
    kernel = cauchy_kernel(L, **{k: x for k, x in p.items() if k != "skip"})
    spectrum = jnp.fft.rfft(kernel.T[None], 2 * L, axis=1) * jnp.fft.rfft(u, 2 * L, axis=1)
    return jnp.fft.irfft(spectrum, 2 * L, axis=1)[:, :L] + p["skip"] * u


def torch_fft(p: Arrays, u: jax.Array) -> Callable[[], None]:
    """S4D's kernel and its convolution by FFT in PyTorch, forward and backward."""
    import torch

    torch.set_num_threads(1)
    own = {k: torch.tensor(np.array(x), requires_grad=True) for k, x in p.items()}
    x, L = torch.tensor(np.array(u[0].T), requires_grad=True), u.shape[1]

    def run() -> None:
        a = torch.complex(-own["log_a_real"].exp(), own["a_imag"])
        z = a * own["log_dt"].exp()[:, None]
        c = torch.complex(own["c_real"], own["c_imag"]) * (z.exp() - 1) / a
        powers = torch.exp(z[..., None] * torch.arange(L))
        kernel = 2 * torch.einsum("dp,dpl->dl", c, powers).real
        spectrum = torch.fft.rfft(kernel, 2 * L) * torch.fft.rfft(x, 2 * L)
        y = torch.fft.irfft(spectrum, 2 * L)[:, :L] + own["skip"][:, None] * x
        torch.autograd.grad((y**2).sum(), (*own.values(), x))

    return run


def compiled(name: str, f: Callable, p: Arrays, u: jax.Array) -> Callable[[], Any]:
    gradients = jax.jit(jax.grad(lambda p, u: jnp.sum(f(p, u) ** 2), (0, 1)))
    program = gradients.lower(p, u).compile()
    print(
        f"  {name}: temp {(compiled_memory(program).temporaries or 0) / 2**20:.0f} MB", flush=True
    )
    return lambda: jax.block_until_ready(program(p, u))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--kinds", nargs="+", choices=("s4d", "s4"), default=["s4d"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    u = jax.random.normal(jax.random.key(9), (1, options.length, D))
    for kind in options.kinds:
        p, op = (s4d_system(), diagonal_state_space) if kind == "s4d" else (s4_system(), s4)
        print(f"{kind}, {options.length} tokens")
        programs = {f"chunk {chunk}": chunked(op, chunk) for chunk in options.chunks}
        programs["lax.scan" if kind == "s4d" else "Cauchy and FFT"] = (
            scanned if kind == "s4d" else convolved
        )
        thunks = {name: compiled(name, f, p, u) for name, f in programs.items()}
        if kind == "s4d":
            try:
                thunks["torch FFT"] = torch_fft(p, u)
            except ImportError as error:
                print(f"  torch FFT: left out, {error}; pip install 'effjax[oracle]'")
        seconds = pinned.rounds(thunks, options.rounds)
        for base in list(thunks)[len(options.chunks) :]:
            pinned.show(seconds, base)


if __name__ == "__main__":
    main()
