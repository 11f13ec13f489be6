"""Finished models: the one that is shipped, opening them, their cards, and publishing them."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download

from ..files import safe_name

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
DEFAULT = "cxr_cfg_128"
LARGEST_SIZE, LARGEST_DEPTH = 1_000_000, 100  # of a number in a component's configuration; of `layers_per_block`


def default_checkpoint(name=DEFAULT):
    """The folder of a shipped model: `CFGAnomalyPipeline.from_pretrained(default_checkpoint())`.

    Those other than the default one are opened with `load_pipeline(NAME)`: they may share components with it.

    Raises:
        ValueError: no such model is shipped; names those that are.
    """
    shipped = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
    if name not in shipped:
        raise ValueError(f"expected one of the shipped models {', '.join(shipped)}, got {name!r}")
    return str(CHECKPOINTS / name)


def shared_components(folder, index):
    """{name: component} of what a shipped model's index names and its folder does not hold: the default model's.

    A classifier guides the default model's UNet, which is shipped once.
    """
    if folder.parent != CHECKPOINTS:
        return {}
    # a component is [library, class]; `data_range` is a list, too
    pairs = {name for name, value in index.items() if isinstance(value, list) and value and isinstance(value[0], str)}
    missing = [name for name in sorted(pairs - {"_class_name"}) if not (folder / name).is_dir()]
    return {name: getattr(load_pipeline(CHECKPOINTS / DEFAULT), name) for name in missing}


def load_unet(folder, unconditional=False):
    """The UNet of a pipeline folder, a Hub name or a shipped model, to train on from its weights.

    With `unconditional`, a class-conditional UNet is answered as its unconditional equal: the last class embedding, the
    null label, is a constant vector beside that of the time, so it goes into a bias there.
    """
    from diffusers import UNet2DModel

    from ..models.class_matrix_unet import ClassMatrixUNet
    from ..models.space_to_depth_unet import SpaceToDepthUNet

    folder = shipped_folder(folder) or folder
    found = UNet2DModel.load_config(folder, subfolder="unet")["_class_name"]
    kind = {cls.__name__: cls for cls in (ClassMatrixUNet, SpaceToDepthUNet)}.get(found, UNet2DModel)
    unet = kind.from_pretrained(folder, subfolder="unet")
    if not unconditional or unet.config.num_class_embeds is None:
        return unet
    config = {key: value for key, value in unet.config.items() if key != "num_class_embeds" and key[0] != "_"}
    plain = kind(**config)
    weights = unet.state_dict()
    null = weights.pop("class_embedding.weight")[-1]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + null
    plain.load_state_dict(weights)
    return plain


def is_hub_name(name):
    """Whether this can only be USER/NAME on the Hub: it is formed so, and neither it nor a folder USER is here."""
    path = Path(name)
    return not path.exists() and not path.parent.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None


def shipped_folder(name):
    """The folder of a shipped model, "default" for the default one; None where that is no name of one."""
    folder = CHECKPOINTS / (DEFAULT if name == "default" else name)
    return folder if (folder / "model_index.json").is_file() and not Path(name).exists() else None


def load_pipeline(name, trust_remote_code=False):
    """Open a model by the class that it names, whichever of ours that is.

    Args:
        name: a pipeline folder, USER/NAME on the Hub, or the name of a shipped model ("default" for the default one).
        trust_remote_code: run the code that it brings along, where its class is none of ours.

    Raises:
        FileNotFoundError: no such folder, or nothing was saved there. ValueError: not one of our classes, or
            damaged files.
    """
    from diffusers import DiffusionPipeline

    from .. import pipelines

    name = shipped_folder(name) or name
    index = Path(name) / "model_index.json"
    if not index.is_file():
        if not is_hub_name(name):
            raise FileNotFoundError(f"expected a folder with a model_index.json or a Hub name USER/NAME, got {name}")
        index = Path(hf_hub_download(str(name), "model_index.json"))
    content = read_index(index.parent)
    found = class_named(content)
    if found in pipelines.__all__ and found.endswith("Pipeline"):
        check_sizes(Path(name), content)
        with one_line_errors(name):
            return getattr(pipelines, found).from_pretrained(name, **shared_components(Path(name), content))
    if trust_remote_code:
        return DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    known = [known for known in pipelines.__all__ if known.endswith("Pipeline")]
    raise ValueError(f"expected a {' or '.join(known)} in {name}, got a {found}, whose code has to be trusted first")


def class_named(index):
    """The name of the pipeline class in a `model_index.json`, with or without its file."""
    name = index["_class_name"]
    return name[-1] if isinstance(name, list) else name


def read_index(folder):
    """`model_index.json` of a pipeline folder; FileNotFoundError: none there, ValueError: damaged."""
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"expected a pipeline folder with a model_index.json, got {folder}")
    index = read_json(path)
    name = index.get("_class_name")
    if not isinstance(name[-1] if isinstance(name, list) and name else name, str):
        raise ValueError(f"{path}: expected the name of a pipeline class as `_class_name`, got {name!r}")
    return index


def read_json(path):
    """The dict in a JSON file, else ValueError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def check_sizes(folder, index):
    """Raise ValueError where a component's configuration has a number that no network or noise schedule has.

    Building it would take all memory, or hours, before its weights turn out not to fit.
    """
    for path in (path for component in index for path in folder.glob(f"{safe_name(component)}/*config.json")):
        for key, value in read_json(path).items():
            numbers = value if isinstance(value, list) else [value]
            largest = LARGEST_DEPTH if key == "layers_per_block" else LARGEST_SIZE
            wrong = [n for n in numbers if isinstance(n, int | float) and abs(n) > largest]
            if wrong:
                raise ValueError(f"{path}: expected {key} of at most {largest:,}, got {wrong[0]}")


@contextmanager
def one_line_errors(name):
    """Whatever a library raises on a damaged checkpoint, as a ValueError that names the checkpoint."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be opened, its files are damaged: {type(error).__name__}: {text}") from error
