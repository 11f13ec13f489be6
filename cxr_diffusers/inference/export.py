"""A trained network -> ONNX or OpenVINO, for faster maps on a CPU: inference only, the same answer."""

import copy
import logging
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..files import cache_folder, new_folder
from ..fingerprints import config_of, fingerprint
from ..models.exported_net import NET_FILES, ExportedNet

# a pipeline's class -> the component that does its work, and the inputs of that
NETS = {
    "CFGAnomalyPipeline": ("unet", ["sample", "timestep", "class_labels"]),
    "FixedPointGANPipeline": ("generator", ["sample", "class_labels"]),
}
KEPT = ("sample_size", "in_channels", "out_channels", "num_class_embeds", "num_classes")  # of a network's config
TOLERANCE = 1e-4  # of the check of an export: largest difference of a network's answer, which is of the order of 1
LARGE = 1 << 30  # bytes of weights that go into a file of their own; ONNX files end at 2 GB


def export_pipeline(pipeline, output, format="onnx", overwrite=False):
    """Write a pipeline folder whose network is exported; it opens as any other (`load_pipeline(output)`).

    The folder has everything the pipeline needs (index, scheduler, code, the network) and no weights of torch.

    Args:
        pipeline: a `CFGAnomalyPipeline` or a `FixedPointGANPipeline`.
        output: a new folder; written under a temporary name and renamed.
        format: "onnx" or "openvino".
        overwrite: replace an old folder of a pipeline.

    Raises:
        FileExistsError: `output` exists; or it is to be overwritten and holds no pipeline, or the very one that is
            exported, whose weights would be gone. ValueError: a pipeline that cannot be exported, or that has been
            already, an unknown format, or an exported network that does not answer as the original does.
        ImportError: the packages of the extra `export` are missing.
    """
    output, source = Path(output), Path(str(pipeline.config.get("_name_or_path") or ""))
    check_output(output, source, overwrite)
    exported = with_backend(pipeline, format)
    with new_folder(output) as folder:
        exported.save_pretrained(folder)
        copy_card(pipeline.config.get("_name_or_path"), folder)


def check_output(output, source, overwrite):
    """The door: what must not be written over, whatever was said."""
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{output} exists: give another folder, or overwrite it")
    if not (output / "model_index.json").is_file():
        raise FileExistsError(f"{output} is no pipeline folder, and all that is in it would be gone: give another one")
    # an export holds no weights of torch
    if (source / "model_index.json").is_file() and output.samefile(source):
        raise FileExistsError(
            f"{output} is the model that is exported, whose weights would be gone: give another folder"
        )


def with_backend(pipeline, backend):
    """The same pipeline, its network run by "torch", "onnx" or "openvino"; answers with maps equal to 1e-4.

    An export is kept by the network's fingerprint (see `files.cache_folder`), so that only the first time takes long.
    The pipeline that is handed in stays as it is.

    Raises:
        ValueError: a pipeline without such a network (classifier guidance and Grad-CAM need gradients), or whose folder
            holds another backend's.
    """
    if backend not in ("torch", *NET_FILES):
        raise ValueError(f"expected a backend of torch, {', '.join(NET_FILES)}, got {backend!r}")
    name, inputs = net_of(pipeline, backend)
    net = getattr(pipeline, name, None)
    found = net.config.format if isinstance(net, ExportedNet) else "torch"
    if found == backend:
        return pipeline
    if found != "torch":
        raise ValueError(
            f"expected the backend {found}, to which this model was exported, got {backend}: open the model it was "
            "exported from"
        )
    others = {key: value for key, value in pipeline.components.items() if key != name}
    options = {key: value for key, value in pipeline.config.items() if key not in pipeline.components and key[0] != "_"}
    exported = type(pipeline)(**{name: cached_net(net, inputs, backend)}, **others, **options)
    if pipeline.config.get("_name_or_path"):
        exported.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
    exported.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
    return exported


def net_of(pipeline, backend):
    """(name, inputs) of the component that an export replaces; ValueError where there is none."""
    kind = type(pipeline).__name__
    if kind in NETS:
        return NETS[kind]
    if backend == "torch":
        return "", []
    why = {
        "ClassifierGuidedPipeline": ": classifier guidance needs gradients, which an exported network does not have",
        "GradCAMPipeline": ": Grad-CAM needs gradients, which an exported network does not have",
    }
    raise ValueError(f"expected a {' or '.join(NETS)} for the backend {backend}, got a {kind}{why.get(kind, '')}")


def cached_net(net, inputs, format):
    """A network -> its `ExportedNet`, exported now or by an earlier run. OpenVINO's is made from ONNX's."""
    weights = fingerprint(net, {}, 0)
    folder = cache_folder("exports") / f"{weights}-{format}"
    if not folder.is_dir():
        source = None if format == "onnx" else cached_net(net, inputs, "onnx").folder
        with new_folder(folder) as new:
            export_net(net, inputs, new, format, weights, source)
    return ExportedNet.from_pretrained(folder)


def export_net(net, inputs, folder, format, weights, source=None):
    """Write config.json and the network's file into `folder`, and check that it answers as `net` does.

    Args:
        net: (sample (B, C, H, W), further inputs (B,)) -> output with a `sample`.
        inputs: their names, "sample" first.
        weights: fingerprint of `net`.
        source: for "openvino": the folder of the ONNX export.
    """
    net = copy.deepcopy(net).cpu().float().eval()
    size = net.config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"expected a network for square pictures, got `sample_size={size!r}`")
    config = {key: value for key, value in config_of(net).items() if key in KEPT}
    exported = ExportedNet(format=format, inputs=inputs, weights=weights, **config)
    if format == "onnx":
        write_onnx(net, inputs, folder / NET_FILES["onnx"])
    else:
        write_openvino(source / NET_FILES["onnx"], folder / NET_FILES["openvino"])
    exported.save_config(folder)
    check_net(net, exported.open_net(folder), inputs)


def write_onnx(net, inputs, path):
    """Export by torch.export, the exporter that torch maintains.

    The older one (`dynamo=False`) is ten times as quick and right for the UNet, but on its way out, and it refuses an
    instance norm with running statistics. The example has two pictures, since of one the UNet's export is refused. A
    forward must not ask for `len(tensor)`: that freezes the batch axis without a word.
    """
    try:
        import onnxscript  # noqa: F401  the exporter imports it late, and says so at length
    except ImportError:
        raise ImportError("exporting needs onnx and onnxscript: pip install 'cxr_diffusers[export]'") from None
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


def write_openvino(source, path):
    """An ONNX file -> OpenVINO's two files, net.xml and net.bin."""
    try:
        import openvino
    except ImportError:
        raise ImportError("exporting to OpenVINO needs openvino: pip install 'cxr_diffusers[export]'") from None
    # its default halves the weights' precision, which would be another map
    openvino.save_model(openvino.convert_model(source), path, compress_to_fp16=False)


@torch.no_grad()
def check_net(net, exported, inputs):
    """ValueError unless both answer alike, for a batch of another size than the example's: no axis has frozen."""
    args = example(net, inputs, 3)
    expected = net(*args).sample
    try:
        difference = (expected - exported(*args).sample).abs().max().item()
    except Exception as error:  # each engine has errors of its own
        raise ValueError(f"the exported network does not take a batch of 3: {error}") from error
    if not difference <= TOLERANCE:
        raise ValueError(f"the exported network answers differently, by up to {difference:.1e}; allowed: {TOLERANCE}")


def example(net, inputs, batch):
    """Some pictures, and conditions for them, as float32 and int64."""
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
    """A network whose answer is the plain tensor."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *inputs):
        return self.net(*inputs).sample


def copy_card(source, folder):
    """The model card with its pictures, and the licence: they hold for the exported model as well."""
    card = Path(str(source), "README.md")
    if not source or not card.is_file():
        return
    shown = [path for path in card.parent.glob("*.png") if f"({path.name})" in card.read_text()]
    for file in (card, *shown, *card.parent.glob("LICENSE*")):
        shutil.copyfile(file, folder / file.name)


@contextmanager
def quiet_exporter():
    """Without the exporter's own remarks, which are about its insides."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
