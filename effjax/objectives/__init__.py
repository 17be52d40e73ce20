"""Losses, as pure functions of what a model returned: sums and counts, so that batches add up."""

from effjax.objectives.causal_lm import bits, causal_lm, mean_loss

__all__ = ["bits", "causal_lm", "mean_loss"]
