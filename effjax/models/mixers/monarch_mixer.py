"""Monarch Mixer: gated long convolutions, Monarch matrices along the sequence and the width."""

from typing import ClassVar

from effjax.models.configs import StackConfig
from effjax.models.functional import Keys
from effjax.models.mixers.hyena import Hyena
from effjax.models.monarch import MonarchDense
from effjax.ops.convolution.long import Form


class MonarchMixer(Hyena):
    """M2's causal mixer: o(x_0 * (h conv (x_1 * v))), without attention and without a dense matrix.

    Along the sequence it is a Hyena operator whose convolution goes through Monarch matrices: the
    Fourier transform is one (of order two), rows are filled up with zeros to twice their length, so
    that the product of polynomials wraps nothing round and is causal, at T^1.5 instead of T^2.
    Along the features the projections are Monarch matrices, at D^1.5. With the feed-forward network
    "monarch" a block has neither attention nor a dense network.

    Filters are those of the section `hyena`, blocks and ranks of the section `monarch`.

    Source: Fu et al. 2023, "Monarch Mixer", sections 3 and 4 (causality) and 5.3,
    https://arxiv.org/abs/2310.12109, and the authors' code,
    https://github.com/HazyResearch/m2/blob/main/bert/src/mm/monarch_mixer_sequence_mixer.py, whose
    projections are dense and which transforms by cuFFT.
    """

    causality: ClassVar[str] = "fft"
    form: ClassVar[Form] = "monarch"

    def __init__(self, config: StackConfig, rngs: Keys):
        super().__init__(config, rngs)
        own, gain, gates = config.monarch, config.residual_gain, config.hyena.order + 1
        width, branches = (("embed", config.width),), (("gate", gates), ("embed", config.width))
        self.inputs = MonarchDense("btd,dge->btge", width, branches, rngs, own)
        self.outputs = MonarchDense("btd,de->bte", width, width, rngs, own, gain=gain)
