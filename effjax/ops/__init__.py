"""Pure functions of arrays: sequence mixing, positions, routing, feed-forward.

Each fast form has a naive one beside it.
"""
