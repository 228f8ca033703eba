"""Tiny, whole pipelines of diffusers, with text encoders and tokenizers made here."""

import diffusers
import torch
import transformers
from diffusers_networks import (
    dit,
    filled,
    flux,
    pixart,
    sana,
    sana_vae,
    sd3,
    sd_unet,
    sdxl_unet,
    unet2d,
    vae,
    wan,
    wan_vae,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["a", "cat", "dog", "and", "the", "moon", "red", "no"]
LENGTH = 8


def tokenizer():
    """Whole words, a start and an end, padded."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def clip(projection=False, width=8):
    config = transformers.CLIPTextConfig(
        vocab_size=16,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return filled(getattr(transformers, kind)(config), seed=3)


def t5():
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return filled(transformers.T5EncoderModel(config), seed=4)


SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def scheduler(name, **more):
    kind, fields = SCHEDULERS[name]
    return getattr(diffusers, kind)(**TABLE, **fields, **more)


def flow(**more):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)


def small_vae(**more):
    return filled(vae(**more), seed=2)


def stable(schedule="ddim"):
    return diffusers.StableDiffusionPipeline(
        small_vae(),
        clip(),
        tokenizer(),
        filled(sd_unet()),
        scheduler(schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl():
    return diffusers.StableDiffusionXLPipeline(
        small_vae(),
        clip(width=4),
        clip(True, width=4),
        tokenizer(),
        tokenizer(),
        filled(sdxl_unet(pooled=4)),
        scheduler("euler"),
    )


def stable3():
    return diffusers.StableDiffusion3Pipeline(
        filled(sd3()),
        flow(),
        small_vae(scaling_factor=1.5, shift_factor=0.06),
        clip(True, width=4),
        tokenizer(),
        clip(True, width=4),
        tokenizer(),
        None,
        None,
    )


def distilled():
    """A UNet with its guidance as an input, as latent consistency models have it."""
    pipeline = stable()
    pipeline.register_modules(unet=filled(sd_unet(time_cond_proj_dim=8)))
    return pipeline


def umt5():
    config = transformers.UMT5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return filled(transformers.UMT5EncoderModel(config), seed=4)


def film():
    return diffusers.WanPipeline(
        tokenizer(), umt5(), filled(wan_vae(), seed=2), flow(), filled(wan())
    )


def gemma():
    config = transformers.Gemma2Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return filled(transformers.Gemma2Model(config), seed=4)


def sana_small():
    return diffusers.SanaPipeline(
        tokenizer(),
        gemma(),
        filled(sana_vae(), seed=2),
        filled(sana()),
        diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def flux1():
    return diffusers.FluxPipeline(
        flow(use_dynamic_shifting=True),
        small_vae(scaling_factor=0.36, shift_factor=0.12),
        clip(),
        tokenizer(),
        t5(),
        tokenizer(),
        filled(flux()),
    )


def pixart_alpha():
    return diffusers.PixArtAlphaPipeline(
        tokenizer(), t5(), small_vae(), filled(pixart()), scheduler("dpmpp")
    )


def classes():
    return diffusers.DiTPipeline(filled(dit()), small_vae(), scheduler("ddim"))


def pixels():
    return diffusers.DDPMPipeline(
        filled(unet2d()), diffusers.DDPMScheduler(clip_sample=False, beta_end=0.02)
    )


PIPELINES = {
    f.__name__: f
    for f in (
        stable,
        xl,
        stable3,
        flux1,
        pixart_alpha,
        classes,
        pixels,
        distilled,
        film,
        sana_small,
    )
}


def saved(name, folder, **options):
    pipeline = PIPELINES[name](**options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def start(batch, shape, seed=11):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
