"""Deblurring with a diffusion prior: DiffPIR (Zhu et al. 2023, https://arxiv.org/abs/2305.08995)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import BaseOutput, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from .cxr_anomaly import in_evaluation_mode
from .cxr_deconvolution import (
    canvas_size,
    check_kernel,
    data_step,
    extend,
    image_masks,
    masked_data_step,
    middle,
    transfer_function,
)
from .cxr_images import read_images
from .cxr_inversion import noise_from_output
from .cxr_portable import PortableMixin
from .cxr_tiles import blend

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from cxr_diffusers import load_prior
        >>> from cxr_diffusers.deblurring.degradations import gaussian_kernel

        >>> pipeline = load_prior()  # the shipped model's UNet, with its null label, is the prior
        >>> output = pipeline(Image.open("chest.png"), kernel=gaussian_kernel(1.5), num_inference_steps=20)
        >>> output.restored[0].save("sharper.png")
        ```
"""
NOISE_FLOOR = 0.001  # of `noise_std`, as in the original: below it a data step would divide by nearly nothing


@dataclass
class DeblurOutput(BaseOutput):
    """The output of `DiffPIRDeblurPipeline`.

    With `output_type` "pil" | "np" | "pt", where all images have one size:

    restored: the deblurred images, with the grey scale and the size of the input: [0, 1] of the type's range.
        list of PIL images (mode L, or I;16 for a deeper input) | (B, H, W, C) array | (B, C, H, W) tensor
    image: the input in the same form.

    Images of several sizes give a list of (H, W, C) arrays | of (C, H, W) tensors instead.
    """

    restored: list | np.ndarray | torch.Tensor
    image: list | np.ndarray | torch.Tensor


class DiffPIRDeblurPipeline(PortableMixin, DiffusionPipeline):
    """Deblurring with a given kernel: denoising, data step and renewed noise in turn (Algorithm 1 of DiffPIR).

    The blurred image is y = k * x + n with a given kernel k and Gaussian noise n. The UNet, trained to denoise
    radiographs at every noise level, is the prior. Images may have any size, also another one than in its training.

    Args:
        unet: unconditional, or class-conditional and then called with one label. A learned variance is ignored.
        scheduler: its betas and `prediction_type` (epsilon, v_prediction or sample) are read; the steps are DiffPIR's.
        data_range: the darkest and the brightest value of the UNet's training images.
        scaling: "minmax": each image is stretched to `data_range` by its own darkest and brightest value, as in
            training, and the result is returned on the input's grey scale. "dtype": by the range of its type.
        label: of a class-conditional UNet; None is its last embedding, the null label.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDIMScheduler,
        data_range: list[float] | tuple[float, ...] = (-1.0, 1.0),
        scaling: str = "minmax",
        label: int | None = None,
    ) -> None:
        super().__init__()
        if scaling not in ("minmax", "dtype"):
            raise ValueError(f"expected `scaling` minmax or dtype, got {scaling!r}")
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"expected `prediction_type` epsilon, v_prediction or sample, got {prediction!r}")
        classes = unet.config.num_class_embeds
        if label is not None and not 0 <= label < (classes or 0):
            raise ValueError(f"expected a `label` of the UNet's {classes or 'no'} class embeddings, got {label!r}")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(data_range=list(data_range), scaling=scaling, label=label)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: PipelineImageInput,
        kernel: np.ndarray | torch.Tensor | Sequence[Any],
        noise_std: float = 0.5 / 255,
        num_inference_steps: int = 100,
        lambda_: float = 7.0,
        zeta: float = 0.3,
        timestep_spacing: str = "quad",
        boundary: str = "unknown",
        tile_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DeblurOutput | tuple:
        """Deblur images whose blur kernel is given.

        Args:
            image: a PIL image, an array, a tensor or a list of them, any size and bit depth, see `prepare_image`.
            kernel: (h, w), or (B, h, w) for one kernel for each image; values of 0 or more that sum to 1, in pixels of
                the image.
            noise_std: standard deviation of the noise in the blurred image, on the scale where the type's range is 1
                (0.5 / 255, the default: half a grey level of 8 bits, which rounding alone makes 0.29). Not less than
                0.001 is used. More noise: the prior counts for more.
            num_inference_steps: evaluations of the UNet. The result is the clean estimate of the last step.
            lambda_: the weight of the prior against the measurement; 7 in the original's experiments.
            zeta: the share of fresh noise when noise is put back, 0 (deterministic) to 1; the original's is 0.3.
            timestep_spacing: "quad": the timesteps t_i = T - sqrt(i / (N - 1)) T, close together where the noise is
                low; "uniform": evenly spaced.
            boundary: content outside the image. "unknown": more of the scene, which the blur mixed into the border; it
                is restored along with the image, over a margin of the kernel's size, and cut off afterwards; conjugate
                gradients solve the data step. "extend": the image is continued smoothly over that margin and the
                continuation is treated as measured, so that the data step has a closed form. "wrap": the image repeats
                (for images that were blurred in this way); closed form; the sides must be multiples of the UNet's
                total downsampling factor.
            tile_size: None: the UNet denoises the whole image at once. A number: it denoises overlapping square tiles
                of that side and blends them, for images that do not fit into memory. The data step is never tiled.
            generator: one, or a list with one for each image: then an image's result does not depend on its batch.
            output_type: "pil", "np" or "pt"; see `DeblurOutput`.
            return_dict: False returns the tuple (restored, image).
            callback_on_step_end: `callback(pipeline, i, t, {"latents": ...})`, called after every step; a dict it
                returns replaces the latents.
            callback_on_step_end_tensor_inputs: only "latents" is available.

        Returns:
            `DeblurOutput`, or the tuple (restored, image).

        Raises:
            TypeError: `image` is not an image. ValueError: an argument out of its range, or a kernel that does not
            sum to 1 or is larger than the image.

        Examples:
        """
        # 1. check the arguments
        images, deep = zip(*read_images(image, self.unet.config.in_channels), strict=True)
        kernel = check_kernel(kernel)
        self.check_inputs(
            images,
            kernel,
            noise_std=noise_std,
            num_inference_steps=num_inference_steps,
            lambda_=lambda_,
            zeta=zeta,
            timestep_spacing=timestep_spacing,
            boundary=boundary,
            tile_size=tile_size,
            generator=generator,
            output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        timesteps = self.timesteps(num_inference_steps, timestep_spacing)

        # 2. images that share a canvas size form a batch
        margin = max(kernel.shape[-2:]) if boundary != "wrap" else 0
        sizes = [p.shape[-2:] for p in images]
        canvases = [canvas_size(height, width, margin, self.reduction) for height, width in sizes]
        groups = {canvas: [i for i, c in enumerate(canvases) if c == canvas] for canvas in canvases}
        restored = [None] * len(images)
        with in_evaluation_mode([self.unet]), self.progress_bar(total=len(groups) * num_inference_steps) as bar:
            for canvas, members in groups.items():
                on_step = self.on_step(callback_on_step_end, callback_on_step_end_tensor_inputs, bar)
                results = self.restore(
                    [images[i] for i in members],
                    kernel if len(kernel) == 1 else kernel[members],
                    canvas,
                    timesteps,
                    noise_std=noise_std,
                    lambda_=lambda_,
                    zeta=zeta,
                    boundary=boundary,
                    tile_size=tile_size,
                    generator=[generator[i] for i in members] if isinstance(generator, list) else generator,
                    on_step=on_step,
                )
                for i, result in zip(members, results, strict=True):
                    restored[i] = result

        # 3. convert to the output type
        output = DeblurOutput(_as(restored, output_type, deep), _as(images, output_type, deep))
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    def restore(
        self,
        images: Sequence[torch.Tensor],
        kernel: torch.Tensor,
        canvas: tuple[int, int],
        timesteps: Sequence[int],
        *,
        noise_std: float,
        lambda_: float,
        zeta: float,
        boundary: str,
        tile_size: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        on_step: Callable[[int, int, torch.Tensor], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """List of (C, H, W) in [0, 1] on one (H, W) `canvas` -> list of the same, restored (Algorithm 1)."""
        device = self._execution_device
        low, high = self._ends(images)  # black and white of each image for the prior
        y = torch.stack([extend(p, *canvas) for p in images])
        y = self._to_model((y - low) / (high - low)).to(device)
        otf = transfer_function(kernel.to(device), *canvas)
        measured = image_masks([p.shape[-2:] for p in images], *canvas).to(device)
        # the stretch to the prior's black and white stretches the noise as well
        sigma_n = (max(NOISE_FLOOR, noise_std) / (high - low)).to(device)

        alphas = self.scheduler.alphas_cumprod.to(device, torch.float32)
        # x_T: the blurred image with noise of the highest level
        alpha = alphas[timesteps[0]]
        x = alpha**0.5 * y + (1 - alpha) ** 0.5 * self._noise(y, generator)
        for i, t in enumerate(timesteps):
            alpha, last = alphas[t], i + 1 == len(timesteps)
            # Algorithm 1: denoised estimate of the prior, its data step towards y, and from that x_{t-1}
            x0 = self.denoise(x, t, alpha, tile_size)
            rho = self.penalty(alpha, sigma_n, lambda_)
            x0 = masked_data_step(x0, y, otf, rho, measured) if boundary == "unknown" else data_step(x0, y, otf, rho)
            x = x0 if last else self.renoise(x, x0, alpha, alphas[timesteps[i + 1]], zeta, self._noise(x, generator))
            if on_step is not None:
                x = on_step(i, t, x)
        restored = self._from_model(x).cpu() * (high - low) + low
        return [middle(r, *p.shape[-2:]).clamp(0, 1) for r, p in zip(restored, images, strict=True)]

    def denoise(self, x: torch.Tensor, t: int, alpha: torch.Tensor, tile_size: int | None = None) -> torch.Tensor:
        """(B, C, H, W) noisy at timestep `t` -> (B, C, H, W): the predicted clean image, clipped."""
        if tile_size is None:
            output = self.predict(x, t)
        else:
            output = blend(x, tile_size, lambda tiles: self.predict(tiles, t))
        noise = noise_from_output(output, x, alpha, self.scheduler.config.prediction_type)
        return ((x - (1 - alpha) ** 0.5 * noise) / alpha**0.5).clamp(*self.config.data_range)

    def penalty(self, alpha: torch.Tensor, sigma_n: torch.Tensor | float, lambda_: float) -> torch.Tensor:
        """rho_t = lambda (sigma_n / sigma_t)^2, with sigma_t^2 = (1 - alpha) / alpha.

        As in the original, sigma_n is on a scale of [0, 1] and sigma_t on one of [-1, 1]: their lambda's factor of 4.
        """
        half = (self.config.data_range[1] - self.config.data_range[0]) / 2
        return lambda_ * sigma_n**2 * half**2 * alpha / (1 - alpha)

    def renoise(
        self,
        x: torch.Tensor,
        x0: torch.Tensor,
        alpha: torch.Tensor,
        new_alpha: torch.Tensor,
        zeta: float,
        fresh: torch.Tensor,
    ) -> torch.Tensor:
        """The latents of the next step: x0 with noise at alpha bar `new_alpha` (Zhu et al. 2023, algorithm 1).

        The noise is mixed from the noise in x, with variance 1 - zeta, and from `fresh` noise, with variance zeta.
        """
        noise = (x - alpha**0.5 * x0) / (1 - alpha) ** 0.5
        mixed = (1 - zeta) ** 0.5 * noise + zeta**0.5 * fresh
        return new_alpha**0.5 * x0 + (1 - new_alpha) ** 0.5 * mixed

    def predict(self, x: torch.Tensor, t: int) -> torch.Tensor:
        """The network's output as float32, without a learned variance; a class-conditional UNet gets `label`."""
        labels = None
        classes = self.unet.config.num_class_embeds
        if classes:
            label = classes - 1 if self.config.label is None else self.config.label
            labels = torch.full((len(x),), label, device=x.device)
        output = self.unet(x.to(self.unet.dtype), t, class_labels=labels).sample
        return output[:, : x.shape[1]].float()

    def timesteps(self, num_inference_steps: int, timestep_spacing: str = "quad") -> list[int]:
        """The training timesteps at which the UNet is evaluated, descending from the last."""
        chain = self.scheduler.config.num_train_timesteps
        if timestep_spacing == "uniform":
            return [chain - 1 - i * chain // num_inference_steps for i in range(num_inference_steps)]
        if num_inference_steps == 1:
            return [chain - 1]
        sequence = [int(v) for v in np.sqrt(np.linspace(0, chain**2, num_inference_steps))]
        sequence[-1] = chain - 1
        return [chain - 1 - s for s in sequence]

    @property
    def reduction(self) -> int:
        """The sides of the UNet's input must be multiples of this number, because its levels halve them."""
        return self.unet.config.get("patch_size", 1) * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def check_inputs(self, images: Sequence[torch.Tensor], kernel: torch.Tensor, **given: Any) -> None:
        """Raise ValueError for an argument of `__call__` (`given`) outside its range."""
        chain = self.scheduler.config.num_train_timesteps
        steps, tile = given["num_inference_steps"], given["tile_size"]
        if len(kernel) not in (1, len(images)):
            raise ValueError(f"expected one kernel or one for each of {len(images)} images, got {len(kernel)}")
        if not isinstance(steps, int) or not 1 <= steps <= chain:
            raise ValueError(f"expected `num_inference_steps` from 1 to {chain}, got {steps!r}")
        for name in ("noise_std", "lambda_"):
            if not math.isfinite(given[name]) or given[name] < 0 or (name == "lambda_" and given[name] == 0):
                raise ValueError(
                    f"expected a finite `{name}`, {'0 or' if name == 'noise_std' else ''} more than 0, got "
                    f"{given[name]!r}"
                )
        if given["noise_std"] > 1:
            raise ValueError(
                f"expected `noise_std` as a share of the grey scale, 0 to 1, got {given['noise_std']}: divide "
                "grey levels by 255"
            )
        if not 0 <= given["zeta"] <= 1:
            raise ValueError(f"expected a `zeta` from 0 to 1, got {given['zeta']!r}")
        if given["timestep_spacing"] not in ("quad", "uniform"):
            raise ValueError(f"expected `timestep_spacing` quad or uniform, got {given['timestep_spacing']!r}")
        if given["boundary"] not in ("unknown", "extend", "wrap"):
            raise ValueError(f"expected `boundary` unknown, extend or wrap, got {given['boundary']!r}")
        for image in images:
            height, width = image.shape[-2:]
            if max(kernel.shape[-2:]) > min(height, width):
                size = " x ".join(map(str, kernel.shape[-2:]))
                raise ValueError(f"expected a kernel of at most {height} x {width}, the image's size, got {size}")
            if given["boundary"] == "wrap" and (height % self.reduction or width % self.reduction):
                raise ValueError(
                    f"expected sides that divide by {self.reduction} with `boundary='wrap'`, got {height} x {width}"
                )
        if tile is not None and (not isinstance(tile, int) or tile < 1 or tile % self.reduction):
            raise ValueError(f"expected a `tile_size` that divides by {self.reduction}, or None, got {tile!r}")
        generator = given["generator"]
        if isinstance(generator, list) and len(generator) != len(images):
            raise ValueError(f"expected one generator for each of the {len(images)} images, got {len(generator)}")
        if given["output_type"] not in ("pil", "np", "pt"):
            raise ValueError(f"expected `output_type` pil, np or pt, got {given['output_type']!r}")
        unknown = set(given["tensor_inputs"]) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"expected `callback_on_step_end_tensor_inputs` among {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}"
            )

    def on_step(
        self, callback: Callable | None, tensor_inputs: Sequence[str], bar: Any
    ) -> Callable[[int, int, torch.Tensor], torch.Tensor]:
        """`on_step(i, t, latents) -> latents`, which advances the progress bar and calls diffusers' step callback."""

        def call(i, t, latents):
            bar.update()
            if callback is None:
                return latents
            kwargs = {}
            for name in tensor_inputs:
                kwargs[name] = latents
            return (callback(self, i, t, kwargs) or {}).pop("latents", latents)

        return call

    def _ends(self, images):
        """The grey values that become black and white for the prior: two (B, 1, 1, 1) tensors."""
        if self.config.scaling == "dtype":
            return torch.zeros(len(images), 1, 1, 1), torch.ones(len(images), 1, 1, 1)
        low = torch.stack([p.min() for p in images]).reshape(-1, 1, 1, 1)
        high = torch.stack([p.max() for p in images]).reshape(-1, 1, 1, 1)
        return low, torch.where(high > low, high, low + 1)  # a constant image is not stretched

    def _to_model(self, x):
        low, high = self.config.data_range
        return x * (high - low) + low

    def _from_model(self, x):
        low, high = self.config.data_range
        return (x - low) / (high - low)

    @staticmethod
    def _noise(like, generator):
        return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _as(images, output_type, deep):
    """List of (C, H, W) in [0, 1] -> the output type."""
    if output_type == "pil":
        return [_to_pil(p, d) for p, d in zip(images, deep, strict=True)]
    if output_type == "np":
        images = [p.permute(1, 2, 0).numpy() for p in images]
    if len({p.shape for p in images}) > 1:
        return list(images)
    return np.stack(images) if output_type == "np" else torch.stack(images)


def _to_pil(image, deep):
    array = image.permute(1, 2, 0).numpy()
    array = array if array.shape[-1] == 3 else array[..., 0]
    if deep and array.ndim == 2:
        return PIL.Image.fromarray((array * 65535).round().astype(np.uint16))
    return PIL.Image.fromarray((array * 255).round().astype(np.uint8))


__all__ = ["DeblurOutput", "DiffPIRDeblurPipeline"]
