"""The command line, called as a user calls it: what it writes, what it says, and its exit codes."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens.original_unet import OriginalUNet
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, pipelines, read_image, run_as_original
from cxr_diffusers.cli import build_parser, main
from cxr_diffusers.commands.convert import NOT_NEEDED
from cxr_diffusers.commands.options import SETTINGS, batch_size_of
from cxr_diffusers.data import LOADERS, open_dataset
from cxr_diffusers.files import load_map
from cxr_diffusers.guided_diffusion import ConversionFlags
from cxr_diffusers.pipelines.cxr_images import restore_map

ROOT = Path(__file__).parent.parent
# MODEL_FLAGS, DIFFUSION_FLAGS, TRAIN_FLAGS and SAMPLE_FLAGS of the original's README, at toy size
ORIGINAL_FLAGS = """
    --unet_version v1 --image_size 16 --in_channels 1 --num_channels 32 --channel_mult 1,2 --num_classes 2
    --class_cond True --num_res_blocks 1 --num_heads 1 --learn_sigma True --use_scale_shift_norm False
    --attention_resolutions 8 --diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False
    --rescale_timesteps False --lr 1e-4 --batch_size 4 --p_uncond 0.1 --dropout 0.1 --num_samples 11
    --timestep_respacing ddim1000 --use_ddim True
""".split()


@pytest.fixture
def model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--num-inference-steps", "20", "--noise-level", "300"]


@pytest.fixture
def folder(tmp_path):
    """healthy/ and diseased/, three images each; the diseased with a mask."""
    rng = np.random.default_rng(0)
    for i in range(6):
        home = tmp_path / "data" / ("healthy" if i < 3 else "diseased")
        home.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 16)).astype(np.uint8)).save(home / f"{i}.png")
        if i >= 3:
            mask = np.zeros((20, 16), np.uint8)
            mask[5:10, 4:9] = 255
            Image.fromarray(mask).save(home / f"{i}_mask.png")
    return tmp_path / "data"


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys, time, cxr_diffusers.cli as cli; cli.build_parser().format_help()\n"
        "heavy = [m for m in ('torch', 'diffusers', 'datasets', 'pandas', 'numpy', 'PIL') if m in sys.modules]\n"
        "print(heavy, time.process_time() < 1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "[] True", done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", ["detect", "demo", "evaluate", "prepare", "deblur", "publish", "publish-data", "convert", "export"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert "options:" in printed and "%%" not in printed


def subparsers():
    """{command: its parser}"""
    return next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["detec"], "invalid choice: 'detec'"),
        (["detect", "x.png", "--out", "maps", "--backend", "fast"], "--backend: invalid choice: 'fast'"),
        (["detect", "x.png"], "required: --out"),
        (["evaluate", "--out", "x", "--bootstrap", "many"], "invalid int value: 'many'"),
        (["train", "--lst"], "--lst"),
        (
            ["detect", "x.png", "--out", "maps", "--no-such-option"],
            "cxr-diffusers detect: unrecognized arguments: --no-",
        ),
        (["demo", "--no-such-option"], "cxr-diffusers demo: unrecognized arguments: --no-such-option"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    printed = capsys.readouterr().err
    assert wrong in printed and printed.count("\n") == 1, printed


@pytest.mark.parametrize("command", sorted(subparsers()))
def test_the_help_of_a_command_names_only_its_own_options(command):
    for line in (subparsers()[command].epilog or "").splitlines():
        named = re.search(r"(?:cxr-diffusers |`)([a-z-]+)", line)
        parser = subparsers().get(named and named[1], subparsers()[command])
        words = re.sub(r"accelerate launch .* -m", "", line)  # whose options are not ours
        assert set(re.findall(r"--[a-z-]+(?![\w-])", words)) <= set(parser._option_string_actions), line


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["detect", "missing", "--out", "maps"], "no such file or folder: missing"),
        (["detect", "two\nlines", "--out", "maps"], "no such file or folder: two lines"),
        (
            ["deblur", "missing", "out", "--kernel", "gaussian:sigma=1"],
            "expected the folder of a data set, got missing",
        ),
        (["evaluate", "missing", "--out", "report"], "missing"),
        (["evaluate", "phantom:n=2", "--healthy", "missing", "--out", "report"], "missing"),
    ],
)
def test_missing_images_are_an_error_before_the_model_is_opened(arguments, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--model", "no-such-model"]) == 2
    printed = capsys.readouterr().err
    assert wrong in printed and "no-such-model" not in printed and printed.count("\n") == 1


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2 and "detect" in capsys.readouterr().out


def test_help_names_what_there_is(capsys):
    """Written by hand, so that --help need not import what it speaks of: here it is compared."""
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    assert f"{', '.join(list(LOADERS)[:-1])} or {list(LOADERS)[-1]}" in " ".join(capsys.readouterr().out.split())
    calls = [getattr(pipelines, name).__call__ for name in pipelines.__all__ if name.endswith("Pipeline")]
    assert set(SETTINGS) < {name for call in calls for name in inspect.signature(call).parameters}
    assert not set(NOT_NEEDED) & set(ConversionFlags.__dataclass_fields__)


def test_detect_writes_tells_and_resumes(model, folder, tmp_path, capsys):
    command = ["detect", str(folder / "healthy"), "--out", str(tmp_path / "out"), *model]
    assert main(command) == 0
    assert "3 images: 3 computed (" in capsys.readouterr().out
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 4
    (folder / "healthy" / "broken.png").write_bytes(b"not a picture")
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "4 images: 0 computed, 3 were there, 1 failed" in printed.out
    assert printed.err.count("failed: ") == 1 and "broken.png" in printed.err


def test_detect_can_run_as_the_original_did(model, folder, tmp_path, capsys):
    image, out = str(folder / "healthy" / "0.png"), tmp_path / "out"
    own = ["--noise-level", "5", "--num-inference-steps", "50", "--guidance-scale", "1"]
    command = ["detect", image, "--out", str(out), *model[:2], "--as-original", *own]
    assert main(command) == 0
    result = load_map(out / "maps" / "0.png")
    pipeline = CFGAnomalyPipeline.from_pretrained(model[1])
    settings = dict(noise_level=5, num_steps=50, guidance_scale=1, generator=torch.Generator().manual_seed(0))
    expected = run_as_original(pipeline, read_image(image), output_type="np", progress=False, **settings)
    radiograph = read_image(image)
    np.testing.assert_allclose(
        result, restore_map(expected.anomaly_map[0], radiograph.height, radiograph.width), atol=1e-4
    )
    assert main([*command, "--smoothing", "1"]) == 2 and "smoothing" in capsys.readouterr().err
    levels = ["--noise-level", "3", "5", "--out", str(tmp_path / "levels")]
    assert main([*command, *levels]) == 2 and "expected `noise_level` to be an index" in capsys.readouterr().err


def test_detect_hands_the_options_to_the_pipeline(model, folder, tmp_path):
    options = ["--negative-label", "pleural effusion", "--source-label", "0", "--region", "image"]
    options += ["--direction", "bright"]
    assert main(["detect", str(folder / "healthy" / "0.png"), "--out", str(tmp_path / "out"), *model, *options]) == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["call"] == {
        "noise_level": 300,
        "num_inference_steps": 20,
        "negative_label": "pleural effusion",
        "source_label": 0,
        "direction": "bright",
        "region": "image",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "model_index.json or a Hub name"),
        (["--model", "."], "model_index.json or a Hub name"),
        (["--noise-level", "5000"], "`noise_level` to be a timestep"),
        (["--negative-label", "pneumonia"], "got 'pneumonia'"),
        (["--batch-size", "0"], "--batch-size of 1 or more"),
        (["--guidance-scale", "nan"], "expected a finite `guidance_scale`, got nan"),
        (["--device", "foo"], "expected a device that PyTorch can use here, such as cpu, got 'foo': "),
        (["--device", "meta"], "expected a device that PyTorch can use here, such as cpu, got 'meta': "),
        (["--device", "cuda:99"], "expected a device that PyTorch can use here, such as cpu, got 'cuda:99': "),
    ],
)
def test_an_invalid_argument_is_refused_in_one_line(model, folder, tmp_path, capsys, arguments, message):
    assert main(["detect", str(folder), "--out", str(tmp_path / "out"), *model, *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cxr-diffusers detect: ") and message in said


def test_out_of_memory_is_one_line_with_advice_and_other_errors_are_not_hidden(folder, tmp_path, monkeypatch, capsys):
    call = ["detect", str(folder), "--out", str(tmp_path / "out")]

    def fail_with(error):
        def run(options):
            raise error

        return run

    monkeypatch.setattr("cxr_diffusers.commands.detect.run", fail_with(torch.OutOfMemoryError("CUDA out of memory.")))
    assert main([*call, "--batch-size", "64"]) == 2
    assert capsys.readouterr().err.strip() == "cxr-diffusers detect: CUDA out of memory; lower --batch-size"
    monkeypatch.setattr("cxr_diffusers.commands.detect.run", fail_with(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        main(call)


def test_the_batch_size_is_the_given_one_or_that_of_the_device():
    def resolved(*arguments):
        return batch_size_of(build_parser().parse_args(["detect", "images", "--out", "out", *arguments]))

    assert resolved("--device", "cpu") == 8
    assert resolved("--device", "cuda:1") == 32
    assert resolved() == (32 if torch.cuda.is_available() else 8)
    assert resolved("--batch-size", "3") == 3


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "phantom:n=2,size=32", "--out", "out"],
        ["deblur", "data", "out", "--kernel", "gaussian:sigma=1"],
        ["demo"],
    ],
)
def test_every_command_refuses_an_unusable_device(command, tmp_path, monkeypatch, capsys):
    if command == ["demo"]:
        pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--device", "foo"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"cxr-diffusers {command[0]}: expected a device") and len(said.splitlines()) == 1


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere"])
@pytest.mark.parametrize(
    "command",
    [
        "detect data --out {out}",
        "evaluate data --out {out}",
        "chexlocalize data data.json --out {out}",
        "prepare data {out}",
        "deblur data {out} --kernel gaussian:sigma=1",
        "convert data.pt {out}",
        "export default {out}",
        "train phantom_cfg_32 train.output_dir={out}",
        "prepare data {out}/a.parquet --pack",
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(command, out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    arguments = command.format(out=out).split()
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert (
        len(said.splitlines()) == 1 and f"expected a folder that can be written, got {Path(out).absolute()}: " in said
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "no.pt"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip() == f"cxr-diffusers convert: expected a file, got {tmp_path / 'no.pt'}"


def test_an_empty_folder_is_said_to_be_empty(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["detect", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), *model]) == 2
    assert "DICOM image in" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_evaluate_prints_the_table_of_a_folder(model, folder, tmp_path, capsys):
    healthy = str(folder / "healthy")
    command = ["evaluate", str(folder), "--healthy", healthy, "--out", str(tmp_path / "out"), "--bootstrap", "20"]
    assert main([*command, *model]) == 0
    printed = capsys.readouterr().out
    assert "| pixel AP |" in printed and "| method |" in printed and "| chance |" in printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["n_images"], summary["n_with_region"], summary["n_healthy"]) == (6, 3, 3)
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_a_data_set_is_opened_by_its_name_and_keywords(folder):
    assert len(open_dataset("phantom:n=3,seed=5")) == 3
    dataset = open_dataset(f"folder:root={folder},classes=[diseased,healthy]")
    assert dataset.features["label"].names == ["diseased", "healthy"] and len(dataset) == 6
    assert open_dataset(str(folder)).features["label"].names == ["healthy", "diseased"]


def test_a_table_is_opened_as_in_the_help(tmp_path):
    for name in ("image", "mask"):
        Image.new("L", (8, 8), 200).save(tmp_path / f"{name}.png")
    (tmp_path / "x.csv").write_text("file,mask,patient_id,view\nimage.png,mask.png,p7,AP\n")
    [row] = open_dataset(f"table:csv={tmp_path}/x.csv,mask=mask,patient=patient_id,view=view,label=diseased")
    assert (row["label"], row["patient"], row["view"]) == (1, "p7", "AP") and np.asarray(row["mask"]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/no/such/folder", "a folder or NAME:key=value"),
        ("nothing:root=x", "with NAME of brats"),
        ("phantom:n", "got 'n' in"),
        ("phantom:colour=red", "unknown key 'colour'"),
        ("phantom:n=3,n=4", "expected 'n' once in 'phantom:n=3,n=4', got it twice"),
        ("phantom:n=3,seed=abc", "seed: expected int, got 'abc'"),
    ],
)
def test_an_invalid_data_set_argument_is_refused_with_the_syntax(text, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(text)


def test_prepare_makes_the_small_copy_and_prints_a_summary(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    assert main(["prepare", str(folder), str(copy), "--size", "12", "--equalize", "--workers", "1"]) == 0
    assert "images" in capsys.readouterr().out
    assert {row["image"].size for row in open_dataset(str(copy))} == {(12, 12)}


def test_publish_wants_a_card(model, tmp_path, capsys):
    folder = Path(model[1])
    assert main(["publish", str(folder), "me/model"]) == 2
    assert "--training" in capsys.readouterr().err
    assert main(["publish", str(tmp_path / "nowhere"), "me/model"]) == 2
    assert "model_index.json" in capsys.readouterr().err
    (folder / "README.md").write_text("# a card")
    assert main(["publish", str(folder), "me/model", "--image", "x.png"]) == 2
    assert "--training" in capsys.readouterr().err and (folder / "README.md").read_text() == "# a card"


@pytest.mark.parametrize(
    "command",
    [
        "evaluate d --out o --only 1 2 --only 3 --skip 1 2 --skip 3 --on 1 --on 2 3",
        "evaluate d --out o --strata 1 --strata 2 3 --model 1 --model 2 3 --noise-level 1 2 --noise-level 3",
        "demo --model 1 --model 2 3",
        "prepare d o --unlabelled 1 --unlabelled 2 3",
    ],
)
def test_an_option_that_takes_several_values_may_be_given_several_times(command):
    for _ in range(2):
        options = vars(build_parser().parse_args(command.split()))
        names = {word.removeprefix("--").replace("-", "_") for word in command.split() if word.startswith("--")} - {
            "out"
        }
        assert {name: [int(value) for value in options[name]] for name in names} == dict.fromkeys(names, [1, 2, 3])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("prepare DATA OUT --pack --format png --workers 2", "expected --format, --workers only without --pack"),
        ("prepare DATA OUT --quality 90", "expected --quality only with --pack"),
        ("chexlocalize DATA x.json --out OUT --bootstrap 0", "expected --bootstrap of 1 or more, got 0"),
        ("prepare DATA OUT --frontal-only", "expected CheXpert for `frontal_only`, got "),
        ("deblur DATA OUT --kernel disk:radius=1 --plan --shard 0/2", "expected --plan without --shard, got 0/2"),
        ("detect DATA --out OUT --as-original --dtype bfloat16", "expected --dtype float32 with --as-original"),
        ("detect DATA --out OUT --backend onnx --dtype bfloat16", "expected --dtype float32 with --backend onnx"),
        ("detect DATA --out OUT --no-panel --vmax 0.5 --model MODEL", "expected `vmax` with panels or `dicom`"),
        ("publish MODEL me/x --license mit", "expected --training beside --license: a new card"),
        ("publish MODEL me/x --training T --evaluated-on X", "expected --evaluation FOLDER of one data set with"),
        ("publish MODEL me/x --training T --evaluated-on X --evaluation DATA", "FOLDER of one data set with"),
    ],
)
def test_an_option_without_effect_is_refused(model, folder, tmp_path, capsys, command, message):
    words = {"DATA": str(folder), "OUT": str(tmp_path / "out"), "MODEL": model[1]}
    assert main([words.get(word, word) for word in command.split()]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert not (Path(model[1]) / "README.md").exists()


def test_convert_takes_the_originals_command_line_as_it_is(tmp_path, capsys):
    net = OriginalUNet(mult=(1, 2), attention=(1,), classes=2, class_mlp=True)
    net(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    torch.save(net.tensors, tmp_path / "model.pt")
    command = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "out"), *ORIGINAL_FLAGS]
    assert main([*command, "--class_names", "healthy, effusion"]) == 0
    assert "CFGAnomalyPipeline" in capsys.readouterr().out
    pipeline = CFGAnomalyPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.class_names == ["healthy", "effusion"] and pipeline.unet.config.dropout == 0.1

    for further, message in [
        ([], "overwrite"),
        (["--overwrite", "--learn_sigma", "maybe"], "learn_sigma True or False, got 'maybe'"),
        (["--overwrite", "--num_res_blocks", "2"], "the flag num_res_blocks is 2, but the tensors say 1"),
        (["--overwrite", "--num_heads", "two"], "num_heads"),
    ]:
        assert main([*command, *further]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("cxr-diffusers convert: ") and message in said
