"""The rows of a comparison: train or transform a decoder, then measure it like every other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from effjax.config import digest
from effjax.cost import clock, flops
from effjax.cost.energy import Energy as Joules
from effjax.cost.energy import EnergyMeter, carbon
from effjax.cost.memory import Memory
from effjax.cost.peaks import peaks
from effjax.data.documents import Corpus
from effjax.data.loader import ArrayLoader
from effjax.data.packing import Packed, pack_corpus
from effjax.data.tokenizers import ByteTokenizer
from effjax.evaluate import measure, record
from effjax.evaluate.record import Record
from effjax.inference.state_size import state_bytes
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.select.decoder_flops import adapter_training_flops, training_flops
from effjax.select.equal_flops import Plan, steps
from effjax.training.loop import TrainConfig, compile_step, start, train
from effjax.training.progress import Progress, trainable_line
from effjax.transforms.adapt.lora import adapters
from effjax.weights import Tree, count_parameters

Log = Callable[..., None]

CONTEXT, NEW_TOKENS, PROMPTS, ROUNDS = 128, 64, 4, 3
"""What generation is timed by: prompts of 128 tokens, 64 new ones, 4 rows, 3 interleaved rounds."""

SCORED_ROWS = 96
"""Rows of held-out text that are scored, evenly spread over it."""


class Text:
    """A corpus of bytes, split by file into rows to learn and rows to score."""

    def __init__(self, corpus: Corpus, length: int):
        learned, held_out = corpus.split()
        tokenizer = ByteTokenizer()
        self.corpus = corpus
        self.learned: Packed = pack_corpus(learned, tokenizer, length)
        self.held_out: Packed = pack_corpus(held_out, tokenizer, length)

    @property
    def summary(self) -> record.Corpus:
        """The corpus as a record names it."""
        return record.Corpus(self.corpus.name, self.corpus.digest, self.corpus.bytes)


@dataclass(frozen=True)
class Training:
    """What training a row took; `hardware` is one step, counted."""

    plan: Plan
    hardware: flops.Flops
    trainable: int
    compile: float
    seconds: tuple[float, ...]
    memory: Memory
    energy: Joules


class Row(NamedTuple):
    """A finished row: its parameters, its record and the seconds that training took of it."""

    params: Tree
    record: Record
    training_seconds: float


def fit(
    name: str,
    model: DecoderConfig,
    setting: TrainConfig,
    text: Text,
    budget: float,
    log: Log,
    *,
    adapt: Tree = None,
) -> tuple[Tree, Training]:
    """Trains a decoder for a budget of model FLOPs; of `adapt`, its low-rank updates only.

    Raises ConfigError where the budget does not pay for one step.
    """
    options: dict[str, Any] = {}
    per_token = training_flops(model, setting.length)
    if adapt is not None:
        options = {"params": adapt, "where": adapters}
        per_token = adapter_training_flops(model, setting.length, adapt)
    plan = steps(name, budget, per_token, setting.tokens_per_step)
    loader = ArrayLoader(text.learned, setting.batch, setting.seed)
    run = start(model, setting, plan.steps, **options)
    first = loader.batch_at(0)
    hardware = flops.count(run.step, run.state, first)
    compiled = compile_step(run, first)
    trainable, total = map(count_parameters, (run.state.trainable, run.state.params))
    if adapt is not None:
        print(trainable_line(trainable, total))
    progress = Progress(
        name,
        plan.steps,
        setting.tokens_per_step,
        flops_per_step=hardware.total,
        peak=peaks().matmul_float32,
    )
    seconds: list[float] = []

    def observe(number: int, _: Any, metrics: dict[str, float], took: float) -> None:
        seconds.append(took)
        log(row=name, step=number, seconds=took, **metrics)
        progress.update(number, metrics["nats"])

    with EnergyMeter() as meter, progress:
        state = train(run.state, compiled.step, loader, run.mesh, until=plan.steps, observe=observe)
    took = (compiled.seconds, tuple(seconds), compiled.memory, meter.energy)
    return state.params, Training(plan, hardware, trainable, *took)


class Laboratory:
    """Measures rows of one comparison alike, their speed beside one reference model's.

    config: what the comparison was asked for, whose digest every record carries.
    """

    def __init__(self, config: Any, seed: int):
        self.digest, self.seed = digest(config), seed
        self.reference: tuple[Callable, float] | None = None

    def measured(
        self,
        run: str,
        name: str,
        model: DecoderConfig,
        params: Tree,
        text: Text,
        *,
        length: int,
        batch: int,
        seed: int | None = None,
        recipe: Sequence[Any] = (),
        training: Training | None = None,
        base: Record | None = None,
    ) -> Record:
        """The record of a model: of a training, or of what was made of `base` without any."""
        apply = decoder(model).apply
        seed = self.seed if seed is None else seed
        groups = _trained(training, length, batch) if training else _untrained(base)
        per_token = measure.decode_flops(apply, params, length).total
        groups["flops"] = replace(groups["flops"], per_token=float(per_token))
        rate = self._speed(apply, params)
        groups["time"] = replace(groups["time"], tokens_per_s_generate=rate, rounds=ROUNDS)
        state = state_bytes(apply, params)
        trainable = training.trainable if training is not None else 0
        return Record(
            run=run,
            method=name,
            config_digest=self.digest,
            corpus=text.summary,
            seed=seed,
            device=measure.this_device(),
            versions=measure.versions(),
            quality=_quality(apply, params, text, batch, seed),
            recipe=tuple(recipe),
            params=record.Parameters(count_parameters(params), trainable),
            bytes=measure.storage(params),
            state_bytes=record.StateBytes(state.fixed, float(state.per_token)),
            **groups,
        )

    def refer_to(self, model: DecoderConfig, params: Tree, measured: Record) -> None:
        """Takes a model that an earlier run has measured as the reference of speed."""
        rate = measured.time.tokens_per_s_generate
        if rate is not None:
            self.reference = (_generation(decoder(model).apply, params), rate)

    def skipped(self, run: str, name: str, text: Text, seed: int, why: str) -> Record:
        """The record of a row that was not made: no figures, and the reason."""
        return Record(
            run=run,
            method=name,
            config_digest=self.digest,
            corpus=text.summary,
            seed=seed,
            device=measure.this_device(),
            versions=measure.versions(),
            quality=record.Quality("bits_per_byte"),
            status=record.Status(finished=False, reason=why),
            reasons={"*": why},
        )

    def _speed(self, apply: Callable, params: Tree) -> float:
        """Generated tokens/s: the reference's, times how much faster this is in turns with it."""
        thunk = _generation(apply, params)
        if self.reference is None:
            timing = clock.measure(thunk, rounds=ROUNDS)
            self.reference = (thunk, PROMPTS * NEW_TOKENS / timing.wall.median)
            return self.reference[1]
        ratio, _ = measure.relative_speed(thunk, self.reference[0], rounds=ROUNDS)
        return self.reference[1] * ratio.median


def _quality(apply: Callable, params: Tree, text: Text, batch: int, seed: int) -> record.Quality:
    scored = measure.score(apply, params, text.held_out, rows=SCORED_ROWS, batch=batch)
    return record.Quality("bits_per_byte", scored.value, scored.low, scored.high, (seed,))


def _generation(apply: Callable, params: Tree) -> Callable:
    return measure.generation(apply, params, batch=PROMPTS, prompt=CONTEXT, new_tokens=NEW_TOKENS)


def _trained(training: Training, length: int, batch: int) -> dict[str, Any]:
    spread = clock.Spread.of(training.seconds)
    joules, grams = training.energy, carbon(training.energy)
    reasons: dict[str, str] = {}
    if joules.joules is None:
        reasons |= {"energy": joules.source, "carbon": grams.source}
    if training.memory.temporaries is None:
        reasons["memory"] = training.memory.source
    steps_run = len(training.seconds)
    return {
        "flops": record.Flops(
            train_model=training.plan.flops,
            train_hardware=training.hardware.total * steps_run,
            unknown=training.hardware.unknown,
        ),
        "memory": record.Memory(
            training.memory.temporaries, training.memory.arguments, training.memory.source
        ),
        "time": record.Time(
            compile=training.compile,
            step_median=spread.median,
            step_spread=spread.high - spread.low,
            tokens_per_s_train=batch * length / spread.median,
        ),
        "energy": record.Energy(joules.joules, joules.low, joules.high, _source(joules)),
        "carbon": record.Carbon(grams.grams, grams.low, grams.high),
        "reasons": reasons,
    }


def _untrained(base: Record | None) -> dict[str, Any]:
    """A transform's groups: its model's training was the base's, and it has none of its own."""
    why = "made from the baseline without training"
    return {
        "flops": base.flops if base is not None else record.Flops(),
        "memory": record.Memory(),
        "time": record.Time(),
        "energy": record.Energy(),
        "carbon": record.Carbon(),
        "reasons": dict.fromkeys(("memory", "time", "energy", "carbon"), why),
    }


def _source(joules: Joules) -> str | None:
    return None if joules.kind is None else f"{joules.kind}: {joules.source}"
