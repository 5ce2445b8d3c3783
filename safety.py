"""The two-stage safety check: a picture is dropped if both stages flag it. Knows nothing of FLUX.

It fails closed: a stage that breaks, or whose score is not a number, has flagged the picture.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedModel, ViTForImageClassification, ViTImageProcessorPil

from service.faults import out_of_memory

logger = logging.getLogger(__name__)

# The batch size of a device. Smaller batches are filled up: the last bits of a score depend on the batch size, and must
# not depend on how many pictures a request has.
BATCH = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True)
class Finding:
    """What one stage found in one picture; the score is nan where the stage broke."""

    score: float
    flagged: bool


@dataclass(frozen=True)
class Verdict:
    """What both stages found in one picture."""

    checker: Finding
    classifier: Finding

    @property
    def flagged(self) -> bool:
        """Whether the picture is dropped: only if both stages flag it."""
        return self.checker.flagged and self.classifier.flagged

    def metric(self) -> dict[str, float | None]:
        """The score of each stage, None where it broke."""
        scores = {"checker": self.checker.score, "classifier": self.classifier.score}
        return {stage: round(score, 4) if math.isfinite(score) else None for stage, score in scores.items()}


Scores = Callable[[list[Image.Image]], list[float]]


class SafetyChecker:
    """Stable Diffusion's safety checker and a classifier with a label "nsfw", held on one device."""

    def __init__(
        self,
        checker: StableDiffusionSafetyChecker,
        checker_processor: CLIPImageProcessorPil,
        classifier: ViTForImageClassification,
        classifier_processor: ViTImageProcessorPil,
        batch: int | None = None,
    ) -> None:
        """Take both models, each with its image processor; `batch` replaces the device's batch size."""
        self._checker, self._checker_processor = checker, checker_processor
        self._classifier, self._classifier_processor = classifier, classifier_processor
        self._batch = batch or BATCH[checker.device.type]
        labels = {label.lower(): index for index, label in classifier.config.id2label.items()}
        if "nsfw" not in labels:
            raise ValueError(f"The NSFW classifier knows {', '.join(labels)}; it must have a label nsfw.")
        self._nsfw = labels["nsfw"]

    @classmethod
    def load(
        cls,
        checker: Path,
        classifier: Path,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        batch: int | None = None,
    ) -> "SafetyChecker":
        """Load both models from directories, each with its image processor; nothing is downloaded."""
        return cls(
            _load(StableDiffusionSafetyChecker, checker, device, dtype),
            CLIPImageProcessorPil.from_pretrained(checker, local_files_only=True),
            _load(ViTForImageClassification, classifier, device, dtype),
            ViTImageProcessorPil.from_pretrained(classifier, local_files_only=True),
            batch,
        )

    def check(self, images: list[Image.Image]) -> list[Verdict]:
        """A verdict for each picture, in order; the pictures are not changed.

        A picture's score depends on that picture alone, also where another one breaks a stage.
        """
        checker = self._findings("checker", self._concept_scores, images, threshold=0.0)
        classifier = self._findings("classifier", self._nsfw_probabilities, images, threshold=0.5)
        return [Verdict(*findings) for findings in zip(checker, classifier, strict=True)]

    def _findings(self, stage: str, score: Scores, images: list[Image.Image], threshold: float) -> list[Finding]:
        batches = [images[start : start + self._batch] for start in range(0, len(images), self._batch)]
        return [finding for batch in batches for finding in _look(stage, score, batch, threshold)]

    def _concept_scores(self, images: list[Image.Image]) -> list[float]:
        """How far each picture exceeds the threshold of the concept nearest to it; above 0 is flagged.

        As in `StableDiffusionSafetyChecker.forward`, which returns only yes or no and blackens its input: cosines
        minus thresholds, rounded to three places, plus 0.01 for a picture that shows a concept of special care.
        """
        model = self._checker
        pixels = self._pixels(self._checker_processor, model, images)
        embeddings = model.visual_projection(model.vision_model(pixels).pooler_output)  # [B, D]

        def excess(concepts: Tensor, thresholds: Tensor, adjustment: Tensor) -> Tensor:
            cosines = cosine_distance(embeddings, concepts).float()  # [B, concepts]
            return (cosines - thresholds.float() + adjustment).round(decimals=3)

        none = torch.zeros(len(pixels), 1, device=model.device)
        special = excess(model.special_care_embeds, model.special_care_embeds_weights, none)
        careful = ~(special <= 0).all(dim=1, keepdim=True)  # [B, 1]; nan is careful too
        scores = excess(model.concept_embeds, model.concept_embeds_weights, none.masked_fill(careful, 0.01))
        return scores.amax(dim=1)[: len(images)].tolist()  # nan if any is nan

    def _nsfw_probabilities(self, images: list[Image.Image]) -> list[float]:
        pixels = self._pixels(self._classifier_processor, self._classifier, images)
        logits = self._classifier(pixels).logits.float()  # [B, labels]
        return logits.softmax(dim=-1)[: len(images), self._nsfw].tolist()

    def _pixels(
        self, processor: CLIPImageProcessorPil | ViTImageProcessorPil, model: PreTrainedModel, images: list[Image.Image]
    ) -> Tensor:
        """A model's input, in which the last picture is repeated until the batch is full: [B, 3, H, W]."""
        pixels = processor(images, return_tensors="pt").pixel_values.to(model.device, model.dtype)
        return torch.cat([pixels, pixels[-1:].expand(self._batch - len(images), -1, -1, -1)])


@torch.inference_mode()
def _look(stage: str, score: Scores, images: list[Image.Image], threshold: float) -> list[Finding]:
    """One stage's findings in a batch or a part of one: flagged unless the score is a number up to the threshold."""
    trouble = ""
    try:
        values = score(images)
    except Exception as error:
        if out_of_memory(error):  # tells nothing about the picture; the whole prediction fails
            raise
        if len(images) > 1:
            return [finding for image in images for finding in _look(stage, score, [image], threshold)]
        values = [math.nan]
        trouble = f"failed with {type(error).__name__}"  # the type alone: a message may name local files
    findings = []
    for value in values:
        broken = not math.isfinite(value)
        if broken:
            reason = trouble or f"scored {value}"
            logger.warning("The safety %s %s: the picture counts as flagged by it.", stage, reason)
        findings.append(Finding(math.nan if broken else value, flagged=broken or value > threshold))
    return findings


def _load(
    kind: type[PreTrainedModel], directory: Path, device: torch.device | str, dtype: torch.dtype
) -> PreTrainedModel:
    model, report = kind.from_pretrained(directory, local_files_only=True, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # it would judge at random
        raise ValueError(f"{kind.__name__} lacks {len(missing)} of its tensors, among them {missing[0]}.")
    return model.to(device)
