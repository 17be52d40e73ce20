"""The encoder-decoder: a decoder whose blocks also read what an encoder made of another text."""

from functools import lru_cache

import jax

from effjax.models.configs import EncoderDecoderConfig
from effjax.models.context import Memory
from effjax.models.decoder import Decoder
from effjax.models.encoder import Encoder
from effjax.models.functional import Functional, Keys, functional
from effjax.weights import Tree


class EncoderDecoder(Decoder):
    """A decoder with cross-attention, and the encoder that makes its memory.

        memory, _, _ = apply(params, source, method="encode")
        logits, state, aux = apply(params, targets, memory=memory)
        state = apply(params, batch, length, piece, memory=memory, method="init_state")

    Packed rows: source and target of a pair have the same segment, and no other reads them.

    Source: Vaswani et al. 2017, Attention Is All You Need, section 3.1,
    https://arxiv.org/abs/1706.03762; Raffel et al. 2020, T5, section 2.1,
    https://arxiv.org/abs/1910.10683 (norms before the branches, one table of embeddings).
    """

    def __init__(self, config: EncoderDecoderConfig, rngs: Keys):
        super().__init__(config.decoder, rngs)
        self.encoder = Encoder(config.encoder, rngs, self.embed if config.shared else None)

    def encode(self, tokens: jax.Array, **options: object) -> tuple[Memory, None, Tree]:
        """The memory of a source [B S]; options and `aux` as in the encoder's call."""
        return self.encoder.encode(tokens, **options)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def encoder_decoder(config: EncoderDecoderConfig) -> Functional:
    """`(init, apply, axes_of)` of an encoder-decoder: the same functions for the same config."""
    return functional(lambda rngs: EncoderDecoder(config, rngs))
