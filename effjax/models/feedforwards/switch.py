"""A Switch mixture of experts in place of the dense network."""

from typing import Any, ClassVar

import jax
from flax import nnx

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.models.layers import Dense, Experts
from effjax.ops.mixture.switch import (
    RouterStatistics,
    Routing,
    balance_loss,
    capacity,
    combine,
    dispatch,
    dropless,
    route,
    router_logits,
    router_statistics,
    z_loss,
)


class Switch(nnx.Module):
    """Each token through one of E networks; in training every expert has so many slots a row.

    With a key (training) a token that finds its expert full is dropped: the residual passes it on.
    Without one (evaluation, decoding) nothing is dropped, so that results do not depend on how a
    text is cut into pieces or on what else is in the batch.

    aux["router"]: sums over the batch's live tokens, so that parts of a batch add up: `balance`
    (each row's balance loss times its live tokens: a row is a group in GShard's sense), `z`
    (squared log-partitions), `dropped`, `live`, and `assigned` [E], how many prefer each expert.
    """

    carries: ClassVar[bool] = False

    def __init__(self, config: StackConfig, rngs: Keys):
        own = config.switch
        self.factor, self.jitter = own.capacity_factor, own.jitter
        each = (("experts", own.experts),)
        self.router = Dense("btd,de->bte", (("embed", config.width),), each, rngs)
        self.experts = Experts(
            own.experts, config.width, config.hidden, rngs, gain=config.residual_gain
        )

    def init_state(self, *sizes: Any) -> None:
        """None: a token is treated alone."""

    def __call__(
        self, x: jax.Array, context: Context, state: None = None
    ) -> tuple[jax.Array, None, dict]:
        live = context.positions >= 0
        logits = router_logits(x, self.router.weight, live, noise=self.jitter, key=context.key)
        length, experts = x.shape[1], logits.shape[-1]
        training = context.key is not None
        slots = capacity(length, experts, self.factor) if training else length
        routing = route(logits, live, slots)
        if training:
            y = combine(self.experts(dispatch(x, routing, experts, slots)), routing)
        else:
            one = self.experts.one
            y = dropless(x, routing.expert, routing.gate, one, experts, live=live)
        return y, None, {"router": _sums(routing, live)}


def _sums(routing: Routing, live: jax.Array) -> dict[str, jax.Array]:
    rows: RouterStatistics = router_statistics(routing, live)
    return {
        "balance": (balance_loss(rows) * rows.tokens).sum(),
        "z": (z_loss(rows) * rows.tokens).sum(),
        "dropped": rows.dropped.sum(),
        "live": rows.tokens.sum(),
        "assigned": rows.assigned.sum(axis=0),
    }
