"""Is Mega 5 times faster than a transformer at 4096 tokens, in 15% of its memory, or less by 15%?

    python -m experiments.lra_speed
    python -m experiments.lra_speed --length 1024 --rounds 2

Times a training step of one layer, and reads the temporaries of its compiled program, for dense
attention (the form that materialises its scores, which the claim's peers used), attention in
blocks, Mega and Mega-chunk, interleaved. Two readings of the survey's "memory reduced by about
15%": to 0.85 of the transformer's, or to 0.15 (the Mega paper's table says about 0.14).

Cost: 3 minutes on 2 cores. Expectation: Mega-chunk holds both against dense attention; against
attention in blocks it is faster, and memory is much the same.

Writes experiments/results/lra_speed.json.

Source: Treviso et al. 2023, section 3.1; Ma et al. 2022, Mega, table 2,
https://arxiv.org/abs/2209.10655
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.config import main, require_positive, require_types
from effjax.cost.clock import measure
from effjax.cost.memory import compiled_memory
from effjax.models.decoder import decoder
from effjax.models.presets import tiny
from effjax.ops.attention.naive import naive_attention
from effjax.ops.attention.patterns import Causal
from effjax.select.claims import write_result

FASTER, READINGS = 5.0, {"by 15%": 0.85, "to 15%": 0.15}


@dataclass(frozen=True)
class SpeedConfig:
    """length: tokens of the one row. rounds: interleaved timings of each program."""

    length: int = 4096
    rounds: int = 5
    out: str = "experiments/results/lra_speed.json"

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "length", "rounds")


def layer(kind: str) -> Callable:
    """A training step's gradient of one layer's weights."""
    model = replace(tiny(kind), layers=1)
    init, apply, _ = decoder(model)
    params = jax.jit(init)(jax.random.key(0))
    return partial(jax.jit(jax.grad(lambda p, t: apply(p, t)[0].mean())), params)


def dense(tokens: jax.Array) -> jax.Array:
    """The same layer's attention alone with all of its scores in memory: a lower bound."""
    config = tiny()
    N, H, T = config.attention.heads, config.head_dim("attention"), tokens.shape[1]
    x = jax.random.normal(jax.random.key(0), (1, T, N, H))
    at = jnp.arange(T, dtype=jnp.int32)[None]
    form = partial(naive_attention, pattern=Causal(), q_positions=at, k_positions=at)
    return jax.grad(lambda x: form(x, x, x, aligned=True).mean())(x)


def run(config: SpeedConfig) -> None:
    tokens = jnp.zeros((1, config.length), jnp.int32)
    programs: dict[str, Callable] = {"dense attention": jax.jit(dense)}
    programs |= {kind: layer(kind) for kind in ("attention", "mega", "mega_chunk")}
    rows: dict[str, dict[str, Any]] = {name: {"method": name, "cpu": []} for name in programs}
    for name, run_one in programs.items():
        jitted, args = (
            (run_one.func, run_one.args) if isinstance(run_one, partial) else (run_one, ())
        )
        compiled = jitted.lower(*args, tokens).compile()  # type: ignore[attr-defined]
        rows[name]["temporaries"] = compiled_memory(compiled).temporaries
    for _ in range(config.rounds):
        for name, run_one in programs.items():
            once = measure(lambda f=run_one: jax.block_until_ready(f(tokens)), rounds=1)
            rows[name]["cpu"].append(once.cpu.median)
    claims = []
    for base in ("dense attention", "attention"):
        for name in ("mega", "mega_chunk"):
            ratios = np.array(rows[base]["cpu"]) / np.array(rows[name]["cpu"])
            memory = rows[name]["temporaries"] / rows[base]["temporaries"]
            holds = {reading: memory <= share for reading, share in READINGS.items()}
            claims.append(
                {
                    "method": name,
                    "against": base,
                    "times faster": [float(np.quantile(ratios, q)) for q in (0, 0.5, 1)],
                    "5 times faster": bool(np.median(ratios) >= FASTER),
                    "share of memory": memory,
                    **{f"memory {reading}": bool(held) for reading, held in holds.items()},
                }
            )
            low, middle, high = claims[-1]["times faster"]
            print(
                f"{name:10} against {base:16} {middle:.2f} ({low:.2f} to {high:.2f}) times as "
                f"fast, {memory:.2f} of its temporaries",
                flush=True,
            )
    write_result(
        config.out,
        question="Is Mega 5 times faster than a transformer at 4096 tokens, in less memory?",
        command="python -m experiments.lra_speed",
        settings={"length": config.length, "rounds": config.rounds, "width": tiny().width},
        rows=[*rows.values(), *claims],
    )


if __name__ == "__main__":
    raise SystemExit(main(run, SpeedConfig))
