"""Quality of counterfactuals: flip rate, FID, KID and similarity, with a separate classifier as the judge."""

import json

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.linear_model import LogisticRegression
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from cxr_diffusers import GradCAMPipeline, load_pipeline
from cxr_diffusers.evaluation import compare, counterfactual_table, evaluate
from cxr_diffusers.evaluation.feature_distances import frechet_distance, kernel_distance, kernel_distance_of
from cxr_diffusers.evaluation.judge import check_judge, classify_images, is_its_own_judge, name_of
from cxr_diffusers.evaluation.metrics import image_auroc, interval_of, mean_of, patient_weights
from cxr_diffusers.pipelines import AnomalyOutput
from helpers import BrightSpots, spot_rows, toy_resnet


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class Healer(BrightSpots):
    """The spots are painted away, and nothing else is touched."""

    def __call__(self, image, output_type="np"):
        output = super().__call__(image)
        healed = np.where(output.image > 0.3, 0.2, output.image)
        return AnomalyOutput(output.image, healed, output.anomaly_map, output.anomaly_score)


class Harmer(Healer):
    """A spot is painted into every image, including those without one."""

    def __call__(self, image, output_type="np"):
        output = super().__call__(image)
        harmed = output.image.copy()
        harmed[:, 20:26, 20:28] = 0.6
        return AnomalyOutput(output.image, harmed, output.anomaly_map, output.anomaly_score)


@pytest.fixture(scope="module")
def judge():
    """A real classifier at toy size, whose last layer is fitted to tell spots from none."""
    classifier = toy_resnet()
    judge = GradCAMPipeline(classifier, sample_size=32, class_names=["healthy", "spot"], scaling="dtype")
    images = [np.asarray(row["image"], np.float32) / 255 for row in (*spot_rows(40), *spot_rows(40, spot=False))]
    _, features = classify_images(judge, images)
    fitted = LogisticRegression(C=1e4, max_iter=5000).fit(features, np.arange(80) < 40)
    layer = classifier.classifier[-1]
    layer.weight.data = torch.tensor(np.concatenate([-fitted.coef_, fitted.coef_]) / 2, dtype=torch.float32)
    layer.bias.data = torch.tensor(np.concatenate([-fitted.intercept_, fitted.intercept_]) / 2, dtype=torch.float32)
    return judge


@pytest.fixture(scope="module")
def evaluated(judge):
    methods = {"healer": Healer(), "harmer": Harmer(), "nothing": BrightSpots()}
    # two are labelled diseased without a spot: an image that the judge calls healthy cannot be flipped
    subtle = [{**row, "label": 1, "patient": f"s{i}"} for i, row in enumerate(spot_rows(2, spot=False, dark=61))]
    options = dict(healthy=spot_rows(12, spot=False), judge=judge, n_bootstrap=100, progress=False)
    return compare(methods, spot_rows(14) + subtle, **options)


def value(result, name, number):
    return result.summary["counterfactuals"]["rows"][name][number]["value"]


def test_fid_is_the_formula_of_the_paper_and_that_of_torchmetrics(rng):
    a, b = rng.normal(size=(40, 5)), rng.normal(0.5, 2, size=(30, 5))
    covariances = np.cov(a.T), np.cov(b.T)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    root = linalg.sqrtm(covariances[0] @ covariances[1])
    assert frechet_distance(a, b) == pytest.approx(means + np.trace(covariances[0] + covariances[1] - 2 * root).real)
    tensors = [torch.tensor(x) for x in (a.mean(0), covariances[0], b.mean(0), covariances[1])]
    assert frechet_distance(a, b) == pytest.approx(_compute_fid(*tensors).item())


def test_fid_needs_no_more_images_than_features(rng):
    a, b = rng.normal(size=(6, 50)), rng.normal(size=(7, 50))
    eigenvalues = linalg.eigvals(np.cov(a.T) @ np.cov(b.T))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    assert frechet_distance(a, b) == pytest.approx(expected - 2 * np.sqrt(eigenvalues.real.clip(0)).sum(), rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kid_is_that_of_torchmetrics(rng):
    a, b = rng.normal(size=(20, 8)), rng.normal(0.3, 1, size=(20, 8))
    expected = poly_mmd(torch.tensor(a), torch.tensor(b), degree=3, gamma=None, coef=1.0).item()
    assert kernel_distance(a, b) == pytest.approx(expected)


def test_kid_is_0_on_average_where_fid_is_not(rng):
    pairs = [(rng.normal(size=(8, 4)), rng.normal(size=(8, 4))) for _ in range(300)]
    kids, fids = [kernel_distance(*pair) for pair in pairs], [frechet_distance(*pair) for pair in pairs]
    assert abs(np.mean(kids)) < 3 * np.std(kids) / 300**0.5
    assert min(kids) < 0 and np.mean(fids) > 1


def test_two_images_of_one_patient_form_no_pair(rng):
    a, b = rng.normal(size=(9, 4)), rng.normal(1, 1, size=(7, 4))
    twice = np.repeat(a, 2, axis=0), np.arange(18) // 2
    assert kernel_distance(twice[0], b, twice[1]) == pytest.approx(kernel_distance(a, b))
    assert kernel_distance(twice[0], b) != pytest.approx(kernel_distance(a, b))
    # between the sets as well: a chest and the same chest healed are near each other, whatever the method did
    assert kernel_distance(a, a + 0.001, range(9), range(9)) == pytest.approx(0, abs=1e-3)
    assert kernel_distance(a, a + 0.001) < -0.5


def test_copies_in_a_replicate_form_no_pair_in_kid(rng):
    features, in_a = rng.normal(size=(24, 4)), np.arange(24) < 12
    statistic = kernel_distance_of(features, in_a, ~in_a, range(24))
    assert statistic(np.full((1, 24), 3.0))[0] == pytest.approx(statistic(np.ones((1, 24)))[0])
    interval = interval_of(statistic, patient_weights(range(24), 500))
    assert interval.low < interval.value < interval.high and interval.undefined == 0
    # copies would push every replicate up: then the interval would lie above the value
    assert np.mean(statistic(patient_weights(range(24), 500))) == pytest.approx(interval.value, abs=0.1)


def test_a_distance_that_is_not_defined_is_nan_and_unequal_features_are_refused(rng):
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(1, 3))
    assert np.isnan(frechet_distance(a, b)) and np.isnan(kernel_distance(a, b))
    with pytest.raises(ValueError, match=r"got \(5, 3\) and \(5, 2\)"):
        frechet_distance(a, a[:, :2])


def test_healed_images_are_called_healthy_and_unchanged_ones_are_not(evaluated):
    assert value(evaluated, "healer", "flip_rate") == 1 and value(evaluated, "healer", "p_healthy_moved") > 0.5
    assert value(evaluated, "harmer", "flip_rate") == 0
    assert value(evaluated, "the input itself", "flip_rate") == 0
    assert value(evaluated, "the input itself", "p_healthy_moved") == 0


def test_healthy_images_keep_their_probability(evaluated):
    assert value(evaluated, "healer", "p_healthy_moved_healthy") == pytest.approx(0, abs=0.02)
    assert value(evaluated, "harmer", "p_healthy_moved_healthy") < -0.5


def test_healed_images_are_nearer_to_healthy_images_than_diseased_ones(evaluated):
    assert value(evaluated, "healer", "kid") < 0.5 * value(evaluated, "the input itself", "kid")
    assert value(evaluated, "healer", "fid") < value(evaluated, "the input itself", "fid")
    assert value(evaluated, "the input, blurred", "kid") > value(evaluated, "healer", "kid")
    split = evaluated.summary["counterfactuals"]["rows"]["healthy, split in two"]
    assert set(split) == {"kid", "fid"} and split["kid"]["value"] < value(evaluated, "the input itself", "kid")


def test_the_judges_columns_are_its_own_probabilities(evaluated, judge):
    table = evaluated.per_image[evaluated.per_image.method == "healer"]
    images = [row["image"] for row in (*spot_rows(14), *spot_rows(2, spot=False, dark=61), *spot_rows(12, spot=False))]
    pixels = torch.stack([torch.from_numpy(np.asarray(p, np.float32) / 255)[None] for p in images])
    healed = torch.where(pixels > 0.3, torch.tensor(0.2), pixels)
    with torch.no_grad():
        before, after = (judge.classifier(2 * x - 1).logits.softmax(1)[:, 0].numpy() for x in (pixels, healed))
    assert table.p_healthy.to_numpy() == pytest.approx(before, abs=2e-3)  # kept in half precision
    assert table.p_healthy_counterfactual.to_numpy() == pytest.approx(after, abs=2e-3)
    called = before[:16] < 0.5
    assert table.flipped.iloc[:16].isna().tolist() == (~called).tolist() and table.flipped.iloc[16:].isna().all()
    section = evaluated.summary["counterfactuals"]
    assert section["n_called_diseased"]["healer"] == called.sum() == 14
    assert section["n_diseased"] == 16 and section["n_healthy"] == 12
    assert section["judge_auroc"]["healer"] == pytest.approx(image_auroc(1 - before, [1] * 16 + [0] * 12))
    assert value(evaluated, "healer", "p_healthy_moved") == pytest.approx((after - before)[:16].mean(), abs=2e-3)


def test_features_are_the_input_of_the_last_layer(judge):
    images = [np.asarray(row["image"], np.float32) / 255 for row in spot_rows(3)]
    probabilities, features = classify_images(judge, images)
    layer = judge.classifier.classifier[-1]
    logits = torch.tensor(features, dtype=torch.float32) @ layer.weight.data.T + layer.bias.data
    assert logits.softmax(1).numpy() == pytest.approx(probabilities, abs=1e-5)


def test_a_judge_in_training_mode_judges_as_any_other(judge):
    images = [np.asarray(row["image"], np.float32) / 255 for row in spot_rows(3)]
    expected = classify_images(judge, images)[0]
    judge.components["classifier"].train()
    try:
        np.testing.assert_allclose(classify_images(judge, images)[0], expected, atol=1e-6)
    finally:
        judge.components["classifier"].eval()


def test_a_counterfactual_is_stretched_like_its_image(judge):
    stretching = GradCAMPipeline(judge.classifier, sample_size=32, scaling="minmax")
    image = np.asarray(spot_rows(1)[0]["image"], np.float32) / 255
    low, high = image.min(), image.max()
    darker = 0.9 * image
    _, features = classify_images(stretching, [darker], [image])
    _, expected = classify_images(judge, [((darker - low) / (high - low)).clip(0, 1)])
    assert features == pytest.approx(expected, abs=1e-5)
    _, alone = classify_images(stretching, [darker])
    assert alone != pytest.approx(expected, abs=1e-2)


def test_methods_without_a_counterfactual_or_guided_by_the_judge_are_not_judged(evaluated, judge):
    section = evaluated.summary["counterfactuals"]
    assert section["not_measured"] == {"nothing": "it has no counterfactual"} and "nothing" not in section["rows"]
    assert evaluated.per_image[evaluated.per_image.method == "nothing"].p_healthy.isna().all()
    assert is_its_own_judge(GradCAMPipeline(judge.classifier, sample_size=16), judge)
    assert not is_its_own_judge(GradCAMPipeline(toy_resnet(), sample_size=16), judge)
    assert not is_its_own_judge(Healer(), judge)

    class Guided(Healer):
        components = {"classifier": judge.classifier}

    result = evaluate(Guided(), spot_rows(4), judge=judge, n_bootstrap=5, progress=False)
    assert result.summary["counterfactuals"]["not_measured"] == {"method": "the judge is its own classifier"}
    assert set(result.summary["counterfactuals"]["rows"]["method"]) == {"psnr_outside", "ssim_outside"}


def test_without_a_judge_only_similarity_is_measured():
    result = evaluate(Harmer(), spot_rows(8), n_bootstrap=50, progress=False)
    section = result.summary["counterfactuals"]["rows"]
    assert set(section) == {"method"} and set(section["method"]) == {"psnr_outside", "ssim_outside"}
    assert "p_healthy" not in result.per_image
    for name, interval in section["method"].items():
        expected = interval_of(
            mean_of(result.per_image[name]), patient_weights([row["patient"] for row in spot_rows(8)], 50, 0)
        )
        assert interval == expected._asdict() and interval["low"] < interval["value"] < interval["high"], name
    assert "| PSNR outside (dB) | SSIM outside |" in counterfactual_table(result)
    assert "flip rate" not in counterfactual_table(result)
    assert counterfactual_table(evaluate(BrightSpots(), spot_rows(3), n_bootstrap=5, progress=False)) == ""


def test_the_data_sets_own_healthy_images_come_first(judge):
    dataset = spot_rows(6) + spot_rows(5, spot=False)
    section = evaluate(Healer(), dataset, healthy=spot_rows(9, spot=False), judge=judge, n_bootstrap=5, progress=False)
    assert section.summary["counterfactuals"]["n_healthy"] == 5
    alone = evaluate(Healer(), spot_rows(6), judge=judge, n_bootstrap=5, progress=False)
    assert alone.summary["counterfactuals"]["n_healthy"] == 0 and "kid" not in alone.summary["counterfactuals"]["rows"]


def test_the_table_names_the_judge_and_the_methods_not_judged(evaluated, tmp_path):
    text = counterfactual_table(evaluated)
    assert "| counterfactuals | flip rate |" in text and "Judge: GradCAMPipeline." in text
    assert "Not judged: nothing, it has no counterfactual." in text
    read = json.loads(json.dumps(evaluated.summary, default=float))
    assert counterfactual_table(read) == text
    assert counterfactual_table({"settings": {}}) == ""  # written by an older version


def test_a_judge_without_an_image_classifier_is_refused(pipeline):
    with pytest.raises(ValueError, match="judge with an image classifier of transformers.*got a CFGAnomalyPipeline"):
        evaluate(BrightSpots(), spot_rows(2), judge=pipeline, progress=False)


def test_the_shipped_classifier_is_a_judge():
    judge = load_pipeline("cxr_grad_cam_128")
    check_judge(judge)
    assert name_of(judge) == "cxr_grad_cam_128"
    probabilities, features = classify_images(
        judge, [np.asarray(row["image"], np.float32) / 255 for row in spot_rows(2)]
    )
    assert probabilities.shape == (2, 3) and features.shape == (2, 192) and judge.class_names[0] == "healthy"
