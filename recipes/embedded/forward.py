"""The training forward over the parameters of the transformers model: the same mathematics, arranged for speed.

Many questions about one image share its prefix: the prefix rows (<s> USER : and the visual tokens) are computed once,
and the questions follow in blocks of BLOCK rows. A row of a block sees the whole prefix and, inside its block, the
earlier rows of its own question (`mask`). tests/embedded/test_corpus.py compares the result with transformers.

Matrix products run in bfloat16 where the device multiplies it in hardware (a GPU, AMX, AVX-512 BF16: `precision.py`),
otherwise in float32; softmax is always float32. The layers are compiled: on one core with AMX the matrix products are
nearly free, and the rest (softmax, norms, activations) is several times faster when fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from pdrop.embedded.model import HEADS, TOWER_HEADS, TOWER_WIDTH, WIDTH
from pdrop.embedded.vocabulary import GRID, PATCH_SIZE
from recipes.embedded.precision import matrix_dtype

BLOCK = 32  # rows of a block of questions
_EPSILON = 1e-5  # of every norm in the model's config
_ROPE_THETA = 1e6

# The order in which the functions of a layer, below, take its parameters.
_TOWER_PARTS = [
    f"{module}.{kind}"
    for module in (
        *("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
        *("layer_norm2", "mlp.fc1", "mlp.fc2"),
    )
    for kind in ("weight", "bias")
]
_DECODER_PARTS = [
    f"{module}.weight"
    for module in (
        *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    )
]


def _like(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(x.dtype) for tensor in tensors)


def _attend(scores: Tensor, values: Tensor) -> Tensor:
    """softmax(scores) @ values with the softmax in float32; scores (..., rows, columns)."""
    scores = scores.float()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return torch.matmul((weights / weights.sum(-1, keepdim=True)).to(values.dtype), values)


def tower_layer(x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """One layer of the vision tower. x (batch, 1 + VISUAL_TOKENS, TOWER_WIDTH)."""
    n1, b1, q, qb, k, kb, v, vb, o, ob, n2, b2, up, upb, down, downb = _like(x, *parts)
    batch, rows, width = x.shape
    h = F.layer_norm(x, (width,), n1, b1, _EPSILON)
    scale = (width // TOWER_HEADS) ** -0.5
    joint = F.linear(h, torch.cat([q * scale, k, v]), torch.cat([qb * scale, kb, vb]))
    query, key, value = joint.view(batch, rows, 3, TOWER_HEADS, -1).permute(2, 0, 3, 1, 4)
    mixed = _attend(torch.matmul(query, key.transpose(-1, -2)), value)
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, rows, width), o, ob)
    h = F.layer_norm(x, (width,), n2, b2, _EPSILON)
    return x + F.linear(F.gelu(F.linear(h, up, upb)), down, downb)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + _EPSILON)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def decoder_layer(
    x: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, causal: Tensor, mask: Tensor
) -> Tensor:
    """One decoder layer over prefix and blocks.

    x (batch, prefix + blocks * BLOCK, WIDTH); cos, sin (batch, rows, 1, head); causal (prefix, prefix) and
    mask (batch, 1, blocks, BLOCK, BLOCK) are added to the scores.
    """
    norm1, q, k, v, o, norm2, gate, up, down = _like(x, *parts)
    batch, rows, width = x.shape
    prefix, blocks, size = causal.shape[0], mask.shape[2], width // HEADS
    joint = F.linear(_rms(x, norm1), torch.cat([q * size**-0.5, k, v])).view(batch, rows, 3 * HEADS, size)
    turned = _rotate(joint[:, :, : 2 * HEADS], cos, sin)
    query, key = turned[:, :, :HEADS].transpose(1, 2), turned[:, :, HEADS:].transpose(1, 2)
    value = joint[:, :, 2 * HEADS :].transpose(1, 2)
    key_p, value_p = key[:, :, :prefix], value[:, :, :prefix]
    seen = _attend(torch.matmul(query[:, :, :prefix], key_p.transpose(-1, -2)) + causal, value_p)

    def in_blocks(rows_: Tensor) -> Tensor:
        return rows_[:, :, prefix:].reshape(batch, HEADS, blocks, BLOCK, size)

    far = torch.matmul(query[:, :, prefix:], key_p.transpose(-1, -2)).float()
    near = torch.matmul(in_blocks(query), in_blocks(key).transpose(-1, -2)).float() + mask
    near = near.view(batch, HEADS, blocks * BLOCK, BLOCK)
    top = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True)).detach()
    far, near = torch.exp(far - top), torch.exp(near - top)
    total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
    own = torch.matmul((near / total).to(x.dtype).view(batch, HEADS, blocks, BLOCK, BLOCK), in_blocks(value))
    asked = torch.matmul((far / total).to(x.dtype), value_p) + own.view(batch, HEADS, blocks * BLOCK, size)
    x = x + F.linear(torch.cat([seen, asked], 2).transpose(1, 2).reshape(batch, rows, width), o)
    h = _rms(x, norm2)
    return x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def parts_of(layer: torch.nn.Module, names: list[str]) -> tuple[Tensor, ...]:
    """The layer's parameters in the order that the functions above take them."""
    return tuple(layer.get_parameter(name) for name in names)


class PackedForward:
    """The compiled forward of one model on its device. `compiled=False` runs the same functions eagerly (tests)."""

    def __init__(self, model: LlavaForConditionalGeneration, compiled: bool = True) -> None:
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.model = model
        self._device = next(model.parameters()).device
        self._dtype = matrix_dtype(self._device)  # of the activations
        self._tower_layer, self._decoder_layer = wrap(tower_layer), wrap(decoder_layer)
        vision = model.model.vision_tower
        self._vision = getattr(vision, "vision_model", vision)

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 (batch, 168, 168, 3) -> the tower's last layer (batch, VISUAL_TOKENS, TOWER_WIDTH)."""
        parts, batch, side = self._vision.embeddings, len(pixels), PATCH_SIZE
        x = pixels.view(batch, GRID, side, GRID, side, 3).permute(0, 1, 3, 5, 2, 4).reshape(batch, GRID * GRID, -1)
        x = F.linear(
            x.to(self._dtype) / 127.5 - 1, parts.patch_embedding.weight.reshape(TOWER_WIDTH, -1).to(self._dtype)
        )
        x = torch.cat([parts.class_embedding.to(self._dtype).expand(batch, 1, -1), x], 1)
        x = x + parts.position_embedding.weight.to(self._dtype)
        norm = self._vision.pre_layrnorm
        x = F.layer_norm(x, (TOWER_WIDTH,), norm.weight.to(self._dtype), norm.bias.to(self._dtype), _EPSILON)
        for layer in self._vision.encoder.layers:
            x = self._tower_layer(x, parts_of(layer, _TOWER_PARTS))
        return x[:, 1:]

    def logits(
        self, features: Tensor, head_ids: Tensor, ids: Tensor, positions: Tensor, mask: Tensor, rows: Tensor
    ) -> Tensor:
        """Next-token logits (n, vocabulary), float32, of the chosen rows of the blocks; see `hidden`.

        rows: bool (batch, blocks, BLOCK).
        """
        return self.words(self.hidden(features, head_ids, ids, positions, mask)[1][rows])

    def words(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary), float32, of the rows `hidden` (n, WIDTH)."""
        x = _rms(hidden, self.model.model.language_model.norm.weight.to(self._dtype))
        return F.linear(x, self.model.lm_head.weight.to(self._dtype)).float()

    def projected(self, features: Tensor) -> Tensor:
        """The projector's output for the tower's features: (batch, VISUAL_TOKENS, WIDTH)."""
        bridge = self.model.model.multi_modal_projector
        x = F.gelu(F.linear(features, *_like(features, bridge.linear_1.weight, bridge.linear_1.bias)))
        return F.linear(x, *_like(features, bridge.linear_2.weight, bridge.linear_2.bias))

    def hidden(
        self, features: Tensor, head_ids: Tensor, ids: Tensor, positions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States after the last layer: of the visual tokens (batch, VISUAL_TOKENS, WIDTH) and of the questions (batch,
        blocks, BLOCK, WIDTH).

        features (batch, VISUAL_TOKENS, TOWER_WIDTH); head_ids (3,): <s> USER : ; ids and positions (batch, blocks,
        BLOCK); mask bool (batch, blocks, BLOCK, BLOCK), True where a row may attend.
        """
        model, batch, blocks = self.model.model, len(ids), ids.shape[1]
        x = self.projected(features)
        words = model.language_model.embed_tokens.weight.to(self._dtype)
        asked = words[ids.view(batch, blocks * BLOCK)]
        x = torch.cat([words[head_ids].expand(batch, -1, -1), x, asked], 1)
        prefix = x.shape[1] - blocks * BLOCK
        first = torch.arange(prefix, device=self._device).expand(batch, prefix)
        cos, sin = _rope(torch.cat([first, positions.view(batch, -1)], 1), self._dtype)
        causal = torch.full((prefix, prefix), -1e4, dtype=self._dtype, device=self._device).triu(1)
        added = torch.zeros(mask.shape, dtype=self._dtype, device=self._device).masked_fill_(~mask, -1e4)[:, None]
        for layer in model.language_model.layers:
            x = self._decoder_layer(x, parts_of(layer, _DECODER_PARTS), cos, sin, causal, added)
        return x[:, len(head_ids) : prefix], x[:, prefix:].reshape(batch, blocks, BLOCK, WIDTH)


def _rope(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (batch, rows, 1, head) in `dtype`, the matrix products' own."""
    size = WIDTH // HEADS
    speed = _ROPE_THETA ** (-torch.arange(0, size, 2, device=positions.device).float() / size)
    angle = positions[..., None].float() * speed
    angle = torch.cat([angle, angle], -1)[:, :, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)
