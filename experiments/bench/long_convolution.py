"""Which form of the long convolution is the fastest, by length of row?

    python -m experiments.bench.long_convolution                     # lengths 64 ... 16384
    python -m experiments.bench.long_convolution --packed            # three documents a row
    python -m experiments.bench.long_convolution --save experiments/results/long_convolution.json

With `--save` each length is put beside those that the file has from the same machine.

Cost: 5 minutes on one core, and as much again packed. Each figure is process CPU seconds of a
forward and backward pass on one pinned core (an accelerator: wall seconds), median (low-high) over
interleaved rounds, for 4096 tokens or one longer row of 64 channels and a kernel as long as the
row; `temp` is XLA's figure for temporaries. `FASTEST` and `CHUNK` of `effjax.ops.convolution.long`
are read off the file that `--save` writes.

Expectation (float32, one core of an AMD EPYC that other programs share): rows of one document are
fastest by one FFT from 128 tokens on (4096: 10 ms, by Monarch 28, direct 182), three documents a
row from 512 on (4096: 18 ms in chunks of 512, direct 140); shorter packed rows directly.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost import clock, memory
from effjax.ops.convolution.long import long_convolution

CHANNELS, TOKENS = 64, 4096
LENGTHS = (64, 128, 256, 512, 1024, 4096, 16384)
CHUNKS = {"direct": (16, 32, 64), "fft": (32, 64, 128, 512), "monarch": (128, 512)}
MOST = {"direct": 4096, "monarch": 4096}  # beyond, a pass takes seconds


def rows(B: int, T: int, documents: int) -> tuple[jax.Array, jax.Array]:
    """Every row is so many documents, cut at random."""
    rng, index = np.random.default_rng(0), np.arange(T)
    cuts = np.sort([rng.choice(T - 1, documents - 1, replace=False) + 1 for _ in range(B)], axis=1)
    begins = np.concatenate([np.zeros((B, 1), int), cuts], axis=1).astype(int)
    segments = (index[None, :, None] >= begins[:, None]).sum(-1) - 1
    positions = index[None] - np.take_along_axis(begins, segments, axis=1)
    return jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)


def compiled(
    T: int, form: Any, chunk: int | None, documents: int
) -> tuple[Callable[[], Any], float]:
    """The gradients of sum y^2 by inputs and kernel, compiled; temporaries in MB."""
    B = max(1, TOKENS // T)
    u, kernel = (jax.random.normal(jax.random.key(i), (B, T, CHANNELS)) for i in range(2))
    positions, segments = rows(B, T, documents)

    def loss(u: jax.Array, kernel: jax.Array, positions: jax.Array, segments: jax.Array) -> Any:
        y, _ = long_convolution(
            u, kernel, positions=positions, segments=segments, aligned=documents == 1,
            form=form, chunk=chunk,
        )  # fmt: skip
        return jnp.sum(y**2)

    arrays = (u, kernel[0].T, positions, segments)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile()
    temp = memory.compiled_memory(program).temporaries or 0
    return lambda: jax.block_until_ready(program(*arrays)), temp / 2**20


def measured(T: int, documents: int, rounds: int, chunks: dict) -> dict[str, dict[str, float]]:
    """Seconds and megabytes of each form and chunk at one length."""
    programs = {}
    for form, sizes in chunks.items():
        if MOST.get(form, T) < T:
            continue
        whole = (None,) if documents == 1 and form != "direct" else ()
        for chunk in (*whole, *(c for c in sizes if c < T)):
            programs[f"{form} {chunk or 'whole'}"] = compiled(T, form, chunk, documents)
    timings = clock.interleave({name: run for name, (run, _) in programs.items()}, rounds=rounds)
    kind = "cpu" if jax.default_backend() == "cpu" else "wall"
    return {
        name: {
            "seconds": getattr(timing, kind).median,
            "low": getattr(timing, kind).low,
            "high": getattr(timing, kind).high,
            "temp_mb": round(programs[name][1], 1),
        }
        for name, timing in timings.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--forms", nargs="+", choices=CHUNKS, default=list(CHUNKS))
    parser.add_argument("--packed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    platform = jax.default_backend()
    if platform == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}", flush=True)
    chunks = {form: CHUNKS[form] for form in options.forms}
    documents = 3 if options.packed else 1
    for T in options.lengths:
        found = measured(T, documents, options.rounds, chunks)
        for name, row in found.items():
            print(
                f"{documents} documents {T:6} {name:14} {1e3 * row['seconds']:8.2f} "
                f"({1e3 * row['low']:.2f}-{1e3 * row['high']:.2f}) ms  {row['temp_mb']} MB",
                flush=True,
            )
        if options.save:
            save(options.save, {"jax": jax.__version__, "device": device}, documents, T, found)


def save(path: Path, machine: dict[str, str], documents: int, T: int, found: dict) -> None:
    """Puts one length beside the others that the same machine has measured."""
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before if before.items() >= machine.items() else {}
    rows_ = kept.get(f"{documents} documents", {}) | {str(T): found}
    result = machine | kept | {f"{documents} documents": rows_}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
