"""FLUX's blocks, computing what diffusers' do with fewer passes over memory.

    queries, keys, values   one product, its weight one matrix of which the layers' own weights are views; then biases,
                            norms and RoPE in one pass, for text and image into one tensor
    fp8                     norm and modulation, and GELU, are quantised where they are computed; a single block's MLP
                            is part of the one product
    bf16                    GELU is applied by the product before it; a single block's last product reads its two
                            inputs where they lie, instead of one that is put together

Parameters keep their names and shapes, and are views of the joined matrices. This module knows no live weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from engine import fp8
from engine.block_operators import EPS, Quantized, gelu_quantize, linear_gelu, norm_quantize, rotate_heads
from engine.fp8 import Fp8Linear

Linear = nn.Linear | Fp8Linear
# Inputs of products: tokens [B, N, K], for fp8 layers quantised.
Operand = Tensor | Quantized


def fuse(transformer: FluxTransformer2DModel) -> None:
    """Let an allocated transformer's blocks compute in this way; a block that is fp8 in part stays diffusers' own.

    Call it once, after layers were replaced by fp8 ones, and before anything keeps views of the weights: those of
    layers that read the same input are moved into one matrix. Weights that are part of a larger memory already, as of
    fp8 layers in place of bf16 ones, are not moved, and multiplied one by one.
    """
    for block in transformer.transformer_blocks:
        block.__class__ = DoubleBlock if _is_uniform(block) else FluxTransformerBlock
        if isinstance(block, DoubleBlock):
            block.image_qkv, block.text_qkv = _join(_image_qkv(block.attn)), _join(_text_qkv(block.attn))
    for block in transformer.single_transformer_blocks:
        block.__class__ = SingleBlock if _is_uniform(block) else FluxSingleTransformerBlock
        if isinstance(block, SingleBlock):
            block.joined = _join(_single_inputs(block))
    # The names of blocks that `compile_repeated_blocks` compiles.
    transformer._repeated_blocks = [*type(transformer)._repeated_blocks, DoubleBlock.__name__, SingleBlock.__name__]
    torch.cuda.empty_cache()  # the weights' former memory; does nothing without CUDA


class Joined(nn.Module):
    """The weights of layers that read the same input as one: [ΣN, K], and for fp8 the scales [ΣN, 1].

    A copied block has none and multiplies its layers one by one: its parameters are not views of this.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        super().__init__()
        self.widths = [len(layer.weight) for layer in layers]
        for name in ("weight", "scale") if isinstance(layers[0], Fp8Linear) else ("weight",):
            self.register_buffer(name, _move_together([getattr(layer, name) for layer in layers]), persistent=False)

    def __deepcopy__(self, _: dict[int, object]) -> None:
        """None in place of a copy."""


class DoubleBlock(FluxTransformerBlock):
    """A double block; takes and gives what diffusers' does."""

    def forward(  # noqa: D102
        self,
        hidden_states: Tensor,  # [B, image, C]
        encoder_hidden_states: Tensor,  # [B, text, C]
        temb: Tensor,  # [B, C]
        image_rotary_emb: tuple[Tensor, Tensor],  # [text + image, D] each
        joint_attention_kwargs: dict[str, object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        _refuse(joint_attention_kwargs)
        attn, image, text = self.attn, hidden_states, encoder_hidden_states
        shift, factor, gate, ff_shift, ff_factor, ff_gate = _modulation(self.norm1, temb, 6)
        text_shift, text_factor, text_gate, text_ff_shift, text_ff_factor, text_ff_gate = _modulation(
            self.norm1_context, temb, 6
        )
        layers = [*_text_qkv(attn), *_image_qkv(attn)]
        products = [
            *_products(_modulated(text, text_factor, text_shift, attn.add_q_proj), _text_qkv(attn), self.text_qkv),
            *_products(_modulated(image, factor, shift, attn.to_q), _image_qkv(attn), self.image_qkv),
        ]
        norms = [attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k]
        y = _attend(attn, products, layers, norms, image_rotary_emb)
        image = image + gate[:, None] * attn.to_out[0](y[:, text.shape[1] :])
        text = text + text_gate[:, None] * attn.to_add_out(y[:, : text.shape[1]])
        image = image + ff_gate[:, None] * _feed_forward(self.ff, image, ff_factor, ff_shift)
        text = text + text_ff_gate[:, None] * _feed_forward(self.ff_context, text, text_ff_factor, text_ff_shift)
        return text, image


class SingleBlock(FluxSingleTransformerBlock):
    """A single block; takes and gives what diffusers' does."""

    def forward(  # noqa: D102
        self,
        hidden_states: Tensor,  # [B, image, C]
        encoder_hidden_states: Tensor,  # [B, text, C]
        temb: Tensor,  # [B, C]
        image_rotary_emb: tuple[Tensor, Tensor],  # [text + image, D] each
        joint_attention_kwargs: dict[str, object] | None = None,
    ) -> tuple[Tensor, Tensor]:
        _refuse(joint_attention_kwargs)
        attn, out, text = self.attn, self.proj_out, encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, factor, gate = _modulation(self.norm, temb, 3)
        layers, norms = _image_qkv(attn), [attn.norm_q, attn.norm_k]
        inputs = _modulated(x, factor, shift, attn.to_q)
        products = _products(inputs, _single_inputs(self), self.joined)
        y = _attend(attn, products[:3], layers, norms, image_rotary_emb)
        if isinstance(out, Fp8Linear):
            z = _product(gelu_quantize(y, products[3], self.proj_mlp.bias), out) + out.bias
        else:
            hidden = linear_gelu(inputs, self.proj_mlp.weight, self.proj_mlp.bias)
            of_attention, of_hidden = out.weight.split([y.shape[2], hidden.shape[2]], dim=1)
            z = F.linear(y, of_attention, out.bias)
            z = torch.addmm(z.flatten(0, 1), hidden.flatten(0, 1), of_hidden.t()).view_as(x)
        x = x + gate[:, None] * z
        return x[:, :text], x[:, text:]


def _refuse(joint_attention_kwargs: dict[str, object] | None) -> None:
    if joint_attention_kwargs:
        raise ValueError("Fused blocks take nothing for the attention: no IP adapter, no mask.")


def _modulation(norm: nn.Module, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shift, factor and gate, once or twice: [B, C] each."""
    return norm.linear(F.silu(temb)).chunk(parts, dim=1)


def _modulated(x: Tensor, factor: Tensor, shift: Tensor, reader: Linear) -> Operand:
    """norm(x) * (1 + factor) + shift, quantised for an fp8 reader: x [B, N, C], factor and shift [B, C]."""
    if isinstance(reader, Fp8Linear):
        return norm_quantize(x, factor, shift)
    return F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + factor[:, None]) + shift[:, None]


def _product(x: Operand, layer: Linear | Joined) -> Tensor:
    """x times the layer's weight, without its bias: [B, N, layer's width]; of fp8 layers in bfloat16."""
    if isinstance(x, Tensor):
        return F.linear(x, layer.weight)
    values, scale = x
    y = fp8.product(values.flatten(0, 1), scale.flatten(0, 1), layer.weight, layer.scale)
    return y.view(*values.shape[:2], -1)


def _products(x: Operand, layers: Sequence[Linear], joined: Joined | None) -> Sequence[Tensor]:
    """x times the weight of each layer, without their biases."""
    if joined is None:
        return [_product(x, layer) for layer in layers]
    return _product(x, joined).split(joined.widths, dim=2)


def _attend(
    attn: FluxAttention,
    products: Sequence[Tensor],
    layers: Sequence[Linear],
    norms: Sequence[nn.RMSNorm],
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    """Attention over all tokens: [B, tokens, C]; the arguments are as of `rotate_heads`."""
    biases, weights = [layer.bias for layer in layers], [norm.weight for norm in norms]
    query, key, value = rotate_heads(products, biases, weights, *rope)
    return dispatch_attention_fn(query, key, value, backend=attn.processor._attention_backend).flatten(2, 3)


def _feed_forward(ff: FeedForward, x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    first, second = ff.net[0].proj, ff.net[2]
    x = _modulated(x, factor, shift, first)
    if isinstance(first, Fp8Linear):
        return _product(gelu_quantize(None, _product(x, first), first.bias), second) + second.bias
    return second(linear_gelu(x, first.weight, first.bias))


def _image_qkv(attn: FluxAttention) -> tuple[Linear, ...]:
    return attn.to_q, attn.to_k, attn.to_v


def _text_qkv(attn: FluxAttention) -> tuple[Linear, ...]:
    return attn.add_q_proj, attn.add_k_proj, attn.add_v_proj


def _single_inputs(block: FluxSingleTransformerBlock) -> tuple[Linear, ...]:
    """A single block's layers whose products are computed as one: in bf16 the MLP's ends in GELU, and stays apart."""
    mlp = (block.proj_mlp,) if isinstance(block.proj_mlp, Fp8Linear) else ()
    return *_image_qkv(block.attn), *mlp


def joined_layers(transformer: FluxTransformer2DModel) -> list[Linear]:
    """The layers whose weights `fuse` moves."""
    groups = [layers(block.attn) for block in transformer.transformer_blocks for layers in (_image_qkv, _text_qkv)]
    groups += [_single_inputs(block) for block in transformer.single_transformer_blocks]
    return [layer for group in groups for layer in group]


def _is_uniform(block: nn.Module) -> bool:
    """Whether all layers of a block but the modulation, or none, are fp8."""
    linears = [
        isinstance(layer, Fp8Linear)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear | Fp8Linear) and not name.startswith("norm")
    ]
    return all(linears) or not any(linears)


def _join(layers: Sequence[Linear]) -> Joined | None:
    """The layers' weights as one, unless they lie in the memory of something else."""
    alone = all(layer.weight.untyped_storage().nbytes() == layer.weight.nbytes for layer in layers)
    return Joined(layers) if alone else None


def _move_together(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; the tensors keep their numbers and become views of it."""
    joined = torch.cat([tensor.data for tensor in tensors])
    for tensor, rows in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = rows
    return joined
