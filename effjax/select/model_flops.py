"""Model FLOPs: what a decoder must compute for one token, in closed form, from plain numbers.

The convention, for every row of a comparison alike:

- a multiply-add is two operations; a dense weight costs 2 of them a token, forward;
- masks are exact: a causal query at position t has t keys, not T, and a window's at most its width;
- the backward pass costs twice the forward one, nothing is computed twice (no remat), so training
  is three times forward: 6 operations a weight and token;
- an embedding lookup is 0, the output projection is counted whether or not it is tied to it;
- norms, rotations, activations, softmax, biases, routing decisions and the optimiser are 0.

What the program as written does (padding, dead blocks, capacity slots, recomputation) is a matter
for `effjax.cost.flops`, and is never what rows are made equal in.
"""

from collections.abc import Iterable


def dense(inputs: int, outputs: int) -> float:
    """Counts one token through a dense weight: 2 * inputs * outputs."""
    return 2.0 * inputs * outputs


def mean_keys(length: int, window: int | None = None) -> float:
    """Averages the keys that a causal query sees over a row of `length` tokens.

        1/T * sum over t = 1..T of min(t, W)  =  m * (1 - (m - 1) / (2 T)),   m = min(W, T)

    which is (T + 1) / 2 without a window. The row is taken as one document; packing several into
    it only lowers the mean, by what depends on the text and so is left out.

    Source: Kaplan et al. 2020, "Scaling laws for neural language models", table 1
    (https://arxiv.org/abs/2001.08361), which counts all T keys; here the mask is exact.
    """
    widest = length if window is None else min(window, length)
    return widest * (1 - (widest - 1) / (2 * length))


def attention(keys: float, heads: int, head_dim: int) -> float:
    """Counts one query against `keys` keys: scores and values, 4 * N * H * keys.

    `keys` is `mean_keys(...)` in training, or the context so far for a generated token.
    Key-value heads that are shared save projections and bytes, not these.
    """
    return 4.0 * heads * head_dim * keys


def retention(chunk: int, heads: int, head_dim: int, value_dim: int) -> float:
    """Counts one token of chunked retention, its mask exact within the chunk.

        N * [ 2 (H + Hv) (C + 1) / 2   scores and values within the chunk
            + 2 H Hv + 2 H Hv ]        reading the state and adding to it

    `chunk` is at most the row's length. A generated token is `retention_step`.

    Source: Sun et al. 2023, "Retentive network", equation 7 (https://arxiv.org/abs/2307.08621).
    """
    within = 2.0 * (head_dim + value_dim) * mean_keys(chunk)
    return heads * within + retention_step(heads, head_dim, value_dim)


def retention_step(heads: int, head_dim: int, value_dim: int) -> float:
    """Counts one token of recurrent retention: S += k v^T and q S, 4 * N * H * Hv."""
    return 4.0 * heads * head_dim * value_dim


def diagonal_state_space(width: int, states: int) -> float:
    """Counts one token of a diagonal complex recurrence, D channels of P states each.

        h = a h + u                7 P: a complex product (6) and a real sum; b is folded into c
        y = sum of Re(c h) + d u   4 P + 1: products (2), their sum and the sum over states

    in all D * (11 P + 1), in training as in generation. The form that trains (a scan, chunks or an
    FFT) does more or less than this; rows are equal in what the method asks for.

    Source: Gu et al. 2022, "On the parameterization and initialization of diagonal state space
    models", section 3 (https://arxiv.org/abs/2206.11893).
    """
    return width * (11.0 * states + 1.0)


def feedforward(width: int, hidden: int, matrices: int = 2) -> float:
    """Counts one token through a feed-forward block of 2 matrices, or 3 where it is gated."""
    return matrices * dense(width, hidden)


def switch(width: int, hidden: int, experts: int, matrices: int = 2) -> float:
    """Counts one token through the router and the one expert that it is sent to.

    Source: Fedus et al. 2022, "Switch transformers", section 2 (https://arxiv.org/abs/2101.03961).
    """
    return dense(width, experts) + feedforward(width, hidden, matrices)


def decoder(blocks: Iterable[float], width: int, vocabulary: int) -> float:
    """Counts one token through a decoder: its blocks and the output projection, forward."""
    return sum(blocks) + dense(width, vocabulary)


def training(trained: float, frozen: float = 0.0) -> float:
    """Counts one token of training from its forward FLOPs: 3 * trained + 2 * frozen.

    A frozen weight passes the gradient on (once its forward cost) and has none of its own. For a
    low-rank adapter, `frozen` is the base decoder and `trained` the adapter's two matrices.
    """
    return 3.0 * trained + 2.0 * frozen
