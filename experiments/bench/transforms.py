"""What does compressing a stack of weights cost, against numpy and against reading it once?

    python -m experiments.bench.transforms                            # 24 x 1024^2, half a minute
    python -m experiments.bench.transforms --layers 24 --width 2048   # 1e8 parameters, two minutes

Each figure is process CPU seconds per call on one pinned core, median (low-high) over interleaved
rounds, the refusal of NaN and infinity included; `x numpy` is numpy's time over effjax's, round by
round; `x copy` is effjax's time over that of copying the stack. numpy works layer by layer with its
own fastest forms (`partition` for magnitude, `argpartition` for 2:4, packed nibbles for int4).

Expectation (one core of an AMD EPYC Zen 5 that other programs share, 24 x 1024^2): magnitude 0.18 s
and 1.8x numpy, 2:4 0.09 s and 6x, int8 0.02 to 0.03 s and equal. int4 takes 0.12 s and a quarter of
numpy's speed: XLA on CPU writes 4-bit arrays one entry after the other, 4.5 ns each, and makes no
exception for a bitcast of packed bytes; 2:4 pays the same for its 4-bit index.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost import clock
from effjax.transforms import magnitude, round_to_nearest, semi_structured
from effjax.weights import Axes, Tree

AXES = {"w": Axes(("embed",), ("ff",), ("layers",))}
GROUP = 128


def prune(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half of the entries, exactly: ties at the threshold go in order."""
    size, order = w.size // 2, np.abs(w)
    threshold = np.partition(order.ravel(), size)[size]
    mask = order > threshold
    tied = np.flatnonzero(order.ravel() == threshold)
    mask.ravel()[tied[size - (w.size - mask.sum() - tied.size) :]] = True
    return np.where(mask, w, 0), mask


def two_of_four(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest of every four rows, and where they stood."""
    fours = w.reshape(-1, 4, w.shape[1])
    kept = np.sort(np.argpartition(np.abs(fours), 2, axis=1)[:, 2:], axis=1)
    return np.take_along_axis(fours, kept, axis=1), (kept[:, 0] + 4 * kept[:, 1]).astype(np.uint8)


def codes(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes, or int4 codes two to a byte, in groups of rows."""
    top = 2 ** (bits - 1) - 1
    groups = w.reshape(-1, GROUP, w.shape[1])
    scale = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / top, np.finfo(np.float32).tiny)
    found = np.rint(groups / scale).astype(np.int8).reshape(w.shape)
    return (found if bits == 8 else (found[::2] & 15) | (found[1::2] << 4)), scale


def layer_by_layer(f: Callable[[np.ndarray], object], stack: np.ndarray) -> list[object]:
    return [f(layer) for layer in stack]


VERBS: dict[str, tuple[Callable[..., Tree], Callable[[np.ndarray], object]]] = {
    "magnitude 50%": (partial(magnitude, sparsity=0.5), prune),
    "2:4": (semi_structured, two_of_four),
    "int8 groups": (partial(round_to_nearest, bits=8, group=GROUP), partial(codes, bits=8)),
    "int4 groups": (partial(round_to_nearest, bits=4, group=GROUP), partial(codes, bits=4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before JAX starts its threads
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, core {core}", flush=True)
    shape = (options.layers, options.width, options.width)
    host = np.random.default_rng(0).standard_normal(shape, np.float32)
    params = {"w": jnp.asarray(host)}
    copy = jax.jit(lambda w: w + 1)
    for name, (verb, by_numpy) in VERBS.items():
        thunks: dict[str, Callable[[], object]] = {
            "effjax": partial(verb, params, AXES),
            "numpy": partial(layer_by_layer, by_numpy, host),
            "copy": partial(copy, params["w"]),
        }
        timings = clock.interleave(thunks, rounds=options.rounds)
        print(
            f"{name:14} {_show(timings['effjax'].cpu, '.4f')} s"
            f"   x numpy {_show(clock.ratio(timings['numpy'], timings['effjax']), '.2f')}"
            f"   x copy {_show(clock.ratio(timings['effjax'], timings['copy']), '.2f')}"
            f"   first call {timings['effjax'].first:.2f} s",
            flush=True,
        )


def _show(spread: clock.Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.low:{form}}-{spread.high:{form}})"


if __name__ == "__main__":
    main()
