"""A comparison at equal training FLOPs: its rows, their order, what is skipped, and going on."""

import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import jax

from effjax.config import require_finite, require_types
from effjax.data.corpora import load
from effjax.data.tokenizers import require_vocab
from effjax.errors import ConfigError, near
from effjax.evaluate.record import Record, read_records, write_records
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.kinds import DECODER_KINDS, Kind
from effjax.models.mixers import MIXERS
from effjax.models.presets import tiny
from effjax.select.equal_flops import FLOPS_PER_MINUTE
from effjax.select.rows import Laboratory, Row, Text, fit
from effjax.training import checkpoints
from effjax.training.loop import TrainConfig
from effjax.training.run_directory import RunDirectory
from effjax.training.saved_model import load_model, save_model
from effjax.transforms.recipe import apply_recipe
from effjax.weights import Tree

RUN = "compare"
BASELINE = "attention"
SECOND_SEED = "attention-seed-2"
TRAINED = (BASELINE, "window", "retention", "state_space", "switch", SECOND_SEED)
RECIPES: dict[str, list[dict[str, Any]]] = {
    "int8": [{"verb": "round_to_nearest", "bits": 8}],
    "int4": [{"verb": "round_to_nearest", "bits": 4, "group": 32}],
    "magnitude": [{"verb": "magnitude", "sparsity": 0.5}],
    "2:4": [{"verb": "semi_structured", "where": "stack/**/kernel"}],
    "svd": [{"verb": "svd", "rank": 32, "where": "stack/**/kernel"}],
}
LORA = [{"verb": "lora", "rank": 8, "alpha": 16.0, "where": "stack/**/kernel"}]
LORA_SHARE = 0.25
"""The fine-tune's share of a trained row's FLOPs."""

ADAPTED = ("topics", "lora")
"""Scored on the second text, off the fronts: the baseline as it is, and its fine-tune."""

ROWS = (BASELINE, *RECIPES, *ADAPTED, *TRAINED[1:])
"""What `all` makes."""

KINDS = tuple(kind for kind in DECODER_KINDS if MIXERS[kind].decodes and kind not in ROWS)
"""Trained too where they are asked for by name: every other mixer that decodes."""

OFFERED = (*ROWS, *KINDS)
METHODS = {SECOND_SEED: BASELINE, "topics": BASELINE}
"""The method that a row is another run of: with another seed, or scored on another text."""


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, on which text, for how long.

    corpus: the text to learn: `python`, a path, a glob or `tfds:NAME`. adapt_corpus: LoRA's text.
    methods: rows to run, as `attention,mamba2,int8`, or `all`; any mixer that decodes may be one.
    minutes: the time to stay within; it sets the budget too: FLOPs of a trained row =
    flops_per_minute x minutes.
    """

    corpus: str = "python"
    adapt_corpus: str = "python-topics"
    methods: str = "all"
    minutes: float = 5.0
    seed: int = 0
    out: str = "runs/compare"
    flops_per_minute: float = FLOPS_PER_MINUTE
    model: DecoderConfig = field(default_factory=tiny)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(batch=8, length=256))

    def __post_init__(self) -> None:
        require_types(self)
        for name in ("minutes", "flops_per_minute"):
            require_finite(self, name, low=0.0, low_open=True)
        require_finite(self, "seed", low=0, high=2**31 - 2)
        require_vocab(self.model.vocab)
        if not self._asked:
            raise ConfigError(
                f"methods must name at least one row, or be all, got {self.methods!r}"
            )
        # What the rows set themselves would be overwritten in silence.
        own = {
            "model.pattern": (self.model.pattern, (BASELINE,)),
            "model.feedforward": (self.model.feedforward, "dense"),
            "train.seed": (self.train.seed, 0),
        }
        for name, (got, wanted) in own.items():
            if got != wanted:
                raise ConfigError(
                    f"{name} is what the rows differ in: leave it {wanted}, got {got}"
                )
        for name in self._asked:
            if name not in OFFERED:
                rows = ", ".join(OFFERED)
                raise ConfigError(f"methods has no {name!r}; there are {rows}{near(name, OFFERED)}")

    @property
    def _asked(self) -> tuple[str, ...]:
        if self.methods == "all":
            return ROWS
        return tuple(name.strip() for name in self.methods.split(",") if name.strip())

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows to run, in order: what is made of the baseline brings the baseline along."""
        wanted = set(self._asked)
        if wanted - set(TRAINED) - set(KINDS):
            wanted.add(BASELINE)
        if "lora" in wanted:
            wanted.add("topics")
        return tuple(name for name in OFFERED if name in wanted)

    def model_of(self, row: str) -> DecoderConfig:
        """The decoder that a row trains or transforms."""
        if row in get_args(Kind):
            return replace(self.model, pattern=(row,))  # type: ignore[arg-type]
        return replace(self.model, feedforward="switch") if row == "switch" else self.model

    def seed_of(self, row: str) -> int:
        """All rows share a seed but the one that measures what a seed is worth."""
        return self.seed + 1 if row == SECOND_SEED else self.seed

    def budget_of(self, row: str) -> float:
        """Model FLOPs that a row trains for; 0 for what is made without training."""
        whole = self.flops_per_minute * self.minutes
        share = LORA_SHARE if row == "lora" else float(row in (*TRAINED, *KINDS))
        return share * whole


def row_of(made: Record) -> str:
    """The row that a record was made for: two rows may be runs of one method."""
    return made.run.partition("/")[2]


@dataclass(frozen=True)
class Cost:
    """What a finished row took: model FLOPs, seconds of training them, and seconds around that."""

    flops: float
    training: float
    around: float


class Comparison:
    """Makes the rows of a config one after the other, keeping each in the run's directory.

    `records` holds every row that is finished or skipped, in order; a directory with finished rows
    is gone on with.
    """

    def __init__(self, config: CompareConfig, directory: RunDirectory):
        self.config, self.directory = config, directory
        self.began = time.perf_counter()
        self.text = Text(load(config.corpus), config.train.length)
        self.laboratory = Laboratory(config, config.seed)
        self._rehearse()
        stored = directory / "record.json"
        found = read_records(stored) if stored.exists() else []
        self.records = {row_of(r): r for r in found if r.status.finished}
        self.costs: list[Cost] = []
        self._base: Tree = None
        self._adapt: Text | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the minutes that were asked for are over."""
        return 60 * self.config.minutes - (time.perf_counter() - self.began)

    def estimate(self, row: str) -> float:
        """Seconds that a row will take, from the speed of the rows that this run has finished."""
        if not self.costs:
            return 0.0
        work = sum(cost.flops for cost in self.costs)
        pace = sum(cost.training for cost in self.costs) / work if work else 0.0
        budget = self.config.budget_of(row)
        alike = [cost for cost in self.costs if bool(cost.flops) == bool(budget)]
        return pace * budget + statistics.mean(cost.around for cost in alike or self.costs)

    def missing(self) -> list[str]:
        """The rows that are not finished, in order."""
        done = {name for name, row in self.records.items() if row.status.finished}
        return [row for row in self.config.rows if row not in done]

    def make(self, row: str) -> Record:
        """Makes a row and stores it; a row for which there is no time is skipped, and says so.

        The baseline is always made: everything else is compared with it.
        """
        wait, left = self.estimate(row), max(self.seconds_left, 0)
        if row != BASELINE and wait > left:
            why = f"it needs about {wait:.0f} s of the {left:.0f} s that are left"
            self.records[row] = self._skipped(row, why)
        else:
            begin = time.perf_counter()
            made = self._trained(row) if self.config.budget_of(row) else self._transformed(row)
            self.records[row] = made.record
            around = time.perf_counter() - begin - made.training_seconds
            cost = Cost(self.config.budget_of(row), made.training_seconds, around)
            self.costs.append(cost)
        ordered = [self.records[name] for name in OFFERED if name in self.records]
        write_records(self.directory / "record.json", ordered)
        return self.records[row]

    def baseline(self) -> Tree:
        """The trained baseline's parameters, from memory or from an earlier run's checkpoint."""
        if self._base is None:
            self._base = load_model(self.directory / "checkpoints" / BASELINE).params
        return self._base

    def _trained(self, row: str) -> Row:
        model, setting = self.config.model_of(row), self.config.train
        setting = replace(setting, seed=self.config.seed_of(row))
        text, recipe, adapt = self.text, [], None
        if row == "lora":
            text, recipe = self._second_text(), LORA
            adapt = apply_recipe(LORA, decoder(model).axes_of)(self.baseline())
        budget, log = self.config.budget_of(row), self.directory.log
        params, training = fit(row, model, setting, text, budget, log, adapt=adapt)
        # A row that was interrupted between its checkpoint and its record is made again.
        folder = self.directory / "checkpoints" / row
        if checkpoints.latest_step(folder) is None:
            save_model(folder, training.plan.steps, model, params, recipe)
        if row == BASELINE:
            self._base = params
        measured = self._measured(row, params, text, recipe=recipe, training=training)
        return Row(params, measured, sum(training.seconds))

    def _transformed(self, row: str) -> Row:
        recipe = RECIPES.get(row, [])
        params = apply_recipe(recipe, decoder(self.config.model).axes_of)(self.baseline())
        text = self._second_text() if row == "topics" else self.text
        base = self.records[BASELINE]
        return Row(params, self._measured(row, params, text, recipe=recipe, base=base), 0.0)

    def _measured(self, row: str, params: Tree, text: Text, **how: Any) -> Record:
        if self.laboratory.reference is None and BASELINE in self.records:
            base = self.records[BASELINE]
            self.laboratory.refer_to(self.config.model, self.baseline(), base)
        train = self.config.train
        return self.laboratory.measured(
            f"{RUN}/{row}",
            METHODS.get(row, row),
            self.config.model_of(row),
            params,
            text,
            length=train.length,
            batch=train.batch,
            seed=self.config.seed_of(row),
            **how,
        )

    def _rehearse(self) -> None:
        """Applies every recipe to abstract parameters, so that a bad size is refused at once."""
        init, _, axes_of = decoder(self.config.model)
        abstract = jax.eval_shape(init, jax.random.key(0))
        for row in self.config.rows:
            if recipe := LORA if row == "lora" else RECIPES.get(row):
                jax.eval_shape(apply_recipe(recipe, axes_of), abstract)

    def _second_text(self) -> Text:
        if self._adapt is None:
            self._adapt = Text(load(self.config.adapt_corpus), self.config.train.length)
        return self._adapt

    def _skipped(self, row: str, why: str) -> Record:
        return self.laboratory.skipped(
            f"{RUN}/{row}", METHODS.get(row, row), self.text, self.config.seed_of(row), why
        )
