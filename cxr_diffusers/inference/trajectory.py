"""The trajectory of an image to noise and back: recorded by the step callback, displayed as an animation or strip."""

import inspect
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..files import save_png, write_file
from ..visualization import GAP, write_words

DARK, BRIGHT, DIM, LINE = (14, 17, 22), (235, 238, 242), (150, 158, 170), (245, 158, 66)
SECONDS = 5.0  # length of an animation, whatever its number of frames
HOLD = 900  # ms for the first frame, the noisiest and the last


@dataclass
class Frame:
    """The end of a step.

    level: the timestep of the latents, 0 (an image) to T (noise). direction: "inversion", "decoding" or "inpainting".
    latents: (B, C, H, W) float32 on the CPU. predicted: likewise, the clean image x_0 that the step predicted, or None.
    alpha: alpha bar of the level.
    """

    level: int
    direction: str
    latents: torch.Tensor
    predicted: torch.Tensor | None
    alpha: float


class Trajectory:
    """A `callback_on_step_end` that records the latents: `pipeline(images, callback_on_step_end=trajectory)`.

    Each call of the pipeline replaces the recording of the call before. Afterwards `frames` has the steps in their
    order, `film` and `strip` draw them, and `save` writes a drawing.

    A frame's `predicted` is the clean image x_0 that the network predicted in its step. The latents before and after a
    DDIM step are sqrt(alpha) x_0 + sqrt(1 - alpha) eps with the same x_0 and eps (Song et al. 2021,
    https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0), so x_0 follows from them without running the network. It
    is None where this does not hold: for other schedulers, with clipping or noise (eta > 0), and for the first frame.

    Args:
        max_frames: with more frames, every second one is dropped; the last is always kept.
        predicted: False leaves the clean images out (for example with eta > 0, which a callback cannot see).
    """

    def __init__(self, max_frames: int = 48, predicted: bool = True) -> None:
        if max_frames < 2:
            raise ValueError(f"expected `max_frames` of 2 or more, got {max_frames}")
        self.max_frames, self.predicted = max_frames, predicted
        self.kept: list[Frame] = []
        self.last: Frame | None = None
        self.stride, self.data_range = 1, (-1.0, 1.0)

    @property
    def frames(self) -> list[Frame]:
        """[`Frame`] in the order of the steps; [] before the first call."""
        return self.kept + ([self.last] if self.last is not None and self.last is not self.kept[-1] else [])

    def __call__(self, pipeline: Any, i: int, t: Any, callback_kwargs: dict) -> dict:
        """The callback at the end of each step; changes nothing."""
        latents, scheduler = callback_kwargs["latents"].detach().float().cpu(), pipeline.scheduler
        if i == 0:
            self.kept, self.last, self.stride, self.t = [], None, 1, -1
            self.data_range = tuple(pipeline.config.data_range)
        t, inpainting = int(t), getattr(pipeline, "is_inpainting", False)
        rising = not inpainting and self._is_inversion(t)
        before = self._before(t, rising, inpainting)
        level = t if rising else level_after(scheduler, t)
        alpha, clean = signal_level(scheduler, level), None
        if self.predicted and before is not None and steps_are_lines(scheduler):
            # with timesteps that are not spaced by its step length, DDIM treats the latents as those of `t`
            start = before.alpha if rising else signal_level(scheduler, t)
            clean = predict_clean_image(before.latents, latents, start, alpha)
            clean = before.predicted if clean is None else clean
        direction = "inpainting" if inpainting else "inversion" if rising else "decoding"
        self.last, self.t = Frame(max(level, 0), direction, latents, clean, alpha), t
        if i % self.stride == 0:
            self.kept.append(self.last)
        if len(self.kept) > self.max_frames:
            self.kept, self.stride = self.kept[::2], 2 * self.stride
        return {}

    def _is_inversion(self, t):
        """Timesteps rise during inversion; the first one that does not belongs to decoding."""
        return t > self.t and (self.last is None or self.last.direction == "inversion")

    def _before(self, t, rising, inpainting):
        """The frame at the beginning of the step from `t`, None if it was not recorded.

        This is the last frame, except when decoding begins at another noise level: then it is the frame that inversion
        recorded at that level. Each round of inpainting begins at noise that is not recorded.
        """
        if inpainting:
            return self.last if self.last is not None and self.last.direction == "inpainting" and t < self.t else None
        if self.last is None or rising:
            return self.last
        goes_on = self.last.level == t if self.last.direction == "inversion" else t < self.t
        left = [frame for frame in self.kept if frame.direction == "inversion" and frame.level == t]
        return self.last if goes_on else next(iter(left), None)

    def film(self, index: int = 0, panel_size: int = 256) -> list[Image.Image]:
        """The frames as RGB images: latents, predicted clean image if there is one, noise level, progress bar.

        Args:
            index: of the image in the batch.
        """
        frames = self._frames()
        both = any(frame.predicted is not None for frame in frames)
        return [
            _film_frame(self._panels(frame, index, panel_size, both), frame, k / max(1, len(frames) - 1))
            for k, frame in enumerate(frames)
        ]

    def strip(self, index: int = 0, columns: int = 9, panel_size: int = 128) -> Image.Image:
        """RGB image of some frames from left to right; the predicted clean images, if any, form a second row."""
        frames = self._frames()
        chosen = sorted(set(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)))
        both = any(frame.predicted is not None for frame in frames)
        rows, text = 1 + both, max(11, panel_size // 10)
        width = GAP + (panel_size + GAP) * len(chosen)
        page = Image.new("RGB", (width, 3 * text + 5 * GAP + rows * (panel_size + GAP)), DARK)
        draw = ImageDraw.Draw(page)
        for k, frame in enumerate(frames[n] for n in chosen):
            x, y = GAP + k * (panel_size + GAP), GAP
            colour = DIM if frame.direction == "inversion" else LINE
            write_words(draw, (x, y), frame.direction, text, colour, panel_size)
            write_words(draw, (x, y + text + GAP), f"level {frame.level}", text, BRIGHT, panel_size)
            y += 2 * (text + GAP)
            for panel in self._panels(frame, index, panel_size, both):
                if panel is not None:
                    page.paste(panel, (x, y))
                y += panel_size + GAP
        y = page.height - (text + GAP)
        note = "noisy image" + (" above, predicted clean image below" if both else "")
        write_words(draw, (GAP, y), note, text, DIM, width - 2 * GAP)
        return page

    def last_panels(self, panel_size: int = 256, index: int = 0) -> list[Image.Image]:
        """[noisy image, predicted clean image where known] of the latest frame, square RGB PIL images."""
        return [panel for panel in self._panels(self.last, index, panel_size, True) if panel is not None]

    def save(self, path: Path | str, index: int = 0, panel_size: int | None = None) -> None:
        """Write .webp or .gif (the animation) or .png (the strip); `path` never holds half a file.

        Args:
            index: of the image in the batch.
            panel_size: side of a panel, in pixels; None: 256 in an animation, 128 in a strip.

        Raises:
            ValueError: another ending, nothing recorded yet, or no such image in the batch.
        """
        ending = Path(path).suffix.lower()
        if ending == ".png":
            return save_png(self.strip(index, panel_size=panel_size or 128), path)
        if ending not in (".webp", ".gif"):
            raise ValueError(f"expected a file that ends in .webp or .gif (animation) or .png (strip), got {path}")
        write_file(path, self.film_bytes(index, ending[1:], panel_size or 256))

    def film_bytes(self, index: int = 0, format: str = "webp", panel_size: int = 256) -> bytes:
        """The content of a WebP or GIF file with the animation, which repeats endlessly."""
        film = self.film(index, panel_size)
        turn = next((k for k, frame in enumerate(self.frames) if frame.direction != "inversion"), len(film)) - 1
        step = max(40, round(1000 * SECONDS / len(film)))
        times = [HOLD if k in (0, turn, len(film) - 1) else step for k in range(len(film))]
        options: dict[str, Any] = {"quality": 80, "method": 2} if format == "webp" else {"optimize": False}
        with io.BytesIO() as buffer:
            film[0].save(buffer, format, save_all=True, append_images=film[1:], duration=times, loop=0, **options)
            return buffer.getvalue()

    def _frames(self):
        if not self.frames:
            raise ValueError("expected a recorded call, got none: pass it as `callback_on_step_end` first")
        return self.frames

    def _panels(self, frame, index, size, both):
        """[latents, clean image or None] as square RGB images."""
        if not 0 <= index < len(frame.latents):
            raise ValueError(
                f"expected `index` below {len(frame.latents)}, the number of images in the batch, got {index}"
            )
        low, high = self.data_range
        middle, half = (low + high) / 2, (high - low) / 2
        # the grey scale leaves two standard deviations for the noise beside the remaining image: no jumps in brightness
        room = half * frame.alpha**0.5 + 2 * (1 - frame.alpha) ** 0.5
        # the model's own pixels: interpolated noise would look smooth
        nearest = Image.Resampling.NEAREST
        panels = [_panel(frame.latents[index], middle * frame.alpha**0.5, room, size, nearest)]
        if both:
            # in the first frame there is almost no noise: the latents are the image
            clean = frame.latents if frame.predicted is None and frame.alpha > 0.999 else frame.predicted
            panels.append(None if clean is None else _panel(clean[index], middle, half, size))
        return panels


def check_steps(pipeline: Any) -> None:
    """Raise ValueError unless a call of `pipeline` has steps that can be recorded."""
    if "callback_on_step_end" not in inspect.signature(pipeline.__call__).parameters:
        class_name = type(pipeline).__name__
        raise ValueError(f"expected a pipeline with denoising steps to record its trajectory, got a {class_name}")


def predict_clean_image(x: torch.Tensor, new_x: torch.Tensor, alpha: float, new_alpha: float) -> torch.Tensor | None:
    """The clean image x_0 that the latents before and after a DDIM step have in common, in their shape.

    Args:
        x, new_x: (B, C, H, W), before and after the step, either way.
        alpha, new_alpha: their alpha bar.

    Returns:
        None if both alphas are equal (in the last step with `set_alpha_to_one: false`): the step changes nothing.
    """
    if alpha == new_alpha:
        return None
    a, b, c, d = alpha**0.5, (1 - alpha) ** 0.5, new_alpha**0.5, (1 - new_alpha) ** 0.5
    return (d * x - b * new_x) / (a * d - b * c)


def steps_are_lines(scheduler: Any) -> bool:
    """Whether a step keeps x_0 and eps: true for DDIM without clipping and thresholding."""
    config = scheduler.config
    return type(scheduler).__name__ == "DDIMScheduler" and not config.clip_sample and not config.thresholding


def level_after(scheduler: Any, t: int) -> int:
    """The timestep after a decoding step from `t`; below 0: the clean image."""
    if type(scheduler).__name__ == "DDIMScheduler" and not steps_are_lines(scheduler):  # see `decode_step`
        return t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    smaller = [int(s) for s in scheduler.timesteps if s < t]
    return max(smaller, default=-1)


def signal_level(scheduler: Any, level: int) -> float:
    """alpha bar of a timestep; for a negative one that of the clean image."""
    if level < 0:
        return float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return float(scheduler.alphas_cumprod[level])


def _panel(values, middle, half, size, grow=Image.Resampling.BICUBIC):
    """(C, H, W) -> square RGB PIL image; `middle` is grey, `middle` - `half` black, `middle` + `half` white."""
    grey = ((values.mean(0) - middle) / (2 * half) + 0.5).clamp(0, 1).numpy()
    image = Image.fromarray((grey * 255).round().astype(np.uint8))
    return image.resize((size, size), grow).convert("RGB")


def _film_frame(panels, frame, done):
    size = next(panel for panel in panels if panel is not None).width
    text = max(11, size // 18)
    page = Image.new("RGB", (GAP + (size + GAP) * len(panels), size + 2 * text + 5 * GAP), DARK)
    draw = ImageDraw.Draw(page)
    for k, panel in enumerate(panels):
        x = GAP + k * (size + GAP)
        write_words(draw, (x, GAP), ("noisy image", "predicted clean image")[k], text, DIM, size)
        if panel is not None:
            page.paste(panel, (x, text + 2 * GAP))
    y = page.height - text - 2 * GAP
    arrow = "image \u2192 noise" if frame.direction == "inversion" else "noise \u2192 image"
    words = f"{frame.direction} ({arrow})    noise level {frame.level}"
    write_words(draw, (GAP, y), words, text, BRIGHT, page.width - 2 * GAP)
    draw.rectangle([GAP, page.height - 4, GAP + round(done * (page.width - 2 * GAP)), page.height - 3], fill=LINE)
    return page
