"""How much does attention depend on its input?

    python -m experiments.attention_probe
    python -m experiments.attention_probe --corpus ../shared/data/tinyshakespeare.txt

Trains small decoders, takes the mean attention weights of each head over texts that were trained
on, and puts them in the place of the weights that queries and keys make: of the heads that miss
them least first (by the loss of the model with one head made constant), then of more and more, up
to all. Nothing is trained after that. Held-out text is scored.

Cost: 4 minutes on 2 cores. Expectation: little is lost with half of the heads constant, and more
with all. The claims, fixed before the first run: half of the heads constant cost at most 5% of the
bits per byte, all of them at most 8%.
Writes experiments/results/attention_probe.json.

Source: Hassid et al. 2022, "How Much Does Attention Actually Attend?",
https://arxiv.org/abs/2211.03495, whose encoders lose 8% of their tasks' scores on average with all
heads constant, after a classifier is trained on top; Treviso et al. 2023, section 3.1.
"""

from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.config import main, require_positive, require_types
from effjax.data.corpora import load
from effjax.data.packing import pack_corpus
from effjax.data.tokenizers import ByteTokenizer
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.mixers.papa import make_constant
from effjax.models.sections import AttentionConfig, PapaConfig
from effjax.objectives.causal_lm import causal_lm
from effjax.select.claims import Verdict, verdict, write_result
from effjax.training.optimizer import OptimizerConfig
from effjax.training.seeds import seeded_batches, train_seeds
from effjax.weights import Tree

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
CLAIMS = {0.5: 0.05, 1.0: 0.08}
"""Of which share of heads the claim allows which relative rise in bits per byte."""
TEXTS = 256
"""Rows that are averaged over, and rows that are scored."""


@dataclass(frozen=True)
class ProbeConfig:
    """seeds: runs, which begin at seed 0. steps: of training each. out: where results go."""

    corpus: str = "python"
    seeds: int = 5
    steps: int = 600
    batch: int = 16
    length: int = 64
    out: str = "experiments/results/attention_probe.json"

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "seeds", "steps", "batch", "length")

    @property
    def model(self) -> DecoderConfig:
        return DecoderConfig(
            width=64,
            hidden=256,
            layers=4,
            pattern=("papa",),
            attention=AttentionConfig(heads=4),
            papa=PapaConfig(length=self.length),
        )


@partial(jax.jit, static_argnames="apply")
def loss(apply: Any, params: Tree, tokens: jax.Array) -> jax.Array:
    """Bits per byte of the rows, each from its second byte on."""
    logits, _, _ = apply(params, tokens[:, :-1])
    nats, count = causal_lm(logits, tokens[:, 1:])
    return nats / count / jnp.log(2.0)


@partial(jax.jit, static_argnames="apply")
def averages(apply: Any, params: Tree, tokens: jax.Array) -> jax.Array:
    """Mean attention weights [layers N T T]."""
    return apply(params, tokens)[2]["stack"]["000"]["papa_00"]["weights"]


@jax.jit
def probed(params: Tree, weights: jax.Array, heads: jax.Array) -> Tree:
    """The model with the chosen heads [layers N] constant."""
    unit = params["stack"]["runs"]["000"]["papa_00"]
    unit = {**unit, "mixer": make_constant(unit["mixer"], weights, heads)}
    return {**params, "stack": {"runs": {"000": {"papa_00": unit}}}}


def probe(apply: Any, params: Tree, seen: jax.Array, held_out: jax.Array) -> list[float]:
    """Bits per byte of held-out text for each share of constant heads."""
    weights = averages(apply, params, seen)
    layers, heads = weights.shape[:2]
    one = np.eye(layers * heads).reshape(-1, layers, heads)
    harm = [float(loss(apply, probed(params, weights, jnp.asarray(h)), seen)) for h in one]
    rank = np.argsort(np.argsort(harm)).reshape(layers, heads)
    chosen = [jnp.asarray(rank < round(share * rank.size)) for share in SHARES]
    return [float(loss(apply, probed(params, weights, h), held_out)) for h in chosen]


def judged(found: np.ndarray) -> list[Verdict]:
    """The claims, from bits per byte [seeds shares]."""
    rise = found / found[:, :1] - 1
    return [
        verdict(
            f"{share:.0%} of the heads constant cost at most {most:.0%}",
            (most - rise[:, SHARES.index(share)]).tolist(),
        )
        for share, most in CLAIMS.items()
    ]


def run(config: ProbeConfig) -> None:
    learned, held_out = (
        pack_corpus(text, ByteTokenizer(), config.length) for text in load(config.corpus).split()
    )
    seen, scored = (jnp.asarray(text.whole_rows(TEXTS)[:, :-1]) for text in (learned, held_out))
    apply, seeds = decoder(config.model).apply, range(config.seeds)
    batches = seeded_batches(learned, config.batch, seeds)
    trained, _ = train_seeds(
        config.model, OptimizerConfig(), batches, seeds=seeds, steps=config.steps
    )
    rows = []
    print("seed  " + "  ".join(f"{share:>6.0%}" for share in SHARES) + "   of the heads constant")
    for seed in seeds:
        params = jax.tree.map(itemgetter(seed), trained)
        rows.append(probe(apply, params, seen, scored))
        print(f"{seed:4}  " + "  ".join(f"{x:6.3f}" for x in rows[-1]), flush=True)
    verdicts = judged(np.array(rows))
    for found in verdicts:
        print(found)
    write_result(
        config.out,
        question="How much do small decoders lose when attention no longer reads its input?",
        command="python -m experiments.attention_probe",
        settings={"corpus": config.corpus, "steps": config.steps, "length": config.length},
        rows=[
            {"seed": seed, "bits_per_byte": dict(zip(map(str, SHARES), row, strict=True))}
            for seed, row in enumerate(rows)
        ],
        verdicts=verdicts,
    )
    print(f"results in {config.out}")


if __name__ == "__main__":
    raise SystemExit(main(run, ProbeConfig))
