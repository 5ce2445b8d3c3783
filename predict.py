"""The contract: Cog's typed inputs become a Request, pictures become files. The only file that knows Cog.

Cog reads this file statically, without importing it: every default, bound and choice of `predict` is a literal, every
description is one string literal, and the position of a parameter is its x-order. `script/schema` reads it the same way.
"""
# ruff: noqa: B008, E501 (calling Input in a default is how Cog declares one; a description is one literal, however long)

from cog import BasePredictor, Input, Path


class Predictor(BasePredictor):
    """FLUX.1 with LoRAs that change from one request to the next."""

    def setup(self, weights: Path | None = None) -> None:
        """Load the models.

        Args:
            weights: the main LoRA of requests that name none (`COG_WEIGHTS`).
        """

    def predict(
        self,
        prompt: str = Input(
            description="Prompt for generated image. If you include the `trigger_word` used in the training process you are more likely to activate the trained object, style, or concept in the resulting image."
        ),
        image: Path | None = Input(
            default=None,
            description="Input image for image to image or inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored.",
        ),
        mask: Path | None = Input(
            default=None,
            description="Image mask for image inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored.",
        ),
        aspect_ratio: str = Input(
            default="1:1",
            description="Aspect ratio for the generated image. If custom is selected, uses height and width below & will run in bf16 mode",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
        ),
        height: int | None = Input(
            default=None,
            description="Height of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
            ge=256,
            le=1440,
        ),
        width: int | None = Input(
            default=None,
            description="Width of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
            ge=256,
            le=1440,
        ),
        prompt_strength: float = Input(
            default=0.8,
            description="Prompt strength when using img2img. 1.0 corresponds to full destruction of information in image",
            ge=0,
            le=1,
        ),
        model: str = Input(
            default="dev",
            description="Which model to run inference with. The dev model performs best with around 28 inference steps but the schnell model only needs 4 steps.",
            choices=["dev", "schnell"],
        ),
        num_outputs: int = Input(default=1, description="Number of outputs to generate", ge=1, le=4),
        num_inference_steps: int = Input(
            default=28,
            description="Number of denoising steps. More steps can give more detailed images, but take longer.",
            ge=1,
            le=50,
        ),
        guidance_scale: float = Input(
            default=3,
            description="Guidance scale for the diffusion process. Lower values can give more realistic images. Good values to try are 2, 2.5, 3 and 3.5",
            ge=0,
            le=10,
        ),
        seed: int | None = Input(default=None, description="Random seed. Set for reproducible generation"),
        output_format: str = Input(
            default="webp", description="Format of the output images", choices=["webp", "jpg", "png"]
        ),
        output_quality: int = Input(
            default=80,
            description="Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality. Not relevant for .png outputs",
            ge=0,
            le=100,
        ),
        disable_safety_checker: bool = Input(default=False, description="Disable safety checker for generated images."),
        go_fast: bool = Input(
            default=False,
            description="Run faster predictions with model optimized for speed (currently fp8 quantized); disable to run in original bf16",
        ),
        megapixels: str = Input(
            default="1", description="Approximate number of megapixels for generated image", choices=["1", "0.25"]
        ),
        replicate_weights: str | None = Input(
            default=None,
            description="Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'",
        ),
        lora_scale: float = Input(
            default=1,
            description="Determines how strongly the main LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
            ge=-1,
            le=3,
        ),
        extra_lora: str | None = Input(
            default=None,
            description="Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'",
        ),
        extra_lora_scale: float = Input(
            default=1,
            description="Determines how strongly the extra LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
            ge=-1,
            le=3,
        ),
    ) -> list[Path]:
        """Draw pictures; the inputs are described above, each beside its parameter.

        Returns:
            One file for each picture, in order of their seeds.

        Raises:
            ValueError: a sentence for the person who sent the request.
        """
        raise ValueError("This predictor has its inputs only; it does not draw yet.")
