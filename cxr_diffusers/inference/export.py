"""Export of a trained network to ONNX or OpenVINO, for faster maps on a CPU: inference only, same output."""

import copy
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files import cache_folder, new_folder
from ..fingerprints import config_of, fingerprint
from ..models.exported_net import NET_FILES, ExportedNet

# pipeline class -> (component that is exported, its inputs)
NETS = {
    "CFGAnomalyPipeline": ("unet", ["sample", "timestep", "class_labels"]),
    "FixedPointGANPipeline": ("generator", ["sample", "class_labels"]),
}
# of the network's config, kept by the export
CONFIG_KEYS = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "num_classes")
TOLERANCE = 1e-4  # largest allowed difference of an exported network's output, which is of the order of 1
LARGE = 1 << 30  # bytes of weights above which they get their own file; an ONNX file is limited to 2 GB


def export_pipeline(pipeline: Any, output: Path | str, format: str = "onnx", overwrite: bool = False) -> None:
    """Write a pipeline folder with an exported network; `load_pipeline(output)` opens it.

    The folder has everything that the pipeline needs (index, scheduler, code, exported network) and no torch weights.

    Args:
        pipeline: a `CFGAnomalyPipeline` or a `FixedPointGANPipeline`.
        output: a new folder; written under a temporary name and renamed.
        format: "onnx" or "openvino".
        overwrite: replace an old folder of a pipeline.

    Raises:
        FileExistsError: `output` exists; with `overwrite`, it holds no pipeline, or it is the exported pipeline's own
            folder, whose weights would be lost.
        ValueError: a pipeline that cannot be exported or is an export itself, an unknown format, or an exported
            network with another output than the original.
        ImportError: the packages of the extra `export` are missing.
    """
    output, source = Path(output), Path(str(pipeline.config.get("_name_or_path") or ""))
    check_output(output, source, overwrite)
    exported = with_backend(pipeline, format)
    with new_folder(output) as folder:
        exported.save_pretrained(folder)
        copy_card(pipeline.config.get("_name_or_path"), folder)


def check_packages(format: str) -> None:
    """Raise ImportError if a package is missing that an export to "onnx" or "openvino" needs."""
    # torch's exporter imports onnxscript late, and fails with a long message
    names = ["onnx", "onnxscript", "onnxruntime" if format == "onnx" else "openvino"]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"exporting to {format} needs {', '.join(missing)}: pip install 'cxr_diffusers[export]'")


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `output` is new or may be replaced, see `export_pipeline`."""
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists: give another folder, or overwrite it")
    if not (output / "model_index.json").is_file():
        raise FileExistsError(f"{output} is no pipeline folder, and all its files would be lost: give another one")
    # an export holds no weights of torch
    if (source / "model_index.json").is_file() and output.samefile(source):
        raise FileExistsError(
            f"{output} is the model that is exported, and its weights would be lost: give another folder"
        )


def with_backend(pipeline: Any, backend: str) -> Any:
    """A pipeline whose network is run by "torch", "onnx" or "openvino", with maps equal to 1e-4.

    Exports are cached by the network's fingerprint (see `files.cache_folder`), so that only the first call takes long.
    `pipeline` is not changed.

    Raises:
        ValueError: a pipeline without such a network (classifier guidance and Grad-CAM need gradients), or an export to
            another backend.
    """
    if backend not in ("torch", *NET_FILES):
        raise ValueError(f"expected a backend of torch, {', '.join(NET_FILES)}, got {backend!r}")
    name, inputs = net_of(pipeline, backend)
    net = getattr(pipeline, name, None)
    current = net.config.format if isinstance(net, ExportedNet) else "torch"
    if current == backend:
        return pipeline
    if current != "torch":
        raise ValueError(
            f"expected the backend {current}, to which this model was exported, got {backend}: open the model it was "
            "exported from"
        )
    others = {key: value for key, value in pipeline.components.items() if key != name}
    options = {key: value for key, value in pipeline.config.items() if key not in pipeline.components and key[0] != "_"}
    exported = type(pipeline)(**{name: cached_net(net, inputs, backend)}, **others, **options)
    if pipeline.config.get("_name_or_path"):
        exported.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
    exported.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return exported


def net_of(pipeline: Any, backend: str) -> tuple[str, list[str]]:
    """(name, inputs) of the component that an export replaces; ValueError if there is none."""
    class_name = type(pipeline).__name__
    if class_name in NETS:
        return NETS[class_name]
    if backend == "torch":
        return "", []
    reasons = {
        "ClassifierGuidedPipeline": ": classifier guidance needs gradients, which an exported network does not have",
        "GradCAMPipeline": ": Grad-CAM needs gradients, which an exported network does not have",
    }
    raise ValueError(
        f"expected a {' or '.join(NETS)} for the backend {backend}, got a {class_name}{reasons.get(class_name, '')}"
    )


def cached_net(net: nn.Module, inputs: list[str], format: str) -> ExportedNet:
    """The `ExportedNet` of a network, from the cache or exported now. The OpenVINO file is made from the ONNX file."""
    weights = fingerprint(net, {}, 0)
    folder = cache_folder("exports") / f"{weights}-{format}"
    if not folder.is_dir():
        source = None if format == "onnx" else cached_net(net, inputs, "onnx").folder
        with new_folder(folder) as new:
            export_net(net, inputs, new, format, weights, source)
    return ExportedNet.from_pretrained(folder)


def export_net(
    net: nn.Module, inputs: list[str], folder: Path, format: str, weights: str, source: Path | None = None
) -> None:
    """Write config.json and the network's file into `folder`, and check that its output equals that of `net`.

    Args:
        net: (sample (B, C, H, W), further inputs (B,)) -> output with a `sample`.
        inputs: their names, "sample" first.
        weights: fingerprint of `net`.
        source: folder of the ONNX export from which OpenVINO's is made; None for "onnx".
    """
    check_packages(format)
    net = copy.deepcopy(net).cpu().float().eval()
    vars(net).pop("forward", None)  # of `use_dtype`: under autocast
    size = net.config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"expected a network for square images, got `sample_size={size!r}`")
    config = {key: value for key, value in config_of(net).items() if key in CONFIG_KEYS}
    exported = ExportedNet(format=format, inputs=inputs, weights=weights, **config)
    if source is None:
        write_onnx(net, inputs, folder / NET_FILES["onnx"])
    else:
        write_openvino(source / NET_FILES["onnx"], folder / NET_FILES["openvino"])
    exported.save_config(folder)
    check_net(net, exported.open_net(folder), inputs)


def write_onnx(net: nn.Module, inputs: list[str], path: Path) -> None:
    """Export with torch.export, the exporter that torch maintains.

    The older one (`dynamo=False`) is ten times as fast and correct for the UNet, but deprecated, and it refuses an
    instance norm with running statistics. The example batch has two images, because the export of the UNet fails with
    one. The network's forward must not use `len(tensor)`, which silently fixes the batch size.
    """
    wrapped, batch = SampleOnly(net).eval(), torch.export.Dim("batch")
    with quiet_exporter():
        torch.onnx.export(
            wrapped,
            example(net, inputs, 2),
            path,
            input_names=inputs,
            output_names=["output"],
            dynamo=True,
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            external_data=sum(p.numel() * 4 for p in net.parameters()) > LARGE,
            verbose=False,
        )


def write_openvino(source: Path, path: Path) -> None:
    """Convert an ONNX file to OpenVINO's two files, net.xml and net.bin."""
    import openvino

    # the default stores the weights in half precision, which changes the map
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)


@torch.no_grad()
def check_net(net: nn.Module, exported: ExportedNet, inputs: list[str]) -> None:
    """Raise ValueError unless both outputs agree, for another batch size than the one of the export."""
    args = example(net, inputs, 3)
    expected = net(*args).sample
    try:
        difference = (expected - exported(*args).sample).abs().max().item()
    except Exception as error:  # each engine raises its own types
        raise ValueError(f"the exported network does not take a batch of 3: {error}") from error
    if not difference <= TOLERANCE:
        raise ValueError(f"expected an exported network equal to {TOLERANCE}, got a difference of {difference:.1e}")


def example(net: nn.Module, inputs: list[str], batch: int) -> tuple[torch.Tensor, ...]:
    """A batch of inputs of the network: images as float32, class labels as int64."""
    config, generator = net.config, torch.Generator().manual_seed(0)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    classes = config.get("num_class_embeds") or config.get("num_classes") or 1
    values = {
        "sample": torch.randn(shape, generator=generator).clamp(-1, 1),
        "timestep": torch.linspace(1, 900, batch),
        "class_labels": torch.arange(batch) % classes,
    }
    return tuple(values[name] for name in inputs)


class SampleOnly(nn.Module):
    """A network whose output is the plain tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.net(*inputs).sample


def copy_card(source: Path | str | None, folder: Path) -> None:
    """Copy the model card, its images and the licence, which apply to the exported model as well."""
    card = Path(str(source), "README.md")
    if not source or not card.is_file():
        return
    images = [path for path in card.parent.glob("*.png") if f"({path.name})" in card.read_text()]
    for file in (card, *images, *card.parent.glob("LICENSE*")):
        shutil.copyfile(file, folder / file.name)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Suppress the exporter's messages about its internals."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
