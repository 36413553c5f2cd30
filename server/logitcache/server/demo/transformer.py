"""A small decoder-only transformer in plain PyTorch: token ids and their mask to logits of the next token.

Knows nothing of texts or of distillation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transformer(nn.Module):
    """Pre-norm blocks of causal attention and an MLP of four times the width; the embedding is the output layer too."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, longest: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) ids and mask, padded on either side, to (batch, length, vocabulary) logits.

        A token's position is counted from its example's first token, so the side of the padding changes nothing.
        Logits at padding mean nothing.
        """
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        visible = _visible(attention_mask.bool())
        x = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, visible)
        return F.linear(self.norm(x), self.tokens.weight)


def _visible(held: Tensor) -> Tensor:
    """(batch, 1, length, length): which tokens each position attends to, itself always: no softmax is empty."""
    length = held.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=held.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=held.device)
    return causal & held[:, None, None, :] | itself


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = x.shape
        query_key_value = self.query_key_value(self.attention_norm(x))
        # (3, batch, heads, length, width of a head)
        query, key, value = query_key_value.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        x = x + self.attended(attended.transpose(1, 2).reshape(batch, length, width))
        added: Tensor = self.mlp(self.mlp_norm(x))
        return x + added
