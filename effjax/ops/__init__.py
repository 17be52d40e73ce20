"""Pure functions of arrays: sequence mixing, positions, routing, feed-forward; naive beside fast."""
