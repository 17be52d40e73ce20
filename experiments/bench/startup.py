"""What does it cost to begin: importing effjax, and compiling deep models?

    python -m experiments.bench.startup

Prints the CPU seconds of `import jax` and of `import jax, effjax` in fresh processes, interleaved,
and those of compiling a training step of 4 and of 24 scanned layers. Cost: 2 minutes.
Expectation: under 0.5 s over importing jax; 24 layers compile in at most 1.3 times the time of 4.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import replace

from experiments.bench import pinned  # isort: skip  (pins the core before XLA counts them)

import jax
import numpy as np

from effjax.data.batch import Batch
from effjax.models.decoder import decoder
from effjax.models.presets import tiny
from effjax.training.objective import language_model_objective
from effjax.training.optimizer import OptimizerConfig, optimizer
from effjax.training.step import train_state, train_step

MEASURE = "import time; {}; print(time.process_time())"


def importing(statement: str) -> float:
    """CPU seconds of a fresh process that runs one import."""
    command = [sys.executable, "-c", MEASURE.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compiling(layers: int) -> float:
    """CPU seconds to trace and compile a training step."""
    config = replace(tiny(), layers=layers)
    init, _, axes_of = decoder(config)
    tokens = np.zeros((2, 128), np.int32)
    batch = Batch(tokens, tokens, np.tile(np.arange(128, dtype=np.int32), (2, 1)), tokens)
    begin = time.process_time()
    params = jax.jit(init)(jax.random.key(0))
    axes = axes_of(params)
    rule = optimizer(OptimizerConfig(), 10, params, axes)
    state = train_state(params, axes, rule, jax.random.key(1))
    jax.jit(train_step(language_model_objective(config), rule)).lower(state, batch).compile()
    return time.process_time() - begin


def main() -> None:
    rounds = [(importing("import jax"), importing("import jax, effjax")) for _ in range(7)]
    more = [both - jax_alone for jax_alone, both in rounds]
    print(
        f"import effjax: {statistics.median(more):.3f} cpu s over importing jax "
        f"({min(more):.3f} to {max(more):.3f}, {len(more)} rounds on core {pinned.CORE})"
    )
    compiling(2)  # what the first compilation of a process pays is not the depth's
    ratios = []
    for _ in range(3):
        jax.clear_caches()
        few = compiling(4)
        jax.clear_caches()
        many = compiling(24)
        ratios.append(many / few)
        print(f"compile: 4 layers {few:.2f} cpu s, 24 layers {many:.2f} cpu s: {many / few:.2f}")
    print(f"24 layers / 4 layers: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
