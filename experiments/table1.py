"""Are the costs of generating text as a survey's Table 1 has them?

    python -m experiments.table1
    python -m experiments.table1 --contexts 256 512 1024 --rounds 3

For the Transformer, RWKV, H3, Hyena and RetNet at one size: seconds and counted FLOPs of one more
token behind n others, bytes of the state that it needs, temporaries of a pass over n tokens, and
the longest chain of steps of that pass that wait for one another. Slopes of bytes and FLOPs over n
decide, on logarithms; seconds, which have a constant part, decide by the growth of their median
from the shortest to the longest context against that of an O(1) method: under a quarter is none.

The table (Ding et al. 2023, section 5.5): time n, 1, 1, n, 1; memory n^2, n, n log n, n log n, n;
parallel training for all but RWKV. What its columns mean is doubtful: time can only be that of one
token, memory only that of a pass over n tokens, and for a cache that is O(n), not O(n^2).

Cost: 4 minutes on 2 cores. Expectation: the time column holds; memory is linear for all, because
attention runs in blocks and FFTs in place; RWKV's chain is as short as RetNet's, because its sums
are associative.

Writes experiments/results/table1.json.

Source: Ding et al. 2023, "The Efficiency Spectrum of Large Language Models", Table 1,
https://arxiv.org/abs/2312.00678
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.config import main, require_positive, require_types
from effjax.cost import clock
from effjax.cost.memory import compiled_memory, stored_bytes
from effjax.errors import ConfigError
from effjax.evaluate.measure import decode_flops
from effjax.models.decoder import decoder
from effjax.models.presets import tiny
from effjax.select.claims import write_result
from effjax.weights import Tree

# Kind, then what the table says: time of a token, memory, parallel training.
TABLE: dict[str, tuple[str, str, str, bool]] = {
    "Transformer": ("attention", "n", "n^2", True),
    "RWKV": ("rwkv", "1", "n", False),
    "H3": ("h3", "1", "n log n", True),
    "Hyena": ("hyena", "n", "n log n", True),
    "RetNet": ("retention", "1", "n", True),
}
SLOPES = {"1": 0.0, "n": 1.0, "n log n": 1.15, "n^2": 2.0}
NEAR = 0.3
GROWTH = 0.25
"""How much more a token may take at the longest context and still count as O(1)."""


@dataclass(frozen=True)
class Table1Config:
    """contexts: n, in rising order. rounds: timings of each, of which the median counts."""

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    rounds: int = 7
    out: str = "experiments/results/table1.json"

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "contexts", "rounds")
        if len(self.contexts) < 2 or list(self.contexts) != sorted(set(self.contexts)):
            raise ConfigError(f"contexts must rise, two at least, got {self.contexts}")


def chain(jaxpr: Any) -> int:
    """The longest chain of loop steps that wait for one another: loops in loops multiply."""
    longest = 1
    for equation in jaxpr.eqns:
        inner = [
            chain(getattr(part, "jaxpr", part))
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        steps = equation.params["length"] if equation.primitive.name == "scan" else 1
        longest = max(longest, steps * max(inner, default=1))
    return longest


def measured(name: str, n: int, rounds: int) -> dict[str, Any]:
    """One more token behind n others, and a pass over n tokens."""
    model = replace(tiny(TABLE[name][0]), layers=1)
    init, apply, _ = decoder(model)
    params = jax.jit(init)(jax.random.key(0))
    state = apply(params, 1, n + 1, 1, method="init_state")
    step = jax.jit(lambda p, s, t, at: apply(p, t, positions=at, segments=t * 0, state=s)[:2])
    token = jnp.zeros((1, 1), jnp.int32)

    def once(state: Tree) -> None:
        jax.block_until_ready(step(params, state, token, jnp.full((1, 1), n, jnp.int32)))

    whole = jax.ShapeDtypeStruct((1, n), jnp.int32)
    forward = jax.jit(lambda p, t: apply(p, t)[0])
    return {
        "method": name,
        "context": n,
        "cpu_seconds": clock.measure(once, state, rounds=rounds, calls=5).cpu.median,
        "flops": decode_flops(apply, params, n).total,
        "state_bytes": stored_bytes(jax.eval_shape(lambda s: s, state)),
        "temporaries": compiled_memory(forward.lower(params, whole).compile()).temporaries,
        "chain": chain(jax.make_jaxpr(forward)(params, whole).jaxpr),
    }


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Of the logarithm over the logarithm of the context."""
    x, y = (np.log([row[key] for row in rows]) for key in ("context", name))
    return float(np.polyfit(x, y, 1)[0])


def judged(name: str, rows: list[dict[str, Any]], constant: float) -> dict[str, Any]:
    """What the table says of a method, and what was found."""
    _, time, memory, parallel = TABLE[name]
    grown = rows[-1]["cpu_seconds"] / rows[0]["cpu_seconds"]
    grows = grown > constant * (1 + GROWTH)
    wide, long = slope(rows, "temporaries"), slope(rows, "chain")
    return {
        "method": name,
        "time_growth": grown,
        "time_claim": {"says": time, "state": says(grows == (time == "n"))},
        "state_slope": slope(rows, "state_bytes"),
        "memory_slope": wide,
        "memory_claim": {"says": memory, "state": says(abs(wide - SLOPES[memory]) <= NEAR)},
        "chain": rows[-1]["chain"],
        "parallel_claim": {"says": parallel, "state": says((rows[-1]["chain"] < 1000) == parallel)},
        "chain_slope": long,
    }


def says(holds: bool) -> str:
    """Counted or compiled, not sampled: there is no interval."""
    return "holds" if holds else "does not hold here"


def run(config: Table1Config) -> None:
    rows = {name: [measured(name, n, config.rounds) for n in config.contexts] for name in TABLE}
    retnet = rows["RetNet"]
    constant = max(1.0, retnet[-1]["cpu_seconds"] / retnet[0]["cpu_seconds"])
    found = [judged(name, made, constant) for name, made in rows.items()]
    for made, one in zip(rows.values(), found, strict=True):
        times = " ".join(f"{1e3 * row['cpu_seconds']:.2f}" for row in made)
        print(
            f"{one['method']:12} ms a token {times} (O({one['time_claim']['says']}): "
            f"{one['time_claim']['state']}); state slope {one['state_slope']:.2f}; memory slope "
            f"{one['memory_slope']:.2f} (O({one['memory_claim']['says']}): "
            f"{one['memory_claim']['state']}); chain {one['chain']}",
            flush=True,
        )
    write_result(
        config.out,
        question="Are the costs of generating text as a survey's Table 1 has them?",
        command="python -m experiments.table1",
        settings={"contexts": config.contexts, "rounds": config.rounds, "width": tiny().width},
        rows=[*found, *(row for made in rows.values() for row in made)],
    )


if __name__ == "__main__":
    raise SystemExit(main(run, Table1Config))
