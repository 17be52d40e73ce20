"""FNet: a Fourier transform in attention's place, without parameters."""

from typing import Any, ClassVar, NoReturn

import jax
from flax import nnx

from effjax.errors import ConfigError
from effjax.models.configs import StackConfig
from effjax.models.context import Context
from effjax.models.functional import Keys
from effjax.ops.accounting import Flops
from effjax.ops.structured.fourier import fourier_mixing, fourier_mixing_flops


class FNet(nnx.Module):
    """Re(F_n x F_D): each document's tokens and features, mixed by a Fourier transform.

    Every token sees all of its document, so that this is for encoders. A document of packed rows is
    transformed by itself, at its own length: what else stands in the row, and padding, change
    nothing. Positions make no difference but by what a scheme adds to the embedding; the transform
    knows the order.

    Source: Lee-Thorp et al. 2021, FNet, section 3.2, https://arxiv.org/abs/2105.03824. The
    transform is divided by sqrt(n D), because here norms precede the mixing and the paper's, which
    follow, take its scale away.
    """

    causality: ClassVar[str] = "none"
    decodes: ClassVar[bool] = False

    def __init__(self, config: StackConfig, rngs: Keys):
        pass

    def init_state(self, *sizes: Any) -> Any:
        """Raises ConfigError: there is none."""
        self.refuse()

    def __call__(
        self, x: jax.Array, context: Context, state: Any = None
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        y = fourier_mixing(
            x,
            positions=context.positions,
            segments=context.segments,
            orthonormal=True,
            aligned=context.aligned,
        )
        return y, state, {}

    @classmethod
    def exact_flops(cls, config: StackConfig, T: int) -> Flops:
        """Model FLOPs of what mixes the tokens of one row."""
        return fourier_mixing_flops(1, T, config.width, aligned=True)

    @classmethod
    def program_flops(cls, config: StackConfig, B: int, T: int, aligned: bool) -> Flops:
        """FLOPs of the same as written, over B rows of one document each."""
        return fourier_mixing_flops(B, T, config.width, aligned=aligned)

    @classmethod
    def step_flops(cls, config: StackConfig, context: int) -> int:
        """Raises ConfigError: no token is generated."""
        cls.refuse()

    @classmethod
    def refuse(cls) -> NoReturn:
        """Raises ConfigError: a later token changes all of a transform."""
        raise ConfigError("'fnet' mixes each token with all later ones and does not decode")
