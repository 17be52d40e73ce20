"""The encoder: an embedding, a stack of blocks that read both ways, and what is asked of them."""

from functools import lru_cache

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.errors import ConfigError
from effjax.models.configs import EncoderConfig
from effjax.models.context import Context, Memory, dropout, fold
from effjax.models.functional import Functional, Keys, functional
from effjax.models.layers import Dense, Embed, Norm
from effjax.models.positions import SCHEMES
from effjax.models.positions.absolute import add_positions
from effjax.models.stack import Remat, Stack
from effjax.weights import Tree


class Encoder(nnx.Module):
    """Tokens in their contexts of both sides; heads that predict masked tokens, and classes.

    Source: Devlin et al. 2019, BERT, sections 3 and A.2, https://arxiv.org/abs/1810.04805, from
    whose blocks ours differ as everywhere in this package (norms before the branches and of the
    root mean square, no biases, any pattern of mixers and scheme of positions); there are no
    embeddings of sentence A and B.
    """

    def __init__(self, config: EncoderConfig, rngs: Keys, embed: Embed | None = None):
        self.dtype = jnp.dtype(config.dtype)
        self.embed = Embed(config.vocab, config.width, rngs) if embed is None else embed
        self.position = SCHEMES[config.position.scheme].embedding(config, rngs)
        self.stack = Stack(config, rngs)
        self.norm = Norm(config.width)
        self.masked_head = MaskedHead(config, rngs) if config.masked_lm else None
        self.class_head = ClassHead(config, config.classes, rngs) if config.classes else None

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        memory: Memory | None = None,
        key: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> tuple[jax.Array, None, Tree]:
        """Hidden states [B T D] after the last norm, no state, and `aux`; all as in `Decoder`."""
        read, _, aux = self.encode(
            tokens, positions=positions, segments=segments, memory=memory, key=key, remat=remat
        )
        return read.values, None, aux

    def encode(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        memory: Memory | None = None,
        key: jax.Array | None = None,
        remat: Remat | None = None,
    ) -> tuple[Memory, None, Tree]:
        """The same as a memory for cross-attention: with where the tokens stand."""
        context = Context.of(tokens, positions, segments, memory, key)
        x = self.embed(context.ids(tokens), self.dtype)
        x = add_positions(self.position, x, context)
        x, _, aux = self.stack(x, context, remat=remat)
        memory = Memory(self.norm(x), context.positions, context.segments)
        return memory, None, {"stack": aux}

    def masked_lm(self, tokens: jax.Array, **options: object) -> tuple[jax.Array, None, Tree]:
        """Logits [B T V] of what each token was before it was masked; options as in the call."""
        if self.masked_head is None:
            raise ConfigError("masked_lm needs EncoderConfig.masked_lm=true, got false")
        x, _, aux = self(tokens, **options)  # type: ignore[arg-type]
        return self.embed.attend(self.masked_head(x)), None, aux

    def classify(
        self, tokens: jax.Array, *, key: jax.Array | None = None, **options: object
    ) -> tuple[jax.Array, None, Tree]:
        """Logits [B classes] from each row's first token; options as in the call.

        A row is one text: of packed ones, the first is classified.
        """
        if self.class_head is None:
            raise ConfigError("classify needs EncoderConfig.classes, got none")
        read, _, aux = self.encode(tokens, key=key, **options)  # type: ignore[arg-type]
        first = jnp.argmax(read.positions >= 0, axis=1)
        x = jnp.take_along_axis(read.values, first[:, None, None], axis=1)[:, 0]
        return self.class_head(x, key), None, aux


class MaskedHead(nnx.Module):
    """norm(gelu(transform(x))), which the embedding's table turns into logits.

    Source: Devlin et al. 2019, https://github.com/google-research/bert, `get_masked_lm_output`,
    without its biases.
    """

    def __init__(self, config: EncoderConfig, rngs: Keys):
        width = (("embed", config.width),)
        self.transform = Dense("btd,de->bte", width, width, rngs)
        self.norm = Norm(config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(jax.nn.gelu(self.transform(x)))


class ClassHead(nnx.Module):
    """classes(dropout(tanh(pool(x)))): the classifier over one vector [B D] of each text.

    Source: Devlin et al. 2019, https://github.com/google-research/bert, `BertModel` (the pooler)
    and `run_classifier.create_model`, without their biases.
    """

    def __init__(self, config: EncoderConfig, classes: int, rngs: Keys):
        width = (("embed", config.width),)
        self.dropout = config.dropout
        self.pool = Dense("bd,de->be", width, width, rngs)
        self.classes = Dense("bd,dc->bc", width, (("classes", classes),), rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        pooled = jnp.tanh(self.pool(x))
        # The stack's runs have the first numbers of this key.
        return self.classes(dropout(pooled, self.dropout, fold(key, 2**31 - 1)))


@lru_cache(maxsize=64)
def encoder(config: EncoderConfig) -> Functional:
    """`(init, apply, axes_of)` of an encoder: the same functions for the same config.

    `apply` gives hidden states, `apply(..., method="masked_lm")` and `method="classify"` logits.
    """
    return functional(lambda rngs: Encoder(config, rngs))
