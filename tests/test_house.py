"""The house stands: no circle of imports, one package name, and every way of installing gives the same imports."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

HOMES = {"cxr_diffusers": "cxr_diffusers", "pipelines": "cxr_diffusers.pipelines", "training": "training"}


@cache
def modules():
    """{dotted name: file} of everything that is ours."""
    paths = {}
    for folder, prefix in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [p for p in path.relative_to(ROOT / folder).with_suffix("").parts if p != "__init__"]
            paths[".".join([prefix, *parts])] = path
    return paths


def imports(name, path):
    """The modules of ours that a module imports, as dotted names, imports inside functions included."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            if base.split(".")[0] in HOMES:
                for alias in node.names:
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else home_of(base, alias.name)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in HOMES)


def home_of(base, name):
    """`from cxr_diffusers import X` means the module that X lives in."""
    if base != "cxr_diffusers":
        return base
    from cxr_diffusers import _HOME

    return f"cxr_diffusers.{_HOME[name]}"


def room(name):
    """The package or single file of the first level that a module lives in; programs are rooms of their own."""
    return ".".join(name.split(".")[:2])


def test_the_packages_form_no_circle():
    """`pipelines/` and `models/` import nothing of ours but siblings, and the other rooms form no circle."""
    arrows = {(a, b) for a, path in modules().items() for b in imports(a, path) if a != "cxr_diffusers"}
    assert len(arrows) > 40, "the walk did not walk"
    assert not [f"{a} -> {b}" for a, b in arrows if b.split(".")[0] in ("pipelines", "training")], "never a second name"

    rooms = {(room(a), room(b)) for a, b in arrows if room(a) != room(b)}
    travels = ("cxr_diffusers.pipelines", "cxr_diffusers.models")
    assert not [f"{a} -> {b}" for a, b in rooms if a in travels]
    while rooms:
        ends = {b for _, b in rooms} - {a for a, _ in rooms}  # rooms that import no other room
        assert ends, f"a circle among {sorted({a for a, _ in rooms})}"
        rooms = {(a, b) for a, b in rooms if b not in ends}


def test_siblings_of_a_pipeline_import_no_siblings():
    """A pipeline imports siblings `cxr_*.py`, and these import none: diffusers copies one level."""
    files = {n: p for n, p in modules().items() if n.startswith("cxr_diffusers.pipelines.")}
    assert len(files) >= 4
    for name, path in files.items():
        targets = list(imports(name, path))
        assert all(t.startswith("cxr_diffusers.pipelines.cxr_") for t in targets), (name, targets)
        if path.stem.startswith("cxr_"):
            assert not targets, f"{name} is a sibling and imports {targets}"


def test_every_public_name_is_there():
    import cxr_diffusers

    for name in cxr_diffusers.__all__:
        assert getattr(cxr_diffusers, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        getattr(cxr_diffusers, "nothing")  # noqa: B009


def missing_annotations(name, function):
    """Parameters of a function, or its return, that have no annotation: ["name(parameter)", "name ->"]."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    missing = [f"{name}({p.name})" for p in parameters if p.annotation is p.empty]
    return missing + [f"{name} ->"] * (signature.return_annotation is signature.empty)


def public_functions(name, value):
    """A function itself, or the public methods that a class of ours defines or inherits from ours, and its call."""
    if inspect.isfunction(value):
        yield name, value
    for cls in inspect.getmro(value) if inspect.isclass(value) else ():
        if not cls.__module__.startswith("cxr_diffusers"):
            continue
        for key, member in vars(cls).items():
            member = getattr(member, "fget", None) or getattr(member, "__func__", member)
            generated = "<string>" in str(getattr(getattr(member, "__code__", None), "co_filename", ""))
            if inspect.isfunction(member) and not generated and (key[0] != "_" or key in ("__init__", "__call__")):
                yield f"{name}.{key}", member


def test_every_public_name_is_annotated():
    import cxr_diffusers

    names = {name: getattr(cxr_diffusers, name) for name in cxr_diffusers._HOME}
    functions = [function for name, value in names.items() for function in public_functions(name, value)]
    assert len(functions) > 100, "the walk did not walk"
    missing = [text for name, function in functions for text in missing_annotations(name, function)]
    assert not missing, f"{len(missing)} without a type: {', '.join(sorted(set(missing)))}"


def run_python(code, cwd, path=""):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_the_package_is_cheap(tmp_path):
    heavy = "('torch', 'diffusers', 'datasets', 'pandas')"
    code = f"import sys, cxr_diffusers; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code, tmp_path, ROOT).stdout.strip() == "[]"


# torch and diffusers are imported once; each place is then tried in a process of its own, and the last place trains
IMPORTS = """if True:
    import os, sys, diffusers.pipelines.ddim, torch
    def train():
        from cxr_diffusers.cli import main
        assert main(["train", "phantom_unconditional_32", *{values}]) == 0
        assert main(["evaluate", "--config", "evaluate", "--out", "report"]) == 2  # the plan asks for its root
    for place in (places := {places}):
        if not (child := os.fork()):
            sys.path.insert(1, place)  # after the working folder, as PYTHONPATH
            import cxr_diffusers, cxr_diffusers.pipelines as p
            from cxr_diffusers import CFGAnomalyPipeline
            assert CFGAnomalyPipeline is p.CFGAnomalyPipeline
            assert CFGAnomalyPipeline.__module__ == "cxr_diffusers.pipelines.pipeline_cfg_anomaly"
            print(p.__file__, flush=True)
            if place == places[-1]:
                train()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


def build_wheel(folder):
    """A wheel of this checkout without the weights' content, built from a copy.

    setuptools would leave a build folder behind, and pack the files of an old one.
    """

    def copy_file(source, target):
        return Path(target).touch() if source.endswith(".safetensors") else shutil.copy2(source, target)

    copy = folder / "copy"
    for name in ("configs", "cxr_diffusers", "pipelines", "training"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored, copy_function=copy_file)
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    run_python(f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r})", copy)
    return next(folder.glob("*.whl"))


def test_a_bare_checkout_a_wheel_and_a_foreign_folder_called_pipelines_get_along(tmp_path):
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("raise RuntimeError('another project has this name, too')")
    wheel, site = build_wheel(tmp_path), tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    values = ["data.n=8", "train.batch_size=4", "train.max_steps=1", "train.validation_images=1"]
    done = run_python(IMPORTS.format(places=[str(ROOT), str(site)], values=values), tmp_path)
    files = [line for line in done.stdout.splitlines() if line.endswith("__init__.py")]
    assert files == [str(ROOT / "pipelines" / "__init__.py"), str(site / "cxr_diffusers" / "pipelines" / "__init__.py")]

    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cxr_diffusers"}
    assert {"cxr_diffusers/pipelines/pipeline_cfg_anomaly.py", "cxr_diffusers/py.typed"} < set(names)
    tracked = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cxr_diffusers").rglob("*") if p.is_file()}
    assert not {name for name in tracked - set(names) if "__pycache__" not in name}, "setup.cfg misses package data"
    description = next(zipfile.ZipFile(wheel).read(name).decode() for name in names if name.endswith("/METADATA"))
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) > 20 and all(link.startswith("https://") for link in links), "a relative link is dead on PyPI"
    ours = {f"{n.replace('.', '/')}" for n in modules() if not n.startswith("training")}
    packed = {n.removesuffix(".py").removesuffix("/__init__") for n in names if n.endswith(".py")}
    assert not ours - packed, "setup.cfg does not list a package"
    assert any(n.endswith("samples/sample_1.png") for n in names)
    assert {f"cxr_diffusers/demo/{n}" for n in ("page.css", "viewer.html", "viewer.js")} < set(names)
    assert any(n.endswith("cxr_cfg_128/unet/diffusion_pytorch_model.safetensors") for n in names)
    assert any(n.endswith("cxr_fixed_point_gan_128/generator/diffusion_pytorch_model.safetensors") for n in names)
    recipes = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    programs = {f"training_programs/{p.name}" for p in (ROOT / "training").glob("*.py")}
    assert {f"cxr_diffusers/{n}" for n in recipes | programs} <= set(names)
    # a recipe and a plan are found by name, and the recipe's program trains, without the repository
    assert (tmp_path / "runs" / "phantom_unconditional_32" / "model_index.json").is_file()
    assert f"{site}/cxr_diffusers/configs/plans/evaluate.yaml: give root" in done.stderr


def test_every_process_that_a_test_waits_for_has_a_timeout():
    starting = {"subprocess.run", "subprocess.check_output", "subprocess.check_call", "subprocess.call"}
    endless = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or any(k.arg == "timeout" for k in node.keywords):
                continue
            called = ast.unparse(node.func)
            if called in starting or (re.search(r"(process|child)\.(wait|communicate)$", called) and not node.args):
                endless.append(f"{path.name}:{node.lineno}")
    assert not endless
