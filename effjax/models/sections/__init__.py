"""Sections of a model's config that are no op's own pattern, one for each kind that has numbers."""

from effjax.models.sections.attention import AttentionConfig, PapaConfig, PositionConfig
from effjax.models.sections.mixture import SwitchConfig
from effjax.models.sections.recurrence import (
    EMAConfig,
    GatedLinearAttentionConfig,
    Mamba2Config,
    MegaConfig,
    RetentionConfig,
    RWKVConfig,
)
from effjax.models.sections.state_space import (
    DSSConfig,
    GSSConfig,
    H3Config,
    S4Config,
    StateSpaceConfig,
)

__all__ = [
    "AttentionConfig",
    "DSSConfig",
    "EMAConfig",
    "GSSConfig",
    "GatedLinearAttentionConfig",
    "H3Config",
    "Mamba2Config",
    "MegaConfig",
    "PapaConfig",
    "PositionConfig",
    "RWKVConfig",
    "RetentionConfig",
    "S4Config",
    "StateSpaceConfig",
    "SwitchConfig",
]
