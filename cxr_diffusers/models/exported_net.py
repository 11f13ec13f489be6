"""A network exported to ONNX or OpenVINO, in place of the original in a pipeline."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

# format -> the file that is opened, beside the config
NET_FILES = {"onnx": "net.onnx", "openvino": "net.xml"}


@dataclass
class ExportedNetOutput(BaseOutput):
    """
    sample: (B, C, H, W) float32, the output of the network.
    """

    sample: torch.Tensor


class ExportedNet(ModelMixin, ConfigMixin):
    """Replaces, in a pipeline, the UNet or the generator that it was exported from: the same call, the same output.

    It runs on the CPU in float32, with torch's number of threads at the time of opening, and has no gradients. Its
    folder contains config.json and the network's file (net.onnx, or net.xml and net.bin), and no weights of torch.
    `cxr_diffusers.inference.export.export_net` makes one.

    Args:
        format: "onnx" (run by ONNX Runtime) or "openvino".
        inputs: the names of the network's inputs, in the order of the call: sample, then timestep, class_labels.
        weights: the fingerprint of the original network.
        sample_size, in_channels, out_channels, num_class_embeds, num_classes: from that network's config, if it has
            them.
    """

    @register_to_config
    def __init__(
        self,
        format: str,
        inputs: list[str],
        weights: str,
        sample_size: int | None = None,
        in_channels: int = 1,
        out_channels: int = 1,
        num_class_embeds: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if format not in NET_FILES:
            raise ValueError(f"expected a `format` of {', '.join(NET_FILES)}, got {format!r}")
        self.folder: Path | None = None
        self.call_net: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(
        self,
        sample: torch.Tensor,
        *conditions: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ExportedNetOutput | tuple:
        """(B, C, H, W) and the conditions, each a number or (B,) -> `ExportedNetOutput`.

        Raises:
            ValueError: more or fewer conditions than the network has, images of another size than that of the export,
                or images that require a gradient.
        """
        given = [*conditions, *([] if class_labels is None else [class_labels])]
        names, size = self.config.inputs[1:], self.config.sample_size
        if len(given) != len(names):
            raise ValueError(f"expected {' and '.join(names)} besides the sample, got {len(given)} values")
        if tuple(sample.shape[1:]) != (self.config.in_channels, size, size):
            raise ValueError(
                f"expected images of shape (B, {self.config.in_channels}, {size}, {size}), for which this network "
                f"was exported, got {tuple(sample.shape)}"
            )
        if sample.requires_grad and torch.is_grad_enabled():
            raise ValueError("an exported network has no gradients: expected a call under `torch.no_grad()`")
        if self.call_net is None:
            raise ValueError("expected a network that `from_pretrained` or `open_net` has opened, got its config alone")
        arrays = {"sample": sample.detach().cpu().float().numpy()}
        for name, value in zip(names, given, strict=True):
            dtype = torch.int64 if name == "class_labels" else torch.float32
            arrays[name] = torch.as_tensor(value).to("cpu", dtype).expand(len(sample)).numpy()
        # a copy: the engine's next call overwrites the memory of its output
        output = torch.from_numpy(self.call_net(arrays).copy()).to(sample.device)
        return ExportedNetOutput(output) if return_dict else (output,)

    def open_net(self, folder: str | Path) -> "ExportedNet":
        """Open the network's file in `folder` and return this network; FileNotFoundError: no such file."""
        path = Path(folder) / NET_FILES[self.config.format]
        if not path.is_file():
            raise FileNotFoundError(f"expected the exported network {path.name} in {folder}, which has none")
        self.folder = Path(folder)
        self.call_net = {"onnx": open_onnx, "openvino": open_openvino}[self.config.format](path)
        return self

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> "ExportedNet":
        """Open a folder written by `save_pretrained` or an export; other arguments of diffusers are ignored."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        return cls.from_config(cls.load_config(folder)).open_net(folder).eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Copy the folder's files: config.json and the network."""
        if self.folder is None:
            raise ValueError("expected a network that `from_pretrained` or `open_net` has opened, got its config alone")
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for file in self.folder.glob("net.*"):
            temporary = target / f".{file.name}.{os.getpid()}.tmp"
            temporary.write_bytes(file.read_bytes())
            os.replace(temporary, target / file.name)
        self.save_config(target)


def open_onnx(path: Path) -> Callable:
    """An ONNX file -> {name: array} -> array."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError("an ONNX network needs onnxruntime: pip install 'cxr_diffusers[export]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]


def open_openvino(path: Path) -> Callable:
    """An OpenVINO file -> {name: array} -> array."""
    try:
        import openvino
    except ImportError:
        raise ImportError("an OpenVINO network needs openvino: pip install 'cxr_diffusers[export]'") from None
    # its default on newer processors is bfloat16, which would change the maps
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    return lambda arrays: compiled(arrays)[0]
