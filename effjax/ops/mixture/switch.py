"""Switch routing: every token goes through the one expert that its router prefers.

Training has a fixed number of slots per row and expert (`route`, `dispatch`, `combine`): shapes are
static, and a token that finds its expert full gets nothing from it. Evaluation and decoding
(`dropless`) drop nothing, so that a token's output does not depend on its row or its batch.

Source: Fedus, Zoph & Shazeer 2021, "Switch Transformers", https://arxiv.org/abs/2101.03961, and
Zoph et al. 2022, "ST-MoE", https://arxiv.org/abs/2202.08906, for the z-loss.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.errors import ConfigError
from effjax.weights import Weight, einsum

JITTER = 1e-2  # `MoE1D.switch_jitter` of the published Switch configurations
LARGEST_BLOCK = 128  # rows: enough for a matrix product to run at speed, few enough to waste


class Routing(NamedTuple):
    """Where each token of `[B T]` goes; everything real is at least float32."""

    expert: Int[Array, "B T"]
    slot: Int[Array, "B T"]
    """The token's rank among its row's live tokens for the same expert; meaningless if not live."""
    gate: Float[Array, "B T"]
    """The probability of the chosen expert: the router's only path to the output's gradient."""
    kept: Bool[Array, "B T"]
    """Live, and its slot lies below the capacity."""
    probabilities: Float[Array, "B T E"]
    log_partition: Float[Array, "B T"]


class RouterStatistics(NamedTuple):
    """Sums over live tokens. They add over rows, micro-batches and devices; the losses do not."""

    tokens: Float[Array, "*parts"]
    assigned: Float[Array, "*parts E"]
    """Tokens that prefer each expert, dropped ones included."""
    probability: Float[Array, "*parts E"]
    squared_log_partition: Float[Array, "*parts"]
    dropped: Float[Array, "*parts"]


def capacity(length: int, experts: int, factor: float) -> int:
    """Returns the slots that each expert has for one row of `length` tokens.

    C = ceil(factor * length / experts), at least 1, at most `length`. Raises ConfigError.

    Source: Fedus et al. 2021, section 2.2, equation 3, https://arxiv.org/abs/2101.03961. There the
    batch shares its slots; here each row has its own, so that rows do not affect each other.
    """
    if experts < 1:
        raise ConfigError(f"experts must be at least 1, got {experts}")
    if not (math.isfinite(factor) and factor > 0):
        raise ConfigError(f"capacity factor must be finite and above 0, got {factor}")
    rounding = 1e-9  # 1.1 * 10 is a little more than 11 in binary
    return max(1, min(length, math.ceil(factor * length / experts - rounding)))


def router_logits(
    x: Float[Array, "B T D"],
    w: Float[Array, "D E"] | Float[Weight, "D E"],
    live: Bool[Array, "B T"],
    *,
    noise: float = JITTER,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B T E"]:
    """Scores every expert for every token, in float32 whatever the activations are.

    h = x w; with a key (training), x is first multiplied by u ~ Uniform(1 - noise, 1 + noise).
    Padding scores 0, so that nothing in it, NaN included, reaches a result or a gradient.

    Source: Fedus et al. 2021, section 2.4 (selective precision) and appendix C (jitter of the
    input, as in its text; its figure 15 adds the noise to the scores), https://arxiv.org/abs/2101.03961
    """
    x = jnp.where(live[..., None], x, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
    if key is not None and noise:
        x = x * jax.random.uniform(key, x.shape, x.dtype, 1 - noise, 1 + noise)
    return einsum("btd,de->bte", x, w)


def route(
    logits: Float[Array, "B T E"],
    live: Bool[Array, "B T"],
    capacity: int,
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Routing:
    """Sends each live token to its preferred expert, while the expert has slots left in the row.

    p = softmax(h); expert = argmax p; gate = p[expert]. Slots go to live tokens in order of
    position, so a later token never displaces an earlier one; padding takes none. Without
    `positions` the order is that along the row, which is the order of positions in every row that
    effjax packs, pads or decodes; with them a row may be permuted. In a packed row earlier
    documents come first (give `segments` with `positions`, which restart in each document), and
    what they leave is what later ones find: only a capacity of T makes documents independent.

    Source: Fedus et al. 2021, sections 2.1-2.2 and equations 1-2, https://arxiv.org/abs/2101.03961
    """
    experts = logits.shape[-1]
    logits = jnp.where(live[..., None], logits, 0)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    probabilities = jax.nn.softmax(logits, axis=-1)
    expert = jnp.argmax(logits, axis=-1)
    gate = jnp.take_along_axis(probabilities, expert[..., None], axis=-1)[..., 0]
    if positions is None:
        slot, _ = _ranks(expert, live, experts)
    else:
        keys = (positions,) if segments is None else (positions, segments)
        slot = _ordered_ranks(expert, live, experts, jnp.lexsort(keys, axis=-1))
    kept = live & (slot < capacity)
    log_partition = jax.nn.logsumexp(logits, axis=-1)
    return Routing(expert, slot, gate, kept, probabilities, log_partition)


def dispatch(
    x: Float[Array, "B T D"], routing: Routing, experts: int, capacity: int
) -> Float[Array, "B E C D"]:
    """Copies every kept token into its expert's slot; empty slots hold zeros.

    Gathers in both directions, never a product with a one-hot matrix (3x slower on a CPU).

    Source: Fedus et al. 2021, appendix F, https://arxiv.org/abs/2101.03961 (there one-hot)
    """
    source, destination = _places(routing, experts, capacity)
    slots = _move_rows(x, source, destination)
    return slots.reshape(x.shape[0], experts, capacity, x.shape[-1])


def combine(y: Float[Array, "B E C D"], routing: Routing) -> Float[Array, "B T D"]:
    """Brings each token its expert's output times its gate; dropped tokens and padding get zeros.

    out_t = gate_t * y[expert_t, slot_t], in y's dtype. Added to a residual stream, a dropped token
    passes unchanged, bit for bit.

    Source: Fedus et al. 2021, equation 2, https://arxiv.org/abs/2101.03961
    """
    rows, experts, capacity, width = y.shape
    source, destination = _places(routing, experts, capacity)
    out = _move_rows(y.reshape(rows, experts * capacity, width), destination, source)
    return (jnp.where(routing.kept, routing.gate, 0)[..., None] * out).astype(y.dtype)


def router_statistics(routing: Routing, live: Bool[Array, "B T"]) -> RouterStatistics:
    """Sums over each row's live tokens, `[B]` and `[B E]`, what the auxiliary losses need.

    `jax.tree.map(lambda s: s.sum(0), ...)` adds rows to a batch; batches add in the same way.

    Source: Fedus et al. 2021, equations 5-6, https://arxiv.org/abs/2101.03961
    """
    real = routing.gate.dtype
    weight = live.astype(real)
    chosen = jax.nn.one_hot(routing.expert, routing.probabilities.shape[-1], dtype=real)
    return RouterStatistics(
        tokens=weight.sum(1),
        assigned=(chosen * weight[..., None]).sum(1),
        probability=(routing.probabilities * weight[..., None]).sum(1),
        squared_log_partition=(routing.log_partition**2 * weight).sum(1),
        dropped=(weight - routing.kept.astype(real)).sum(1),
    )


def balance_loss(
    statistics: RouterStatistics, whole: RouterStatistics | None = None
) -> Float[Array, "*parts"]:
    """Penalises uneven use of the experts: 1 when the router is uniform, up to E.

    L = E * sum_i f_i P_i, with f_i the share of live tokens that prefer expert i (a constant to the
    gradient) and P_i its mean probability. No live token: 0. The paper multiplies by 1e-2. Each
    leading index of the statistics (a row, a layer) has its own loss.

    whole: the statistics of the whole batch when `statistics` are those of its parts. The parts'
        losses, and their gradients, then add to those of the whole batch, exactly.

    Source: Fedus et al. 2021, equations 4-6, https://arxiv.org/abs/2101.03961. Its figure 14 takes
    the mean of the cores' losses, which depends on how the batch is cut; ours is the batch's.
    """
    batch = _constants(statistics, whole)
    tokens = jnp.maximum(batch.tokens, 1)[..., None]
    experts = statistics.assigned.shape[-1]
    return experts * ((batch.assigned / tokens) * (statistics.probability / tokens)).sum(-1)


def z_loss(
    statistics: RouterStatistics, whole: RouterStatistics | None = None
) -> Float[Array, "*parts"]:
    """Penalises large router scores, which round badly: mean over live tokens of logsumexp(h)^2.

    whole: as in `balance_loss`. No live token: 0. The paper multiplies by 1e-3.

    Source: Zoph et al. 2022, section 3.3, equation 5, https://arxiv.org/abs/2202.08906
    """
    tokens = jnp.maximum(_constants(statistics, whole).tokens, 1)
    return statistics.squared_log_partition / tokens


def _constants(statistics: RouterStatistics, whole: RouterStatistics | None) -> RouterStatistics:
    """What the losses divide by and weigh with: no path for gradients, shaped as the parts are."""
    batch = statistics if whole is None else whole
    wide = jax.tree.map(lambda a, part: jnp.broadcast_to(a, part.shape), batch, statistics)
    return jax.lax.stop_gradient(wide)


def dropless(
    x: Float[Array, "*tokens D"],
    expert: Int[Array, "*tokens"],
    gate: Float[Array, "*tokens"],
    apply_expert: Callable[[Int[Array, ""], Float[Array, "C D"]], Float[Array, "C D"]],
    experts: int,
    block: int | None = None,
    *,
    live: Bool[Array, "*tokens"] | None = None,
) -> Float[Array, "*tokens D"]:
    """Applies every token's expert to it, whatever the load: the form for evaluation and decoding.

    out_t = gate_t * E_expert_t(x_t). Tokens are grouped by expert, each group is padded to a
    multiple of `block` rows, and one block is processed at a time. The number of blocks is static,
    `dropless_blocks`, so the cost is that of at most N + min(E, N) * (block - 1) rows.

    apply_expert: called once with a traced expert index and `block` rows (zeros where padded).
    live: padding (False) reaches no expert and gets zeros.

    Source: Gale et al. 2022, "MegaBlocks", section 4, https://arxiv.org/abs/2211.15841 (the padded
    groups; there one block-sparse product does the work of our loop)
    """
    rows, flat = x.reshape(-1, x.shape[-1]), expert.reshape(-1)
    tokens = flat.shape[0]
    block = block_rows(tokens, experts) if block is None else block
    keep = jnp.ones(tokens, bool) if live is None else live.reshape(-1)
    rank, counts = _ranks(flat, keep, experts)
    ends = jnp.cumsum(-(-counts // block))  # in blocks
    first = (ends - (-(-counts // block))) * block
    blocks = dropless_blocks(tokens, experts, block)
    destination = jnp.where(keep, first[flat] + rank, blocks * block)
    source = _invert(destination[None], blocks * block)
    grouped = _move_rows(rows[None], source, destination[None])[0]
    owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right").clip(max=experts - 1)
    done = jax.lax.map(
        lambda part: apply_expert(*part), (owner, grouped.reshape(blocks, block, x.shape[-1]))
    )
    out = _move_rows(done.reshape(1, -1, x.shape[-1]), destination[None], source)[0]
    weighted = jnp.where(keep, gate.reshape(-1), 0)[..., None] * out
    return weighted.astype(x.dtype).reshape(x.shape)


def block_rows(tokens: int, experts: int) -> int:
    """Returns the default rows of a block: half an expert's even share, from 1 to 128.

    Source: none; padding then costs at most half of the work, and long inputs waste little.
    """
    return max(1, min(LARGEST_BLOCK, tokens // (2 * experts)))


def dropless_blocks(tokens: int, experts: int, block: int) -> int:
    """Returns the most blocks that `tokens` rows can need, however the experts share them.

    sum_i ceil(n_i / block) <= floor((N + min(E, N) * (block - 1)) / block), for sum_i n_i = N.

    Source: counting: a group in use wastes at most block - 1 rows; at most min(E, N) are in use.
    """
    return (tokens + min(experts, tokens) * (block - 1)) // block


def _ranks(
    expert: Int[Array, "*rows T"], live: Bool[Array, "*rows T"], experts: int
) -> tuple[Int[Array, "*rows T"], Int[Array, "*rows E"]]:
    """Numbers the live tokens of each expert along the last axis, and counts them."""
    chosen = jax.nn.one_hot(expert, experts, dtype=jnp.int32) * live[..., None]
    running = jnp.cumsum(chosen, axis=-2)
    return (running * chosen).sum(-1) - 1, running[..., -1, :]


def _ordered_ranks(
    expert: Int[Array, "B T"], live: Bool[Array, "B T"], experts: int, order: Int[Array, "B T"]
) -> Int[Array, "B T"]:
    """The ranks of `_ranks`, counted in another order than that of the row."""
    taken = (jnp.take_along_axis(expert, order, -1), jnp.take_along_axis(live, order, -1))
    ranks, _ = _ranks(*taken, experts)
    return jnp.take_along_axis(ranks, jnp.argsort(order, axis=-1), -1)


def _places(
    routing: Routing, experts: int, capacity: int
) -> tuple[Int[Array, "B S"], Int[Array, "B T"]]:
    """The token in each slot, the slot of each token; one past the end where there is none."""
    slot = routing.expert * capacity + routing.slot
    destination = jnp.where(routing.kept, slot, experts * capacity)
    return _invert(destination, experts * capacity), destination


def _invert(destination: Int[Array, "B T"], size: int) -> Int[Array, "B S"]:
    """Which token is bound for each of `size` places; T where none is."""
    tokens = jnp.arange(destination.shape[-1], dtype=destination.dtype)
    empty = jnp.full(size, destination.shape[-1], destination.dtype)
    return jax.vmap(lambda to: empty.at[to].set(tokens, mode="drop"))(destination)


@jax.custom_vjp
def _move_rows(
    x: Float[Array, "B T D"], source: Int[Array, "B S"], destination: Int[Array, "B T"]
) -> Float[Array, "B S D"]:
    """Rows `x[source]`, zeros where `source` is past the end; `destination` is its inverse.

    A row goes to one place at most, so its cotangent is a gather too: on a CPU 8x faster than the
    scatter-add that autodiff makes, and without atomics on a GPU.
    """
    return jnp.take_along_axis(x, source[..., None], axis=1, mode="fill", fill_value=0)


def _move_rows_forward(x: Array, source: Array, destination: Array) -> tuple[Array, tuple]:
    return _move_rows(x, source, destination), (source, destination)


def _move_rows_backward(places: tuple, cotangent: Array) -> tuple[Array, None, None]:
    source, destination = places
    return _move_rows(cotangent, destination, source), None, None


_move_rows.defvjp(_move_rows_forward, _move_rows_backward)
