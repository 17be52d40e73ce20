"""FLOPs and bytes of the recurrences in closed form: of the program that runs, and of the method.

Only products count, two FLOPs per multiply-add; exponentials, masks and the short scan over the
chunks' memories are element-wise work. Everything is for a batch, without an incoming state.
"""

from typing import NamedTuple

from effjax.ops.recurrence.layout import spare_chunks


class Flops(NamedTuple):
    """FLOPs of a forward pass, and of the backward pass that follows it."""

    forward: int
    backward: int


def retention_flops(B: int, T: int, N: int, H: int, Hv: int, chunk: int) -> Flops:
    """FLOPs of `retention` as written: whole chunks, the last one filled up, masks not spared.

    Per token and head: chunk (H + Hv) multiply-adds inside the chunk (scores, values), 2 H Hv
    between chunks (writing, reading). Every product has two cotangents.

    Source: our own count of `retention.py`.
    """
    chunk = min(chunk, T)
    tokens = B * -(-T // chunk) * chunk
    forward = 2 * tokens * N * (chunk * (H + Hv) + 2 * H * Hv)
    return Flops(forward, 2 * forward)


def exact_retention_flops(B: int, T: int, N: int, H: int, Hv: int, chunk: int) -> Flops:
    """FLOPs of chunked retention itself: its mask exact, so half of what is inside a chunk.

    A token sees (chunk + 1) / 2 tokens of its chunk on average. `recurrent_retention_flops` is the
    cost that does not depend on a chunk; a comparison that trains by chunks counts by chunks.

    Source: Sun et al. 2023, equation 7, https://arxiv.org/abs/2307.08621
    """
    chunk = min(chunk, T)
    whole, rest = divmod(T, chunk)
    pairs = whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    forward = 2 * B * N * (pairs * (H + Hv) + 2 * T * H * Hv)
    return Flops(forward, 2 * forward)


def recurrent_retention_flops(B: int, T: int, N: int, H: int, Hv: int) -> Flops:
    """FLOPs of S += k v^T and q S for every token: generation, and the least for training.

    Source: Sun et al. 2023, equation 6, https://arxiv.org/abs/2307.08621
    """
    forward = 4 * B * T * N * H * Hv
    return Flops(forward, 2 * forward)


def retention_state_bytes(B: int, N: int, H: int, Hv: int) -> int:
    """Bytes of the state: S in float32, position and segment in int32; of any length of text.

    Source: our own count of `retention_state`.
    """
    return B * (4 * N * H * Hv + 8)


def state_space_flops(
    B: int, T: int, D: int, P: int, chunk: int, *, aligned: bool = False
) -> Flops:
    """FLOPs of `diagonal_state_space` as written, T > 1: whole chunks, spare ones if not `aligned`.

    Per token and channel: chunk multiply-adds inside the chunk, 2 P to write the memory and 2 P to
    read it. Every product has two cotangents. Rows that do not fit their layout are run by token,
    without a product; a program is counted by its dearest branch.

    Source: our own count of `state_space.py`.
    """
    chunk = min(chunk, T)
    chunks = -(-T // chunk)
    chunks += 0 if aligned else spare_chunks(chunks)
    forward = 2 * B * chunks * chunk * D * (chunk + 4 * P)
    return Flops(forward, 2 * forward)


def exact_state_space_flops(B: int, T: int, D: int, P: int) -> Flops:
    """FLOPs of the recurrence itself, D (11 P + 1) a token, in training as in generation.

    A complex product and a real sum (7 P) move a channel's memory; two products and their sum (4 P)
    and the skip (1) read it. Here additions count, because there are no matrix products: it is
    the number of multiplications and additions that the definition asks for.

    Source: Gu et al. 2022, section 2, https://arxiv.org/abs/2206.11893
    """
    forward = B * T * D * (11 * P + 1)
    return Flops(forward, 2 * forward)


def state_space_state_bytes(B: int, D: int, P: int) -> int:
    """Bytes of the state: h in two float32 parts, position and segment; of any length of text.

    Source: our own count of `state_space_state`.
    """
    return B * (8 * D * P + 8)
