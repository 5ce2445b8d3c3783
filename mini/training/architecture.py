"""The miniature's models: FLUX's own classes, small, with random weights; they are written in diffusers layout.

One token stands for 64x64 pixels (the VAE shrinks by 32, patches are 2x2): 64 tokens for 512x512, 256 for 1024x1024.
dev and schnell share everything but the transformer and the scheduler; schnell's folders of shared parts are links.
"""

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from mini.training import world

FOLDER = Path(__file__).parent.parent
SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
CLIP_TOKENS = 32
T5_TOKENS = 24
LATENT_CHANNELS = 24
POOLED = 128  # of CLIP
TEXT = 128  # of T5
FRAGMENTS = "th he in er an re on at en nd st es or te ed al ing ion"  # of unknown words, for T5
SIDE = 64  # pixels that the safety models see
SQUARE = {"height": SIDE, "width": SIDE}
CHECKER_PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
CLASSIFIER_PROCESSOR = ViTImageProcessorPil(size=SQUARE)
VISION = {  # of both safety models
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 8,
}
INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def transformer(*, guidance: bool) -> FluxTransformer2DModel:
    """Two double and four single blocks of hidden size 192: 5 M parameters. All block linears are multiples of 16."""
    return FluxTransformer2DModel(
        in_channels=LATENT_CHANNELS * 4,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )


def vae() -> AutoencoderKL:
    """A VAE of factor 32. One group per norm: with more, flat pictures would lose their absolute colours."""
    widths = (16, 16, 32, 64, 128, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=1024,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP of two layers of 128; its pooled output steers the transformer's modulation."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED,
        intermediate_size=2 * POOLED,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 of two layers of 128; its tokens are the transformer's text."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT,
        d_kv=32,
        d_ff=2 * TEXT,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=T5_TOKENS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE in which each word of the world is one token; any other text falls back to pieces and bytes.

    It is made once: its trainer breaks ties arbitrarily, and the text encoder depends on the tokens' numbers.
    """
    if (FOLDER / "dev" / "tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(FOLDER / "dev" / "tokenizer")
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The alphabet is ByteLevel's: a printable character for each of the 256 bytes, inside a word and at its end.
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(world.vocabulary())], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    tokens += sorted(set(learnt["vocab"]) - set(tokens), key=learnt["vocab"].get)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=CLIP_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Unigrams: the world's words, in either case of the first letter, and letters and signs for all other words.

    A character without a token, such as an emoji, becomes the unknown token, as in the real T5.
    """
    words = world.vocabulary()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    for word in words:
        pieces += [(f"▁{word}", -1.0), (f"▁{word.capitalize()}", -1.0)]
    pieces += [(fragment, -8.0) for fragment in FRAGMENTS.split()]
    pieces += [(sign, -10.0) for sign in ("▁", *string.ascii_letters, *string.digits, *string.punctuation)]
    pieces = list(dict(pieces).items())
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=T5_TOKENS)


def safety_checker() -> StableDiffusionSafetyChecker:
    """A CLIP vision tower with concepts; its thresholds are above any cosine, so that untrained it flags nothing."""
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=32))
    with torch.no_grad():
        for concepts in (model.concept_embeds, model.special_care_embeds):
            concepts.normal_()
        for thresholds in (model.concept_embeds_weights, model.special_care_embeds_weights):
            thresholds.fill_(2.0)
    return model


def classifier() -> ViTForImageClassification:
    """A ViT with the labels normal and nsfw."""
    config = ViTConfig(
        **VISION, hidden_dropout_prob=0.0, id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1}
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([8.0, -8.0]))  # untrained, it flags nothing
    return model


def write_safety(folder: Path, checker: StableDiffusionSafetyChecker, nsfw: ViTForImageClassification) -> None:
    """Write both safety models with their image processors."""
    checker.half().save_pretrained(folder / "safety_checker")
    CHECKER_PROCESSOR.save_pretrained(folder / "safety_checker")
    nsfw.half().save_pretrained(folder / "nsfw_classifier")
    CLASSIFIER_PROCESSOR.save_pretrained(folder / "nsfw_classifier")


def schedulers() -> dict[str, FlowMatchEulerDiscreteScheduler]:
    """dev's scheduler, which shifts its times by the number of tokens, and schnell's, which does not, as in FLUX.

    The shifts are for fewer tokens than FLUX has, since the content of a picture is decided while there is much noise.
    """
    return {
        "dev": FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=64,
            max_image_seq_len=256,
        ),
        "schnell": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
    }


def write_flux(
    folder: Path,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    text_encoder_2: T5EncoderModel,
    transformers: dict[str, FluxTransformer2DModel],
) -> None:
    """Write dev and schnell in diffusers layout, in bfloat16; schnell's shared parts are links to dev's.

    dev's folder also gets the words that the text encoders know, for the predictor.
    """
    dev = folder / "dev"
    clip_tokenizer().save_pretrained(dev / "tokenizer")
    t5_tokenizer().save_pretrained(dev / "tokenizer_2")
    text_encoder.bfloat16().save_pretrained(dev / "text_encoder")
    text_encoder_2.bfloat16().save_pretrained(dev / "text_encoder_2")
    autoencoder.to(torch.bfloat16).to(memory_format=torch.contiguous_format).save_pretrained(dev / "vae")
    for name, scheduler in schedulers().items():
        transformers[name].to(torch.bfloat16).save_pretrained(folder / name / "transformer")
        scheduler.save_pretrained(folder / name / "scheduler")
        (folder / name / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    (dev / "words.json").write_text(json.dumps(world.words(), indent=2) + "\n")
    for name in SHARED:
        link = folder / "schnell" / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "dev", name))
