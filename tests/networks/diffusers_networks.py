"""Tiny, randomly initialised networks of ten families of diffusers, and how each is called."""

import dataclasses
from collections.abc import Callable

import diffusers
import jax
import numpy as np
import torch

from diffsamp.interop.torch import to_jax

BATCH = 2


@dataclasses.dataclass
class Case:
    """One network: how to make it, the shape of its x, and its other arguments."""

    make: Callable
    shape: tuple
    x: str
    cond: Callable = dict
    fixed: dict = dataclasses.field(default_factory=dict)
    t: str = "timestep"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arrays(tree):
    """A tree of tensors as JAX arrays."""
    return jax.tree.map(to_jax, tree)


def apart(got, want):
    """The largest difference, relative to the largest number."""
    want = want.detach().float().numpy()
    return float(abs(np.asarray(got, np.float32) - want).max() / abs(want).max())


def filled(module, seed=0):
    """Evaluation mode, frozen, and with small random numbers in layers initialised with zeros."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim > 1 or not p.any():
            bound = 0.5 / max(1, p[0].numel() if p.ndim > 1 else 4) ** 0.5
            p.data = bound * torch.randn(p.shape, generator=generator)
    return module.eval().requires_grad_(False)


def unet2d():
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def sd_unet(**more):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=more.pop("attention_head_dim", 2),
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )


def sdxl_unet(pooled=8):
    return sd_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + pooled,
    )


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=8,
        use_additional_conditions=False,
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


def flux(guidance_embeds=True):
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )


def sana():
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
    )


def vae(**more):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=8,
        **more,
    )


def text(length=5, width=8, seed=1):
    return {"encoder_hidden_states": normal(BATCH, length, width, seed=seed)}


FLUX_IDS = {
    "txt_ids": torch.zeros(5, 3),
    "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(2.0)),
}

CASES = {
    "UNet2D": Case(unet2d, (3, 8, 8), "sample"),
    "SD": Case(sd_unet, (4, 8, 8), "sample", text),
    "SDXL": Case(
        sdxl_unet,
        (4, 8, 8),
        "sample",
        lambda: (
            text()
            | {
                "added_cond_kwargs": {
                    "text_embeds": normal(BATCH, 8, seed=2),
                    "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(BATCH, 1),
                }
            }
        ),
    ),
    "DiT": Case(dit, (4, 8, 8), "hidden_states", lambda: {"class_labels": torch.tensor([3, 7])}),
    "PixArt": Case(
        pixart,
        (4, 8, 8),
        "hidden_states",
        text,
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3": Case(
        sd3,
        (4, 8, 8),
        "hidden_states",
        lambda: text() | {"pooled_projections": normal(BATCH, 8, seed=2)},
    ),
    "Flux": Case(
        flux,
        (4, 16),
        "hidden_states",
        lambda: (
            text()
            | {"pooled_projections": normal(BATCH, 8, seed=2), "guidance": torch.tensor([3.5, 2.0])}
        ),
        FLUX_IDS,
    ),
    "Wan": Case(wan, (4, 2, 4, 4), "hidden_states", text),
    "Sana": Case(sana, (4, 4, 4), "hidden_states", text),
}


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.5, 2.0, 2.5],
    )


def sana_vae():
    blocks = ("ResBlock", "EfficientViTBlock")
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )


# how to make it, the shape of latents, of pictures or films
DECODERS = {
    "AutoencoderKL": (vae, (4, 8, 8), (3, 16, 16)),
    "AutoencoderKLWan": (wan_vae, (4, 2, 2, 2), (3, 5, 16, 16)),
    "AutoencoderDC": (sana_vae, (4, 4, 4), (3, 8, 8)),
}
