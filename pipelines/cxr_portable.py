"""A pipeline folder that carries its own code: it opens where only diffusers is installed."""

import hashlib
import importlib
import inspect
import json
import os
import re
from pathlib import Path

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from diffusers.utils.torch_utils import is_compiled_module


class PortableMixin:
    """Put before `DiffusionPipeline` among the bases of a pipeline class.

    Whatever way it is saved (`save_pretrained`, `push_to_hub`), the folder holds the pipeline's file and the siblings
    it imports, and opens with

        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)    where this package is not installed
        TheClass.from_pretrained(folder)                                     where it is: the installed code runs

    So do components of ours (a classifier, a generator): their file lies in the component's folder.

    It leans on two hooks of diffusers, `save_config` and `_dict_from_json_file`, and on its table of loadable classes;
    tests hold them in place.
    """

    def save_config(self, save_directory, push_to_hub=False, **kwargs):
        """Write `model_index.json` and, beside it, the code; the last thing that `save_pretrained` does."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [copy_code(type(self), folder), type(self).__name__]
        for name, component in self.components.items():
            component = component._orig_mod if is_compiled_module(component) else component
            if component is not None and is_ours(component):
                index[name][0] = copy_code(type(component), folder / name)
        write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As in diffusers, and with components of any class: those that only stand in for the annotated type, too."""
        names = inspect.signature(cls.__init__).parameters
        components = {name: part for name, part in pipeline.components.items() if name in names and part is not None}
        return super().from_pipe(pipeline, **{**components, **kwargs})

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """Asked for by its class, a folder opens with that class and our installed ones, without its own code."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
                config[name] = installed(*value)
        return config

    def push_to_hub(self, repo_id, **kwargs):
        """As in diffusers, together with the card of the model that this pipeline was loaded from."""
        from huggingface_hub import HfApi

        files = card_files(str(self.config.get("_name_or_path") or ""), kwargs.get("token"))
        if files and not kwargs.get("create_pr"):  # which must touch nothing but its own branch
            api = HfApi(token=kwargs.get("token"))
            repo_id = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
            for name, content in files.items():
                content = named(content.decode(), repo_id).encode() if name == "README.md" else content
                api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)
        return super().push_to_hub(repo_id, **kwargs)


def card_files(source, token=None):
    """{name: bytes} of the card of a model, a folder or a name on the Hub, and of the images it shows."""
    from huggingface_hub import hf_hub_download

    def read(name):
        path = Path(source) / name if Path(source).is_dir() else hf_hub_download(source, name, token=token)
        return Path(path).read_bytes()

    try:
        card = read("README.md")
        return {"README.md": card, **{name: read(name) for name in re.findall(r"\(([^/()]+\.png)\)", card.decode())}}
    except (OSError, ValueError):  # no card, no connection, or no name
        return {}


def named(card, repo_id):
    """A card whose example opens `repo_id`, whatever name it was written for."""
    return re.sub(r'(DiffusionPipeline\.from_pretrained\(")[^"]*', rf"\g<1>{repo_id}", card)


PACKAGE = __name__.rpartition(".pipelines.")[0]  # "" where this file is a copy in a model's folder


def installed(library, class_name):
    """[library, class] of a component -> the same, or [this package, class] where it is installed and has the class."""
    if library not in ("diffusers", "transformers") and class_name in LOADABLE_CLASSES.get(PACKAGE, {}):
        return [PACKAGE, class_name]
    return [library, class_name]


def register_components():
    """Let diffusers open the models of this package as components, wherever `model_index.json` names the package."""
    homes = vars(importlib.import_module(PACKAGE))["_HOME"]
    models = [name for name, home in homes.items() if home.startswith("models.")]
    LOADABLE_CLASSES[PACKAGE] = {name: ["save_pretrained", "from_pretrained"] for name in models}
    ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES[PACKAGE])


if PACKAGE:
    register_components()


def is_ours(component):
    """A component whose class no library on the other machine knows."""
    return type(component).__module__.split(".")[0] not in ("diffusers", "transformers")


def copy_code(cls, folder):
    """Copy the file that defines `cls`, and the siblings it imports, into `folder`; return the module's name.

    diffusers loads all such files into one flat package, and a process that has loaded a file keeps it or, where it
    comes again, runs the new one in the old one's namespace. So each copy is named after its content: two versions
    never meet under one name.
    """
    source = Path(inspect.getsourcefile(cls))
    code = source.read_text()
    for name in get_relative_imports(source):
        stamped = write_stamped(name, source.with_name(f"{name}.py").read_text(), folder)
        code = code.replace(f"from .{name} import", f"from .{stamped} import")
    return write_stamped(source.stem, code, folder)


def write_stamped(name, code, folder):
    """Write `folder`/NAME_STAMP.py and return NAME_STAMP; `name` has one already when it comes from such a folder."""
    stamped = f"{re.sub(r'_[0-9a-f]{8}$', '', name)}_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    write_atomically(Path(folder) / f"{stamped}.py", code)
    return stamped


def write_atomically(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
