"""The contract of all anomaly pipelines: the same output for every way of calling, saving, opening and publishing."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils

from cxr_diffusers import (
    CFGAnomalyPipeline,
    ClassifierGuidedPipeline,
    DiffPIRDeblurPipeline,
    FixedPointGANPipeline,
    GradCAMPipeline,
    LungSegmenter,
    PyramidCAMPipeline,
    default_checkpoint,
    detect,
    evaluate,
    load_phantom,
)
from cxr_diffusers.hub.loading import load_pipeline
from cxr_diffusers.hub.model_card import write_model_card
from cxr_diffusers.pipelines.cxr_anomaly import ContractMixin
from helpers import toy_classifier, toy_generator, toy_pyramid, toy_resnet, toy_unet
from local_hub import local_hub, run_script

CLASSES = ["healthy", "pleural effusion"]
SHORT = {"num_inference_steps": 10, "noise_level": 300, "direction": "bright"}


def ddim():
    return DDIMScheduler(clip_sample=False)


# a new pipeline is a new line
PIPELINES = {
    "cfg": lambda: CFGAnomalyPipeline(toy_unet(), ddim(), CLASSES, settings=SHORT),
    "classifier_guided": lambda: ClassifierGuidedPipeline(
        toy_unet(), toy_classifier(), ddim(), class_names=CLASSES, settings=SHORT
    ),
    "guided_by_a_transformers_classifier": lambda: ClassifierGuidedPipeline(
        toy_unet(), toy_resnet(), ddim(), class_names=CLASSES, settings=SHORT
    ),
    "fixed_point_gan": lambda: FixedPointGANPipeline(toy_generator(), CLASSES, settings={"direction": "bright"}),
    "grad_cam": lambda: GradCAMPipeline(toy_resnet(), class_names=CLASSES, sample_size=16, settings={"smoothing": 1.0}),
    "pyramid_cam": lambda: PyramidCAMPipeline(toy_pyramid(), CLASSES, settings={"smoothing": 1.0}),
}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    pipeline = PIPELINES[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_shapes_and_ranges_are_those_of_the_documentation(pipeline, images):
    output = pipeline(images, output_type="pt")
    assert output.image.shape == output.counterfactual.shape == (2, 1, 16, 16)
    assert output.anomaly_map.shape == (2, 16, 16) and output.anomaly_score.shape == (2,)
    for x in (output.image, output.counterfactual, output.anomaly_map):
        assert 0 <= x.min() and x.max() <= 1
    torch.testing.assert_close(output.image, images)
    assert output.anomaly_map.max() > 0.01


def test_pil_np_pt_and_a_tuple_are_the_same_answer(pipeline, images):
    pt = pipeline(images, output_type="pt")
    array, pil = (pipeline(images, output_type=name) for name in ("np", "pil"))
    np.testing.assert_array_equal(array.counterfactual[..., 0], pt.counterfactual[:, 0])
    np.testing.assert_array_equal(array.anomaly_map, pt.anomaly_map)
    np.testing.assert_allclose(np.stack(pil.anomaly_map) / 65535, pt.anomaly_map, atol=1 / 65535)
    assert pil.image[0].mode == "L" and pil.anomaly_map[0].mode == "I;16"
    np.testing.assert_allclose(np.stack(pil.counterfactual) / 255, pt.counterfactual[:, 0], atol=0.6 / 255)
    np.testing.assert_allclose(pil.anomaly_score, pt.anomaly_score, rtol=1e-6)
    for a, b in zip(pipeline(images, output_type="pt", return_dict=False), pt.to_tuple(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_is_its_images_one_by_one(pipeline, images):
    single = [pipeline(x, output_type="pt") for x in images]
    both = pipeline(images, output_type="pt")
    torch.testing.assert_close(both.anomaly_map, torch.cat([x.anomaly_map for x in single]), atol=2e-5, rtol=0)
    torch.testing.assert_close(both.anomaly_score, torch.cat([x.anomaly_score for x in single]), atol=2e-5, rtol=0)


def test_a_call_leaves_no_gradient_and_changes_no_statistic(pipeline, images):
    before = [tensor.clone() for part in pipeline.components.values() for tensor in state(part)]
    output = pipeline(images, output_type="pt")
    after = [tensor for part in pipeline.components.values() for tensor in state(part)]
    assert len(before) > 10 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert all(p.grad is None for module in modules for p in module.parameters())
    assert not output.anomaly_map.requires_grad and not output.counterfactual.requires_grad


def state(part):
    return part.state_dict().values() if isinstance(part, torch.nn.Module) else []


def test_a_saved_folder_opens_by_class_and_by_name_and_can_be_saved_again(pipeline, images, tmp_path):
    pipeline.save_pretrained(tmp_path / "a")
    by_class = type(pipeline).from_pretrained(tmp_path / "a")
    by_class.save_pretrained(tmp_path / "b")
    expected = pipeline(images, output_type="pt")
    for again in (by_class, load_pipeline(tmp_path / "a"), load_pipeline(tmp_path / "b")):
        assert type(again) is type(pipeline) and again.class_names == CLASSES
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(again(images, output_type="pt").anomaly_map, expected.anomaly_map)
    assert {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*")} == {
        p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*")
    }
    assert not [p for p in (tmp_path / "a").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_a_folder_without_code_opens(pipeline, images, tmp_path):
    """Its index has only the name of the class."""
    pipeline.save_pretrained(tmp_path)
    for code in tmp_path.rglob("*.py"):
        code.unlink()
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": type(pipeline).__name__}))
    again = load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    expected = pipeline(images, output_type="pt").anomaly_map
    torch.testing.assert_close(again(images, output_type="pt").anomaly_map, expected)


def toy_segmenter():
    torch.manual_seed(0)
    return LungSegmenter(sample_size=16, block_out_channels=(4, 8), norm_num_groups=2).eval()


def with_segmenter(pipeline):
    pipeline.register_modules(lung_segmenter=toy_segmenter())
    return pipeline


def test_region_lungs_multiplies_the_map_by_the_soft_mask(pipeline, images):
    plain = pipeline(images, output_type="pt")
    with pytest.raises(ValueError, match="expected a pipeline with a `lung_segmenter` for `region='lungs'`"):
        pipeline(images, region="lungs")
    with_segmenter(pipeline)
    torch.testing.assert_close(pipeline(images, output_type="pt").anomaly_map, plain.anomaly_map)
    gate = pipeline.lung_segmenter.field(plain.image)
    assert gate.min() < 0.9 * gate.max()
    inside = pipeline(images, region="lungs", output_type="pt")
    torch.testing.assert_close(inside.anomaly_map, plain.anomaly_map * gate, atol=1e-4, rtol=0)
    torch.testing.assert_close(inside.counterfactual, plain.counterfactual)


def test_keep_below_keeps_the_image_where_the_map_is_low(pipeline, images):
    if "keep_below" not in pipeline.ORIGINAL_SETTINGS:
        pytest.skip("a method without counterfactuals")
    raw = pipeline(images, output_type="pt")
    value = 0.4 * float(raw.anomaly_map.max())
    kept = pipeline(images, keep_below=value, output_type="pt")
    torch.testing.assert_close(kept.anomaly_map, raw.anomaly_map)
    torch.testing.assert_close(kept.anomaly_score, raw.anomaly_score)
    low, high = ((raw.anomaly_map[:, None] < limit) for limit in (value, 2 * value))
    assert low.any() and (~high).any()
    torch.testing.assert_close(kept.counterfactual[low], raw.image[low])
    torch.testing.assert_close(kept.counterfactual[~high], raw.counterfactual[~high])
    between = kept.counterfactual - raw.image
    assert (between.abs() <= (raw.counterfactual - raw.image).abs() + 1e-6).all()
    with_segmenter(pipeline)  # the counterfactual changes where the returned map is high, which is in the lungs
    lungs = pipeline(images, keep_below=value, region="lungs", output_type="pt")
    low = lungs.anomaly_map[:, None] < value
    torch.testing.assert_close(lungs.counterfactual[low], raw.image[low])


def test_the_lung_segmenter_is_saved_with_the_pipeline(pipeline, images, tmp_path):
    with_segmenter(pipeline).register_to_config(settings={**pipeline.config.settings, "region": "lungs"})
    pipeline.save_pretrained(tmp_path)
    opened = load_pipeline(tmp_path)
    assert isinstance(opened.lung_segmenter, LungSegmenter)
    opened.set_progress_bar_config(disable=True)
    expected = pipeline(images, output_type="pt").anomaly_map
    torch.testing.assert_close(opened(images, output_type="pt").anomaly_map, expected)


def test_from_pipe_shares_the_components_and_keeps_the_configuration(pipeline, images):
    pipeline.register_to_config(map_threshold=0.25)
    shared = type(pipeline).from_pipe(pipeline)
    assert all(shared.components[name] is part for name, part in pipeline.components.items())
    assert shared.class_names == CLASSES and shared.config.map_threshold == 0.25
    assert shared.settings() == pipeline.settings()
    shared.set_progress_bar_config(disable=True)
    expected = pipeline(images, output_type="pt").anomaly_map
    torch.testing.assert_close(shared(images, output_type="pt").anomaly_map, expected)


def test_from_pipe_of_another_method_keeps_shared_settings():
    guided = ClassifierGuidedPipeline(
        toy_unet(), toy_classifier(), ddim(), settings={**SHORT, "classifier_scale": 3.0}, map_threshold=0.1
    )
    free = CFGAnomalyPipeline.from_pipe(guided, class_names=CLASSES)
    assert free.unet is guided.unet and free.config.settings == SHORT and free.config.map_threshold is None


def test_components_alone_carry_no_settings_as_documented(pipeline):
    options = {"sample_size": 16} if "sample_size" in pipeline.config else {}
    bare = type(pipeline)(**pipeline.components, **options)
    assert bare.settings() == bare.ORIGINAL_SETTINGS and bare.config.map_threshold is None
    assert "`TheClass(**pipeline.components)`, carry none of them" in ContractMixin.__doc__


def test_compiled_networks_are_saved_as_they_were(pipeline, images, tmp_path):
    expected = pipeline(images, output_type="pt").anomaly_map
    for name in ("unet", "classifier", "generator"):
        if name in pipeline.components:
            setattr(pipeline, name, torch.compile(getattr(pipeline, name)))  # compiles with the first forward only
    pipeline.save_pretrained(tmp_path)
    opened = load_pipeline(tmp_path)
    opened.set_progress_bar_config(disable=True)
    torch.testing.assert_close(opened(images, output_type="pt").anomaly_map, expected)


STEPWISE = ["cfg", "classifier_guided", "guided_by_a_transformers_classifier"]


@pytest.mark.parametrize("name", STEPWISE)
def test_steps_are_counted_and_can_be_interrupted(name, images):
    pipeline, seen = PIPELINES[name](), []
    pipeline.set_progress_bar_config(disable=True)

    def callback(pipe, i, t, kwargs, last):
        seen.append((i, pipe.num_timesteps))
        pipe._interrupt = i == last
        return {}

    for last in (1, 3, 99):  # during inversion, during decoding, not at all
        seen.clear()
        output = pipeline(images, output_type="pt", callback_on_step_end=functools.partial(callback, last=last))
        assert seen == [(i, 6) for i in range(min(last, 5) + 1)]
        assert output.counterfactual.isfinite().all() and not pipeline.interrupt


def test_class_evidence_draws_from_the_generator_and_is_fixed_without_one(images):
    pipeline = PIPELINES["cfg"]()
    pipeline.set_progress_bar_config(disable=True)

    def score(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return pipeline(images, score="evidence", generator=generator, output_type="pt").anomaly_score

    torch.testing.assert_close(score(0), score(0))
    torch.testing.assert_close(score(), score())
    assert (score(0) - score(1)).abs().min() > 1e-4 and (score(0) - score()).abs().min() > 1e-4


def test_with_a_list_of_generators_each_image_has_noise_of_its_own(images):
    pipeline = PIPELINES["cfg"]()
    pipeline.set_progress_bar_config(disable=True)

    def scores(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(images[rows], score="evidence", generator=generators, output_type="pt").anomaly_score

    both = scores([0, 1], [0, 1])
    torch.testing.assert_close(both, torch.cat([scores([0], [0]), scores([1], [1])]))
    assert (both - scores([0, 1], [0, 2])).abs()[1] > 1e-4
    with pytest.raises(ValueError, match="expected one generator for each of the 2 images, got 1"):
        scores([0, 1], [0])


# portable pipelines: these, and the one for deblurring, which is called differently
PORTABLE = {
    **PIPELINES,
    "cfg_with_segmenter": lambda: with_segmenter(PIPELINES["cfg"]()),
    "deblur": lambda: DiffPIRDeblurPipeline(toy_unet(num_class_embeds=None), ddim()),
}
CALL = {"output_type": "pt", "return_dict": False}
CALLS = {
    "cfg_with_segmenter": {**CALL, "region": "lungs"},
    "deblur": {**CALL, "kernel": [[1 / 9] * 3] * 3, "num_inference_steps": 2},
}


def another_version(folder, other):
    """Copy a pipeline's folder; every code file declares another version, under names as saving would give."""
    shutil.copytree(folder, other)
    for code in sorted(other.rglob("*.py")):
        code.write_text(code.read_text() + 'VERSION = "another"\n')
        renamed = code.rename(code.with_stem(code.stem[:-8] + "0" * 8))
        for file in (*other.glob("*.py"), other / "model_index.json"):
            file.write_text(file.read_text().replace(code.stem, renamed.stem))


# one process imports the libraries; its child may import this package, the process itself may not
SCRIPT = """if True:
    import os, sys, torch, transformers
    from diffusers import DiffusionPipeline
    torch.set_num_threads(1)
    image, expected, on_hub = torch.load("expected.pt")

    def check(pipeline, call, answer):
        pipeline.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        torch.testing.assert_close(pipeline(image, **call), answer)

    def publish_and_push():
        from cxr_diffusers import publish
        from cxr_diffusers.hub.loading import load_pipeline
        for name in on_hub:
            publish(name, "me/" + name)
            pipeline = load_pipeline("me/" + name)
            assert type(pipeline).__module__.startswith("cxr_diffusers."), type(pipeline)
            check(pipeline, *expected[name])
            pipeline.push_to_hub("me/pushed_" + name)

    if not (child := os.fork()):
        publish_and_push()
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "publishing failed"
    sys.modules["cxr_diffusers"] = None  # importing it fails, installed or not

    def versions(pipeline):
        # {module: the version that it declares}, of the pipeline, of the siblings that it imports, of its components
        module = type(pipeline).__module__
        names = {module} | {str(getattr(value, "__module__", "")) for value in vars(sys.modules[module]).values()}
        names |= {type(part).__module__ for part in pipeline.components.values()}
        return {name: getattr(sys.modules[name], "VERSION", None) for name in names if "diffusers_modules" in name}

    for name, (call, answer) in expected.items():
        # the other version in between: the loaded code of one must not serve the other
        places = [name, "other/" + name, *(["me/" + name, "me/pushed_" + name] if name in on_hub else [])]
        for place in [*places, "again/" + name]:
            pipeline = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
            loaded = versions(pipeline)
            expected_version = "another" if "other/" in place else None
            assert len(loaded) > 2 and set(loaded.values()) == {expected_version}, (place, loaded)
            check(pipeline, call, answer)
            if place == name:
                first = pipeline
                pipeline.save_pretrained("again/" + name)
        assert set(versions(first).values()) == {None}, "an open pipeline keeps its code"
    print("all the same")
"""
# publishing does not depend on the class; these cover components with code, an optional component, another call
ON_HUB = ["classifier_guided", "cfg_with_segmenter", "deblur"]


def test_saved_and_published_folders_run_with_their_own_code_without_this_package(images, tmp_path):
    """From folders, from the Hub by both ways of publishing, saved a second time, and beside another version."""
    expected = {}
    for name, make in PORTABLE.items():
        pipeline, call = make(), CALLS.get(name, CALL)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(tmp_path / name)
        write_model_card(tmp_path / name, training="Random weights.")
        another_version(tmp_path / name, tmp_path / "other" / name)
        torch.manual_seed(0)
        expected[name] = call, pipeline(images[:1], **call)
    torch.save((images[:1], expected, ON_HUB), tmp_path / "expected.pt")
    with local_hub() as hub:
        assert run_script(hub, SCRIPT, tmp_path) == "all the same"
        for name in ON_HUB:
            published, pushed = hub.files(f"me/{name}"), hub.files(f"me/pushed_{name}")
            assert set(published) <= set(pushed)
            assert (
                b"Random weights." in pushed["README.md"] and f'("me/pushed_{name}", '.encode() in pushed["README.md"]
            )
    for name in PORTABLE:
        first, second = ({p.name for p in (tmp_path / at / name).rglob("*.py")} for at in (".", "again"))
        assert first == second and len(first) > 2


SHIPPED = ["cxr_cfg_128", "cxr_fixed_point_gan_128", "cxr_grad_cam_128", "cxr_pyramid_128"]


@pytest.mark.parametrize("name", SHIPPED)
def test_diffusers_opens_a_shipped_folder_with_the_installed_class(name, tmp_path, monkeypatch):
    """As the model's card promises: the folder carries no copy of the code, only an import of the package."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    folder = default_checkpoint(name)
    card = " ".join(Path(folder, "README.md").read_text().split())
    assert f'`DiffusionPipeline.from_pretrained(default_checkpoint("{name}"), trust_remote_code=True)`' in card
    opened = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    expected = load_pipeline(name)
    assert type(opened) is type(expected) and opened.config.settings == expected.config.settings
    assert {n: type(part) for n, part in opened.components.items()} == {
        n: type(part) for n, part in expected.components.items()
    }
    opened.save_pretrained(tmp_path / "saved")
    assert list((tmp_path / "saved").glob("pipeline_*.py")), "a saved copy carries its own code"


def test_detect_and_evaluate_accept_every_pipeline(pipeline, tmp_path):
    data = load_phantom(n=6, seed=3)
    paths = []
    for i, image in enumerate(data["image"][:2]):
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    assert detect(pipeline, paths, tmp_path / "maps", progress=False)["computed"] == 2
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2
    summary = evaluate(pipeline, data, n_bootstrap=10, progress=False).summary
    assert 0 < summary["method"]["pixel_ap"]["value"] < 1 and np.isfinite(summary["method"]["image_auroc"]["value"])


def test_the_class_describes_its_method(pipeline, tmp_path):
    """The page and the model card take a name, a summary and the meaning of the score from the class."""
    described = [name for name in ("title", "summary") if name in vars(type(pipeline))]
    assert described == ["title", "summary"] and len(pipeline.summary) > 60 and pipeline.describe_score()
    titles = {make().title for make in PIPELINES.values()}
    assert len(titles) == len({type(make()) for make in PIPELINES.values()}), "two classes have one title"
    pipeline.save_pretrained(tmp_path)
    write_model_card(tmp_path, training="Random weights.")
    assert pipeline.summary in " ".join((tmp_path / "README.md").read_text().split())


def test_an_unknown_setting_of_a_checkpoint_is_named(pipeline):
    options = {**pipeline.components, "settings": {"guidance": 4}}
    options |= {"sample_size": 16} if "sample_size" in pipeline.config else {}
    with pytest.raises(ValueError, match="expected `settings` among .* got .*guidance"):
        type(pipeline)(**options)
    with pytest.raises(ValueError, match="target_label"):
        pipeline(np.zeros((16, 16), np.uint8), target_label="pneumonia")
    with pytest.raises(TypeError, match="got str"):
        pipeline("chest.png")
