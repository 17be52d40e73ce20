"""Are attention-free models as good as a transformer at equal training FLOPs, and in which order?

    python -m experiments.attention_free
    python -m experiments.attention_free --kinds attention,rwkv --seeds 2 --gigaflops 200

Trains the Transformer, RWKV, H3, Hyena and RetNet at one width on the same text, all seeds in one
program, each for the steps that the same training FLOPs pay for, and ranks them by the loss on
held-out text. The survey ranks them, by plus signs: Transformer 3 to 4, RetNet 3, H3 2, RWKV and
Hyena 1.

Cost: 15 minutes on 2 cores. Expectation: at this size the order is another; recurrences with fixed
decays learn bytes faster than attention. Claims, fixed before the first run: each attention-free
model's loss is at most 1.05 times the transformer's ("comparable"); RetNet is below H3, H3 below
RWKV, H3 below Hyena.

Writes experiments/results/attention_free.json.

Source: Ding et al. 2023, section 5.5 and Table 1, https://arxiv.org/abs/2312.00678
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from effjax.config import main, require_finite, require_positive, require_types
from effjax.data.corpora import load
from effjax.data.packing import pack_corpus
from effjax.data.tokenizers import ByteTokenizer
from effjax.errors import ConfigError, near
from effjax.evaluate.measure import score
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.kinds import DECODER_KINDS
from effjax.models.presets import tiny
from effjax.select.claims import Verdict, verdict, write_result
from effjax.select.decoder_flops import training_flops
from effjax.select.equal_flops import equal_flops
from effjax.training.optimizer import OptimizerConfig
from effjax.training.seeds import seeded_batches, train_seeds

COMPARABLE = 1.05
ORDER = (("retention", "h3"), ("h3", "rwkv"), ("h3", "hyena"))


@dataclass(frozen=True)
class AttentionFreeConfig:
    """kinds: names with commas between them. gigaflops: training FLOPs of each run, in 10^9."""

    corpus: str = "python"
    kinds: str = "attention,rwkv,h3,hyena,retention"
    seeds: int = 5
    gigaflops: float = 400.0
    batch: int = 8
    length: int = 128
    out: str = "experiments/results/attention_free.json"

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "seeds", "batch", "length")
        require_finite(self, "gigaflops", low=0.0, low_open=True)
        for name in self.kinds.split(","):
            if name not in DECODER_KINDS:
                raise ConfigError(f"kinds has no {name!r}{near(name, DECODER_KINDS)}")


def model(kind: str) -> DecoderConfig:
    """Two layers of one kind; RWKV has its own feed-forward network, as in its paper."""
    own = replace(tiny(kind), layers=2, width=96, hidden=384)
    return replace(own, feedforward="channel_mixing") if kind == "rwkv" else own


def run(config: AttentionFreeConfig) -> None:
    learned, held_out = (
        pack_corpus(part, ByteTokenizer(), config.length) for part in load(config.corpus).split()
    )
    kinds, seeds = config.kinds.split(","), range(config.seeds)
    costs = {kind: training_flops(model(kind), config.length) for kind in kinds}
    plans = equal_flops(1e9 * config.gigaflops, costs, config.batch * config.length)
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        own, steps = model(kind), plans[kind].steps
        batches = seeded_batches(learned, config.batch, seeds)
        params, _ = train_seeds(own, OptimizerConfig(), batches, seeds=seeds, steps=steps)
        for seed in seeds:
            one = jax.tree.map(lambda x, i=seed: x[i], params)
            bits = score(decoder(own).apply, one, held_out, rows=96, batch=config.batch)
            rows.append({"kind": kind, "seed": seed, "steps": steps, "bits_per_byte": bits.value})
        got = [row["bits_per_byte"] for row in rows if row["kind"] == kind]
        print(f"{kind:12} {steps:5} steps  {np.mean(got):.3f} bits per byte", flush=True)
    found = verdicts(rows)
    for one in found:
        print(one)
    write_result(
        config.out,
        question="Are attention-free models as good as a transformer at equal training FLOPs?",
        command="python -m experiments.attention_free",
        settings={"gigaflops": config.gigaflops, "batch": config.batch, "length": config.length},
        rows=rows,
        verdicts=found,
    )


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Comparable to the transformer, and the survey's order, of the kinds that were run."""
    by: dict[str, np.ndarray] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        by[kind] = np.array([row["bits_per_byte"] for row in rows if row["kind"] == kind])
    found = [
        verdict(
            f"{kind} is at most {COMPARABLE} times attention's loss",
            list(COMPARABLE * by["attention"] - by[kind]),
        )
        for kind in by
        if kind != "attention" and "attention" in by
    ]
    return found + [
        verdict(f"{better} is below {worse}", list(by[worse] - by[better]))
        for better, worse in ORDER
        if better in by and worse in by
    ]


if __name__ == "__main__":
    raise SystemExit(main(run, AttentionFreeConfig))
