"""The converter: every configuration it accepts is exact, everything else is refused by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel

from cxr_diffusers import CFGAnomalyPipeline, ClassMatrixUNet, run_as_original
from cxr_diffusers.guided_diffusion import (
    ConversionFlags,
    convert_checkpoint,
    convert_state_dict,
    parse_flag,
    read_checkpoint,
)
from cxr_diffusers.guided_diffusion.original import OriginalProcedure
from cxr_diffusers.hub.loading import load_unet
from cxr_diffusers.training.recipe import load_recipe
from helpers import flags_of, random_original, toy_unet


@pytest.fixture
def net():
    return random_original(mult=(1, 2), attention=(1,), classes=2, class_mlp=True)


torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


FORK = dict(classes=2, class_mlp=True)
CONFIGURATIONS = {
    "unconditional": dict(mult=(1, 2), attention=(1,)),
    "two channels, fixed variance": dict(mult=(1, 2), attention=(), in_channels=2),
    "the fork's, resampling by residual blocks": dict(mult=(1, 2), attention=(0,), updown=True, **FORK),
    "the fork's, scale and shift, two residual blocks": dict(
        mult=(1, 2, 1), attention=(1,), res_blocks=2, scale_shift=True, **FORK
    ),
    "OpenAI's: 3 channels, head width, everything on": dict(
        mult=(1, 2, 2),
        attention=(0, 1, 2),
        head_channels=16,
        scale_shift=True,
        updown=True,
        classes=5,
        in_channels=3,
        out_channels=6,
    ),
    "Wolleb's: 4 channels, 4 heads": dict(
        mult=(1, 2), attention=(1,), heads=4, classes=2, in_channels=4, out_channels=8
    ),
    "new attention order, head width": dict(mult=(1, 2), attention=(0, 1), head_channels=8, new_order=True, classes=3),
    "the fork's v2, one head": dict(mult=(1, 2), attention=(1,), class_matrix=True, **FORK),
    "the fork's v2, heads of 16 at two widths": dict(
        mult=(1, 2), attention=(0, 1), head_channels=16, scale_shift=True, updown=True, class_matrix=True, **FORK
    ),
    "three residual blocks, one head at several widths": dict(mult=(1, 2), attention=(0, 1), res_blocks=3),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_converted_network_computes_what_the_original_did(name):
    net = random_original(**CONFIGURATIONS[name])
    unet, _, info = convert_state_dict(net.tensors, **flags_of(net))
    x, t = torch.randn(3, net.in_channels, 16, 16, generator=net.random), torch.tensor([0, 437, 999])
    cases = [] if net.classes is None else [torch.tensor([0, 1, net.classes - 1])]
    if net.classes is None or net.class_mlp:
        cases.append(None)
    for labels in cases:
        ours = torch.full((3,), net.classes) if labels is None and net.classes else labels
        with torch.no_grad():
            torch.testing.assert_close(unet(x, t, class_labels=ours).sample, net(x, t, labels), atol=2e-5, rtol=0)
    assert info["null_label"] == net.class_mlp
    assert info["flags"]["learn_sigma"] == (net.out_channels == 2 * net.in_channels)


def test_wrong_heads_or_order_change_the_output_so_the_comparison_can_fail():
    net = random_original(**CONFIGURATIONS["new attention order, head width"])
    x, t, labels = torch.randn(1, 1, 16, 16, generator=net.random), torch.tensor([437]), torch.tensor([1])
    for wrong in ({"num_head_channels": 16}, {"use_new_attention_order": False}):
        unet, _, _ = convert_state_dict(net.tensors, **{**flags_of(net), **wrong})
        with torch.no_grad():
            assert (unet(x, t, class_labels=labels).sample - net(x, t, labels)).abs().max() > 1e-2


def test_half_precision_tensors_are_converted_as_the_floats_they_are(net):
    half = {name: tensor.half() for name, tensor in net.tensors.items()}
    unet, _, _ = convert_state_dict(half, **flags_of(net))
    assert unet.dtype == torch.float32
    assert torch.equal(unet.conv_in.weight, half["input_blocks.0.0.weight"].float())


def test_the_null_label_of_the_fork_is_a_row_of_zeros_and_the_last(net):
    unet, _, info = convert_state_dict(net.tensors, **flags_of(net))
    assert unet.config.num_class_embeds == 3
    assert info["class_names"] == ["healthy", "diseased"]
    assert (unet.class_embedding.weight[2] == 0).all()
    assert (unet.class_embedding.weight[:2] != 0).any(dim=1).all()


def test_label_embeddings_without_a_null_label_get_no_row_for_one():
    net = random_original(**CONFIGURATIONS["Wolleb's: 4 channels, 4 heads"])
    unet, _, info = convert_state_dict(net.tensors, **flags_of(net))
    assert torch.equal(unet.class_embedding.weight, net.tensors["label_emb.weight"])
    assert not info["null_label"] and info["data_range"] == [0.0, 1.0]
    assert (info["source"], info["scaling"], info["aspect"]) == ("brats", "dtype", "keep")  # as four channels say


def test_each_family_brings_its_own_preparation():
    openai = random_original(**CONFIGURATIONS["OpenAI's: 3 channels, head width, everything on"])
    _, _, info = convert_state_dict(openai.tensors, **flags_of(openai))
    assert (info["source"], info["data_range"], info["aspect"]) == ("openai", [-1.0, 1.0], "crop")
    _, _, info = convert_state_dict(openai.tensors, **flags_of(openai), source="wolleb")
    assert (info["source"], info["data_range"], info["aspect"]) == ("wolleb", [0.0, 1.0], "squash")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_scheduler_has_the_flagged_chain(net, schedule):
    _, scheduler, _ = convert_state_dict(net.tensors, **flags_of(net), noise_schedule=schedule, diffusion_steps=250)
    assert isinstance(scheduler, DDIMScheduler) and len(scheduler.betas) == 250
    # cosine ends in noise alone (abar below 1e-5), linear keeps a little
    assert (scheduler.alphas_cumprod[-1] < 1e-5) == (schedule == "cosine")
    assert scheduler.alphas_cumprod[-1] < 1e-4


def one_of_each_kind(net):
    """The names of the tensors, without the second and third residual block and attention of the same making."""
    return [
        name for name in net.tensors if not name.startswith(("middle_block.2", "output_blocks.1", "output_blocks.2"))
    ]


def test_a_tensor_that_is_missing_is_named(net):
    for name in one_of_each_kind(net):
        rest = {key: tensor for key, tensor in net.tensors.items() if key != name}
        if name == "label_emb.weight":  # without it the class MLP is what is left over
            name = "cond_embed"
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            convert_state_dict(rest, **flags_of(net))


def test_a_tensor_of_the_wrong_shape_is_named(net):
    for name in one_of_each_kind(net):
        wrong = {**net.tensors, name: torch.zeros(*net.tensors[name].shape, 2)}
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            convert_state_dict(wrong, **flags_of(net))


def test_a_tensor_left_over_or_not_finite_is_named(net):
    with pytest.raises(ValueError, match=r"unexpected input_blocks\.1\.0\.extra"):
        convert_state_dict({**net.tensors, "input_blocks.1.0.extra": torch.zeros(1)}, **flags_of(net))
    net.tensors["out.2.bias"][0] = float("nan")
    with pytest.raises(ValueError, match=r"out\.2\.bias holds NaN"):
        convert_state_dict(net.tensors, **flags_of(net))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("in_channels", 3),
        ("num_channels", 64),
        ("channel_mult", "1,1"),
        ("num_res_blocks", 2),
        ("attention_resolutions", "16"),
        ("learn_sigma", False),
        ("use_scale_shift_norm", True),
        ("resblock_updown", True),
        ("class_cond", False),
        ("num_classes", 3),
        ("clf_free", False),
    ],
)
def test_a_flag_that_the_tensors_contradict_is_named(net, flag, value):
    with pytest.raises(ValueError, match=flag):
        convert_state_dict(net.tensors, **flags_of(net), **{flag: value})


def test_the_flags_it_was_trained_with_are_accepted(net):
    told = dict(
        in_channels=1,
        num_channels=32,
        channel_mult="1,2",
        num_res_blocks=1,
        attention_resolutions="8",
        learn_sigma=True,
        use_scale_shift_norm=False,
        resblock_updown=False,
        class_cond=True,
        num_classes=2,
        clf_free=True,
        unet_version="v1",
        dropout=0.1,
        rescale_timesteps=True,
        num_heads_upsample=-1,
        noise_schedule="linear",
        source="cfg-fork",
    )
    unet, _, info = convert_state_dict(net.tensors, **flags_of(net), **told)
    assert unet.config.dropout == 0.1
    assert info["assumed"] == []


def test_flags_that_were_not_given_are_reported_as_assumed(net):
    _, _, info = convert_state_dict(net.tensors, image_size=16)
    assert info["assumed"] == ["num_heads", "noise_schedule", "source"]
    assert info["flags"]["num_heads"] == 4


def test_the_image_size_is_derived_from_default_channels_or_required():
    usual = random_original(mult=(1, 2, 2, 2), attention=(1,))
    unet, _, _ = convert_state_dict(usual.tensors, num_heads=1)
    assert unet.config.sample_size == 32
    unusual = random_original(mult=(1, 3), attention=(1,))
    with pytest.raises(ValueError, match="image_size"):
        convert_state_dict(unusual.tensors, num_heads=1)


def test_features_without_equivalent_in_unet2dmodel_are_refused_by_name(net):
    several = random_original(mult=(1, 2), attention=(0, 1), heads=2)
    with pytest.raises(ValueError, match="num_heads 2 with attention at several widths"):
        convert_state_dict(several.tensors, **flags_of(several))
    with pytest.raises(ValueError, match="num_heads_upsample"):
        convert_state_dict(net.tensors, **flags_of(net), num_heads_upsample=2)
    with pytest.raises(ValueError, match="num_head_channels 48 does not divide"):
        convert_state_dict(net.tensors, **{**flags_of(net), "num_head_channels": 48})
    with pytest.raises(ValueError, match="rescale_timesteps"):
        convert_state_dict(net.tensors, **flags_of(net), rescale_timesteps=True, diffusion_steps=4000)
    with pytest.raises(ValueError, match=r"channel_mult 0\.5"):
        wide = {**net.tensors, "time_embed.0.weight": torch.zeros(256, 64)}
        convert_state_dict(wide, **flags_of(net))
    with pytest.raises(ValueError, match="output channels"):
        odd = random_original(mult=(1, 2), attention=(1,), in_channels=2, out_channels=3)
        convert_state_dict(odd.tensors, **flags_of(odd))


def test_v2_is_told_by_its_tensors_and_refused_where_it_is_not_known(net):
    with pytest.raises(ValueError, match="unet_version is 'v2', but the tensors say 'v1'"):
        convert_state_dict(net.tensors, **flags_of(net), unet_version="v2")
    v2 = random_original(**CONFIGURATIONS["the fork's v2, one head"])
    assert convert_state_dict(v2.tensors, **flags_of(v2))[2]["flags"]["unet_version"] == "v2"
    with pytest.raises(ValueError, match=r"missing middle_block\.1\.encoder_kv\.weight"):
        del v2.tensors["middle_block.1.encoder_kv.weight"]
        convert_state_dict(v2.tensors, **flags_of(v2))
    v2 = random_original(**CONFIGURATIONS["the fork's v2, one head"])
    with pytest.raises(ValueError, match="unet_version v2 .* use_new_attention_order True"):
        convert_state_dict(v2.tensors, **{**flags_of(v2), "use_new_attention_order": True})


def test_a_v2_network_sees_the_class_in_its_attention_and_travels(tmp_path):
    net = random_original(**CONFIGURATIONS["the fork's v2, heads of 16 at two widths"])
    torch.save(net.tensors, tmp_path / "model.pt")
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", **flags_of(net))
    assert list((tmp_path / "out" / "unet").glob("class_matrix_unet_*.py"))
    x, t = torch.randn(2, 1, 16, 16, generator=net.random), torch.tensor([437, 437])
    unet = CFGAnomalyPipeline.from_pretrained(tmp_path / "out").unet
    assert type(load_unet(tmp_path / "out")) is ClassMatrixUNet  # to train on
    # without this package's own class: the code in the folder
    strange = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True).unet
    assert type(unet) is ClassMatrixUNet
    assert type(strange) is not ClassMatrixUNet and type(strange).__name__ == "ClassMatrixUNet"
    with torch.no_grad():
        for labels in (torch.tensor([0, 1]), torch.tensor([2, 2])):
            expected = net(x, t, None if labels[0] == 2 else labels)
            for network in (unet, strange):
                torch.testing.assert_close(network(x, t, class_labels=labels).sample, expected, atol=2e-5, rtol=0)
        expected = net(x, t, torch.tensor([0, 1]))
        for attention in unet.attentions():  # what v1 has not: a class of its own for keys and values
            attention.processor.to_v.bias += 0.1
        assert (unet(x, t, class_labels=torch.tensor([0, 1])).sample - expected).abs().max() > 1e-2
    with pytest.raises(ValueError, match="class_labels"):
        unet(x, t)
    with pytest.raises(ValueError, match="num_class_embeds"):
        ClassMatrixUNet(**{**unet.config, "num_class_embeds": None})


def test_v2_at_full_size_has_the_originals_number_of_parameters():
    """117,150,594, of which our class embedding stands for the class MLP."""
    recipe = load_recipe(ROOT / "configs" / "chexpert_cfg_256.yaml", ["data.root=/nowhere"])
    with torch.device("meta"):
        unet = ClassMatrixUNet(**recipe.unet)
    class_mlp = 2 * 128 + (128 * 512 + 512) + (512 * 512 + 512)
    assert sum(p.numel() for p in unet.parameters()) - 3 * 512 + class_mlp == 117_150_594


def test_flags_are_read_as_the_originals_command_lines_write_them():
    written = {
        "num_heads": ("1", 1),
        "learn_sigma": ("True", True),
        "resblock_updown": ("false", False),
        "dropout": ("0.1", 0.1),
        "attention_resolutions": ("16", "16"),
        "noise_schedule": ("cosine", "cosine"),
        "class_names": ("healthy, effusion", ("healthy", "effusion")),
        "image_size": ("256", 256),
    }
    for name, (text, value) in written.items():
        parsed = parse_flag(name, text)
        assert parsed == value and type(parsed) is type(value)
    with pytest.raises(ValueError, match="learn_sigma True or False, got 'yes'"):
        parse_flag("learn_sigma", "yes")
    for field in fields(ConversionFlags):
        assert field.metadata["help"]


def test_an_unknown_flag_or_value_is_named(net):
    with pytest.raises(TypeError, match="num_head\\b"):
        convert_state_dict(net.tensors, num_head=1)
    with pytest.raises(ValueError, match="noise_schedule linear or cosine, got 'sqrt'"):
        convert_state_dict(net.tensors, **flags_of(net), noise_schedule="sqrt")
    with pytest.raises(ValueError, match="class name for each of 2"):
        convert_state_dict(net.tensors, **flags_of(net), class_names=["healthy"])


def test_a_unet_without_its_decoder_is_not_taken_for_a_classifier(net):
    encoder = {name: t for name, t in net.tensors.items() if not name.startswith("output_blocks")}
    with pytest.raises(ValueError, match=r"no tensor output_blocks\.\*"):
        convert_state_dict(encoder, **flags_of(net))


def test_a_converted_folder_is_a_pipeline_that_knows_its_preparation(net, tmp_path):
    torch.save(net.tensors, tmp_path / "ema.pt")
    info = convert_checkpoint(tmp_path / "ema.pt", tmp_path / "out", **flags_of(net))
    pipeline = CFGAnomalyPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.config.data_range == [0.0, 1.0]
    assert (pipeline.config.scaling, pipeline.config.aspect) == ("minmax", "squash")
    assert pipeline.class_names == ["healthy", "diseased"]
    x, t = torch.randn(1, 1, 16, 16, generator=net.random), torch.tensor([300])
    with torch.no_grad():
        null = pipeline.unet(x, t, class_labels=torch.tensor([pipeline.null_label])).sample
        torch.testing.assert_close(null, net(x, t), atol=2e-5, rtol=0)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == json.loads(json.dumps(info))


def test_head_width_survives_saving_and_loading(tmp_path):
    net = random_original(**CONFIGURATIONS["Wolleb's: 4 channels, 4 heads"])
    torch.save(net.tensors, tmp_path / "model.pt")
    convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", **flags_of(net))
    unet = UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
    x, t, labels = torch.randn(1, 4, 16, 16, generator=net.random), torch.tensor([300]), torch.tensor([1])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t, class_labels=labels).sample, net(x, t, labels), atol=2e-5, rtol=0)


def test_without_a_null_label_the_pipeline_compares_two_classes(tmp_path):
    net = random_original(**CONFIGURATIONS["Wolleb's: 4 channels, 4 heads"])
    torch.save(net.tensors, tmp_path / "model.pt")
    names = ("healthy", "tumour")
    info = convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", **flags_of(net), class_names=names)
    pipeline = CFGAnomalyPipeline.from_pretrained(tmp_path / "out")
    assert info["pipeline"] == "CFGAnomalyPipeline" and pipeline.class_names == list(names)
    assert pipeline.settings()["source_label"] == 0 and pipeline.settings()["guidance_scale"] == 0
    assert pipeline.null_label is None
    # the original's default guidance would push away from its last class
    with pytest.raises(ValueError, match="expected `guidance_scale` -1 for a model without a null label, got 4.0"):
        run_as_original(pipeline, torch.rand(1, 4, 16, 16), progress=False)


def test_a_model_that_is_conditioned_on_the_view_does_not_run_as_the_original():
    pipeline = CFGAnomalyPipeline(toy_unet(num_class_embeds=7), DDIMScheduler(clip_sample=False), views=["PA", "AP"])
    with pytest.raises(ValueError, match="expected a model that is not conditioned on the view, got one for"):
        run_as_original(pipeline, torch.rand(1, 1, 16, 16), progress=False)
    with pytest.raises(ValueError, match="expected a model that is not conditioned on the view, got one for"):
        OriginalProcedure(pipeline)


def test_an_unconditional_model_is_written_as_its_two_components(tmp_path):
    net = random_original(**CONFIGURATIONS["unconditional"])
    torch.save(net.tensors, tmp_path / "model.pt")
    info = convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", **flags_of(net))
    assert info["pipeline"] is None
    unet = UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet")
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert unet.config.num_class_embeds is None and len(scheduler.betas) == 1000


def test_a_folder_with_files_is_only_replaced_when_asked_to(net, tmp_path):
    torch.save(net.tensors, tmp_path / "model.pt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        convert_checkpoint(tmp_path / "model.pt", out, **flags_of(net))
    assert (out / "mine.txt").exists()
    convert_checkpoint(tmp_path / "model.pt", out, overwrite=True, **flags_of(net))
    assert not (out / "mine.txt").exists() and (out / "model_index.json").exists()


def test_a_refused_checkpoint_leaves_nothing_behind(net, tmp_path):
    del net.tensors["out.2.bias"]
    torch.save(net.tensors, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"out\.2\.bias"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", **flags_of(net))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_files_that_are_no_checkpoints_are_refused(net, tmp_path):
    class Custom:
        pass

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for name, content in {
        "opt.pt": optimizer.state_dict(),
        "list.pt": [torch.zeros(1)],
        "model.pt": {"a": print},
    }.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    (tmp_path / "text.pt").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="text.pt"):
        read_checkpoint(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.pt")
