"""Pipeline folders that carry their own code, so that they open with diffusers alone."""

import hashlib
import importlib
import inspect
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from diffusers.utils.torch_utils import is_compiled_module

if TYPE_CHECKING:  # a type checker sees the methods of the pipeline that the mixin is put before
    from diffusers import DiffusionPipeline as Base
else:
    Base = object


class PortableMixin(Base):
    """Put before `DiffusionPipeline` among the bases of a pipeline class.

    However it is saved (`save_pretrained`, `push_to_hub`), the folder contains the pipeline's file and the siblings
    that it imports, and opens with

        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)    where this package is not installed
        TheClass.from_pretrained(folder)                                     where it is: the installed code runs

    The code of components of this package (a classifier, a generator) is written into the component's folder.

    The class relies on two hooks of diffusers, `save_config` and `_dict_from_json_file`, and on its table of loadable
    classes; tests check that they are there.
    """

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and the code beside it: the last step of `save_pretrained`."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        index.pop("_name_or_path", None)  # a local path; loading sets it anew
        index["_class_name"] = [copy_code(type(self), folder), type(self).__name__]
        for name, component in self.components.items():
            component = component._orig_mod if is_compiled_module(component) else component
            if component is not None and is_ours(component):
                index[name][0] = copy_code(type(component), folder / name)
            forget_path(folder / name / "config.json")
        write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers, also with components whose class differs from the annotated type."""
        names = inspect.signature(cls.__init__).parameters
        components = {name: part for name, part in pipeline.components.items() if name in names and part is not None}
        return super().from_pipe(pipeline, **{**components, **kwargs})

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """`TheClass.from_pretrained` uses that class and the installed components, not the code in the folder."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        for name, value in config.items():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[1], str):
                config[name] = installed(*value)
        return config

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """As in diffusers, together with the model card of the folder or repository it was loaded from."""
        from huggingface_hub import HfApi

        files = card_files(str(self.config.get("_name_or_path") or ""), kwargs.get("token"))
        if files and not kwargs.get("create_pr"):  # a pull request changes nothing on the main branch
            api = HfApi(token=kwargs.get("token"))
            repo_id = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
            for name, content in files.items():
                content = rename_card(content.decode(), repo_id).encode() if name == "README.md" else content
                api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)
        return super().push_to_hub(repo_id, **kwargs)


def card_files(source: str, token: str | None = None) -> dict[str, bytes]:
    """{name: content} of the model card of a folder or Hub name, and of the images in it; {} without a card."""
    from huggingface_hub import hf_hub_download

    def read(name):
        path = Path(source) / name if Path(source).is_dir() else hf_hub_download(source, name, token=token)
        return Path(path).read_bytes()

    try:
        card = read("README.md")
        return {"README.md": card, **{name: read(name) for name in re.findall(r"\(([^/()]+\.png)\)", card.decode())}}
    except (OSError, ValueError):  # no card, no connection, or an invalid name
        return {}


def rename_card(card: str, repo_id: str) -> str:
    """Replace the model's name in the example of a model card by `repo_id`."""
    return re.sub(r'(DiffusionPipeline\.from_pretrained\(")[^"]*', rf"\g<1>{repo_id}", card)


PACKAGE = __name__.rpartition(".pipelines.")[0]  # "" if this file is a copy in a model's folder


def installed(library: Any, class_name: str) -> list[Any]:
    """[library, class] of a component -> [this package, class] if it is one of the package's models, else unchanged."""
    if library not in ("diffusers", "transformers") and class_name in LOADABLE_CLASSES.get(PACKAGE, {}):
        return [PACKAGE, class_name]
    return [library, class_name]


def register_components() -> None:
    """Let diffusers open components whose library in `model_index.json` is this package."""
    homes = vars(importlib.import_module(PACKAGE))["_HOME"]
    models = [name for name, home in homes.items() if home.startswith("models.")]
    LOADABLE_CLASSES[PACKAGE] = {name: ["save_pretrained", "from_pretrained"] for name in models}
    ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES[PACKAGE])


if PACKAGE:
    register_components()


def is_ours(component: Any) -> bool:
    """Whether a component's class is neither of diffusers nor of transformers, so that its code must be saved."""
    return type(component).__module__.split(".")[0] not in ("diffusers", "transformers")


def copy_code(cls: type, folder: str | Path) -> str:
    """Copy the file that defines `cls`, and the siblings it imports, into `folder`; return the module's name.

    diffusers loads the files of all folders into one flat package, and a second file of the same name would reuse the
    first one's namespace. So the name of each copy contains a digest of its content.
    """
    source = Path(inspect.getsourcefile(cls) or "")
    code = source.read_text()
    for name in get_relative_imports(source):
        stamped = write_stamped(name, source.with_name(f"{name}.py").read_text(), folder)
        code = code.replace(f"from .{name} import", f"from .{stamped} import")
    return write_stamped(source.stem, code, folder)


def forget_path(config: Path) -> None:
    """Take the local path that a component was loaded from out of its config, which may be published."""
    if config.is_file():
        values = json.loads(config.read_text())
        if values.pop("_name_or_path", None) is not None:
            write_atomically(config, json.dumps(values, indent=2) + "\n")


def write_stamped(name: str, code: str, folder: str | Path) -> str:
    """Write `folder`/NAME_DIGEST.py and return NAME_DIGEST; a digest that `name` already has is replaced."""
    stamped = f"{re.sub(r'_[0-9a-f]{8}$', '', name)}_{hashlib.sha256(code.encode()).hexdigest()[:8]}"
    write_atomically(Path(folder) / f"{stamped}.py", code)
    return stamped


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
