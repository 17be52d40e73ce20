"""Closed-form FLOPs of a mixture's matrix products, in both of its forms.

A product of [n k] and [k m] is 2 n k m FLOPs; a training step runs each product once forward and
two of the same size backward. Element-wise work (softmax, activation) is not counted.
"""

from effjax.ops.mixture.switch import block_rows, dropless_blocks

TRAINING = 3  # forward, the cotangent of the activations, the cotangent of the weights


def router_flops(width: int, experts: int) -> int:
    """Returns a token's forward FLOPs in the router: 2 D E.

    Source: Fedus et al. 2021, equation 1, https://arxiv.org/abs/2101.03961
    """
    return 2 * width * experts


def expert_flops(width: int, hidden: int, matrices: int = 2) -> int:
    """Returns a token's forward FLOPs in one expert of `matrices` [D F] weights: 2 D F each.

    Source: counting; 2 matrices for a plain feed-forward network, 3 for a gated one
    """
    return 2 * matrices * width * hidden


def train_model_flops(tokens: int, width: int, hidden: int, experts: int, matrices: int = 2) -> int:
    """Returns the FLOPs of one training step that the model asks for: one expert a live token.

    3 N (2 D E + 2 m D F). Capacity and dropped tokens do not enter: rows at equal FLOPs are equal
    in this number.

    Source: Fedus et al. 2021, section 2 (FLOPs per token do not depend on the experts' number),
    https://arxiv.org/abs/2101.03961
    """
    token = router_flops(width, experts) + expert_flops(width, hidden, matrices)
    return TRAINING * tokens * token


def slot_rows(batch: int, experts: int, capacity: int) -> int:
    """Returns the rows that experts compute in training, full or empty: B E C.

    Source: Fedus et al. 2021, section 2.2, https://arxiv.org/abs/2101.03961
    """
    return batch * experts * capacity


def dropless_rows(tokens: int, experts: int, block: int | None = None) -> int:
    """Returns the rows that experts compute where nothing is dropped: whole blocks, as many as fit.

    Source: `effjax.ops.mixture.switch.dropless`
    """
    block = block_rows(tokens, experts) if block is None else block
    return dropless_blocks(tokens, experts, block) * block


def train_hardware_flops(
    batch: int,
    length: int,
    width: int,
    hidden: int,
    experts: int,
    capacity: int,
    matrices: int = 2,
) -> int:
    """Returns the FLOPs of one training step that run: every slot, full or empty.

    3 B (2 T D E + 2 m E C D F).

    Source: Fedus et al. 2021, section 2.2, https://arxiv.org/abs/2101.03961
    """
    router = batch * length * router_flops(width, experts)
    slots = slot_rows(batch, experts, capacity) * expert_flops(width, hidden, matrices)
    return TRAINING * (router + slots)


def dropless_flops(
    tokens: int, width: int, hidden: int, experts: int, block: int, matrices: int = 2
) -> int:
    """Returns the forward FLOPs that the dropless form runs: whole blocks, their padding included.

    N 2 D E + blocks * block * 2 m D F.

    Source: `effjax.ops.mixture.switch.dropless`
    """
    rows = dropless_rows(tokens, experts, block)
    return tokens * router_flops(width, experts) + rows * expert_flops(width, hidden, matrices)
