"""The README does what it says."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from cxr_diffusers.cli import build_parser
from cxr_diffusers.training.recipe import parse_command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program):
    """The command lines of the README that run `program`, without what stands before it, comments cut."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    found = [line[line.index(program) :] for line in lines if program in line]
    return [shlex.split(line, comments=True) for line in found]


def test_its_first_python_block_runs(tmp_path):
    shutil.copytree(ROOT / "cxr_diffusers" / "samples", tmp_path / "cxr_diffusers" / "samples")
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + blocks("python")[0]
    # the folder of samples must not pass for the package
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "map.png").is_file() and (tmp_path / "as_if_healthy.png").is_file()


def test_its_commands_are_commands():
    lines = commands("cxr-diffusers ")
    assert len(lines) >= 4
    for line in lines:
        assert build_parser().parse_args(line[1:]).run, line


def test_its_training_lines_name_recipes_and_keys_that_exist():
    lines = commands("training/train_")
    assert len(lines) >= 1
    for script, *arguments in lines:
        assert (ROOT / script).is_file()
        given = [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]
        assert parse_command_line(given, ROOT / "configs" / "phantom_cfg_32.yaml").train.max_steps > 0


def test_its_links_and_pictures_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 6
    assert not [link for link in links if not (ROOT / link).exists()]
