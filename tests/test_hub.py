"""Publishing, against a stand-in Hub on 127.0.0.1, and the card that goes with a model."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline
from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import weights_digest
from cxr_diffusers.hub.loading import load_pipeline, load_unet
from cxr_diffusers.hub.model_card import write_model_card
from cxr_diffusers.hub.publishing import publish
from cxr_diffusers.inference.reference_scores import ReferenceScores, keep_scores
from local_hub import local_hub, run_script

FAST = dict(num_inference_steps=20, noise_level=300, guidance_scale=2.0, output_type="pt")
TRAINING = "Phantoms, drawn by the package (Apache-2.0); 10 steps, seed 0."


def interval(value):
    return {"value": value, "low": value, "high": value, "undefined": 0}


def summary():
    """The part of `evaluate`'s summary.json that a card shows; one figure is undefined, one no headline."""
    method = {"pixel_ap": interval(0.25), "dice": interval(None), "iou": interval(0.1), "image_auroc": interval(0.75)}
    return {
        "n_images": 12,
        "n_patients": 10,
        "n_with_region": 5,
        "n_healthy": 7,
        "method": method,
        "rows": {"method": method, "chance": {"pixel_ap": interval(0.125)}},
        "differences": {},
        "strata": {},
    }


@pytest.fixture
def folder(pipeline, tmp_path):
    """A pipeline's folder with a card and a picture, and around it what a training run leaves there."""
    folder = tmp_path / "run"
    pipeline.save_pretrained(folder)
    Image.new("L", (8, 8)).save(folder / "example.png")
    write_model_card(folder, training=TRAINING, picture="example.png")
    for name in ("checkpoint-0000010/model.safetensors", "validation/step-10.png", "logs/events", "log.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stays at home")
    for name in ("run.json", "notes.md", "patient_4711.png", "own.py"):
        (folder / name).write_text("of nobody's business")
    for name in (".saving/model_index.json", "unet/config.json.tmp", ".README.md.1.tmp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half-written")
    return folder


def run(hub, script, cwd):
    """A script's last line, as JSON."""
    return json.loads(run_script(hub, script, cwd))


def test_a_published_model_runs_from_the_hub_and_takes_its_card_along(pipeline, images, folder, tmp_path):
    expected = pipeline(images, **FAST).anomaly_map
    torch.save(images, tmp_path / "images.pt")
    keep_scores(ReferenceScores("toys", as_json(pipeline.settings()), [0.25], weights_digest(pipeline)), folder)
    at_home = f"""if True:
        import json, torch
        from cxr_diffusers import CFGAnomalyPipeline, publish
        from cxr_diffusers.demo.serve import references
        from cxr_diffusers.hub.loading import load_pipeline
        images = torch.load("images.pt")
        address = publish("run", "me/model")
        hers = CFGAnomalyPipeline.from_pretrained("me/model")
        torch.save([p(images, **{FAST}).anomaly_map for p in (hers, load_pipeline("me/model"))], "home.pt")
        again = publish("run", "trained", private=True)
        CFGAnomalyPipeline.from_pretrained("run").push_to_hub("me/other")
        load_pipeline("me/other").push_to_hub("me/third")
        reference_of = references({{"one": hers, "other": load_pipeline("me/third")}})
        healthy = [reference_of("one").scores, reference_of("one").fits(hers, {{}}), reference_of("other")]
        print(json.dumps([address, again, healthy]))
    """
    with local_hub() as hub:
        addresses = run(hub, at_home, tmp_path)
        published, card = hub.files("me/model"), hub.files("me/trained")["README.md"]
        pushed = {name: hub.files(f"me/{name}") for name in ("other", "third")}

    for found in torch.load(tmp_path / "home.pt"):
        torch.testing.assert_close(found, expected)
    assert "/me/model/commit/" in addresses[0] and "/me/trained/commit/" in addresses[1]

    code = {name for name in published if name.endswith(".py")}
    assert sum(name.startswith("pipeline_cfg_anomaly_") for name in code) == 1 and len(code) > 1  # and its siblings
    model = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    assert set(published) == {"model_index.json", "README.md", "example.png", "healthy_scores.json"} | model | code
    assert addresses[2] == [[0.25], True, None], "the scores of healthy images go out with the model"
    # `push_to_hub` of a pipeline that was loaded takes the card and its picture along, from a folder or from the Hub
    for name, files in pushed.items():
        assert (
            set(files) >= set(published) - {"healthy_scores.json"} and files["example.png"] == published["example.png"]
        )
        assert (
            b"Phantoms, drawn by the package" in files["README.md"] and f'("me/{name}", '.encode() in files["README.md"]
        )
    # the example in the card is the one to be copied, whatever the name that it was written for
    assert b'from_pretrained("me/model", trust' in published["README.md"] and b'("me/trained", trust' in card


def test_a_card_has_metadata_that_the_hub_reads_and_figures_as_they_were_measured(folder):
    write_model_card(
        folder, training=TRAINING, evaluation=summary(), evaluated_on="Phantoms, validation", name="me/model"
    )
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "diffusers"
    assert card.data.metrics == ["pixel_ap", "image_auroc"]
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"pixel_ap": 0.25, "image_auroc": 0.75}
    assert {r.dataset_name for r in card.data.eval_results} == {"Phantoms, validation"}
    assert card.data.to_dict()["model-index"][0]["name"] == "model"
    for wanted in (
        'from_pretrained("me/model", trust_remote_code=True)',
        TRAINING,
        "Research use only",
        "not for diagnosis",
        "healthy, pleural effusion",
        "12 images of 10 patients",
        "| method | 0.250 [0.250, 0.250] |",
        "| chance | 0.125 [0.125, 0.125] |",
    ):
        assert wanted in card.text, wanted
    assert "IoU" not in card.text


def test_a_card_reads_what_evaluate_wrote(folder, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(json.dumps(summary()))
    write_model_card(folder, training=TRAINING, evaluation=tmp_path / "report")
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_value == 0.25


def test_a_card_without_figures_claims_none(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None and "Not evaluated yet." in card.text
    assert "![input, counterfactual, anomaly map](example.png)" in card.text


def test_a_card_shows_no_picture_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        write_model_card(folder, training=TRAINING, picture="missing.png")


def test_nothing_is_published_that_was_not_saved_or_has_no_card(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        publish(tmp_path, "me/model")
    (folder / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match="README.md"):
        publish(folder, "me/model")


def test_an_export_is_not_published_since_it_would_not_open(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "README.md").write_text("a card")
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["exported_net_1a2b3c4d", "ExportedNet"]}))
    with pytest.raises(ValueError, match="is an export, which does not open from the Hub"):
        publish(folder, "me/model")


def test_a_model_opens_by_the_class_that_it_names(folder):
    assert type(load_pipeline(folder)) is CFGAnomalyPipeline
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDIMPipeline"}))
    with pytest.raises(ValueError, match="expected a .*CFGAnomalyPipeline.* got a DDIMPipeline"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "."])
def test_what_is_no_model_is_named(name):
    with pytest.raises(FileNotFoundError, match="model_index.json or a Hub name"):
        load_pipeline(name)


def test_training_can_start_from_a_saved_unet(pipeline, folder):
    for ours, theirs in zip(pipeline.unet.parameters(), load_unet(folder).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_unet("default").config.sample_size == 64
