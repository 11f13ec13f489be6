"""Fingerprints of images, of a model's weights, and of a pipeline with its settings; comparison of settings."""

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .files import as_json, plain
from .version import __version__

COUNTERFACTUAL_ONLY = ("keep_below",)  # settings that change neither map nor score
NOT_OF_THE_MAP = (*COUNTERFACTUAL_ONLY, "score")


def fingerprint(pipeline: Any, call_kwargs: Mapping, seed: int | None) -> str:
    """Hash of everything that determines a map: code version, class, configuration, weights, arguments, seed.

    Args:
        pipeline: a pipeline or a network. Any other callable gets a random hash.
    """
    components = getattr(pipeline, "components", {"": pipeline})
    is_hashable = hasattr(pipeline, "components") or isinstance(pipeline, torch.nn.Module)
    digest = hashlib.blake2b(digest_size=16)
    # any other callable gets a random fingerprint, so that two of them never count as equal
    digest.update((f"{type(pipeline).__qualname__} {__version__}" if is_hashable else uuid.uuid4().hex).encode())
    for part in (pipeline, *components.values()):
        config = config_of(part)
        config.pop("map_threshold", None)  # applied after the map is computed
        digest.update(json.dumps(config, sort_keys=True, default=lambda value: plain(value, repr)).encode())
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + str(tensor.dtype).encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([call_kwargs, seed], sort_keys=True, default=lambda value: plain(value, repr)).encode())
    return digest.hexdigest()


def config_of(part: Any) -> dict:
    """The config of a pipeline or component without the private keys of its library; {} if it has no config."""
    config = getattr(part, "config", None) or part
    # transformers' configs and image processors have `to_dict`
    config = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, dict) else {}
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}


def image_digest(key: str, row: Mapping) -> str:
    """Hash of `key` and the pixels of `row["image"]` (PIL image or array), independent of file name and location."""
    image = row["image"]
    layout = f"{image.mode} {image.size}" if hasattr(image, "mode") else f"{image.dtype} {image.shape}"
    if getattr(image, "mode", None) in ("P", "PA"):  # the pixels are indices of colours
        image.load()  # before, the palette has another form
        layout = f"{layout} {bytes(image.getpalette('RGB') or []).hex()}"
    content = f"{key} {layout}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


DIGESTS: WeakKeyDictionary = WeakKeyDictionary()  # cache by pipeline; assumes that the weights do not change


def weights_digest(pipeline: Any) -> str:
    """Hash of all weights of a pipeline, in float32 (independent of memory layout), and of its components' configs.

    A lung gate with another `recess` gives other maps.
    """
    if pipeline not in DIGESTS:
        digest = hashlib.blake2b(digest_size=16)
        for part, module in sorted(pipeline.components.items()):
            config = {key: value for key, value in config_of(module).items() if key not in ("dtype", "torch_dtype")}
            digest.update(f"{part} {json.dumps(config, sort_keys=True, default=plain)}".encode())
            for name, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
                values = tensor.detach().float().cpu().contiguous().numpy()
                digest.update(f"{part}.{name}".encode() + values.tobytes())
        DIGESTS[pipeline] = digest.hexdigest()
    return DIGESTS[pipeline]


def checkpoint_digest(folder: Path | str) -> str:
    """Hash (8 hexadecimal digits) of what determines a checkpoint's images: weights, configs and settings."""
    names = ("config.json", "model_index.json", "scheduler_config.json")
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix == ".safetensors" or p.name in names)
    digest = hashlib.blake2b(digest_size=4)
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode())
        if path.name != "model_index.json":
            digest.update(path.read_bytes())
        else:
            index = json.loads(path.read_text())
            drawn_with = [
                index.get("settings"),
                index.get("map_threshold"),
            ]  # three thresholds are a panel's last colour
            digest.update(json.dumps(drawn_with, sort_keys=True).encode())
    return digest.hexdigest()


def changed_settings(pipeline: Any, call_kwargs: Mapping) -> list[str]:
    """Names of the settings of a call that change the map and are not the checkpoint's own.

    ["procedure"] for a pipeline without settings of its own, such as `OriginalProcedure`.
    """
    if not hasattr(pipeline, "settings"):
        return ["procedure"]
    own, given = as_json(pipeline.settings()), as_json(pipeline.settings(**call_kwargs))
    return [name for name in given if name not in NOT_OF_THE_MAP and given[name] != own.get(name)]
