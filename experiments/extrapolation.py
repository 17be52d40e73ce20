"""Which position schemes read texts longer than those they were trained on?

    python -m experiments.extrapolation
    python -m experiments.extrapolation --schemes rope,alibi --kinds attention --seeds 3

Trains a small decoder for each scheme and kind of attention on rows of L bytes, all seeds in one
program, and scores the same held-out text in rows of L, 2L and 4L. The schemes that stretch rotary
positions (PI, NTK-aware, dynamic NTK, YaRN) read the parameters that were trained with plain rotary
ones; PI and plain rotary positions are also tuned for a few steps on rows of 4L.

Cost: 20 minutes on 2 cores. Expectation: learned and sinusoidal positions lose most, ALiBi and its
kin lose nothing, and a window hides the difference. Claims, fixed before the first run:

- ALiBi's loss at 2L is at most 1.02 times its own at L (POS-06);
- sinusoidal positions lose more than ALiBi at 4L (POS-01);
- tuned on rows of 4L, PI is below plain rotary positions (POS-11);
- untuned at 4L, YaRN is below PI (POS-14), and dynamic NTK below plain rotary positions (POS-13);
- randomised sinusoidal positions are below plain ones at 4L (POS-15);
- no positions at all lose less than learned ones at 4L (POS-16).

Writes experiments/results/extrapolation.json; `--kinds window --out
experiments/results/extrapolation_window.json` wrote the other half of the grid.

Seen: with full attention, verdicts as in the file. With a window of half a row no scheme loses more
than 0.019 bits per byte from L to 4L (dynamic NTK; learned and sinusoidal positions 0.018), where
full attention loses up to 0.074 (plain rotary positions): what is never read cannot be far away.

Source: Press et al. 2022, ALiBi, https://arxiv.org/abs/2108.12409; Chen et al. 2023, position
interpolation, https://arxiv.org/abs/2306.15595; Treviso et al. 2023, section 3.5, and Ding et al.
2023, section 5.3: the effect in sparse or sub-quadratic models "is not yet well understood".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.config import main, require_positive, require_types
from effjax.data.corpora import load
from effjax.data.packing import Packed, pack_corpus
from effjax.data.tokenizers import ByteTokenizer
from effjax.errors import ConfigError, near
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.mixers import MIXERS
from effjax.models.positions import SCHEMES
from effjax.models.sections import AttentionConfig, PositionConfig
from effjax.objectives.causal_lm import causal_lm
from effjax.ops.attention.patterns import Window
from effjax.select.claims import Verdict, verdict, write_result
from effjax.training.optimizer import OptimizerConfig
from effjax.training.seeds import seeded_batches, train_seeds
from effjax.weights import Tree

TIMES = (1, 2, 4)
"""Lengths that are scored, in units of L."""
STRETCHED = ("pi", "ntk", "dynamic_ntk", "yarn")
"""Schemes that read what plain rotary positions were trained to."""
ROWS = 48
"""Rows of 4L that are scored."""


@dataclass(frozen=True)
class ExtrapolationConfig:
    """schemes, kinds: names with commas between them, or all. steps, tuned: of training and tuning.

    seeds: runs, which begin at seed 0. out: where results go.
    """

    corpus: str = "python"
    schemes: str = "all"
    kinds: str = "attention,window"
    seeds: int = 5
    steps: int = 200
    tuned: int = 30
    batch: int = 8
    length: int = 64
    out: str = "experiments/results/extrapolation.json"

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "seeds", "steps", "tuned", "batch", "length")
        names(self.schemes, SCHEMES, "schemes")
        names(self.kinds, MIXERS, "kinds")


def names(asked: str, known: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """The names in a text, or all that are known."""
    found = tuple(known) if asked == "all" else tuple(name.strip() for name in asked.split(","))
    for name in found:
        if name not in known:
            raise ConfigError(f"{option} has no {name!r}{near(name, known)}")
    return found


def order(scheme: str) -> tuple[bool, str]:
    """The schemes that claims are about come first."""
    return scheme not in ("alibi", "learned", "none", "randomized", "rope", "sinusoidal"), scheme


def model(config: ExtrapolationConfig, kind: str, scheme: str) -> DecoderConfig:
    """A decoder of 0.1 M parameters with a window of half a row."""
    return DecoderConfig(
        width=64,
        hidden=256,
        layers=2,
        pattern=(kind,),  # type: ignore[arg-type]
        attention=AttentionConfig(heads=4),
        window=Window(config.length // 2),
        position=PositionConfig(
            scheme=scheme,  # type: ignore[arg-type]
            train_length=config.length,
            factor=float(TIMES[-1]) if scheme in (*STRETCHED, "randomized") else 1.0,
        ),
    )


@partial(jax.jit, static_argnames="apply")
def losses(apply: Any, params: Tree, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Bits per byte of each seed's model."""

    def one(p: Tree) -> jax.Array:
        nats, count = causal_lm(apply(p, tokens)[0], targets)
        return nats / count / jnp.log(2.0)

    return jax.lax.map(one, params)


def scored(made: DecoderConfig, params: Tree, text: np.ndarray, length: int) -> np.ndarray:
    """Bits per byte [times seeds] of one text in rows of 1, 2 and 4 times the length."""
    apply, inputs, targets = decoder(made).apply, text[:, :-1], text[:, 1:]
    cut = [
        [jnp.asarray(x.reshape(-1, length * times)) for x in (inputs, targets)] for times in TIMES
    ]
    return np.stack([losses(apply, params, x, y) for x, y in cut])


Row = tuple[tuple[str, str], np.ndarray]
"""A kind and a scheme, and their bits per byte [times seeds]."""


def grid(config: ExtrapolationConfig) -> Iterator[Row]:
    """Every kind and scheme, as they are done."""
    learned, held_out = load(config.corpus).split()
    short, long = (pack_corpus(learned, ByteTokenizer(), n * config.length) for n in (1, TIMES[-1]))
    text = pack_corpus(held_out, ByteTokenizer(), TIMES[-1] * config.length).whole_rows(ROWS)
    schemes, seeds = names(config.schemes, SCHEMES, "schemes"), range(config.seeds)

    def row(kind: str, name: str, made: DecoderConfig, params: Tree) -> Row:
        return (kind, name), scored(made, params, text, config.length)

    for kind in names(config.kinds, MIXERS, "kinds"):
        trained = sorted((s for s in schemes if s not in STRETCHED), key=order)
        if set(schemes) & set(STRETCHED) and "rope" not in trained:
            trained.append("rope")
        for scheme in trained:
            made = model(config, kind, scheme)
            rows = seeded_batches(short, config.batch, seeds)
            params, _ = train_seeds(made, OptimizerConfig(), rows, seeds=seeds, steps=config.steps)
            yield row(kind, scheme, made, params)
            if scheme != "rope":
                continue
            for other in [s for s in schemes if s in STRETCHED]:
                yield row(kind, other, model(config, kind, other), params)
            for other in [s for s in schemes if s in ("rope", "pi")]:
                made = model(config, kind, other)
                tuned = tune(config, made, params, long)
                yield row(kind, f"{other}, tuned", made, tuned)


def tune(config: ExtrapolationConfig, made: DecoderConfig, params: Tree, long: Packed) -> Tree:
    """A few steps on rows of 4L, at a third of the learning rate."""
    setting = replace(OptimizerConfig(), learning_rate=OptimizerConfig().learning_rate / 3)
    seeds = range(config.seeds)
    rows = seeded_batches(long, max(config.batch // TIMES[-1], 1), seeds)
    return train_seeds(made, setting, rows, seeds=seeds, steps=config.tuned, params=params)[0]


def judged(found: dict[tuple[str, str], np.ndarray]) -> list[Verdict]:
    """The claims, of full attention and of rows that were run."""
    own = {name: bits for (kind, name), bits in found.items() if kind == "attention"}
    rise = {name: bits / bits[0] for name, bits in own.items()}
    claims = [
        (
            "ALiBi at 2L is at most 1.02 times itself at L",
            ("alibi",),
            lambda: 1.02 - rise["alibi"][1],
        ),
        (
            "sinusoidal positions lose more than ALiBi at 4L",
            ("sinusoidal", "alibi"),
            lambda: rise["sinusoidal"][2] - rise["alibi"][2],
        ),
        (
            "tuned at 4L, PI is below plain rotary positions",
            ("rope, tuned", "pi, tuned"),
            lambda: own["rope, tuned"][2] - own["pi, tuned"][2],
        ),
        ("untuned at 4L, YaRN is below PI", ("pi", "yarn"), lambda: own["pi"][2] - own["yarn"][2]),
        (
            "untuned at 4L, dynamic NTK is below plain rotary positions",
            ("rope", "dynamic_ntk"),
            lambda: own["rope"][2] - own["dynamic_ntk"][2],
        ),
        (
            "randomised sinusoidal positions are below plain ones at 4L",
            ("sinusoidal", "randomized"),
            lambda: own["sinusoidal"][2] - own["randomized"][2],
        ),
        (
            "no positions lose less than learned ones at 4L",
            ("learned", "none"),
            lambda: rise["learned"][2] - rise["none"][2],
        ),
    ]
    return [
        verdict(claim, difference().tolist())
        for claim, needs, difference in claims
        if set(needs) <= set(own)
    ]


def run(config: ExtrapolationConfig) -> None:
    print(f"{'':27} " + "  ".join(f"{times:>5}L" for times in TIMES) + "   bits per byte")
    found: dict[tuple[str, str], np.ndarray] = {}
    for (kind, name), bits in grid(config):
        found[kind, name] = bits
        shown = "  ".join(f"{mean:6.3f}" for mean in bits.mean(axis=1))
        print(f"{kind:12} {name:14} {shown}", flush=True)
        save(config, found)
    for one in judged(found):
        print(one)
    print(f"results in {config.out}")


def save(config: ExtrapolationConfig, found: dict[tuple[str, str], np.ndarray]) -> None:
    """Writes what has been found, row by row: a run that is stopped keeps its rows."""
    write_result(
        config.out,
        question="Which position schemes read texts longer than those they were trained on?",
        command=f"python -m experiments.extrapolation --kinds {config.kinds}",
        settings={"corpus": config.corpus, "steps": config.steps, "length": config.length},
        rows=[
            {
                "kind": kind,
                "scheme": name,
                "bits_per_byte": {
                    f"{times}L": np.round(row, 5).tolist()
                    for times, row in zip(TIMES, bits, strict=True)
                },
            }
            for (kind, name), bits in found.items()
        ],
        verdicts=judged(found),
    )


if __name__ == "__main__":
    raise SystemExit(main(run, ExtrapolationConfig))
