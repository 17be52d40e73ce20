"""Train one decoder, on all local devices, and go on where it was stopped.

    python -m experiments.pretrain --steps 300
    python -m experiments.pretrain --model.pattern retention retention attention --model.layers 6
    python -m experiments.pretrain --config runs/pretrain/config.json --steps 600 --out runs/longer
    python -m experiments.pretrain --corpus task:associative_recall,pairs=8 --out runs/recall
    XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
        python -m experiments.pretrain --mesh.data 2 --mesh.fsdp 4

Writes `runs/pretrain/{config.json, metrics.jsonl}`, `checkpoints/` (all that a run needs to go on,
bit for bit) and `model/` (what `experiments.generate` reads). Ctrl-C saves and exits 75.
A task (effjax/data/tasks) is trained on new examples every step and scored by accuracy on others.
Cost: about 1 minute for 300 steps of the default on 2 cores. Expectation: under 3 bits per byte.
"""

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from effjax.config import main, require_positive, require_types, to_json
from effjax.cost import flops
from effjax.cost.peaks import peaks
from effjax.data.examples import RowSource
from effjax.data.loader import ArrayLoader, in_order
from effjax.data.sources import rows_of, task_of
from effjax.data.tokenizers import require_vocab
from effjax.errors import Preempted
from effjax.evaluate import measure
from effjax.evaluate.accuracy import accuracy
from effjax.models.configs import DecoderConfig
from effjax.models.decoder import decoder
from effjax.models.presets import tiny
from effjax.parallel.mesh import MeshConfig
from effjax.training import checkpoints
from effjax.training.interruption import Interruption
from effjax.training.loop import Run, TrainConfig, compile_step, start, train
from effjax.training.progress import Progress
from effjax.training.run_directory import RunDirectory
from effjax.training.saved_model import save_model
from effjax.training.step import TrainState
from effjax.weights import Tree


@dataclass(frozen=True)
class PretrainConfig:
    """Train one decoder.

    corpus: a text, or task:NAME,size=number, which sets train.length to the length of its rows.
    steps: in all, whatever was done before. save_every: steps between checkpoints.
    """

    corpus: str = "python"
    out: str = "runs/pretrain"
    steps: int = 300
    save_every: int = 100
    model: DecoderConfig = field(default_factory=tiny)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "steps", "save_every")
        task = task_of(self.corpus)
        if task is None:
            require_vocab(self.model.vocab)
        else:
            require_vocab(self.model.vocab, task.vocab, repr(task))
            object.__setattr__(self, "train", replace(self.train, length=task.length))


def pretrain(config: PretrainConfig) -> int:
    """Trains to `config.steps`, from the last checkpoint of the run if there is one."""
    with RunDirectory(config.out, config) as directory:
        batch, length, seed = config.train.batch, config.train.length, config.train.seed
        source = rows_of(config.corpus, length=length, count=config.steps * batch, seed=seed)
        loader = ArrayLoader(source.learned, batch, seed)
        run = start(config.model, config.train, config.steps, mesh=config.mesh)
        state = resumed(directory, run, loader)
        print(source.about)
        print(f"mesh {dict(run.mesh.shape)}, from step {int(state.step)} to {config.steps}")
        state = continued(config, directory, run._replace(state=state), loader)
        if checkpoints.latest_step(directory / "model") != config.steps:
            save_model(directory / "model", config.steps, config.model, state.params)
        of_what = text_score if task_of(config.corpus) is None else task_score
        print(of_what(decoder(config.model).apply, state.params, source.held_out, batch))
        if of_what is text_score:
            model = shlex.quote(str(directory / "model"))
            print(f"next: python -m experiments.generate --checkpoint {model}")
    return 0


def text_score(apply: Callable, params: Tree, held_out: RowSource, batch: int) -> str:
    """Bits per byte of rows spread over a text."""
    scored = measure.score(apply, params, held_out, rows=96, batch=batch)
    interval = "" if scored.low is None else f" [{scored.low:.3f}, {scored.high:.3f}]"
    return f"held-out text: {scored.value:.3f} bits per byte{interval}"


def task_score(apply: Callable, params: Tree, held_out: RowSource, batch: int) -> str:
    """Accuracy on examples of a task."""
    scored = accuracy(apply, params, in_order(held_out, batch))
    interval = f"[{scored.low:.3f}, {scored.high:.3f}]"
    asked = f"{scored.targets:,} targets in {scored.rows:,} examples"
    return f"held-out examples: {scored.value:.3f} right {interval}, of {asked}"


def resumed(directory: RunDirectory, run: Run, loader: ArrayLoader) -> TrainState:
    """The run's last checkpoint, on this run's mesh, with the loader put where it stood."""
    folder = directory / "checkpoints"
    if checkpoints.latest_step(folder) is None:
        return run.state
    found = checkpoints.restore(folder, run.state)
    loader.restore(found.meta.position)
    return found.state


def continued(
    config: PretrainConfig, directory: RunDirectory, run: Run, loader: ArrayLoader
) -> TrainState:
    """Trains on, saving as it goes; an interruption saves the last finished step."""
    first = loader.batch_at(0)
    count = flops.count(run.step, run.state, first).total
    compiled = compile_step(run, first)
    folder, tokens = directory / "checkpoints", config.train.tokens_per_step
    is_text = task_of(config.corpus) is None
    progress = Progress(
        "pretrain",
        config.steps,
        tokens,
        flops_per_step=count,
        peak=peaks().matmul_float32 * jax.local_device_count(),
        begin=int(run.state.step),
    )

    def save(state: TrainState) -> None:
        step = int(state.step)
        if checkpoints.latest_step(folder) != step:
            checkpoints.save(
                folder, step, state, config=to_json(config.model), position=loader.position
            )

    def observe(number: int, state: TrainState, metrics: dict[str, Any], seconds: float) -> None:
        bits = {"bits_per_byte": metrics["nats"] / math.log(2)} if is_text else {}
        directory.log(step=number, **bits, seconds=seconds, **metrics)
        progress.update(number, metrics["nats"])
        if number % config.save_every == 0 or number == config.steps or asked.to_stop:
            save(state)
        if asked.to_stop and number < config.steps:
            raise Preempted(f"saved step {number} in {folder}; the same command goes on")

    with Interruption() as asked, progress:
        return train(
            run.state, compiled.step, loader, run.mesh, until=config.steps, observe=observe
        )


if __name__ == "__main__":
    raise SystemExit(main(pretrain, PretrainConfig, prog="python -m experiments.pretrain"))
