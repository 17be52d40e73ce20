"""AdamW behind a warm-up, a decay and a clip: optax parts, put together from one config."""

from dataclasses import dataclass
from typing import Literal

import jax
import optax

from effjax.config import require_finite, require_positive, require_types
from effjax.errors import ConfigError
from effjax.weights import Tree, is_weight


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay.

    learning_rate: the peak. warmup: share of the steps that rise linearly to it. schedule: how it
    falls after, to `final` times the peak. clip: the largest global norm of the gradient.
    weight_decay: on weights with inputs and outputs only, never on norms' scales or constants.
    """

    learning_rate: float = 3e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.05
    final: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self) -> None:
        require_types(self)
        require_positive(self, "learning_rate", "clip")
        require_finite(self, "learning_rate", high=10.0)
        for name in ("warmup", "final"):
            require_finite(self, name, low=0.0, high=1.0)
        require_finite(self, "weight_decay", low=0.0)
        for name in ("b1", "b2"):
            require_finite(self, name, low=0.0, high=1.0, high_open=True)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each of `steps` steps: linear warm-up, then the config's decay."""
    if steps < 1:
        raise ConfigError(f"a schedule needs at least 1 step, got {steps}")
    peak, end = config.learning_rate, config.learning_rate * config.final
    warm = min(round(config.warmup * steps), steps - 1)
    rest = max(steps - warm, 1)
    falls: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }
    if not warm:
        return falls[config.schedule]
    # The first step already moves: from peak / warm, not from zero.
    rise = optax.linear_schedule(peak / warm, peak, max(warm - 1, 1))
    return optax.join_schedules([rise, falls[config.schedule]], [warm])


def optimizer(
    config: OptimizerConfig, steps: int, params: Tree, axes: Tree
) -> optax.GradientTransformation:
    """Clip, AdamW and schedule for the trainable part of `params` (see `weights.partition`)."""
    mask = decay_mask(params, axes)
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=lambda updates: jax.tree.map(
                lambda keep, v: None if v is None else keep,
                mask,
                updates,
                is_leaf=lambda v: v is None,
            ),
        ),
    )


def decay_mask(params: Tree, axes: Tree) -> Tree:
    """True at every array of a weight with inputs and outputs: what weight decay acts on."""
    return jax.tree.map(
        lambda w, ax: jax.tree.map(lambda _: ax.is_matrix, w), params, axes, is_leaf=is_weight
    )
