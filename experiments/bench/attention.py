"""What does blockwise attention cost against dense attention, forward and backward?

    python -m experiments.bench.attention                      # all workloads but the largest
    python -m experiments.bench.attention --workload long      # T = 8192: dense takes 9 GB, 30 s a call
    python -m experiments.bench.attention --block 128 256      # compares block sizes

Cost: 2 minutes on one core. Each figure is process CPU seconds per call (median, min, max over
interleaved rounds) on one pinned core; `x dense` is the ratio to dense round by round; `temp` is
XLA's own figure for temporaries.

Expectation (AMD EPYC Zen 5, one core, float32): causal T = 2048 in a third of dense's time or less,
window 256 at T = 4096 in a twentieth or less, temporaries linear in T, and the training shape
(T = 256) not slower than dense, aligned or packed.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before XLA counts the cores

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.attention.engine import BLOCK, attention
from effjax.ops.attention.patterns import Causal, Pattern, Window


@dataclass(frozen=True)
class Workload:
    pattern: Pattern
    B: int
    T: int
    N: int
    H: int = 64
    rounds: int = 7


WORKLOADS = {
    "short": Workload(Causal(), B=16, T=256, N=4, rounds=15),
    "middle": Workload(Causal(), B=1, T=2048, N=8),
    "window": Workload(Window(256), B=1, T=4096, N=8, rounds=5),
    "long": Workload(Causal(), B=1, T=8192, N=8, rounds=2),
}


def dense(q: jax.Array, k: jax.Array, v: jax.Array, *, pattern: Pattern) -> jax.Array:
    """The program a reader of the paper writes, with its T x T scores."""
    index = jnp.arange(q.shape[1])
    reads = pattern.allowed(index[:, None], index[None, :], 0)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(reads, scores, -1e30)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


def programs(work: Workload, blocks: list[int]) -> dict[str, Callable]:
    """Every program of a workload: what it is called, and q, k, v -> y."""
    row = np.arange(work.T)
    positions = jnp.asarray(np.tile(row, (work.B, 1)))
    parts = jnp.asarray(np.tile(np.where(row < work.T // 3, row, row - work.T // 3), (work.B, 1)))
    same = {"pattern": work.pattern, "q_positions": positions, "k_positions": positions}
    packed = same | {"q_positions": parts, "k_positions": parts}
    packed |= dict.fromkeys(("q_segments", "k_segments"), (positions >= work.T // 3) * 1)

    found: dict[str, Callable] = {"dense": functools.partial(dense, pattern=work.pattern)}
    for block in blocks:
        found[f"aligned {block}"] = functools.partial(attention, aligned=True, block=block, **same)
        found[f"packed {block}"] = functools.partial(attention, ordered=True, block=block, **packed)
    return found


def run(name: str, work: Workload, blocks: list[int], dtype: str, skip: set[str]) -> None:
    """Prints a row per program."""
    rng = np.random.default_rng(0)
    shape = work.B, work.T, work.N, work.H
    q, k, v, w = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    compiled = {}
    for title, f in programs(work, blocks).items():
        if title.split()[0] in skip:
            continue
        loss = lambda q, k, v, f=f: (f(q, k, v) * w).astype(jnp.float32).sum()
        started = time.perf_counter()
        compiled[title] = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        jax.block_until_ready(compiled[title](q, k, v))
        print(f"{name} {title}: first call {time.perf_counter() - started:.1f} s", flush=True)

    seconds: dict[str, list[float]] = {title: [] for title in compiled}
    for _ in range(work.rounds):
        for title, f in compiled.items():
            started = time.process_time()
            jax.block_until_ready(f(q, k, v))
            seconds[title].append(time.process_time() - started)
    for title, times in seconds.items():
        temp = compiled[title].memory_analysis().temp_size_in_bytes / 2**20
        line = f"{name:7} {title:12} {_spread(times, '.4f')} s  temp {temp:7.1f} MB"
        if "dense" in seconds:
            ratios = [x / y for x, y in zip(times, seconds["dense"], strict=True)]
            line += f"  x dense {_spread(ratios, '.3f')}"
        print(line, flush=True)


def _spread(values: list[float], form: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", nargs="+", default=["short", "middle", "window"])
    parser.add_argument("--block", nargs="+", type=int, default=[BLOCK])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--skip", nargs="*", default=[], help="dense, aligned or packed")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, one core", flush=True)
    for name in options.workload:
        run(name, WORKLOADS[name], options.block, options.dtype, set(options.skip))


if __name__ == "__main__":
    main()
