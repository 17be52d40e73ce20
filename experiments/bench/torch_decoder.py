"""The decoder of `by_hand.py` in torch, for timing: same sizes, norms, rotations and AdamW."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions in the half-split layout."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_mixer, self.norm_feedforward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.o = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x, cos, sin):
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_mixer(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(B, T, D))
        h = self.up(self.norm_feedforward(x))
        return x + self.down(F.gelu(h, approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, heads = config.width, config.attention.heads
        self.embed = nn.Embedding(config.vocab, width)
        blocks = (Block(width, config.hidden, heads) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width)
        self.half = width // heads // 2

    def forward(self, tokens):
        rates = 10_000.0 ** (-torch.arange(self.half) / self.half)
        angles = torch.arange(tokens.shape[1])[:, None] * rates
        x, cos, sin = self.embed(tokens), angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x) @ self.embed.weight.T


def compiled_step(config, batch):
    """A thunk that takes one step, forward to update, of a torch.compile'd model."""
    torch.manual_seed(0)
    model = Decoder(config)
    rule = torch.optim.AdamW(model.parameters(), 3e-3, (0.9, 0.95), weight_decay=0.1, foreach=True)
    tokens, targets = (
        torch.from_numpy(np.ascontiguousarray(v)).long() for v in (batch.tokens, batch.targets)
    )

    @torch.compile
    def loss_of(tokens, targets):
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    def thunk() -> None:
        rule.zero_grad(set_to_none=True)
        loss_of(tokens, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()

    return thunk
