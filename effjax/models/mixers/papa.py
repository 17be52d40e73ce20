"""Attention that can be probed: heads whose weights no longer depend on the input."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Constant, Keys
from effjax.models.kinds import Kind
from effjax.models.mixers.attention import Attention
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.papa import ConstantWeights, mean_weights
from effjax.weights import Axes


class PapaAttention(Attention):
    """Attention, until heads are made constant by `make_constant`: the model that PAPA probes.

    `aux["weights"]` holds the mean attention weights [N T T] of a batch of whole rows. Unused they
    cost nothing under jit.

    Source: Hassid et al. 2022, section 3, https://arxiv.org/abs/2211.03495
    """

    kind: ClassVar[Kind] = "papa"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        heads, length = config.attention.heads, config.papa.length
        table = jnp.zeros((heads, length, length))
        self.table = Constant(table, axes=Axes((), ("heads", "query", "key")))
        self.constant = Constant(jnp.zeros(heads), axes=Axes((), ("heads",)))

    def bias(self, scheme: Any = None) -> Bias | None:
        return ConstantWeights(
            self.table.get_value(), self.constant.get_value(), super().bias(scheme)
        )

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        y, new, aux = super().__call__(x, context, state)
        if state is not None:
            return y, new, aux
        q, k = (self.position.rotate(w(x), context.positions) for w in (self.q, self.k))
        weights = mean_weights(
            q, k, pattern=self.pattern, positions=context.positions, bias=self.bias()
        )
        return y, new, {**aux, "weights": weights}


def make_constant(mixer: dict[str, Any], weights: jax.Array, heads: jax.Array) -> dict[str, Any]:
    """The parameters of PAPA mixers whose chosen heads read by the table of `weights`.

    mixer: the parameters [layers ...] of a run of mixers. weights: [layers N T T], whose text is no
    longer than the table. heads: 1 for a head to make constant, else 0, [layers N].
    """
    T = weights.shape[-1]
    table = mixer["table"].at[..., :T, :T].set(jnp.log(jnp.maximum(weights, 1e-9)))
    kernel = mixer["q"]["kernel"]
    kept = (1 - heads).astype(kernel.dtype)[:, None, :, None]
    return {**mixer, "q": {"kernel": kernel * kept}, "table": table, "constant": heads * 1.0}
