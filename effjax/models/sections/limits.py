"""How large the numbers of a section may be.

Beyond these a model is not built but for hours or not at all: they are refused by name, before
anything of their size is made.
"""

SIZE = 2**20
"""Entries along one axis of a weight or of a memory."""

POSITIONS = 2**30
"""Positions or tokens: their sums and differences are numbers of 32 bits."""

UNROLLED = 2**10
"""What a program repeats for each one: the taps of a short convolution, orders, layers."""

SHORTEST, LONGEST = 1e-9, 1e4
"""Step sizes, whose logarithms and exponentials are numbers of 32 bits."""
