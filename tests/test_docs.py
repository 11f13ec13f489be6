"""The pages: every command that they show is one, every link leads somewhere, and the site builds."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from cxr_diffusers import load_phantom
from cxr_diffusers.cli import build_parser, main
from cxr_diffusers.training.recipe import (
    AdversarialRecipe,
    ClassifierRecipe,
    Recipe,
    SegmenterRecipe,
    load_recipe,
    parse_command_line,
    parse_overrides,
)
from helpers import write_chexpert, write_source

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "training" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
PAGES += ROOT.glob("cxr_diffusers/*/*/README.md")
ENVIRONMENT = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
KINDS = {
    "train_cfg": Recipe,
    "train_unconditional": Recipe,
    "train_classifier": ClassifierRecipe,
    "train_fixed_point_gan": AdversarialRecipe,
    "train_lung_segmenter": SegmenterRecipe,
}
DEFAULTS = {
    "train_cfg": "phantom_cfg_32",
    "train_unconditional": "phantom_unconditional_32",
    "train_classifier": "phantom_classifier_32",
    "train_fixed_point_gan": "phantom_fixed_point_gan_32",
    "train_lung_segmenter": "cxr_lung_segmenter_64",
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def lines(text, program):
    """The command lines of the bash blocks that run `program`, from there on, comments and what follows cut."""
    commands = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    for line in commands:
        for part in re.split(r"&&|;|\|\s", re.sub(r"(^|\s)#.*", "", line)):
            if program in part and "..." not in part and "$" not in part:
                yield shlex.split(part[part.index(program) :], comments=True)


@pytest.fixture(params=sorted(PAGES), ids=lambda path: path.relative_to(ROOT).as_posix())
def page(request):
    return request.param


def test_every_command_parses(page):
    text = page.read_text()
    for program in ("cxr-diffusers ", "cxr_diffusers.cli "):
        for line in lines(text, program):
            assert build_parser().parse_args(line[1:]).run, line


def test_every_training_line_builds_its_recipe(page):
    for script, *arguments in lines(page.read_text(), "training/train_"):
        name = Path(script).stem
        assert (ROOT / script).is_file()
        given = [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
        default = ROOT / "configs" / f"{DEFAULTS[name]}.yaml"
        assert parse_command_line(given, default, KINDS[name]).train.max_steps > 0


def test_every_train_command_builds_its_recipe(page):
    for program in ("cxr-diffusers train ", "cxr_diffusers.cli train "):
        for _, _, *arguments in lines(page.read_text(), program):
            if not arguments[0].startswith("-"):
                assert load_recipe(arguments[0], parse_overrides(arguments[1:])).train.max_steps > 0


def test_every_make_target_is_there(page):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines(page.read_text(), "make "):
        assert set(word for word in line[1:] if "=" not in word) <= set(targets), line


def test_every_link_and_image_is_there(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert not [link for link in links if link and ":" not in link and not (page.parent / link).exists()]


def test_every_block_of_python_compiles(page):
    for code in blocks(page.read_text(), "python"):
        compile(code, page.name, "exec")


def test_the_checks_have_something_to_check():
    texts = [page.read_text() for page in PAGES]
    assert sum(len(list(lines(text, "cxr-diffusers "))) for text in texts) >= 15
    assert sum(len(list(lines(text, "training/train_"))) for text in texts) > 5
    assert sum(len(list(lines(text, "cxr-diffusers train "))) for text in texts) > 15


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_the_files_that_a_notebook_names_are_there(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for name in re.findall(r"configs/[\w/]+\.yaml|benchmarks/\w+\.py|training/\w+\.py", text):
        assert (ROOT / name).is_file(), name


def test_the_site_builds_without_a_warning_and_has_every_page(tmp_path):
    # not -q: what is not logged is not counted, and --strict passes
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in ROOT.glob("docs/*.md"):
        assert (tmp_path / "site" / f"{page.stem}.html").is_file()
    home = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis" not in home and 'href="train.html"' in home
    assert "load_hub" in (tmp_path / "site" / "api" / "data.html").read_text()


AS_SHOWN = [  # page, what the line that is run has in it, and what is there afterwards
    ("README.md", "detect MY_IMAGES", "maps/results.csv"),
    ("README.md", "prepare", "data/chexpert-256/train.csv"),
    ("docs/clinic.md", "detect /data/pacs_export", "maps/dicom/IM0001_seg.dcm"),
    ("docs/detect.md", "detect chest.png", "maps/chest.png"),
    ("docs/detect.md", "detect /data/dicom --out maps --model", "maps/rows/IM0001.json"),
    ("docs/detect.md", "--model cxr_grad_cam_128", "maps/results.csv"),
    ("docs/evaluation.md", "evaluate /data/testing --healthy", "report/summary.md"),
    ("docs/evaluation.md", "evaluate table:csv=test.csv", "report/contact_sheet.png"),
    ("docs/trajectory.md", "detect", "maps/trajectories/1.webp"),
]


@pytest.mark.parametrize("page, part, made", AS_SHOWN, ids=lambda value: re.sub(r"\W+", "_", value))
def test_a_command_works_as_it_is_shown(page, part, made, pipeline, tmp_path, monkeypatch, capsys):
    """In a folder that holds what the pages name; what they name below /data is below the folder's data."""
    data, ill = tmp_path / "data", load_phantom(2, size=32)[1]
    for path in write_chexpert(data, "CheXpert-v1.0").rglob("*.jpg"):
        Image.open(path).resize((24, 20)).save(path)
    for folder in (tmp_path / "MY_IMAGES", data / "validation" / "healthy", data / "testing" / "diseased"):
        folder.mkdir(parents=True)
        ill["image"].save(folder / "1.png")
    ill["image"].save(tmp_path / "chest.png")
    ill["mask"].save(data / "testing" / "diseased" / "1_mask.png")
    row = "chest.png,data/testing/diseased/1_mask.png,1,here"
    (tmp_path / "test.csv").write_text(f"file,mask,patient_id,source\n{row}\n")
    (tmp_path / "healthy.csv").write_text("file\nchest.png\n")
    for name in ("pacs_export", "dicom"):
        (data / name).mkdir()
        write_source(data / name / "IM0001")
    pipeline.register_to_config(settings={"num_inference_steps": 4})
    pipeline.save_pretrained(tmp_path / "runs" / "chexpert_cfg_256")
    monkeypatch.chdir(tmp_path)
    commands = lines((ROOT / page).read_text(), "cxr-diffusers ")
    line = next(line for line in commands if part in " ".join(line))
    quick = [] if "--model" in line or line[1] == "prepare" else ["--num-inference-steps", "4"]  # of the shipped model
    quick += ["--threshold", "0.02"] if "--dicom" in line else []  # the model's own is for its own steps
    arguments = [argument.replace("/data/", f"{data}/") for argument in line[1:]]
    assert main([*arguments, *quick]) == 0, capsys.readouterr().err
    assert (tmp_path / made).is_file()


def test_the_first_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "cxr_diffusers" / "samples", tmp_path / "cxr_diffusers" / "samples")
    monkeypatch.chdir(tmp_path)
    exec(blocks((ROOT / "README.md").read_text(), "python")[0], {})
    assert (tmp_path / "map.png").is_file() and (tmp_path / "as_if_healthy.png").is_file()


def test_the_synthetic_dicom_file_of_the_clinic_page_gives_dicom_results(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "clinic.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(blocks(text, "python")[0], {})
    line = next(line for line in lines(text, "cxr-diffusers ") if "synthetic.dcm" in line)
    assert main(line[1:]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "synthetic_maps" / "dicom").glob("synthetic_*.dcm"))) == 3


def test_the_readme_shows_commands_training_lines_and_links():
    text = (ROOT / "README.md").read_text()
    assert len(list(lines(text, "cxr-diffusers "))) >= 4
    assert len(list(lines(text, "training/train_"))) >= 1
    assert len([link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]) >= 6
