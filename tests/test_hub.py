"""Publishing, against a stand-in Hub on 127.0.0.1, and the card that goes with a model."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, GradCAMPipeline, default_checkpoint
from cxr_diffusers.evaluation.predictions import Method
from cxr_diffusers.evaluation.tables import describe_method
from cxr_diffusers.files import as_json
from cxr_diffusers.fingerprints import weights_digest
from cxr_diffusers.hub.loading import load_pipeline, load_unet
from cxr_diffusers.hub.model_card import describe_training, write_model_card
from cxr_diffusers.hub.publishing import publish, uploading
from cxr_diffusers.inference.reference_scores import ReferenceScores, keep_scores
from helpers import toy_resnet
from local_hub import local_hub, run_script

FAST = dict(num_inference_steps=20, noise_level=300, guidance_scale=2.0, output_type="pt")
TRAINING = "Phantoms, drawn by the package (Apache-2.0); 10 steps, seed 0."


def interval(value):
    return {"value": value, "low": value, "high": value, "undefined": 0}


def described(pipeline, **call_kwargs):
    """A method in the settings of `evaluate`'s summary."""
    return json.loads(json.dumps(as_json(describe_method(Method("x", pipeline, call_kwargs)))))


def summary(pipeline, name="method", **others):
    """The part of `evaluate`'s summary.json that a card shows; one figure is undefined, one no headline.

    others: {name of another method: (its description, its AUROC)}, which come first.
    """
    method = {"pixel_ap": interval(0.25), "dice": interval(None), "iou": interval(0.1), "image_auroc": interval(0.75)}
    rows = {other: {"image_auroc": interval(auroc)} for other, (_, auroc) in others.items()} | {name: method}
    return {
        "settings": {"methods": {k: v for k, (v, _) in others.items()} | {name: described(pipeline)}},
        "n_images": 12,
        "n_patients": 10,
        "n_with_region": 5,
        "n_healthy": 7,
        "method": next(iter(rows.values())),
        "rows": {**rows, "chance": {"pixel_ap": interval(0.125)}},
        "differences": {f"{next(iter(rows))} - chance": {"image_auroc": interval(0.625)}},
        "strata": {},
    }


@pytest.fixture
def folder(pipeline, tmp_path):
    """A pipeline's folder with a card and an image, and the other files of a training run."""
    folder = tmp_path / "run"
    pipeline.save_pretrained(folder)
    Image.new("L", (8, 8)).save(folder / "example.png")
    write_model_card(folder, training=TRAINING, image="example.png")
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
        try:  # what is there and public is not made private by saying so
            publish("run", "me/model", private=True)
        except PermissionError as error:
            public = str(error)
        CFGAnomalyPipeline.from_pretrained("run").push_to_hub("me/other")
        load_pipeline("me/other").push_to_hub("me/third")
        reference_of = references({{"one": hers, "other": load_pipeline("me/third")}})
        healthy = [reference_of("one").scores, reference_of("one").fits(hers, {{}}), reference_of("other")]
        try:
            load_pipeline("me/typo")
        except FileNotFoundError as error:
            print(json.dumps([address, again, healthy, str(error), public]))
    """
    with local_hub() as hub:
        addresses = run(hub, at_home, tmp_path)
        published, card = hub.files("me/model"), hub.files("me/trained")["README.md"]
        pushed = {name: hub.files(f"me/{name}") for name in ("other", "third")}

    for anomaly_map in torch.load(tmp_path / "home.pt"):
        torch.testing.assert_close(anomaly_map, expected)
    assert "/me/model/commit/" in addresses[0] and "/me/trained/commit/" in addresses[1]

    code = {name for name in published if name.endswith(".py")}
    assert sum(name.startswith("pipeline_cfg_anomaly_") for name in code) == 1 and len(code) > 1  # and its siblings
    model = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    assert set(published) == {"model_index.json", "README.md", "example.png", "healthy_scores.json"} | model | code
    assert addresses[4].startswith("me/model exists and is public: make it private on the Hub first")
    assert addresses[2] == [[0.25], True, None], "the scores of healthy images go out with the model"
    assert addresses[3].startswith("no folder me/typo here, and no repository me/typo on the")
    # `push_to_hub` of a pipeline that was loaded takes the card and its image along, from a folder or from the Hub
    for name, files in pushed.items():
        assert (
            set(files) >= set(published) - {"healthy_scores.json"} and files["example.png"] == published["example.png"]
        )
        assert (
            b"Phantoms, drawn by the package" in files["README.md"] and f'("me/{name}", '.encode() in files["README.md"]
        )
    # the example in the card is the one to be copied, whatever the name that it was written for
    assert b'from_pretrained("me/model", trust' in published["README.md"] and b'("me/trained", trust' in card


def test_a_card_has_metadata_for_the_hub_and_the_measured_figures(pipeline, folder):
    write_model_card(
        folder, training=TRAINING, evaluation=summary(pipeline), evaluated_on="Phantoms, validation", name="me/model"
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
    assert "IoU" not in card.text and "region, and 7 healthy images beside them. Brackets" in card.text
    write_model_card(folder, training=TRAINING, evaluation=summary(pipeline) | {"n_healthy": 0})
    assert "with a known abnormal region. Brackets" in (folder / "README.md").read_text()


def other_weights(pipeline):
    """The description of a model of the same class and settings with other weights."""
    return {**described(pipeline), "weights": "0" * 32}


def test_a_card_has_the_figures_of_its_own_weights_in_a_report_of_several_models(pipeline, folder, tmp_path):
    report = summary(pipeline, "mine", theirs=(other_weights(pipeline), 0.9))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(json.dumps(report))
    write_model_card(folder, training=TRAINING, evaluation=tmp_path / "report")
    card = ModelCard.load(folder / "README.md")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"pixel_ap": 0.25, "image_auroc": 0.75}
    assert "This model is the row `mine`. Other models: `theirs`." in card.text
    assert "0.625" not in card.text, "the difference of another model to chance"


def test_a_card_reads_every_data_set_of_a_plan(pipeline, folder, tmp_path):
    for name in ("lesions", "nih"):
        (tmp_path / "plan" / name).mkdir(parents=True)
        (tmp_path / "plan" / name / "summary.json").write_text(json.dumps(summary(pipeline)))
    write_model_card(folder, training=TRAINING, evaluation=tmp_path / "plan")
    card = ModelCard.load(folder / "README.md")
    assert {r.dataset_name for r in card.data.eval_results} == {"lesions", "nih"}
    assert card.data.metrics == ["pixel_ap", "image_auroc"] and "On lesions: " in card.text and "On nih: " in card.text
    with pytest.raises(FileNotFoundError, match="expected a folder written by evaluate, got .*run without"):
        write_model_card(folder, training=TRAINING, evaluation=folder)


def test_an_evaluation_of_another_model_or_of_this_one_twice_is_refused(pipeline, folder):
    before = (folder / "README.md").read_text()
    report = summary(pipeline)
    report["settings"]["methods"]["method"] = other_weights(pipeline)
    with pytest.raises(ValueError, match="expected an evaluation of this model, got one of method with other weights"):
        write_model_card(folder, training=TRAINING, evaluation=report)
    with pytest.raises(ValueError, match="expected one row of this model in the evaluation, got 2: again, method"):
        write_model_card(folder, training=TRAINING, evaluation=summary(pipeline, again=(described(pipeline), 0.9)))
    report["settings"]["methods"]["method"].pop("weights")
    with pytest.raises(ValueError, match="names no weights"):
        write_model_card(folder, training=TRAINING, evaluation=report)
    assert (folder / "README.md").read_text() == before


def test_of_two_rows_of_a_model_the_card_takes_the_one_with_its_own_settings(pipeline, folder):
    report = summary(pipeline, harder=(described(pipeline, guidance_scale=9), 0.9))
    write_model_card(folder, training=TRAINING, evaluation=report)
    assert ModelCard.load(folder / "README.md").data.eval_results[1].metric_value == 0.75
    del report["settings"]["methods"]["method"]
    write_model_card(folder, training=TRAINING, evaluation=report)
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == 0.9 and "called with `guidance_scale=9`." in card.text


def test_a_card_written_while_a_run_saves_has_the_name_of_the_run(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "run" / ".saving")
    write_model_card(tmp_path / "run" / ".saving", training=TRAINING)
    text = (tmp_path / "run" / ".saving" / "README.md").read_text()
    assert "\n# run\n" in text and ".saving" not in text


def test_a_card_of_a_run_names_no_file_or_folder_of_this_machine():
    data = {"name": "table", "csv": "val.csv", "root": "images", "gates": {"path": "x"}, "holdout": ["/home/a/b.txt"]}
    train = SimpleNamespace(max_steps=5, batch_size=2, seed=0, init_from=None)
    recipe = SimpleNamespace(train=train, data={**data, "classes": ["healthy", "mass"], "size": 64})
    text = describe_training(recipe, 64, 7)
    assert text.startswith("7 images (name=table, classes=['healthy', 'mass'], size=64), 64 x 64 pixels;")
    recipe.data = {"name": "hub", "path": "me/phantoms"}
    assert "(name=hub, path=me/phantoms)" in describe_training(recipe, 64, 7)


@pytest.mark.parametrize(
    ("init_from", "words"),
    [("cxr_cfg_128", "cxr_cfg_128"), ("me/model", "me/model"), ("/home/a/b", "another model"), ("runs/a", "another")],
)
def test_a_card_of_a_run_says_that_it_started_from_another_model(init_from, words):
    train = SimpleNamespace(max_steps=5, batch_size=2, seed=0, init_from=init_from, gradient_accumulation_steps=4)
    text = describe_training(SimpleNamespace(train=train, data={"name": "phantom"}), 64, 7)
    assert f"started from the weights of {words}" in text and "home" not in text and "runs" not in text
    assert "up to 5 steps of batch 4 x 2 per process" in text


def test_a_card_without_figures_claims_none(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None and "Not evaluated yet." in card.text
    assert "![input, counterfactual, anomaly map](example.png)" in card.text


def test_the_card_of_a_method_without_counterfactual_promises_none(tmp_path):
    folder = tmp_path / "cam"
    GradCAMPipeline(toy_resnet(), sample_size=16, class_names=["healthy", "ill"]).save_pretrained(folder)
    Image.new("L", (9, 9)).save(folder / "example.png")
    write_model_card(folder, training=TRAINING, image="example.png")
    text = (folder / "README.md").read_text()
    assert "![input, anomaly map](example.png)" in text and "`counterfactual` (the image: this method makes" in text


def test_a_card_with_a_missing_image_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        write_model_card(folder, training=TRAINING, image="missing.png")


def test_a_folder_without_model_or_card_is_not_published(folder, tmp_path):
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


def test_a_failed_upload_is_one_line_and_leaves_no_empty_repository(folder, tmp_path):
    """The stand-in has no Xet, so that an upload fails in hf_xet; all other tests do what the line advises."""
    pytest.importorskip("hf_xet")
    script = """if True:
        import contextlib, sys
        from cxr_diffusers.cli import main
        with contextlib.redirect_stderr(sys.stdout):
            print(main(["publish", "run", "me/model"]))
    """
    with local_hub() as hub:
        with_xet = SimpleNamespace(environment={**hub.environment, "HF_HUB_DISABLE_XET": "0"})
        message, code = run_script(with_xet, script, tmp_path, lines=2)
        assert message.startswith("cxr-diffusers publish: upload to me/model failed: expected an upload by Xet, got ")
        assert message.endswith("to upload without Xet, set HF_HUB_DISABLE_XET=1") and code == "2"
        assert not hub.repositories, "an empty repository is deleted again"


def test_errors_of_an_upload_say_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def fails(error, **options):
        api = HfApi(**{"endpoint": hub.address, "token": "t", **options})
        with pytest.raises((OSError, ValueError)) as raised, uploading(api, "me/model") as repo_id:
            if error == "card":
                api.upload_file(path_or_fileobj=b"card", path_in_repo="README.md", repo_id=repo_id)
                raise RuntimeError("cut")
            raise error
        assert "\n" not in str(raised.value)
        return str(raised.value)

    with local_hub() as hub:
        assert "401 Unauthorized: run `hf auth login`, or set HF_TOKEN" in fails(None, token=False)
        assert "an answer of http://127.0.0.1:9, got " in fails(None, endpoint="http://127.0.0.1:9")
        assert fails(ValueError("of the arguments")) == "of the arguments"
        assert fails(FileNotFoundError(2, "no such file", "x.png")) == "[Errno 2] no such file: 'x.png'"
        assert not hub.repositories
        HfApi(endpoint=hub.address, token="t").create_repo("me/model")
        fails(ValueError("of the arguments"))
        assert hub.repositories, "a repository that was there before stays"
        HfApi(endpoint=hub.address, token="t").delete_repo("me/model")
        assert fails("card").endswith("The repository me/model exists now; the same command continues")
        assert set(hub.files("me/model")) == {"README.md"}
        assert "exists now" not in fails(RuntimeError("cut")), "it was there before"
        assert set(hub.files("me/model")) == {"README.md"}


def test_a_model_opens_as_the_class_in_its_index(folder):
    assert type(load_pipeline(folder)) is CFGAnomalyPipeline
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "DDIMPipeline"}))
    with pytest.raises(ValueError, match="expected a .*CFGAnomalyPipeline.* got a DDIMPipeline"):
        load_pipeline(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "."])
def test_a_missing_model_is_named(name):
    with pytest.raises(FileNotFoundError, match="model_index.json or a Hub name"):
        load_pipeline(name)


def test_a_mistyped_shipped_model_is_answered_with_those_that_are_shipped():
    for load in (load_pipeline, load_unet):
        with pytest.raises(FileNotFoundError, match="got cxr_cgf_128, .*; the shipped models are cxr_cfg_128, cxr_cl"):
            load("cxr_cgf_128")


def test_a_mistyped_folder_is_named_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/typo", "models/typo"):
        if name.startswith("models"):
            (tmp_path / "models").mkdir()
        for load in (load_pipeline, load_unet):
            with pytest.raises(FileNotFoundError, match=f"USER/NAME, got {name}, and there is no such folder"):
                load(name)


def test_a_hub_that_does_not_answer_is_named_within_seconds(tmp_path):
    """At a closed port, huggingface_hub alone tries for 23 seconds."""
    script = """if True:
        import time
        import diffusers, cxr_diffusers.pipelines, cxr_diffusers.models.space_to_depth_unet
        from cxr_diffusers.commands.evaluate import open_lung_segmenter
        from cxr_diffusers.data import load_hub
        from cxr_diffusers.hub.loading import load_pipeline, load_unet
        from cxr_diffusers.inference.reference_scores import kept_scores
        def load_stream(name):
            return load_hub(name, streaming=True)
        start = time.monotonic()
        assert kept_scores("me/model") is None
        for load in (load_pipeline, load_unet, open_lung_segmenter, load_hub, load_stream):
            try:
                load("me/model")
            except FileNotFoundError as error:
                print(error)
        print(time.monotonic() - start)
    """
    closed = SimpleNamespace(environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    *messages, seconds = run_script(closed, script, tmp_path, lines=6)
    assert float(seconds) < 10
    for message in messages:
        assert message.startswith("no folder me/model here, and http://127.0.0.1:9, where"), message


def test_training_can_start_from_a_saved_unet(pipeline, folder):
    for ours, theirs in zip(pipeline.unet.parameters(), load_unet(folder).parameters(), strict=True):
        assert torch.equal(ours, theirs)
    config = json.loads((Path(default_checkpoint()) / "unet" / "config.json").read_text())
    assert load_unet("default").config.sample_size == config["sample_size"]
