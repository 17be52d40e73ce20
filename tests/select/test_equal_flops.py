"""The solver: whole steps within one step of the budget, and refusals with the numbers."""

import pytest

from effjax.errors import ConfigError
from effjax.select.equal_flops import FLOPS_PER_MINUTE, budget, equal_flops, steps

ROWS = {"softmax": 4.9e6, "window": 4.7e6 + 0.5, "switch": lambda: 5.1e6, "tiny": 3.0}


@pytest.mark.parametrize("minutes", [0.5, 1, 5, 30])
def test_every_row_meets_the_budget_to_less_than_a_step(minutes):
    flops = budget(minutes)
    assert flops == minutes * FLOPS_PER_MINUTE
    for name, plan in equal_flops(flops, ROWS, 4096).items():
        per_token = ROWS[name]() if callable(ROWS[name]) else ROWS[name]
        assert plan.tokens == plan.steps * 4096
        assert plan.flops == pytest.approx(plan.tokens * per_token, rel=1e-12)
        assert 0 <= plan.unspent < 4096 * per_token
        assert plan.flops + plan.unspent == pytest.approx(flops, rel=1e-12)


def test_an_exact_budget_is_spent():
    plan = steps("row", 1000.0, 10.0, 10)
    assert (plan.steps, plan.tokens, plan.flops, plan.unspent) == (10, 100, 1000, 0.0)
    assert steps("row", 999.0, 10.0, 10).steps == 9


def test_batches_may_differ_by_row():
    plans = equal_flops(1e9, {"a": 1e3, "b": 1e3}, {"a": 100, "b": 1000})
    assert plans["a"].tokens == plans["b"].tokens == 10**6


@pytest.mark.parametrize(
    ("flops", "per_token", "tokens", "message"),
    [
        (99.0, 10.0, 10, r"budget of 99 FLOPs .* one step of 'row': 100 = 10 tokens x 10; .* 1 t"),
        (0.0, 10.0, 10, "budget of 'row' must be a number above 0, got 0"),
        (float("nan"), 10.0, 10, "budget of 'row' must be a number above 0, got nan"),
        (float("inf"), 10.0, 10, "budget of 'row' must be a number above 0, got inf"),
        (-1.0, 10.0, 10, "budget of 'row' must be a number above 0, got -1"),
        (1e3, 0.0, 10, "FLOPs per token of 'row' must be a number above 0, got 0"),
        (1e3, float("nan"), 10, "FLOPs per token of 'row'"),
        (1e3, 1.0, 0, "tokens per step of 'row' must be above 0, got 0"),
    ],
)
def test_impossible_budgets_are_refused_with_the_numbers(flops, per_token, tokens, message):
    with pytest.raises(ConfigError, match=message):
        equal_flops(flops, {"row": per_token}, tokens)
