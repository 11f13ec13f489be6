"""Toy models, images and files that several test files share."""

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pydicom
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from goldens.original_unet import OriginalUNet
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from cxr_diffusers import FixedPointGenerator, NoisyClassifier, PyramidClassifier, denoising_loss, train
from cxr_diffusers.guided_diffusion import convert_state_dict
from cxr_diffusers.inference.detection import detect
from cxr_diffusers.pipelines import AnomalyOutput
from cxr_diffusers.pipelines.cxr_anomaly import score_map
from cxr_diffusers.pipelines.cxr_images import prepare_image
from cxr_diffusers.training.recipe import TrainConfig

torch.set_num_threads(1)


TOY_UNET = dict(
    sample_size=16,
    in_channels=1,
    out_channels=1,
    layers_per_block=1,
    norm_num_groups=4,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    num_class_embeds=3,
)


def toy_unet(seed=0, **changes):
    """The real class, 16 x 16, a few thousand weights; every layer random, also those that start at zero."""
    torch.manual_seed(seed)
    unet = UNet2DModel(**{**TOY_UNET, **changes})
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.7 / parameter[0].numel() ** 0.5)
    return unet.eval()


def evaluations(pipeline, images, **kwargs):
    """(the output, the number of images that the UNet evaluated)."""
    counts = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    try:
        return pipeline(images, **kwargs), sum(counts)
    finally:
        handle.remove()


TOY_CLASSIFIER = dict(
    sample_size=16,
    block_out_channels=(8, 16),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    norm_num_groups=4,
    attention_head_dim=8,
)


def toy_classifier(seed=0, **changes):
    """The real class, 16 x 16, a few thousand weights."""
    torch.manual_seed(seed)
    return NoisyClassifier(**{**TOY_CLASSIFIER, **changes}).eval()


def toy_resnet(num_labels=2, **changes):
    torch.manual_seed(0)
    shape = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=1)
    return ResNetForImageClassification(ResNetConfig(**{**shape, **changes}, num_labels=num_labels)).eval()


TOY_GENERATOR = dict(sample_size=16, in_channels=1, num_classes=2, base_channels=4, num_res_blocks=1)


def toy_generator(seed=0, **changes):
    torch.manual_seed(seed)
    return FixedPointGenerator(**{**TOY_GENERATOR, **changes}).eval()


SHARED = Path(__file__).parents[2] / "shared" / "cxr"


needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real radiographs are not here: {SHARED}")


HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")


def save_image(path, value=128, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", size, value).save(path)
    return path


def chexpert_row(path, view="AP", **findings):
    frontal = "Lateral" if "lateral" in path else "Frontal"
    row = dict.fromkeys(HEADER, "") | {"Path": path, "Sex": "Female", "Age": 60, "Frontal/Lateral": frontal}
    return row | {"AP/PA": "" if "lateral" in path else view} | findings


def chexpert_rows(name):
    """Four patients for each: healthy, effusion, edema, uncertain effusion, uncertain edema, healthy with a device."""
    findings = [
        {"No Finding": 1.0},
        {"Pleural Effusion": 1.0, "Edema": 1.0},
        {"Edema": 1.0},
        {"Pleural Effusion": -1.0},
        {"Edema": -1.0},
        {"No Finding": 1.0, "Support Devices": 1.0},
    ]
    rows = []
    for patient in range(24):
        folder = f"{name}/train/patient{patient:05d}/study1"
        rows.append(chexpert_row(f"{folder}/view1_frontal.jpg", ["AP", "PA", ""][patient % 3], **findings[patient % 6]))
        rows.append(chexpert_row(f"{folder}/view2_lateral.jpg", **findings[patient % 6]))
    return rows


def write_chexpert(parent, name="CheXpert-v1.0-small", csv_name=None):
    rows = chexpert_rows(csv_name or name)
    for row in rows:
        save_image(parent / name / row["Path"].split("/", 1)[1])
    pd.DataFrame(rows, columns=HEADER).to_csv(parent / name / "train.csv", index=False)
    return parent / name


def write_dicom(path, pixels, bits, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientID, dataset.ViewPosition, dataset.Modality = "p7", "PA", "DX"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = pixels.itemsize * 8, bits, bits - 1
    dataset.PixelRepresentation = int(np.issubdtype(pixels.dtype, np.signedinteger))
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax.is_compressed:
        dataset.PixelData = pydicom.encaps.encapsulate([pixels.tobytes()])
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.PixelData = pixels.tobytes()
    dataset.save_as(str(path), enforce_file_format=True)
    return path


def write_source(path, seed=0, **tags):
    """A CR image of 24 x 18 pixels with what a modality's worklist puts into it."""
    values = np.random.default_rng(seed).integers(0, 4096, (8, 6)).astype(np.uint16)
    values = np.kron(values, np.ones((3, 3), np.uint16))
    uid = f"1.2.826.0.1.3680043.8.498.{seed + 1}"
    header = {
        "SOPClassUID": ComputedRadiographyImageStorage,
        "SOPInstanceUID": f"{uid}.3",
        "StudyInstanceUID": f"{uid}.1",
        "SeriesInstanceUID": f"{uid}.2",
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "SpecificCharacterSet": "ISO_IR 100",
        "PatientName": "Müller^Jörg",
        "PatientBirthDate": "19500101",
        "PatientSex": "M",
        "StudyDate": "20260102",
        "StudyTime": "101112",
        "StudyID": "7",
        "AccessionNumber": "A7",
        "SeriesNumber": 3,
        "InstanceNumber": 2,
        "ImagerPixelSpacing": [0.2, 0.2],
    }
    return write_dicom(path, values, 12, **{**header, **tags})


FEW_STEPS = {"num_inference_steps": 20, "noise_level": 300}


def run_detect(pipeline, images, out, **kwargs):
    return detect(pipeline, images, out, call_kwargs=FEW_STEPS, progress=False, **kwargs)


class BrightSpots:
    """A detector without weights: what is bright is abnormal (or, inverted, what is dark)."""

    def __init__(self, inverted=False):
        self.inverted = inverted

    def __call__(self, image, output_type="np"):
        prepared = prepare_image(image, 32, scaling="dtype", data_range=(0, 1))
        anomaly_map = 1 - prepared[:, 0] if self.inverted else prepared[:, 0]
        image = prepared.permute(0, 2, 3, 1).numpy()
        return AnomalyOutput(image, image, anomaly_map.numpy(), score_map(anomaly_map).numpy())


def spot_chest(i, spot=True, height=32, width=32, dark=60):
    """A noisy grey image with or without a bright spot, and the spot's mask."""
    rng = np.random.default_rng(i)
    image = rng.integers(dark - 20, dark, (height, width)).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    if spot:
        y, x = rng.integers(2, height - 10), rng.integers(2, width - 10)
        image[y : y + 6, x : x + 8] += 100
        mask[y : y + 6, x : x + 8] = 255
    return Image.fromarray(image), Image.fromarray(mask)


def spot_rows(n=6, spot=True, view=lambda i: "PA", **size):
    rows = []
    for i in range(n):
        image, mask = spot_chest(i + (0 if spot else 100), spot, **size)
        row = {"image": image, "label": int(spot), "patient": f"p{i // 2}" if spot else f"h{i}", "view": view(i)}
        rows.append({**row, "path": f"{'spot' if spot else 'healthy'}/{i}.png", "mask": mask if spot else None})
    return rows


TEN_STEPS = {"num_inference_steps": 10, "noise_level": 300}


def chest(height=60, width=50, dtype=np.uint8):
    """(height, width) array of a type: a ramp with a bright disc."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    values = 0.2 + 0.5 * x + 0.3 * ((x - 0.4) ** 2 + (y - 0.5) ** 2 < 0.05)
    return (values / values.max() * np.iinfo(dtype).max).astype(dtype)


def picture_of(content):
    return Image.open(io.BytesIO(content))


HERE = Path(__file__).with_name("goldens")


def golden(name):
    """{key: tensor (float32 or integer) or string} of one file."""
    arrays = np.load(HERE / f"{name}.npz")
    return {key: str(arrays[key]) if arrays[key].dtype.kind == "U" else torch.from_numpy(arrays[key]) for key in arrays}


def original_checkpoint(name):
    """(state_dict, the flags it was trained with)"""
    values = golden(name)
    weights = {key.split("/", 1)[1]: value.float() for key, value in values.items() if key.startswith("weights/")}
    return weights, json.loads(values["config"])


def converted(name, change=lambda weights: weights, **wrong_flags):
    """(unet, scheduler) of a golden checkpoint; the arguments are for breaking it."""
    weights, flags = original_checkpoint(name)
    unet, scheduler, _ = convert_state_dict(change(weights), **{**flags, **wrong_flags})
    return unet, scheduler


def largest(a, b):
    return (a.double() - b.double()).abs().max().item()


def within(label, error, bound):
    """Print a measured difference; whether it is at most `bound`."""
    print(f"\n{label}: {error:.1e} (bound {bound:.0e})", end="")
    return error <= bound


def compared(ours, theirs):
    difference = (ours - theirs).abs()
    return f"mean {difference.mean():.4f}, max {difference.max():.3f}, correlation {correlation(ours, theirs):.4f}"


def rows_of(text):
    """The lines of the Markdown table under its header, as lists of cells."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return lines[2:]


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def random_original(**configuration):
    """A random checkpoint of that configuration, as a callable with `tensors`."""
    net = OriginalUNet(**configuration)
    net(
        torch.zeros(1, net.in_channels, 16, 16),
        torch.zeros(1),
        None if net.classes is None else torch.zeros(1, dtype=torch.long),
    )
    return net


def flags_of(net):
    return dict(
        image_size=16, num_heads=net.heads, num_head_channels=net.head_channels, use_new_attention_order=net.new_order
    )


TOY_PYRAMID = dict(
    sample_size=16, block_out_channels=(8, 8, 16), layers_per_block=1, decoder_channels=8, norm_num_groups=4
)


def toy_pyramid(num_classes=2, seed=0, **changes):
    """The real class, 16 x 16, a few thousand weights."""
    torch.manual_seed(seed)
    return PyramidClassifier(**{**TOY_PYRAMID, "attention_head_dim": 8, **changes}, num_classes=num_classes).eval()


# the originals' procedure without some of its offsets, as keywords of the tests' own `procedure`
OFFSET_VARIANTS = {
    "no random noise at first": dict(noising=False),
    "encoding from index 0": dict(first=0),
    "decoding from one index below the latents": dict(below=1),
    "decoding from the latents' own index": dict(below=0),
    "no clamp": dict(clip=False),
    "all of these": dict(noising=False, first=0, below=0, clip=False),
}


TOY_TRAINING = dict(
    batch_size=4, learning_rate=1e-3, save_every=2, validate_every=1000, ema_decay=0.9, lr_warmup_steps=3
)


class ToyImages(torch.utils.data.Dataset):
    """13 images of noise, 16 x 16, of two classes in turn."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(13, 1, 16, 16, generator=generator) * 2 - 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"images": self.images[i], "labels": i % 2}


def train_toy(output_dir, steps, identity=None, **changes):
    """Train a toy UNet; (lines of its log, its weights)."""
    config = TrainConfig(output_dir=str(output_dir), max_steps=steps, **{**TOY_TRAINING, **changes})
    scheduler = DDIMScheduler(clip_sample=False)

    def loss_fn(model, batch):
        return denoising_loss(model, scheduler, batch["images"], batch["labels"])

    def save(model, folder):
        model.save_pretrained(folder)

    train(toy_unet(dropout=0.1), loss_fn, ToyImages(), config, save=save, identity=identity)
    return log_of(output_dir), load_file(Path(output_dir) / "diffusion_pytorch_model.safetensors")


def log_of(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Clock:
    """`time` for a run: each look at the monotonic clock is a second later."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now
