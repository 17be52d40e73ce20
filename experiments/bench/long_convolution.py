"""Which form of the long convolution is the fastest, by length of row?

    python -m experiments.bench.long_convolution                     # lengths 256 ... 16384
    python -m experiments.bench.long_convolution --packed            # three documents a row
    python -m experiments.bench.long_convolution --save experiments/results/long_convolution.json

Cost: 4 minutes on one core that others share. Each figure is process CPU seconds of a forward and
backward pass on one pinned core (an accelerator: wall seconds), median (low-high) over interleaved
rounds, for 4096 tokens or one row of 64 channels and a kernel as long as the row; `temp` is XLA's
figure for temporaries. `FASTEST` and `CHUNK` of `effjax.ops.convolution.long` are read off the
file that `--save` writes.
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
LENGTHS = (256, 512, 1024, 2048, 4096, 16384)
CHUNKS = {"direct": (32, 64, 128), "fft": (256, 512, 1024), "monarch": (256, 512, 1024)}
MOST = {"direct": 8192, "monarch": 8192}  # beyond, a pass takes seconds


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
        if T > MOST.get(form, T):
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
    found: dict[str, Any] = {}
    for documents in (1, 3) if options.save else (3,) if options.packed else (1,):
        for T in options.lengths:
            rows_ = found.setdefault(f"{documents} documents", {})
            rows_[str(T)] = measured(T, documents, options.rounds, chunks)
            for name, row in rows_[str(T)].items():
                print(
                    f"{documents} documents {T:6} {name:14} {1e3 * row['seconds']:8.2f} "
                    f"({1e3 * row['low']:.2f}-{1e3 * row['high']:.2f}) ms  {row['temp_mb']} MB",
                    flush=True,
                )
    if options.save:
        result = {"jax": jax.__version__, "platform": platform, "device": device, **found}
        options.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
