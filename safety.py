"""Two looks at each drawn picture; what both stages flag is not to be shown. Fails closed.

Knows Pillow, torch and the two models; knows nothing of FLUX. A stage that breaks, or whose score is not a number,
has flagged the picture.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedModel, ViTForImageClassification, ViTImageProcessorPil

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """What one stage says of one picture; the score is nan where the stage broke."""

    score: float
    flagged: bool


@dataclass(frozen=True)
class Verdict:
    """What both stages say of one picture."""

    checker: Finding
    classifier: Finding

    @property
    def flagged(self) -> bool:
        """Whether the picture is to be dropped: only where both stages say so."""
        return self.checker.flagged and self.classifier.flagged


class SafetyChecker:
    """Stable Diffusion's safety checker and a classifier with a label "nsfw", held on one device."""

    def __init__(
        self, checker: Path, classifier: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        """Load both stages from directories, each with its image processor; nothing is downloaded.

        Raises:
            ValueError: weights are missing, or the classifier has no label "nsfw". A model that is not all there
                would judge at random.
        """
        self._checker = _load(StableDiffusionSafetyChecker, checker, device, dtype)
        self._checker_processor = CLIPImageProcessorPil.from_pretrained(checker, local_files_only=True)
        self._classifier = _load(ViTForImageClassification, classifier, device, dtype)
        self._classifier_processor = ViTImageProcessorPil.from_pretrained(classifier, local_files_only=True)
        labels = {label.lower(): index for index, label in self._classifier.config.id2label.items()}
        if "nsfw" not in labels:
            raise ValueError(f"The NSFW classifier knows {', '.join(labels)}; it must have a label nsfw.")
        self._nsfw = labels["nsfw"]

    def check(self, images: list[Image.Image]) -> list[Verdict]:
        """A verdict for each picture, in order; the pictures are not changed.

        Each is looked at alone: in a batch its score would depend, in the last bits, on its neighbours, and one that
        breaks a stage would take them with it.
        """
        return [
            Verdict(
                checker=_finding("checker", self._concept_score, image, threshold=0.0),
                classifier=_finding("classifier", self._nsfw_probability, image, threshold=0.5),
            )
            for image in images
        ]

    def _concept_score(self, image: Image.Image) -> float:
        """How far the picture exceeds the threshold of the concept nearest to it; above 0 is flagged.

        The numbers of `StableDiffusionSafetyChecker.forward`, which answers only yes or no and blackens what it is
        given: cosines less thresholds, rounded to three places, every threshold lower by 0.01 for a picture that
        shows a concept of special care.
        """
        model = self._checker
        pixels = self._pixels(self._checker_processor, model, image)
        embedding = model.visual_projection(model.vision_model(pixels).pooler_output)  # [1, D]

        def excess(concepts: torch.Tensor, thresholds: torch.Tensor, adjustment: float) -> torch.Tensor:
            cosines = cosine_distance(embedding, concepts).float()  # [1, concepts]
            return (cosines - thresholds.float() + adjustment).round(decimals=3)

        special = excess(model.special_care_embeds, model.special_care_embeds_weights, 0.0)
        careful = not bool((special <= 0).all())  # nan is careful too
        scores = excess(model.concept_embeds, model.concept_embeds_weights, 0.01 if careful else 0.0)
        return scores.max().item()  # nan if any is nan

    def _nsfw_probability(self, image: Image.Image) -> float:
        pixels = self._pixels(self._classifier_processor, self._classifier, image)
        logits = self._classifier(pixels).logits.float()  # [1, labels]
        return logits.softmax(dim=-1)[0, self._nsfw].item()

    @staticmethod
    def _pixels(
        processor: CLIPImageProcessorPil | ViTImageProcessorPil, model: PreTrainedModel, image: Image.Image
    ) -> torch.Tensor:
        """The picture as a model wants it: [1, 3, H, W]."""
        return processor(image, return_tensors="pt").pixel_values.to(model.device, model.dtype)


@torch.inference_mode()
def _finding(stage: str, score: Callable[[Image.Image], float], image: Image.Image, threshold: float) -> Finding:
    """One stage's look at one picture; flagged unless the score is a number up to the threshold."""
    try:
        value = score(image)
    except Exception as error:
        trouble = f"failed with {type(error).__name__}"  # the type alone: a message may name local files
    else:
        if math.isfinite(value):
            return Finding(value, flagged=value > threshold)
        trouble = f"scored {value}"
    logger.warning("The safety %s %s: the picture counts as flagged by it.", stage, trouble)
    return Finding(math.nan, flagged=True)


def _load(
    kind: type[PreTrainedModel], directory: Path, device: torch.device | str, dtype: torch.dtype
) -> PreTrainedModel:
    model, report = kind.from_pretrained(directory, local_files_only=True, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{kind.__name__} lacks {len(missing)} of its tensors, among them {missing[0]}.")
    return model.to(device)
