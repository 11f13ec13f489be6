"""The models and the samples that are shipped with the package."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from cxr_diffusers import (
    CFGAnomalyPipeline,
    FixedPointGANPipeline,
    default_checkpoint,
    evaluate,
    load_table,
    publish,
    read_image,
)
from cxr_diffusers.data import list_images
from cxr_diffusers.hub.loading import CHECKPOINTS, load_pipeline
from cxr_diffusers.hub.model_card import HEADLINES

PIPELINES = sorted(path.parent for path in Path(default_checkpoint()).parent.glob("*/model_index.json"))
SAMPLES = Path(default_checkpoint()).parent.parent / "samples"
IMPLANTS = Path(__file__).parent.parent.parent / "shared" / "cxr" / "val_implants"


@pytest.fixture(scope="module")
def shipped():
    pipeline = CFGAnomalyPipeline.from_pretrained(default_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_default_model_is_small_and_its_card_complete():
    folder = Path(default_checkpoint())
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 34e6
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    card = " ".join((folder / "README.md").read_text().split())
    assert "Research use only" in card and "NIH Clinical Center" in card and "model-index" in card


def samples(n):
    return [read_image(path) for path in list_images(SAMPLES)[:n]]


def test_its_own_settings_cost_as_many_forwards_as_the_docs_say(shipped):
    count = []
    hook = shipped.unet.register_forward_pre_hook(lambda unet, args: count.append(len(args[0])))
    output = shipped(samples(1), output_type="np")
    hook.remove()
    assert sum(count) == 49 + 6  # docs/method.md; six to estimate the view
    assert shipped.config.map_threshold < output.anomaly_map.max()


FEW_STEPS = {"num_inference_steps": 8, "evidence": 0.0, "score": "map"}


def test_a_call_with_other_settings(shipped):
    output = shipped(samples(1), guidance_scale=4, noise_level=500, **FEW_STEPS)
    assert output.anomaly_map[0].size == (128, 128)


def test_a_shipped_model_is_not_published_without_its_code():
    with pytest.raises(ValueError, match="push_to_hub"):
        publish(default_checkpoint(), "me/model")


@pytest.mark.slow
@pytest.mark.skipif(not IMPLANTS.is_dir(), reason="the validation radiographs are not beside the project")
def test_a_shipped_model_is_significantly_better_than_chance_and_its_mean_map(shipped):
    torch.set_num_threads(2)
    columns = {"patient": "patient_id", "view": "view"}
    implants = load_table(IMPLANTS / "val_implants.csv", label="diseased", mask="mask", **columns)
    rows = evaluate(shipped, implants).summary["rows"]
    method = rows["method"]["pixel_ap"]
    assert method["low"] > rows["chance"]["pixel_ap"]["high"]
    assert method["low"] > rows["mean map"]["pixel_ap"]["high"]


@pytest.mark.parametrize("name", ["cxr_classifier_128", "cxr_grad_cam_128", "cxr_pyramid_128"])
def test_the_other_models_open_by_their_names_and_have_complete_cards(name):
    folder = Path(default_checkpoint(name))
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    card = " ".join((folder / "README.md").read_text().split())
    assert "Research use only" in card and "NIH Clinical Center" in card and "model-index" in card
    pipeline = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.class_names == ["healthy", "pleural effusion", "other finding"]
    assert pipeline.classifier.dtype == torch.float32, "stored in half precision, used in single"
    output = pipeline(samples(1), output_type="np")
    assert 0 < pipeline.config.map_threshold < output.anomaly_map.max()


@pytest.mark.parametrize("index", sorted(CHECKPOINTS.glob("*/model_index.json")), ids=lambda path: path.parent.name)
def test_a_card_lists_the_settings_of_its_model(index):
    settings = json.loads(index.read_text()).get("settings") or {}
    card = (index.parent / "README.md").read_text()
    assert [name for name, value in settings.items() if f"`{name}={value!r}`" not in card] == []


def test_a_classifier_guides_the_one_unet_to_higher_probability_of_healthy(shipped):
    pipeline = load_pipeline("cxr_classifier_128")
    pipeline.set_progress_bar_config(disable=True)
    for ours, theirs in zip(pipeline.unet.parameters(), shipped.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    probabilities = []
    for scale in (0.0, 50.0):
        output = pipeline(samples(1), classifier_scale=scale, num_inference_steps=10, output_type="pt")
        with torch.no_grad():
            logits = pipeline.classifier(2 * output.counterfactual - 1, 0)
        probabilities.append(logits.softmax(dim=1)[0, 0])
    assert probabilities[1] > probabilities[0] + 0.03


def test_all_that_is_shipped_stays_small():
    shipped = Path(default_checkpoint()).parent
    assert {p.parent.name for p in shipped.glob("*/model_index.json")} == {
        "cxr_cfg_128",
        "cxr_classifier_128",
        "cxr_fixed_point_gan_128",
        "cxr_grad_cam_128",
        "cxr_pyramid_128",
    }
    assert sum(p.stat().st_size for p in shipped.rglob("*") if p.is_file()) < 60e6
    with pytest.raises(ValueError, match="cxr_cfg_128, cxr_classifier_128"):
        default_checkpoint("cxr_cfg_256")


def check_figures(card):
    """Each table's first row is the model's, and its figures are those of the YAML."""
    for data in {result.dataset_name for result in card.data.eval_results}:
        results = [result for result in card.data.eval_results if result.dataset_name == data]
        figures = {result.metric_type: result.metric_value for result in results}
        of_regions = {"pixel_ap", "pixel_auroc"} if data != "readings" else set()  # radiologists' words, without boxes
        assert set(card.data.metrics) >= set(figures) >= {"image_auroc"} | of_regions
        text = card.text[card.text.index(f"On {data}:") :]
        table = text[text.index("\n|  | ") + 1 :].splitlines()
        names, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in (table[0], table[2]))
        cells = dict(zip(names, row, strict=True))
        for name, value in figures.items():
            assert float(cells[HEADLINES[name]].split()[0]) == pytest.approx(value, abs=6e-4)


@pytest.mark.parametrize("folder", PIPELINES, ids=lambda folder: folder.name)
def test_a_card_has_the_metadata_of_the_hub_and_its_sections(folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "image-to-image", "apache-2.0")
    assert {"chest-x-ray", "radiology", "cxr_diffusers"} < set(data.tags) and data.datasets == ["nih-chestx-ray14"]
    if "Not evaluated yet." in card.text:  # then no figure may be claimed
        assert not data.eval_results and "| pixel AP |" not in card.text
    else:
        check_figures(card)
    assert "Not a medical device" in card.text and "## Training" in card.text
    for image in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (folder / image).is_file()
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(code, folder.name, "exec")
    assert code.count("\n") <= 5 and f'from_pretrained("{folder.name}", trust_remote_code=True)' in code


def test_the_fixed_point_gan_is_small_opens_by_its_name_and_states_its_limits():
    folder = Path(default_checkpoint("cxr_fixed_point_gan_128"))
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 8e6
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    card = " ".join((folder / "README.md").read_text().split())
    assert "Research use only" in card and "patent" in card and "200,000 updates" in card
    gan = load_pipeline(str(folder))
    assert isinstance(gan, FixedPointGANPipeline) and gan.class_names == [
        "healthy",
        "pleural effusion",
        "other finding",
    ]
    images = samples(6)
    healthy, ill = (gan(images, target_label=k, output_type="np") for k in (0, 1))
    assert abs(healthy.counterfactual - healthy.image).mean() < 0.05, "the same chest, but for what changed"
    # the classes differ in the interior, not at the border alone
    assert abs(healthy.counterfactual - ill.counterfactual)[:, 32:96, 32:96].mean() > 0.01
    assert 0 < gan.config.map_threshold < healthy.anomaly_map.max()


def test_each_model_card_shows_how_to_open_the_model():
    for folder in PIPELINES:
        assert f'`load_pipeline("{folder.name}")`' in (folder / "README.md").read_text()
