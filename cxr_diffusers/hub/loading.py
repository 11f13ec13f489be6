"""Opening finished models: shipped ones, pipeline folders, and models on the Hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from ..connection import hub_answers
from ..files import safe_name

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
DEFAULT = "cxr_cfg_128"
RUNS = "runs"  # where training writes: never the name of a user on the Hub
LARGEST_SIZE, LARGEST_DEPTH = 1_000_000, 100  # of a number in a component's configuration; of `layers_per_block`


def default_checkpoint(name: str = DEFAULT) -> str:
    """The folder of a shipped model: `CFGAnomalyPipeline.from_pretrained(default_checkpoint())`.

    Open other models than the default one with `load_pipeline(NAME)`: they may share components with it.

    Raises:
        ValueError: no such model is shipped; the message lists those that are.
    """
    if name not in shipped_models():
        raise ValueError(f"expected one of the shipped models {', '.join(shipped_models())}, got {name!r}")
    return str(CHECKPOINTS / name)


def shipped_models() -> list[str]:
    """The names of the shipped models."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))


def shared_components(folder: Path, index: dict) -> dict[str, Any]:
    """{name: component} of the default model, for the components that a shipped model names but has no folder for.

    For example, the shipped classifier guides the default model's UNet, which is shipped only once.
    """
    if folder.resolve().parent != CHECKPOINTS.resolve():
        return {}
    # a component is [library, class]; `data_range` is a list, too
    pairs = {name for name, value in index.items() if isinstance(value, list) and value and isinstance(value[0], str)}
    missing = [name for name in sorted(pairs - {"_class_name"}) if not (folder / name).is_dir()]
    return {name: getattr(load_pipeline(CHECKPOINTS / DEFAULT), name) for name in missing}


def load_unet(folder: Path | str, unconditional: bool = False) -> Any:
    """The UNet of a pipeline folder, a Hub name or a shipped model, for further training.

    With `unconditional`, a class-conditional UNet is converted to the equal unconditional one: the last class
    embedding, that of the null label, is a constant added to the time embedding, so it is added to a bias there.

    Raises:
        FileNotFoundError: no such folder, and no such model on the Hub.
        ValueError: `unconditional` of a model that was trained without a null label.
    """
    from diffusers import UNet2DModel

    from ..models.class_matrix_unet import ClassMatrixUNet
    from ..models.space_to_depth_unet import SpaceToDepthUNet

    folder = shipped_folder(folder) or folder
    if not Path(folder).is_dir():
        index_folder(folder)  # a mistyped name is an error before diffusers asks the Hub
    class_name = UNet2DModel.load_config(folder, subfolder="unet")["_class_name"]
    unet_class = {cls.__name__: cls for cls in (ClassMatrixUNet, SpaceToDepthUNet)}.get(class_name, UNet2DModel)
    unet = unet_class.from_pretrained(folder, subfolder="unet")
    if not unconditional or unet.config.num_class_embeds is None:
        return unet
    is_whole = not Path(folder).is_dir() or (Path(folder) / "model_index.json").is_file()
    if is_whole and not read_index(index_folder(folder)).get("has_null_label", True):
        raise ValueError(f"expected a model without classes or with a null label, got {folder}, which has only classes")
    config = {key: value for key, value in unet.config.items() if key != "num_class_embeds" and key[0] != "_"}
    plain = unet_class(**config)
    weights = unet.state_dict()
    null = weights.pop("class_embedding.weight")[-1]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + null
    plain.load_state_dict(weights)
    return plain


def is_hub_name(name: Path | str) -> bool:
    """Whether this can only be USER/NAME on the Hub.

    It has that form, USER is not `RUNS`, and there is neither a folder of this name nor a folder USER.
    """
    path = Path(name)
    if path.exists() or path.parent.is_dir() or path.parts[:1] == (RUNS,):
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None


def hub_file(name: Path | str, filename: str) -> Path:
    """Path of a file of the repository USER/NAME: downloaded, or from the cache if the Hub does not answer.

    Raises:
        FileNotFoundError: no such repository; or the Hub does not answer and the file is not in the cache.
        OSError: no such file in the repository, or no access.
    """
    try:
        return Path(hf_hub_download(str(name), filename, local_files_only=not hub_answers()))
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"no folder {name} here, and no repository {name} on the Hub (for a private one: `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"no folder {name} here, and {constants.ENDPOINT}, where a model {name} might be, does not answer"
        ) from None


def shipped_folder(name: Path | str) -> Path | None:
    """The folder of a shipped model, "default" for the default one; None if no model has this name."""
    folder = CHECKPOINTS / (DEFAULT if name == "default" else name)
    return folder if (folder / "model_index.json").is_file() and not Path(name).exists() else None


def load_pipeline(name: Path | str, trust_remote_code: bool = False) -> Any:
    """Open a model as a pipeline of the class that its `model_index.json` names.

    Args:
        name: a pipeline folder, USER/NAME on the Hub, or the name of a shipped model ("default" for the default one).
        trust_remote_code: run the code in the model's folder if its class is not part of this package.

    Raises:
        FileNotFoundError: no such folder, or no `model_index.json` in it; no such model on the Hub, or the Hub does not
            answer.
        ValueError: another class without `trust_remote_code`, or damaged files.
    """
    from diffusers import DiffusionPipeline

    from .. import pipelines

    name = shipped_folder(name) or name
    index = read_index(index_folder(name))
    cached = is_hub_name(name) and not hub_answers()
    class_name = class_named(index)
    if class_name in pipelines.__all__ and class_name.endswith("Pipeline"):
        check_sizes(Path(name), index)
        components = shared_components(Path(name), index)
        with one_line_errors(name), no_loading_bar():
            return getattr(pipelines, class_name).from_pretrained(name, local_files_only=cached, **components)
    if trust_remote_code:
        return DiffusionPipeline.from_pretrained(name, local_files_only=cached, trust_remote_code=True)
    expected = " or ".join(name for name in pipelines.__all__ if name.endswith("Pipeline"))
    raise ValueError(
        f"expected a {expected} in {name}, got a {class_name}: pass `trust_remote_code=True` to run its own code"
    )


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Hide diffusers' bar of the loaded components, which takes less than a second; downloads have their own bars."""
    from diffusers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def index_folder(name: Path | str) -> Path:
    """The folder with the `model_index.json` of a pipeline folder or, downloaded, of USER/NAME on the Hub.

    Raises:
        FileNotFoundError: neither is there; a local folder is looked for first.
    """
    if (Path(name) / "model_index.json").is_file():
        return Path(name)
    if not is_hub_name(name):
        reason = "which has none" if Path(name).is_dir() else "and there is no such folder"
        if not Path(name).is_dir() and len(Path(name).parts) == 1:
            reason += f"; the shipped models are {', '.join(shipped_models())}"
        raise FileNotFoundError(
            f"expected a folder with a model_index.json or a Hub name USER/NAME, got {name}, {reason}"
        )
    return hub_file(name, "model_index.json").parent


def class_named(index: dict) -> str:
    """The name of the pipeline class in a `model_index.json`, with or without its file."""
    name = index["_class_name"]
    return name[-1] if isinstance(name, list) else name


def read_index(folder: Path | str) -> dict:
    """The content of `model_index.json` in a pipeline folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged.
    """
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a pipeline folder with a model_index.json, got {folder}")
    index = read_json(path)
    name = index.get("_class_name")
    if not isinstance(name[-1] if isinstance(name, list) and name else name, str):
        raise ValueError(f"{path}: expected the name of a pipeline class as `_class_name`, got {name!r}")
    return index


def read_json(path: Path) -> dict:
    """The dict in a JSON file; ValueError with the file's name if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def check_sizes(folder: Path, index: dict) -> None:
    """Raise ValueError if a component's configuration has a number that is too large for any network or schedule.

    Building such a network would take all memory, or hours, before its weights turn out not to fit.
    """
    for path in (path for component in index for path in folder.glob(f"{safe_name(component)}/*config.json")):
        for key, value in read_json(path).items():
            numbers = value if isinstance(value, list) else [value]
            largest = LARGEST_DEPTH if key == "layers_per_block" else LARGEST_SIZE
            wrong = [n for n in numbers if isinstance(n, int | float) and abs(n) > largest]
            if wrong:
                raise ValueError(f"{path}: expected {key} of at most {largest:,}, got {wrong[0]}")


@contextmanager
def one_line_errors(name: Path | str) -> Iterator[None]:
    """Turn the errors that libraries raise on a damaged checkpoint into a ValueError with the checkpoint's name."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be opened, its files are damaged: {type(error).__name__}: {text}") from error
