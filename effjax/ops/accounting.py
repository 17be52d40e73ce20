"""What the closed forms of every op's FLOPs give; the forms stand beside their ops.

A form that begins with `exact` counts what the method asks for, the others the program as written.
Only products count, two FLOPs per multiply-add; element-wise work is 0.
"""

from typing import NamedTuple


class Flops(NamedTuple):
    """FLOPs of a forward pass, and of the backward pass that follows it."""

    forward: int
    backward: int
