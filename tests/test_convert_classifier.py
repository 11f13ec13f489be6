"""The converter of encoder classifiers: exact where it converts, by name where it does not, and paired with a model."""

import json

import pytest
import torch
from goldens.original_unet import OriginalClassifier

from cxr_diffusers import ClassifierGuidedPipeline, NoisyClassifier
from cxr_diffusers.cli import main
from cxr_diffusers.guided_diffusion import convert_checkpoint, convert_state_dict
from helpers import flags_of, random_original

torch.set_num_threads(1)

CONFIGURATIONS = {
    "as all originals build it": dict(mult=(1, 2), attention=(0, 1), scale_shift=True, updown=True),
    "two residual blocks, three levels": dict(
        mult=(1, 2, 3), attention=(1, 2), res_blocks=2, scale_shift=True, updown=True
    ),
    "resampling by convolutions, no scale and shift": dict(mult=(1, 2), attention=(1,)),
    "the mean as its pool": dict(mult=(1, 2), attention=(1,), updown=True, pool="adaptive"),
    "four channels, three classes": dict(
        mult=(1, 2), attention=(1,), scale_shift=True, updown=True, in_channels=4, out_channels=3
    ),
    "no attention but the pool's": dict(mult=(1, 2), attention=(), scale_shift=True, updown=True),
}


def random_classifier(side=16, **configuration):
    net = OriginalClassifier(**{"head_channels": 16, **configuration})
    net(torch.zeros(1, net.in_channels, side, side), torch.zeros(1))
    return net


def convert(net, **flags):
    return convert_state_dict(net.tensors, **{"classifier_num_head_channels": 16, **flags})


@pytest.fixture
def net():
    return random_classifier(**CONFIGURATIONS["two residual blocks, three levels"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_converted_classifier_computes_what_the_original_did(name):
    net = random_classifier(**CONFIGURATIONS[name])
    told = {"image_size": 16, "classifier_depth": net.res_blocks} if net.pool == "adaptive" else {}
    classifier, scheduler, info = convert(net, **told)
    x, t = torch.randn(3, net.in_channels, 16, 16, generator=net.random), torch.tensor([0, 437, 999])
    with torch.no_grad():
        torch.testing.assert_close(classifier(x, t), net(x, t), atol=2e-5, rtol=0)
    assert isinstance(classifier, NoisyClassifier) and len(scheduler.betas) == 1000
    flags = info["flags"]
    assert (flags["image_size"], flags["classifier_depth"]) == (16, net.res_blocks)
    assert (flags["classifier_pool"], flags["classifier_resblock_updown"]) == (net.pool, net.updown)
    assert flags["classifier_attention_resolutions"] == ",".join(str(16 // 2**i) for i in net.attention)


def test_wrong_heads_change_the_logits_so_the_comparison_can_fail(net):
    x, t = torch.randn(1, 1, 16, 16, generator=net.random), torch.tensor([437])
    with torch.no_grad():
        assert (convert(net, classifier_num_head_channels=32)[0](x, t) - net(x, t)).abs().max() > 1e-3


def test_the_readmes_classifier_is_told_from_its_tensors_alone():
    """Its 30 input blocks could be 1, 2, 3, 5, 6, 10 or 15 levels; widths and attention leave six."""
    net = OriginalClassifier(
        mult=(1, 1, 2, 2, 4, 4),
        attention=(3, 4, 5),
        res_blocks=4,
        scale_shift=True,
        updown=True,
        head_channels=64,
    )
    net(torch.zeros(1, 1, 64, 64), torch.zeros(1))
    # as at 256 px, where the last level has 8 x 8 positions
    net.tensors["out.2.positional_embedding"] = torch.zeros(128, 65)
    classifier, _, info = convert_state_dict(
        net.tensors,
        image_size=256,
        classifier_attention_resolutions="32,16,8",
        classifier_width=32,
        classifier_depth=4,
        classifier_pool="attention",
        classifier_resblock_updown=True,
        classifier_use_scale_shift_norm=True,
    )
    assert sum(p.numel() for p in classifier.parameters()) == 5_452_098 == info["num_parameters"]
    assert convert_state_dict(net.tensors)[2]["flags"] == info["flags"]


def test_levels_that_nothing_tells_are_asked_for():
    """One width and no attention: 4 input blocks are one level of three blocks, or two of one."""
    net = random_classifier(mult=(1, 1), attention=(), updown=True)
    with pytest.raises(ValueError, match="classifier_depth 1"):
        convert(net)
    for depth, levels in ((1, 2), (3, 1)):
        classifier, _, info = convert(net, classifier_depth=depth)
        assert len(classifier.config.block_out_channels) == levels and info["flags"]["image_size"] == 8 * levels
    x, t = torch.randn(1, 1, 16, 16, generator=net.random), torch.tensor([437])
    with torch.no_grad():
        torch.testing.assert_close(convert(net, image_size=16)[0](x, t), net(x, t), atol=2e-5, rtol=0)


def test_a_tensor_that_is_missing_left_over_or_misshapen_is_named():
    net = random_classifier(mult=(1, 2), attention=(1,), scale_shift=True, updown=True)
    for name in net.tensors:
        if name.startswith(("input_blocks.2", "middle_block.2")):  # as others of their making
            continue
        rest = {key: tensor for key, tensor in net.tensors.items() if key != name}
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            convert(OriginalClassifier(rest, mult=(1,), attention=()), image_size=16, classifier_depth=1)
    with pytest.raises(ValueError, match=r"unexpected out\.2\.extra"):
        convert(OriginalClassifier({**net.tensors, "out.2.extra": torch.zeros(1)}, mult=(1,), attention=()))
    net.tensors["out.2.c_proj.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"out\.2\.c_proj\.bias: expected shape \[2\], got \[3\]"):
        convert(net)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("image_size", 32),
        ("in_channels", 3),
        ("num_classes", 3),
        ("classifier_width", 64),
        ("classifier_depth", 1),
        ("classifier_attention_resolutions", "16"),
        ("classifier_use_scale_shift_norm", False),
        ("classifier_resblock_updown", False),
        ("classifier_pool", "adaptive"),
    ],
)
def test_a_flag_that_the_tensors_contradict_is_named(net, flag, value):
    with pytest.raises(ValueError, match=f"{flag} is"):
        convert(net, **{flag: value})


def test_features_without_equivalent_in_noisy_classifier_are_refused_by_name(net):
    head = {"out.0.weight": torch.zeros(2048, 256), "out.2.weight": torch.zeros(2, 2048)}
    encoder = {name: tensor for name, tensor in net.tensors.items() if not name.startswith("out.")}
    with pytest.raises(ValueError, match="classifier_pool spatial is not convertible"):
        convert_state_dict({**encoder, **head})
    with pytest.raises(ValueError, match="classifier_pool spatial_v2 is not convertible"):
        convert_state_dict({**encoder, **head, "out.3.weight": torch.zeros(2, 2048)})
    with pytest.raises(ValueError, match="classifier_num_head_channels 64 does not divide"):
        convert_state_dict(net.tensors)
    with pytest.raises(ValueError, match="a class name for each of 2"):
        convert(net, class_names=("healthy",))


# --- with its model


@pytest.fixture
def files(tmp_path):
    """(path of a model as Wolleb's, path of its classifier, the flags of both)"""
    model = random_original(mult=(1, 2), attention=(1,), classes=2)
    classifier = random_classifier(**CONFIGURATIONS["as all originals build it"])
    for name, original in (("model", model), ("classifier", classifier)):
        torch.save(original.tensors, tmp_path / f"{name}.pt")
    return tmp_path / "model.pt", tmp_path / "classifier.pt", {**flags_of(model), "classifier_num_head_channels": 16}


def test_a_model_and_its_classifier_become_one_pipeline(files, tmp_path):
    model, classifier, flags = files
    out, names = tmp_path / "out", ("healthy", "effusion")
    info = convert_checkpoint(model, out, classifier_path=classifier, class_names=names, **flags)
    assert info["pipeline"] == "ClassifierGuidedPipeline" and info["classifier"]["class_names"] == list(names)
    assert json.loads((out / "conversion.json").read_text()) == json.loads(json.dumps(info))
    pipeline = ClassifierGuidedPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.class_names == list(names) and not pipeline.config.has_null_label
    assert (pipeline.config.data_range, pipeline.config.aspect) == ([0.0, 1.0], "squash")
    output = pipeline(torch.rand(1, 1, 16, 16), num_inference_steps=5, output_type="pt")
    assert output.anomaly_map.shape == (1, 16, 16) and output.anomaly_map.isfinite().all()

    alone = convert_checkpoint(classifier, tmp_path / "alone", **flags)
    assert alone["pipeline"] is None and (tmp_path / "alone" / "scheduler").is_dir()
    expected = pipeline.classifier(torch.ones(1, 1, 16, 16), 10)
    torch.testing.assert_close(
        NoisyClassifier.from_pretrained(tmp_path / "alone", subfolder="classifier")(torch.ones(1, 1, 16, 16), 10),
        expected,
    )


def test_exchanged_files_and_a_classifier_of_other_images_are_refused(files, tmp_path):
    model, classifier, flags = files
    for wrong, message in (
        ((classifier, classifier), "to hold a UNet"),
        ((model, model), "to hold an encoder classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(wrong[0], tmp_path / "out", classifier_path=wrong[1], **flags)
    other = random_classifier(**CONFIGURATIONS["four channels, three classes"])
    torch.save(other.tensors, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="a classifier of 1 channels and 16 px"):
        convert_checkpoint(model, tmp_path / "out", classifier_path=tmp_path / "other.pt", **flags)
    assert not (tmp_path / "out").exists()


def test_the_command_line_converts_both_and_detects_as_the_original(files, tmp_path, capsys):
    from PIL import Image

    model, classifier, _ = files
    out = tmp_path / "out"
    command = ["convert", str(model), str(out), "--classifier_path", str(classifier), "--image_size", "16"]
    command += (
        "--num_heads 1 --classifier_num_head_channels 16 --classifier_use_fp16 False --classifier_scale 100".split()
    )
    assert main(command) == 0 and "ClassifierGuidedPipeline" in capsys.readouterr().out
    Image.effect_noise((20, 20), 60).save(tmp_path / "chest.png")
    detect = ["detect", str(tmp_path / "chest.png"), "--model", str(out), "--as-original", "--device", "cpu"]
    options = ["--num-inference-steps", "50", "--noise-level", "4"]
    assert main([*detect, "--out", str(tmp_path / "maps"), *options]) == 0
    assert (tmp_path / "maps" / "maps" / "chest.png").is_file()
    assert main([*detect, "--out", str(tmp_path / "other"), "--guidance-scale", "3", *options]) == 2
    assert "the original procedure has no guidance_scale" in capsys.readouterr().err
