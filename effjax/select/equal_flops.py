"""Equal training FLOPs: how many steps each method gets, so that all cost the same to train.

The budget is a constant times the minutes asked for, never a measurement: two machines, or one on
two days, train the same models, and a run that was interrupted goes on with the same plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from effjax.errors import ConfigError

FLOPS_PER_MINUTE = 2e11
"""Model FLOPs that one trained row gets per minute asked for.

Sized for 2 CPU cores, where the comparison's baseline was seen to train at 40 GFLOP/s and a row to
take 12 seconds besides: at 5 minutes, 25 seconds of training in each of six rows leave time for
all others. A change of this number makes earlier results incomparable: it changes every model.
"""


@dataclass(frozen=True)
class Plan:
    """What a budget buys one row: whole steps, the tokens in them, and their model FLOPs.

    `unspent` = budget - flops is at least 0 and below the FLOPs of one step.
    """

    steps: int
    tokens: int
    flops: int
    unspent: float


def budget(minutes: float, flops_per_minute: float = FLOPS_PER_MINUTE) -> float:
    """Gives the model FLOPs of one trained row for a number of minutes."""
    return minutes * flops_per_minute


def steps(name: str, flops: float, flops_per_token: float, tokens_per_step: int) -> Plan:
    """Plans the most whole steps that a budget of model FLOPs pays for.

        steps = floor(budget / (FLOPs per token * tokens per step))

    `flops_per_token` is training's, from `decoder_flops`. Never more than the budget is spent.

    Raises ConfigError with the numbers where the budget does not pay for one step, or where a
    number is not above 0.
    """
    for what, value in (("budget", flops), ("FLOPs per token", flops_per_token)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{what} of {name!r} must be a number above 0, got {value}")
    if tokens_per_step < 1:
        raise ConfigError(f"tokens per step of {name!r} must be above 0, got {tokens_per_step}")
    cost = flops_per_token * tokens_per_step
    count = int(flops // cost)
    if not count:
        raise ConfigError(
            f"a budget of {flops:.4g} FLOPs does not pay for one step of {name!r}: {cost:.4g} = "
            f"{tokens_per_step} tokens x {flops_per_token:.4g}; ask for {cost / flops:.2g} times "
            "the budget or more, or for smaller batches"
        )
    return Plan(count, count * tokens_per_step, round(count * cost), flops - count * cost)


def equal_flops(
    flops: float,
    rows: Mapping[str, float | Callable[[], float]],
    tokens_per_step: int | Mapping[str, int],
) -> dict[str, Plan]:
    """Plans every row at the same budget of model FLOPs, which each meets to less than one step.

    `rows` gives each method's training FLOPs per token, or a function that computes them;
    `tokens_per_step` is one number for all, or one a row.

    Raises ConfigError as `steps` does, for the first row that the budget does not pay for.
    """
    return {
        name: steps(
            name,
            flops,
            per_token() if callable(per_token) else per_token,
            tokens_per_step if isinstance(tokens_per_step, int) else tokens_per_step[name],
        )
        for name, per_token in rows.items()
    }
