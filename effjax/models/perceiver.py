"""The Perceiver: a few latents read a long input, and everything deep happens among them."""

from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.errors import ConfigError
from effjax.models.configs import PerceiverConfig
from effjax.models.context import Context, Memory, dropout, fold
from effjax.models.feedforwards import FEEDFORWARDS
from effjax.models.functional import Functional, Keys, functional
from effjax.models.layers import Dense, Embed, Norm
from effjax.models.mixers.cross_attention import CrossAttention
from effjax.models.positions import SCHEMES
from effjax.models.positions.absolute import add_positions
from effjax.models.stack import Remat, Stack
from effjax.weights import Axes, Tree

LATENT_SPREAD = 0.02


class Perceiver(nnx.Module):
    """M learned latents that cross-attend to N inputs, then pass a stack; `repeats` times over.

        z = latents;   z = stack(read_i(z, inputs)),   i = 1 .. repeats;   y = norm(z)

    A reading costs O(M N), a pass through the stack O(M^2) a layer whatever the input's length. The
    stack's weights are the same at every repeat, and so are those of all readings but the first:
    parameters do not grow with `repeats` above 2. Without positions in the inputs, their order has
    no effect at all.

    Source: Jaegle et al. 2021, Perceiver, section 3, https://arxiv.org/abs/2103.03206; one reading
    as in Jaegle et al. 2022, Perceiver IO, https://arxiv.org/abs/2107.14795; norms and spread of
    the latents as in https://github.com/google-deepmind/deepmind-research/tree/master/perceiver.
    The inputs are embedded tokens with sinusoids or learned vectors, instead of bytes with Fourier
    features.
    """

    def __init__(self, config: PerceiverConfig, rngs: Keys):
        self.dtype = jnp.dtype(config.dtype)
        self.repeats = config.repeats
        self.embed = Embed(config.vocab, config.width, rngs)
        self.position = SCHEMES[config.position.scheme].embedding(config, rngs)
        self.norm_inputs = Norm(config.width)
        drawn = jax.random.truncated_normal(rngs(), -2, 2, (config.latents, config.width))
        axes = Axes(("latents",), ("embed",), lookup=True)
        self.latents = nnx.Param(LATENT_SPREAD * drawn, axes=axes)
        self.first = Reading(config, rngs)
        self.again = Reading(config, rngs) if config.repeats > 1 else None
        self.stack = Stack(config, rngs)
        self.norm = Norm(config.width)
        classes = (("classes", config.classes or 0),)
        width = (("embed", config.width),)
        self.class_head = Dense("bd,dc->bc", width, classes, rngs) if config.classes else None

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> tuple[jax.Array, None, Tree]:
        """Latents [B M D] after the last norm, no state, and `aux` of each repeat.

        tokens: int32 [B N]. positions: -1 is padding; by default there is none. A row is one text:
        there are no packed ones.
        """
        inputs = Context.of(tokens, positions, None, None, None)
        x = self.embed(inputs.ids(tokens), self.dtype)
        x = self.norm_inputs(add_positions(self.position, x, inputs))
        memory = Memory(x, inputs.positions, inputs.segments)
        z = self.latents.get_value().astype(self.dtype)
        z = jnp.broadcast_to(z[None], (tokens.shape[0], *z.shape))
        auxs = {}
        for i in range(self.repeats):
            ids = jnp.zeros(z.shape[:2], jnp.int32)
            context = Context.of(ids, None, None, memory, fold(key, i))
            reading = self.first if i == 0 or self.again is None else self.again
            z = reading(z, context.for_layer(fold(context.key, 2**31 - 1)))
            z, _, auxs[f"{i:03d}"] = self.stack(z, context, remat=remat)
        return self.norm(z), None, {"stack": auxs}

    def classify(self, tokens: jax.Array, **options: object) -> tuple[jax.Array, None, Tree]:
        """Logits [B classes] from the mean of the latents; options as in the call."""
        if self.class_head is None:
            raise ConfigError("classify needs PerceiverConfig.classes, got none")
        z, _, aux = self(tokens, **options)  # type: ignore[arg-type]
        return self.class_head(z.mean(axis=1)), None, aux


class Reading(nnx.Module):
    """z + cross(norm(z)), then z + feedforward(norm(z)): a block that has no mixer of its own."""

    def __init__(self, config: PerceiverConfig, rngs: Keys):
        self.dropout = config.dropout
        self.norm_cross = Norm(config.width)
        self.cross = CrossAttention(config, rngs)
        self.norm_feedforward = Norm(config.width)
        self.feedforward = FEEDFORWARDS["dense"](config, rngs)

    def __call__(self, z: jax.Array, context: Context) -> jax.Array:
        keys = [fold(context.key, i) for i in range(3)]
        y, _, _ = self.cross(self.norm_cross(z), context)
        z = z + dropout(y, self.dropout, keys[0])
        y, _, _ = self.feedforward(self.norm_feedforward(z), context.for_layer(keys[1]))
        return z + dropout(y, self.dropout, keys[2])


@lru_cache(maxsize=64)
def perceiver(config: PerceiverConfig) -> Functional:
    """`(init, apply, axes_of)` of a Perceiver: the same functions for the same config.

    `apply` gives the latents, `apply(..., method="classify")` logits.
    """
    return functional(lambda rngs: Perceiver(config, rngs))
