"""The two-stage check, on small models of the real classes, saved and loaded as the real ones are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BaseImageProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from safety import SafetyChecker

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def pictures(count: int = 8) -> list[Image.Image]:
    """Coarse noise of many shapes."""
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(count)]
    return [picture.resize((40 + 8 * i, 64), Image.Resampling.NEAREST) for i, picture in enumerate(small)]


def checker_model() -> StableDiffusionSafetyChecker:
    """Random concepts, thresholds that nothing reaches, weights large enough for pictures to differ."""
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)).eval()
    with torch.no_grad():
        for parameter in model.vision_model.parameters():
            parameter.normal_(std=0.3)
        model.concept_embeds.normal_()
        model.special_care_embeds.normal_()
        model.concept_embeds_weights.fill_(2.0)
        model.special_care_embeds_weights.fill_(2.0)
    return model


def classifier_model(labels: tuple[str, ...] = ("normal", "nsfw")) -> ViTForImageClassification:
    torch.manual_seed(1)
    model = ViTForImageClassification(ViTConfig(**VISION, id2label=dict(enumerate(labels)))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


CHECKER_PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
CLASSIFIER_PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16})


def saved(
    directory: Path, checker: StableDiffusionSafetyChecker, classifier: ViTForImageClassification
) -> tuple[Path, Path]:
    """Both models with their processors, in directories."""
    checker.save_pretrained(directory / "checker")
    CHECKER_PROCESSOR.save_pretrained(directory / "checker")
    classifier.save_pretrained(directory / "classifier")
    CLASSIFIER_PROCESSOR.save_pretrained(directory / "classifier")
    return directory / "checker", directory / "classifier"


def loaded(
    directory: Path,
    checker: StableDiffusionSafetyChecker | None = None,
    classifier: ViTForImageClassification | None = None,
) -> SafetyChecker:
    return SafetyChecker.load(
        *saved(directory, checker or checker_model(), classifier or classifier_model()), device="cpu"
    )


def cosines(model: StableDiffusionSafetyChecker, images: list[Image.Image], concepts: torch.Tensor) -> torch.Tensor:
    """[pictures, concepts]."""
    with torch.no_grad():
        pixels = CHECKER_PROCESSOR(images, return_tensors="pt").pixel_values
        embeddings = model.visual_projection(model.vision_model(pixels).pooler_output)
        return torch.nn.functional.cosine_similarity(embeddings[:, None], concepts[None], dim=-1)


def probabilities(model: ViTForImageClassification, images: list[Image.Image]) -> torch.Tensor:
    """[pictures, labels]."""
    with torch.no_grad():
        return model(CLASSIFIER_PROCESSOR(images, return_tensors="pt").pixel_values).logits.softmax(-1)


def undecided_classifier() -> ViTForImageClassification:
    """It flags half of the eight pictures."""
    model = classifier_model()
    odds = probabilities(model, pictures()).logit()[:, 1].sort().values
    with torch.no_grad():
        model.classifier.bias[1] -= (odds[3] + odds[4]) / 2
    return model


def own_answer(model: StableDiffusionSafetyChecker, image: Image.Image) -> bool:
    """The result of the checker's own forward."""
    pixels = CHECKER_PROCESSOR(image, return_tensors="pt").pixel_values
    _, flags = model(clip_input=pixels, images=[np.zeros((8, 8, 3))])
    return flags[0]


def test_only_what_both_stages_flag_is_flagged(tmp_path: Path) -> None:
    images = pictures()
    checker, classifier = checker_model(), undecided_classifier()
    with torch.no_grad():
        median = cosines(checker, images, checker.concept_embeds)[:, 0].sort().values[3]
        checker.concept_embeds_weights[0] = median + 2e-3
    nsfw = [own_answer(checker, image) for image in images]
    likely = [bool(p > 0.5) for p in probabilities(classifier, images)[:, 1]]
    assert {(False, False), (False, True), (True, False), (True, True)} == set(zip(nsfw, likely, strict=True))

    safety = loaded(tmp_path, checker, classifier)
    verdicts = safety.check(images)
    assert [verdict.checker.flagged for verdict in verdicts] == nsfw
    assert [verdict.classifier.flagged for verdict in verdicts] == likely
    assert [verdict.flagged for verdict in verdicts] == [a and b for a, b in zip(nsfw, likely, strict=True)]
    # A picture's verdict is its own, to the bit, whatever stands beside it.
    assert safety.check(images[::-1]) == verdicts[::-1]
    assert safety.check([]) == []


def test_scores_and_flags_agree_with_the_checkers_own_forward(tmp_path: Path) -> None:
    """For thresholds all around each cosine, with special care and without."""
    images = pictures(4)
    rng = np.random.default_rng(0)
    answers = []
    model = checker_model()
    safety = loaded(tmp_path, model)
    concepts = cosines(model, images, model.concept_embeds)  # [pictures, concepts]
    cares = cosines(model, images, model.special_care_embeds)
    for trial in range(120):
        near = trial % len(images)
        for own in (model, safety._checker):
            own.concept_embeds_weights.data = concepts[near].clone()
            own.special_care_embeds_weights.data = cares[near].clone()
        # From well below a thousandth, where rounding decides, to above the hundredth that special care adds.
        above = torch.tensor(rng.choice([0.0, 4e-4, 6e-4, 9e-3, 9.6e-3, 1.1e-2], 17), dtype=torch.float32)
        care = torch.tensor(rng.choice([-1e-2, -4e-4, 4e-4, 1e-2, 1.0], 3), dtype=torch.float32)
        for own in (model, safety._checker):
            own.concept_embeds_weights.data += above
            own.special_care_embeds_weights.data += care.abs() if trial % 3 == 0 else care
        for image in images:
            answer = own_answer(model, image)
            finding = safety.check([image])[0].checker
            assert finding.flagged == answer
            assert (finding.score > 0) == answer
            answers.append(answer)
    assert 50 < sum(answers) < len(answers) - 50


def test_the_checkers_score_is_its_largest_excess(tmp_path: Path) -> None:
    images = pictures(4)
    model = checker_model()
    thresholds = torch.linspace(0.1, 0.9, 17)
    model.concept_embeds_weights.data = thresholds
    plain = (cosines(model, images, model.concept_embeds) - thresholds).max(dim=1).values.tolist()
    safety = loaded(tmp_path, model)
    assert [verdict.checker.score for verdict in safety.check(images)] == pytest.approx(plain, abs=6e-4)
    safety._checker.special_care_embeds_weights.data.fill_(-2.0)
    careful = [score + 0.01 for score in plain]
    assert [verdict.checker.score for verdict in safety.check(images)] == pytest.approx(careful, abs=6e-4)


@pytest.mark.parametrize("labels", [("normal", "nsfw"), ("NSFW", "normal"), ("drawing", "normal", "nsfw")])
def test_the_classifier_is_asked_for_the_label_of_that_name(tmp_path: Path, labels: tuple[str, ...]) -> None:
    model = classifier_model(labels)
    index = [label.lower() for label in labels].index("nsfw")
    expected = probabilities(model, pictures())[:, index].tolist()
    verdicts = loaded(tmp_path, classifier=model).check(pictures())
    assert [verdict.classifier.score for verdict in verdicts] == pytest.approx(expected, abs=1e-6)
    assert [verdict.classifier.flagged for verdict in verdicts] == [p > 0.5 for p in expected]


def test_pictures_are_not_changed(tmp_path: Path) -> None:
    checker = checker_model()
    checker.concept_embeds_weights.data.fill_(-2.0)
    images = pictures()
    before = [image.tobytes() for image in images]
    verdicts = loaded(tmp_path, checker).check(images)
    assert all(verdict.checker.flagged for verdict in verdicts)  # its own forward would have blackened all of them
    assert [image.tobytes() for image in images] == before


@pytest.mark.parametrize("stage", ["checker", "classifier"])
def test_a_stage_whose_weights_are_not_numbers_flags_everything(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checker, classifier = checker_model(), classifier_model()
    broken = checker.visual_projection if stage == "checker" else classifier.classifier
    broken.weight.data[0, 0] = math.nan
    for verdict in loaded(tmp_path, checker, classifier).check(pictures(2)):
        finding = getattr(verdict, stage)
        assert finding.flagged
        assert math.isnan(finding.score)
    assert caplog.messages == [f"The safety {stage} scored nan: the picture counts as flagged by it."] * 2


def test_a_concept_that_is_not_a_number_flags_although_others_are_far(tmp_path: Path) -> None:
    checker = checker_model()
    checker.concept_embeds.data[5] = math.nan
    assert all(verdict.checker.flagged for verdict in loaded(tmp_path, checker).check(pictures(2)))


def test_a_threshold_of_special_care_that_is_not_a_number_means_care(tmp_path: Path) -> None:
    images = pictures(1)
    checker = checker_model()
    checker.concept_embeds_weights.data = cosines(checker, images, checker.concept_embeds)[0] + 5e-3
    safety = loaded(tmp_path, checker)
    assert not safety.check(images)[0].checker.flagged
    safety._checker.special_care_embeds_weights.data[1] = math.nan
    assert safety.check(images)[0].checker.flagged


def test_a_picture_that_breaks_the_stages_is_flagged_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, other = pictures(2)
    closed = Image.new("RGB", (64, 64))
    closed.close()  # its pixels are gone: both processors raise
    safety = loaded(tmp_path)
    verdicts = safety.check([whole, closed, other])
    assert verdicts[1].flagged
    assert [verdicts[0], verdicts[2]] == safety.check([whole, other])
    assert not verdicts[0].flagged
    assert not verdicts[2].flagged
    assert len(caplog.messages) == 2
    assert all(message.endswith("Error: the picture counts as flagged by it.") for message in caplog.messages)
    assert str(tmp_path) not in caplog.text


def test_a_stage_that_raises_leaves_the_other_to_decide(tmp_path: Path) -> None:
    checker, classifier = checker_model(), undecided_classifier()
    likely = [bool(p > 0.5) for p in probabilities(classifier, pictures())[:, 1]]
    paths = saved(tmp_path, checker, classifier)
    # A processor that makes pictures of a size that the model does not take.
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(paths[0])
    verdicts = SafetyChecker.load(*paths, device="cpu").check(pictures())
    assert all(verdict.checker.flagged for verdict in verdicts)
    assert [verdict.flagged for verdict in verdicts] == likely
    assert sum(likely) == 4


def test_a_cancellation_passes_through(tmp_path: Path) -> None:
    class Cancelled(BaseException):
        pass

    def cancel(*_: object) -> None:
        raise Cancelled

    safety = loaded(tmp_path)
    safety._classifier.register_forward_pre_hook(cancel)
    with pytest.raises(Cancelled):
        safety.check(pictures(1))


@pytest.mark.parametrize("stage", ["checker", "classifier"])
def test_a_model_that_is_not_all_there_is_refused(tmp_path: Path, stage: str) -> None:
    paths = saved(tmp_path, checker_model(), classifier_model())
    file = tmp_path / stage / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight" if stage == "checker" else "classifier.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its tensors, among them \w+\.weight") as refused:
        SafetyChecker.load(*paths, device="cpu")
    assert str(tmp_path) not in str(refused.value)


def test_a_classifier_without_the_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows cat, dog; it must have a label nsfw"):
        loaded(tmp_path, classifier=classifier_model(("cat", "dog")))


def test_files_in_the_layout_of_the_published_checker_load(tmp_path: Path) -> None:
    """They were written by older versions: a nested vision model, a position buffer, processors by old names."""
    model = checker_model()
    model.concept_embeds_weights.data.fill_(0.3)
    checker, classifier = saved(tmp_path, model, classifier_model())
    expected = SafetyChecker.load(checker, classifier, device="cpu").check(pictures())

    tensors = load_file(checker / "model.safetensors")
    nested = {name.replace("vision_model.", "vision_model.vision_model.", 1): t for name, t in tensors.items()}
    nested["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    assert len(nested) == len(tensors) + 1
    save_file(nested, checker / "model.safetensors", metadata={"format": "pt"})
    processor = json.loads((checker / "preprocessor_config.json").read_text())
    processor = {key: value for key, value in processor.items() if key.startswith(("do_", "image_"))}
    del processor["image_processor_type"]
    processor |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16, "resample": 3}
    (checker / "preprocessor_config.json").write_text(json.dumps(processor))
    assert SafetyChecker.load(checker, classifier, device="cpu").check(pictures()) == expected


def test_half_precision_runs(tmp_path: Path) -> None:
    paths = saved(tmp_path, checker_model(), classifier_model())
    full = SafetyChecker.load(*paths, device="cpu").check(pictures())
    half = SafetyChecker.load(*paths, device="cpu", dtype=torch.bfloat16).check(pictures())
    assert [v.checker.score for v in half] == pytest.approx([v.checker.score for v in full], abs=0.05)
    assert [v.classifier.score for v in half] == pytest.approx([v.classifier.score for v in full], abs=0.05)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_pictures_looked_at_together_are_judged_as_if_alone(tmp_path: Path, count: int) -> None:
    folders = saved(tmp_path, checker_model(), undecided_classifier())
    alone, together = SafetyChecker.load(*folders, device="cpu"), SafetyChecker.load(*folders, device="cpu", batch=4)
    expected = alone.check(pictures())[:count]
    verdicts = together.check(pictures()[:count])
    assert [verdict.classifier.flagged for verdict in verdicts] == [verdict.classifier.flagged for verdict in expected]
    for verdict, other in zip(verdicts, expected, strict=True):
        assert verdict.classifier.score == pytest.approx(other.classifier.score, abs=1e-5)
        assert verdict.checker.score == pytest.approx(other.checker.score, abs=1e-3)


def test_in_a_batch_a_score_does_not_depend_on_the_other_pictures(tmp_path: Path) -> None:
    checker = SafetyChecker.load(*saved(tmp_path, checker_model(), classifier_model()), device="cpu", batch=4)
    first, *others = pictures()
    assert {checker.check([first, *others[:count]])[0] for count in range(5)} == {checker.check([first])[0]}


def counting(processor: BaseImageProcessor) -> BaseImageProcessor:
    """The same processor; it counts the pictures that it resizes."""

    class Counting(type(processor)):
        resized = 0

        def resize(self, *args: object, **kwargs: object) -> np.ndarray:
            self.resized += 1
            return super().resize(*args, **kwargs)

    return Counting.from_dict(processor.to_dict())


@pytest.mark.parametrize(("count", "together"), [(1, 1), (1, 4), (3, 4), (5, 4)])
def test_each_picture_is_preprocessed_once(count: int, together: int) -> None:
    processors = counting(CHECKER_PROCESSOR), counting(CLASSIFIER_PROCESSOR)
    checker = SafetyChecker(checker_model(), processors[0], classifier_model(), processors[1], batch=together)
    checker.check(pictures(count))
    assert [processor.resized for processor in processors] == [count, count]


def test_a_picture_that_breaks_a_batch_takes_nobody_with_it(tmp_path: Path) -> None:
    checker = SafetyChecker.load(*saved(tmp_path, checker_model(), classifier_model()), device="cpu", batch=4)
    broken = Image.new("RGB", (0, 5))
    verdicts = checker.check([*pictures(2), broken])
    assert [verdict.flagged for verdict in verdicts] == [False, False, True]
