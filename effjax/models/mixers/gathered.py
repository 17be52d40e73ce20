"""What mixers that choose keys by the tokens themselves have in common.

Each comes as two kinds: one that sorts, cuts or ranks a whole row, later tokens included
(`WholeRows`, for encoders), and for some one that decides pair by pair (`PairByPair`).
"""

from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp

from effjax.errors import ConfigError
from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.kinds import Kind
from effjax.ops.accounting import Flops
from effjax.ops.attention.accounting import exact_flops
from effjax.ops.attention.bias import Bias
from effjax.ops.attention.buckets import (
    BucketCache,
    bucket_attention,
    bucket_flops,
    read_bucket_cache,
    write_bucket_cache,
)


class WholeRows:
    """A mixer that chooses with later tokens and cannot go on from earlier ones.

    stable: the kind that can, if there is one. A subclass counts `program_flops`.
    """

    kind: ClassVar[Kind]
    stable: ClassVar[Kind | None] = None
    causality: ClassVar[str] = "none"
    decodes: ClassVar[bool] = False

    def init_state(self, *sizes: Any) -> Any:
        """Raises ConfigError: there is none."""
        self.refuse()

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row: of all pairs that are gathered."""
        return cls.program_flops(config, 1, T, aligned=True)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows."""
        raise NotImplementedError(f"{cls.__name__} must define program_flops")

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """Raises ConfigError: no token is generated."""
        cls.refuse()

    @classmethod
    def refuse(cls) -> NoReturn:
        """Raises ConfigError, naming the kind that decodes."""
        other = "" if cls.stable is None else f"; {cls.stable!r} does"
        raise ConfigError(f"{cls.kind!r} chooses keys with later tokens and does not decode{other}")


class PairByPair:
    """A mixer whose queries read the keys of their own buckets, as `ops.attention.buckets` has it.

    In a decoder, earlier ones only: exactly causal, at the cost of full attention.
    """

    kind: ClassVar[Kind]
    causality: ClassVar[str] = "exact"
    decodes: ClassVar[bool] = True
    causal: bool

    def in_buckets(
        self,
        heads: tuple[jax.Array, jax.Array, jax.Array],
        codes: tuple[jax.Array, jax.Array],
        context: Context,
        state: BucketCache | None,
        *,
        bias: Bias | None,
        **options: Any,
    ) -> tuple[jax.Array, BucketCache | None]:
        """A row's attention, or a piece's over all that was written, and the new state.

        heads: q, k and v [B T N H]. codes: of q and of k, [B N R T].
        """
        positions, segments = context.positions, context.segments
        q, k, v = heads
        if state is not None:
            state = write_bucket_cache(state, k, v, codes[1], positions, segments)
            options |= {"positions": positions, "segments": segments, "bias": bias}
            return read_bucket_cache(state, q, codes[0], **options), state
        y = bucket_attention(
            *heads,
            *codes,
            q_positions=positions,
            k_positions=positions,
            q_segments=segments,
            k_segments=segments,
            causal=self.causal,
            bias=bias,
            **options,
        )
        return y, None

    @classmethod
    def code_flops(cls, config: StackConfig, tokens: int) -> int:
        """FLOPs of giving so many tokens their codes, where no weight of the model does it."""
        return 0

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of one row if all tokens share a bucket, which is the most it asks for."""
        N, H = config.attention.heads, config.head_dim("attention")
        most = exact_flops(config.pattern_of(cls.kind), 1, T, T, N, H)
        return Flops(most.forward + cls.code_flops(config, T), most.backward)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows; what only a loss asks for is left out."""
        pairs = bucket_flops(B, T, T, config.attention.heads, config.head_dim("attention"))
        return Flops(pairs.forward + cls.code_flops(config, B * T), pairs.backward)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """FLOPs as written of a generated token after a context of so many."""
        N, H = config.attention.heads, config.head_dim("attention")
        return bucket_flops(1, 1, context, N, H).forward + cls.code_flops(config, 1)


def to_heads(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values [B T K H] for every query head: choices are made head by head."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)
