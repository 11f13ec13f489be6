"""Radiographs with lung masks, and augmentation that transforms images and masks together."""

import math

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ..data.images import fit_mask
from ..pipelines.cxr_images import prepare_image


class LungImages(torch.utils.data.Dataset):
    """{"images": (1, size, size) float32 in [-1, 1], "masks": (2, size, size) float32 of 0 / 1, right and left lung}.

    Args:
        dataset: has the columns image, mask and path; rows without a mask are left out. A mask has two pieces, and the
            one on the left of the image is the right lung.
        size: side of the square that images and masks are brought to, in pixels.
        aspect: of `pipelines.cxr_anomaly.prepare_image`.

    Raises:
        ValueError: no row has a mask, or a mask has less than two pieces.
    """

    def __init__(self, dataset: datasets.Dataset, size: int, aspect: str = "squash") -> None:
        images, masks = [], []
        marked = "mask" in dataset.column_names
        for row in dataset if marked else ():
            if row["mask"] is None:
                continue
            images.append(prepare_image(row["image"], size, aspect=aspect)[0])
            masks.append(split_lungs(np.asarray(fit_mask(row["mask"], size, aspect)) > 0, row["path"]))
        if not images:
            raise ValueError("expected images with a lung mask, got none")
        self.images, self.masks = torch.stack(images), torch.stack(masks)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"images": self.images[index], "masks": self.masks[index]}


def split_lungs(mask: np.ndarray, path: str = "mask") -> torch.Tensor:
    """(H, W) booleans -> (2, H, W) float32: its two largest pieces, the one on the left of the image first.

    Raises:
        ValueError: less than two pieces, naming `path`.
    """
    pieces, count = ndimage.label(mask)
    if count < 2:
        raise ValueError(f"{path}: expected a mask of two lungs, got {count} connected piece(s)")
    area = np.bincount(pieces.ravel())
    area[0] = 0
    lungs = [pieces == i for i in np.argsort(area)[-2:]]
    lungs.sort(key=lambda lung: np.nonzero(lung)[1].mean())
    return torch.from_numpy(np.stack(lungs).astype(np.float32))


def augment_lungs(
    images: torch.Tensor,
    masks: torch.Tensor,
    size: int,
    degrees: float = 0.0,
    zoom: float = 0.0,
    stretch: float = 0.0,
    shift: float = 0.0,
    gamma: float = 0.0,
    clip: float = 0.0,
    mirror: float = 0.0,
    paint: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Randomly augmented (images, masks) at `size` x `size`, the same change for an image and its mask.

    Args:
        images, masks: (B, 1, S, S) in [-1, 1] and (B, 2, S, S) of 0 / 1, S a multiple of `size`.
        degrees: rotation, uniform in +- degrees.
        zoom: scale exp(u), u uniform in +- zoom.
        stretch: ratio of height and width exp(u), u uniform in +- stretch: children's lungs are wider than adults'.
        shift: translation along each axis, uniform in +- shift of the side.
        gamma: exposure, v -> v ** exp(u) on [0, 1] with u uniform in +- gamma.
        clip: over-exposure, [u, 1 - v] of the grey scale stretched to [0, 1] and the rest clipped, u and v uniform in
            [0, clip].
        mirror: probability of mirroring; the right lung remains the one on the left of the image.
        paint: probability of a synthetic opacity in a lung, see `paint_opacities`.
    """
    batch = len(images)

    def uniform(limit):
        return (torch.rand(batch, device=images.device) * 2 - 1) * limit

    flipped = torch.rand(batch, device=images.device)[:, None, None, None] < mirror
    images = torch.where(flipped, images.flip(-1), images)
    masks = torch.where(flipped, masks.flip(-1).flip(1), masks)

    angle, scale, ratio = uniform(math.radians(degrees)), uniform(zoom).exp(), (uniform(stretch) / 2).exp()
    x, y = uniform(2 * shift), uniform(2 * shift)  # affine_grid spans [-1, 1]: the side is 2
    rows = (
        torch.stack([scale * ratio * angle.cos(), -scale * ratio * angle.sin(), x]),
        torch.stack([scale / ratio * angle.sin(), scale / ratio * angle.cos(), y]),
    )
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), list(images.shape), align_corners=False)
    step = images.shape[-1] // size
    # outside the image: its border values for half of the images, black for the others
    outside = torch.rand(batch, device=images.device)[:, None, None, None] < 0.5
    black = F.grid_sample(images + 1, grid, align_corners=False) - 1
    images = torch.where(outside, black, F.grid_sample(images, grid, padding_mode="border", align_corners=False))
    images = F.avg_pool2d(images, step)
    masks = (F.avg_pool2d(F.grid_sample(masks, grid, align_corners=False), step) > 0.5).float()

    if paint:
        images = paint_opacities(images, masks, paint)
    low, high = (uniform(clip).abs()[:, None, None, None] for _ in range(2))
    images = (((images + 1) / 2 - low) / (1 - low - high)).clamp(0, 1)
    return images ** uniform(gamma).exp()[:, None, None, None] * 2 - 1, masks


def paint_opacities(images: torch.Tensor, masks: torch.Tensor, probability: float) -> torch.Tensor:
    """(B, 1, H, W) images in [-1, 1], (B, 2, H, W) lung masks -> the images with soft synthetic opacities in the lungs.

    Each lung is painted with `probability`: a third of the opacities rise from the base like fluid, a third fill the
    lung, a third are round. They are about as bright as the brightest tenth of the image, more or less transparent, and
    blurred, so that the outline of the mask does not show. The masks remain true: lung behind fluid is lung.
    """
    batch, _, height, width = images.shape
    device, unit = images.device, height / 64

    def uniform(low, high):
        return torch.rand(batch, 2, 1, 1, device=device) * (high - low) + low

    y = torch.linspace(0, 1, height, device=device).view(1, 1, -1, 1)
    x = torch.linspace(0, 1, width, device=device).view(1, 1, 1, -1)
    mass = masks.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    rows = masks.amax(dim=3, keepdim=True) > 0
    top = torch.where(rows, y, 1.0).amin(dim=2, keepdim=True)
    bottom = torch.where(rows, y, 0.0).amax(dim=2, keepdim=True)
    center = (masks * x).sum(dim=(2, 3), keepdim=True) / mass

    # a fluid level that rises towards the chest wall; softness and slope differ
    outwards = (x - center) * torch.tensor([-1.0, 1.0], device=device).view(1, 2, 1, 1)
    level = top + (bottom - top) * uniform(0.2, 0.95) - uniform(0.0, 1.0) * outwards
    basal = torch.sigmoid((y - level) / uniform(0.01, 0.06))
    full = torch.ones_like(basal)
    # a disc around a random pixel of the lung
    chosen = torch.multinomial(masks.flatten(0, 1).flatten(1) + 1e-9, 1).view(batch, 2, 1, 1)
    row, column = (chosen // width) / (height - 1), (chosen % width) / (width - 1)
    distance = (((y - row) / uniform(0.7, 1.4)) ** 2 + (x - column) ** 2).sqrt()
    round_ = torch.sigmoid((uniform(0.04, 0.22) - distance) / uniform(0.01, 0.05))

    shape_index = torch.randint(3, (batch, 2, 1, 1), device=device)
    shape = torch.where(shape_index == 0, basal, torch.where(shape_index == 1, full, round_))
    painted = torch.rand(batch, 2, 1, 1, device=device) < probability
    opacity = (shape * masks * painted * uniform(0.4, 1.0)).amax(dim=1, keepdim=True)
    radius = max(1, round(2 * unit))
    wide, wider = blur(blur(opacity, radius), radius), blur(blur(blur(opacity, 2 * radius), radius), radius)
    opacity = torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, wide, wider)
    bright = images.flatten(1).float().quantile(0.9, dim=1).view(-1, 1, 1, 1)
    dark = images.flatten(1).float().quantile(0.5, dim=1).view(-1, 1, 1, 1)
    target = dark + (bright - dark) * (torch.rand(batch, 1, 1, 1, device=device) * 0.7 + 0.5)
    # an opacity only brightens
    return images + opacity * (target.clamp(-1, 1) - images).clamp_min(0)


def blur(images: torch.Tensor, radius: int) -> torch.Tensor:
    """(B, 1, H, W) -> the mean over a window of 2 `radius` + 1 pixels, counting pixels of the image only."""
    return F.avg_pool2d(images, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
