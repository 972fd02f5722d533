"""Attention with norms for each head, and U-Nets of diffusion models, as public code has them."""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth.model import Deep, randn


class RMSNorm(nn.Module):
    """transformers: over the last dimension, by hand."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class HeadNormAttention(nn.Module):
    """transformers: grouped queries, with a norm for the queries and one for the keys."""

    def __init__(self, hidden_size: int = 16, heads: int = 4, key_value_heads: int = 2) -> None:
        super().__init__()
        self.head_dim = hidden_size // heads
        self.num_key_value_groups = heads // key_value_heads
        self.q_proj = nn.Linear(hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output = output.transpose(1, 2).reshape(*input_shape, -1).contiguous()
        return self.o_proj(output)


class GatedMLP(nn.Module):
    """transformers: the activation is a plain attribute."""

    def __init__(self, hidden_size: int = 16, intermediate_size: int = 20) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = F.silu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """transformers: attention and perceptron with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = HeadNormAttention()
        self.mlp = GatedMLP()
        self.input_layernorm = RMSNorm(16)
        self.post_attention_layernorm = RMSNorm(16)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states = self.self_attn(hidden_states, attention_mask=attention_mask)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


def exists(x):
    return x is not None


def default(value, other):
    if exists(value):
        return value
    return other() if callable(other) else other


class SinusoidalPosEmb(nn.Module):
    """The embedding of a time, in sines and cosines."""

    def __init__(self, dim: int, theta: int = 10000) -> None:
        super().__init__()
        self.dim = dim
        self.theta = theta

    def forward(self, x: Tensor) -> Tensor:
        device = x.device
        half_dim = self.dim // 2
        emb = math.log(self.theta) / (half_dim - 1)
        emb = torch.exp(torch.arange(half_dim, device=device, dtype=torch.float64) * -emb)
        emb = x[:, None] * emb[None, :]
        return torch.cat((emb.sin(), emb.cos()), dim=-1)


class ChannelNorm(nn.Module):
    """denoising-diffusion-pytorch: a norm over the channels, with a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class Block(nn.Module):
    """denoising-diffusion-pytorch: convolution, norm, scale and shift by the time, SiLU."""

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = ChannelNorm(dim_out)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = self.proj(x)
        x = self.norm(x)
        if exists(scale_shift):
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        x = self.act(x)
        return self.dropout(x)


class ResnetBlock(nn.Module):
    """denoising-diffusion-pytorch: each has its own SiLU and Linear for the one time embedding."""

    def __init__(self, dim: int, dim_out: int, *, time_emb_dim: int | None = None) -> None:
        super().__init__()
        self.mlp = (
            nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * 2))
            if exists(time_emb_dim)
            else None
        )
        self.block1 = Block(dim, dim_out)
        self.block2 = Block(dim_out, dim_out)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time_emb: Tensor | None = None) -> Tensor:
        scale_shift = None
        if exists(self.mlp) and exists(time_emb):
            time_emb = self.mlp(time_emb)
            time_emb = time_emb[:, :, None, None]
            scale_shift = time_emb.chunk(2, dim=1)
        h = self.block1(x, scale_shift=scale_shift)
        h = self.block2(h)
        return h + self.res_conv(x)


class Unet(nn.Module):
    """denoising-diffusion-pytorch: modules in lists of lists, and a stack of what to join."""

    def __init__(self, dim: int = 4, dim_mults: tuple[int, ...] = (1, 2), channels: int = 3):
        super().__init__()
        self.channels = channels
        self.init_conv = nn.Conv2d(channels, dim, 3, padding=1)
        dims = [dim, *(dim * m for m in dim_mults)]
        in_out = list(itertools.pairwise(dims))
        time_dim = dim * 4
        self.time_mlp = nn.Sequential(
            SinusoidalPosEmb(dim),
            nn.Linear(dim, time_dim),
            nn.GELU(),
            nn.Linear(time_dim, time_dim),
        )
        self.downs = nn.ModuleList([])
        self.ups = nn.ModuleList([])
        for i, (dim_in, dim_out) in enumerate(in_out):
            last = i == len(in_out) - 1
            self.downs.append(
                nn.ModuleList(
                    [
                        ResnetBlock(dim_in, dim_in, time_emb_dim=time_dim),
                        ResnetBlock(dim_in, dim_in, time_emb_dim=time_dim),
                        nn.Conv2d(dim_in, dim_out, 3, padding=1)
                        if last
                        else nn.Conv2d(dim_in, dim_out, 4, 2, 1),
                    ]
                )
            )
        mid_dim = dims[-1]
        self.mid_block1 = ResnetBlock(mid_dim, mid_dim, time_emb_dim=time_dim)
        self.mid_block2 = ResnetBlock(mid_dim, mid_dim, time_emb_dim=time_dim)
        for i, (dim_in, dim_out) in enumerate(reversed(in_out)):
            last = i == len(in_out) - 1
            self.ups.append(
                nn.ModuleList(
                    [
                        ResnetBlock(dim_out + dim_in, dim_out, time_emb_dim=time_dim),
                        ResnetBlock(dim_out + dim_in, dim_out, time_emb_dim=time_dim),
                        nn.Conv2d(dim_out, dim_in, 3, padding=1)
                        if last
                        else nn.Sequential(
                            nn.Upsample(scale_factor=2, mode="nearest"),
                            nn.Conv2d(dim_out, dim_in, 3, padding=1),
                        ),
                    ]
                )
            )
        self.final_res_block = ResnetBlock(dim * 2, dim, time_emb_dim=time_dim)
        self.final_conv = nn.Conv2d(dim, channels, 1)

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.downs) - 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        assert all(d % self.downsample_factor == 0 for d in x.shape[-2:]), "not divisible"
        x = self.init_conv(x)
        r = x.clone()
        t = self.time_mlp(time)
        h = []
        for block1, block2, downsample in self.downs:
            x = block1(x, t)
            h.append(x)
            x = block2(x, t)
            h.append(x)
            x = downsample(x)
        x = self.mid_block1(x, t)
        x = self.mid_block2(x, t)
        for block1, block2, upsample in self.ups:
            x = torch.cat((x, h.pop()), dim=1)
            x = block1(x, t)
            x = torch.cat((x, h.pop()), dim=1)
            x = block2(x, t)
            x = upsample(x)
        x = torch.cat((x, r), dim=1)
        x = self.final_res_block(x, t)
        return self.final_conv(x)


class ResnetBlock2D(nn.Module):
    """diffusers: what there is, is said by attributes that are strings, flags or None."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None = 12,
        time_embedding_norm: str = "default",
        skip_time_act: bool = False,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.time_embedding_norm = time_embedding_norm
        self.skip_time_act = skip_time_act
        self.output_scale_factor = output_scale_factor
        self.norm1 = nn.GroupNorm(2, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj: nn.Module | None = None
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(2, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.upsample = self.downsample = None
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        hidden_states = input_tensor
        hidden_states = self.norm1(hidden_states)
        hidden_states = self.nonlinearity(hidden_states)
        if self.upsample is not None:
            if hidden_states.shape[0] >= 64:
                input_tensor = input_tensor.contiguous()
            input_tensor = self.upsample(input_tensor)
            hidden_states = self.upsample(hidden_states)
        elif self.downsample is not None:
            input_tensor = self.downsample(input_tensor)
            hidden_states = self.downsample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None:
            if not self.skip_time_act:
                temb = self.nonlinearity(temb)
            temb = self.time_emb_proj(temb)[:, :, None, None]
        if self.time_embedding_norm == "default":
            if temb is not None:
                hidden_states = hidden_states + temb
            hidden_states = self.norm2(hidden_states)
        elif self.time_embedding_norm == "scale_shift":
            if temb is None:
                raise ValueError("temb is needed where time_embedding_norm is scale_shift")
            time_scale, time_shift = torch.chunk(temb, 2, dim=1)
            hidden_states = self.norm2(hidden_states)
            hidden_states = hidden_states * (1 + time_scale) + time_shift
        else:
            hidden_states = self.norm2(hidden_states)
        hidden_states = self.nonlinearity(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.conv2(hidden_states)
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor.contiguous())
        return (input_tensor + hidden_states) / self.output_scale_factor


class CrossAttention(nn.Module):
    """diffusers: attention on the tokens themselves, or on those of a text."""

    def __init__(self, query_dim: int, cross_attention_dim: int | None = None, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.cross_attention_dim = (
            cross_attention_dim if cross_attention_dim is not None else query_dim
        )
        self.to_q = nn.Linear(query_dim, query_dim, bias=False)
        self.to_k = nn.Linear(self.cross_attention_dim, query_dim, bias=False)
        self.to_v = nn.Linear(self.cross_attention_dim, query_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(query_dim, query_dim), nn.Dropout(0.0)])
        self.residual_connection = False

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        residual = hidden_states
        batch_size, _, _ = hidden_states.shape
        query = self.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        key = self.to_k(encoder_hidden_states)
        value = self.to_v(encoder_hidden_states)
        inner_dim = key.shape[-1]
        head_dim = inner_dim // self.heads
        query = query.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        key = key.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        value = value.view(batch_size, -1, self.heads, head_dim).transpose(1, 2)
        hidden_states = F.scaled_dot_product_attention(query, key, value)
        hidden_states = hidden_states.transpose(1, 2).reshape(batch_size, -1, inner_dim)
        hidden_states = self.to_out[0](hidden_states)
        hidden_states = self.to_out[1](hidden_states)
        if self.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states


class Transformer2D(nn.Module):
    """diffusers: attention to itself and to the text, on the pixels of a picture."""

    def __init__(self, channels: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = CrossAttention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, cross_attention_dim)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
        batch, inner_dim, height, width = hidden_states.shape
        residual = hidden_states
        hidden_states = hidden_states.permute(0, 2, 3, 1).reshape(batch, height * width, inner_dim)
        hidden_states = self.attn1(self.norm1(hidden_states)) + hidden_states
        hidden_states = self.attn2(self.norm2(hidden_states), encoder_hidden_states) + hidden_states
        hidden_states = hidden_states.reshape(batch, height, width, inner_dim)
        return hidden_states.permute(0, 3, 1, 2).contiguous() + residual


class DownBlock(nn.Module):
    """diffusers: a block of the way down, whose outputs are joined on the way up."""

    def __init__(self, in_channels: int, out_channels: int, add_downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock2D(in_channels, out_channels)])
        self.attentions = nn.ModuleList([Transformer2D(out_channels, 10)])
        self.downsamplers = None
        if add_downsample:
            self.downsamplers = nn.ModuleList(
                [nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)]
            )

    def forward(
        self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        output_states: tuple[Tensor, ...] = ()
        for resnet, attn in zip(self.resnets, self.attentions):  # noqa: B905
            hidden_states = resnet(hidden_states, temb)
            hidden_states = attn(hidden_states, encoder_hidden_states=encoder_hidden_states)
            output_states += (hidden_states,)
        if self.downsamplers is not None:
            for downsampler in self.downsamplers:
                hidden_states = downsampler(hidden_states)
            output_states += (hidden_states,)
        return hidden_states, output_states


class UpBlock(nn.Module):
    """diffusers: a block of the way up."""

    def __init__(self, in_channels: int, skips: tuple[int, ...], out_channels: int, up: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D((in_channels if i == 0 else out_channels) + skip, out_channels)
            for i, skip in enumerate(skips)
        )
        self.upsamplers = (
            nn.ModuleList([nn.Conv2d(out_channels, out_channels, 3, padding=1)]) if up else None
        )

    def forward(
        self, hidden_states: Tensor, res_hidden_states_tuple: tuple[Tensor, ...], temb: Tensor
    ) -> Tensor:
        for resnet in self.resnets:
            res_hidden_states = res_hidden_states_tuple[-1]
            res_hidden_states_tuple = res_hidden_states_tuple[:-1]
            hidden_states = torch.cat([hidden_states, res_hidden_states], dim=1)
            hidden_states = resnet(hidden_states, temb)
        if self.upsamplers is not None:
            for upsampler in self.upsamplers:
                hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
                hidden_states = upsampler(hidden_states)
        return hidden_states


@dataclasses.dataclass
class UNetOutput:
    """diffusers: what the network gives, by name."""

    sample: Tensor


class ConditionalUNet(nn.Module):
    """diffusers: a U-Net on a time and the tokens of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, kernel_size=3, padding=1)
        self.time_proj = SinusoidalPosEmb(4)
        self.linear_1 = nn.Linear(4, 12)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(12, 12)
        self.down_blocks = nn.ModuleList([DownBlock(4, 4, True), DownBlock(4, 8, False)])
        self.mid_resnets = nn.ModuleList([ResnetBlock2D(8, 8), ResnetBlock2D(8, 8)])
        self.mid_attention = Transformer2D(8, 10)
        self.up_blocks = nn.ModuleList([UpBlock(8, (8, 4), 8, True), UpBlock(8, (4, 4), 4, False)])
        self.conv_norm_out = nn.GroupNorm(2, 4)
        self.conv_out = nn.Conv2d(4, 3, kernel_size=3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        timesteps = timestep
        if not torch.is_tensor(timesteps):
            timesteps = torch.tensor([timesteps], dtype=torch.int64, device=sample.device)
        elif len(timesteps.shape) == 0:
            timesteps = timesteps[None].to(sample.device)
        timesteps = timesteps.expand(sample.shape[0])
        t_emb = self.time_proj(timesteps).to(dtype=sample.dtype)
        emb = self.linear_2(self.act(self.linear_1(t_emb)))
        sample = self.conv_in(sample)
        down_block_res_samples = (sample,)
        for downsample_block in self.down_blocks:
            sample, res_samples = downsample_block(
                hidden_states=sample, temb=emb, encoder_hidden_states=encoder_hidden_states
            )
            down_block_res_samples += res_samples
        sample = self.mid_resnets[0](sample, emb)
        sample = self.mid_attention(sample, encoder_hidden_states)
        sample = self.mid_resnets[1](sample, emb)
        for upsample_block in self.up_blocks:
            res_samples = down_block_res_samples[-len(upsample_block.resnets) :]
            down_block_res_samples = down_block_res_samples[: -len(upsample_block.resnets)]
            sample = upsample_block(sample, res_samples, emb)
        sample = self.conv_out(self.act(self.conv_norm_out(sample)))
        if not return_dict:
            return (sample,)
        return UNetOutput(sample=sample)


def noisy(batch: int) -> tuple[Tensor, Tensor]:
    return randn(batch, 3, 8, 8), torch.rand(batch, dtype=torch.float64) * 100


def described(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(batch, 3, 8, 8), torch.randint(100, (batch,)), randn(batch, 5, 10)


MODELS = {
    # Queries, keys and values are one, gate and up are one. The norms by head have a weight each.
    "head_norms": Deep(
        DecoderLayer, lambda batch: (randn(batch, 5, 16),), {"matmuls": (4 + 3, 2 + 2)}
    ),
    # Eleven residual blocks, each with a SiLU and a projection of the same time embedding; and
    # twice a SiLU and one GELU beside. The blocks' own SiLUs still run, and one more for all.
    "unet_denoising": Deep(
        Unet, noisy, {"matmuls": (2 + 11, 2 + 1), "activations": (11 + 22 + 1, 11 + 1 + 22 + 1)}
    ),
    # Eight residual blocks, each with a SiLU and a projection of the same time embedding. Three
    # times attention: to itself 4 products, which become 2; to the text 4, of which keys and
    # values of all three read the text, and are one.
    "unet_conditional": Deep(
        ConditionalUNet,
        described,
        {
            "matmuls": (2 + 8 + 3 * 8, 2 + 1 + 3 * 2 + 3 * 2 + 1),
            "activations": (8 + 16 + 2, 8 + 1 + 16 + 2),
            "attentions": (6, 6),
        },
    ),
}
