"""Fingerprints of images, of a model's weights, and of a pipeline with its settings."""

import hashlib
import json
import uuid
from weakref import WeakKeyDictionary

import torch

from .version import __version__


def fingerprint(pipeline, call_kwargs, seed):
    """What decides a map, as a hash: code version, class, configuration, weights, arguments, seed."""
    components = getattr(pipeline, "components", {"": pipeline})
    known = hasattr(pipeline, "components") or isinstance(pipeline, torch.nn.Module)
    digest = hashlib.blake2b(digest_size=16)
    # what cannot be told apart must not be taken for the same
    digest.update((f"{type(pipeline).__qualname__} {__version__}" if known else uuid.uuid4().hex).encode())
    for part in (pipeline, *components.values()):
        config = config_of(part)
        config.pop("map_threshold", None)  # it comes after the map
        digest.update(json.dumps(config, sort_keys=True, default=repr).encode())
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                digest.update(name.encode() + str(tensor.dtype).encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps([call_kwargs, seed], sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def config_of(part):
    """The config of a pipeline or component without its library's own bookkeeping; {} for what has none."""
    config = getattr(part, "config", None) or part
    # transformers' configs and image processors have `to_dict`
    config = config.to_dict() if hasattr(config, "to_dict") else config if isinstance(config, dict) else {}
    return {k: v for k, v in config.items() if not k.startswith("_") and k != "transformers_version"}


def picture_digest(key, row):
    """The name of a picture under `key`, whatever its file is called and wherever it lies."""
    image = row["image"]
    # a PIL picture, or an array of several channels
    kind = f"{image.mode} {image.size}" if hasattr(image, "mode") else f"{image.dtype} {image.shape}"
    content = f"{key} {kind}".encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


DIGESTS = WeakKeyDictionary()  # of pipelines in use, whose weights stay as they are


def weights_digest(pipeline):
    """A hash of all weights of a pipeline, as float32: the same in whatever precision and order they lie in memory."""
    if pipeline not in DIGESTS:
        digest = hashlib.blake2b(digest_size=16)
        for part, module in sorted(pipeline.components.items()):
            for name, tensor in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
                values = tensor.detach().float().cpu().contiguous().numpy()
                digest.update(f"{part}.{name}".encode() + values.tobytes())
        DIGESTS[pipeline] = digest.hexdigest()
    return DIGESTS[pipeline]
