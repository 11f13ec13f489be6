"""The way of a picture to noise and back: recorded through the step callback, shown as a film or a film strip."""

import inspect
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..files import save_png, write_file
from ..visualization import GAP, write_words

DARK, BRIGHT, DIM, LINE = (14, 17, 22), (235, 238, 242), (150, 158, 170), (245, 158, 66)
SECONDS = 5.0  # of a film, however many frames it has
HOLD = 900  # ms on the first picture, on the most noise and on the last picture


@dataclass
class Frame:
    """A step's end.

    level: the timestep of the latents, 0 (a picture) to T (noise). going: "inversion" or "decoding".
    latents: (B, C, H, W) float32 on the CPU. predicted: likewise, the clean picture that the step meant, or None.
    """

    level: int
    going: str
    latents: torch.Tensor
    predicted: torch.Tensor | None
    alpha: float


class Trajectory:
    """A `callback_on_step_end` that remembers: `pipeline(images, callback_on_step_end=trajectory)`.

    A call of the pipeline forgets the call before, so one object does for many. Afterwards `frames` has the ends of the
    steps in their order, `film` and `strip` make pictures of them, and `save` writes one.

    A frame's `predicted` is the clean picture x_0 that its step was made of. Two latents of one DDIM step are
    sqrt(alpha) x_0 + sqrt(1 - alpha) eps with the same x_0 and eps (Song et al. 2021,
    https://arxiv.org/abs/2010.02502, eq. 12 with sigma = 0), so it follows from them without a forward of the network.
    It is None where that does not hold: for other schedulers, with clipping or noise (eta > 0), and on the first frame.

    Args:
        max_frames: when there are more, every other one is let go; the last is always kept.
        predicted: False leaves the clean pictures out (say, for eta > 0, which a callback cannot see).
    """

    def __init__(self, max_frames=48, predicted=True):
        if max_frames < 2:
            raise ValueError(f"expected `max_frames` of 2 or more, got {max_frames}")
        self.max_frames, self.predicted = max_frames, predicted
        self.kept, self.last, self.stride, self.data_range = [], None, 1, (-1.0, 1.0)

    @property
    def frames(self):
        """[`Frame`] in the order of the steps; [] before the first call."""
        return self.kept + ([self.last] if self.last is not None and self.last is not self.kept[-1] else [])

    def __call__(self, pipeline, i, t, callback_kwargs):
        """What the pipeline calls at each step's end; changes nothing."""
        latents, scheduler = callback_kwargs["latents"].detach().float().cpu(), pipeline.scheduler
        if i == 0:
            self.kept, self.last, self.stride, self.t = [], None, 1, -1
            self.data_range = tuple(pipeline.config.data_range)
        before, t, rising = self._before(int(t)), int(t), self._is_inversion(int(t))
        level = t if rising else level_after(scheduler, t)
        alpha, clean = signal_level(scheduler, level), None
        if self.predicted and before is not None and steps_are_lines(scheduler):
            # a scheduler whose list is not spaced by its own step length takes the latents for those of `t`
            start = before.alpha if rising else signal_level(scheduler, t)
            clean = predicted_picture(before.latents, latents, start, alpha)
            clean = before.predicted if clean is None else clean
        self.last, self.t = Frame(max(level, 0), "inversion" if rising else "decoding", latents, clean, alpha), t
        if i % self.stride == 0:
            self.kept.append(self.last)
        if len(self.kept) > self.max_frames:
            self.kept, self.stride = self.kept[::2], 2 * self.stride
        return {}

    def _is_inversion(self, t):
        """Timesteps rise; the first that does not is that of decoding."""
        return t > self.t and (self.last is None or self.last.going == "inversion")

    def _before(self, t):
        """The frame that the step from `t` begins with, None where it is unknown.

        It is the last one, but for the beginning of a decoding from another noise level: that takes the latents which
        inversion has left there.
        """
        if self.last is None or self._is_inversion(t):
            return self.last
        goes_on = self.last.level == t if self.last.going == "inversion" else t < self.t
        left = [frame for frame in self.kept if frame.going == "inversion" and frame.level == t]
        return self.last if goes_on else next(iter(left), None)

    def film(self, index=0, panel_size=256):
        """[RGB PIL image], one a frame: the latents, the clean picture beside them where known, the noise level, and
        how far along it is. `index`: which picture of the batch."""
        frames = self._frames()
        both = any(frame.predicted is not None for frame in frames)
        return [
            _film_frame(self._panels(frame, index, panel_size, both), frame, k / max(1, len(frames) - 1))
            for k, frame in enumerate(frames)
        ]

    def strip(self, index=0, columns=9, panel_size=128):
        """RGB PIL image: some frames from left to right, the clean pictures in a second row where known."""
        frames = self._frames()
        chosen = sorted(set(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)))
        both = any(frame.predicted is not None for frame in frames)
        rows, text = 1 + both, max(11, panel_size // 10)
        width = GAP + (panel_size + GAP) * len(chosen)
        page = Image.new("RGB", (width, 3 * text + 5 * GAP + rows * (panel_size + GAP)), DARK)
        draw = ImageDraw.Draw(page)
        for k, frame in enumerate(frames[n] for n in chosen):
            x, y = GAP + k * (panel_size + GAP), GAP
            colour = LINE if frame.going == "decoding" else DIM
            write_words(draw, (x, y), frame.going, text, colour, panel_size)
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

    def last_panels(self, panel_size=256, index=0):
        """[noisy image, predicted clean image where known] of the latest frame, square RGB PIL images."""
        return [panel for panel in self._panels(self.last, index, panel_size, True) if panel is not None]

    def save(self, path, index=0, panel_size=256):
        """Write .webp or .gif (the film) or .png (the strip), under its name only when complete.

        Raises:
            ValueError: another ending, nothing recorded yet, or no such picture in the batch.
        """
        ending = Path(path).suffix.lower()
        if ending == ".png":
            return save_png(self.strip(index), path)
        if ending not in (".webp", ".gif"):
            raise ValueError(f"expected a film's file to end in .webp or .gif, or a strip's in .png, got {path}")
        write_file(path, self.film_bytes(index, ending[1:], panel_size))

    def film_bytes(self, index=0, format="webp", panel_size=256):
        """The film as the content of a WebP or GIF file, which goes round for ever."""
        film = self.film(index, panel_size)
        turn = next((k for k, frame in enumerate(self.frames) if frame.going == "decoding"), len(film)) - 1
        step = max(40, round(1000 * SECONDS / len(film)))
        times = [HOLD if k in (0, turn, len(film) - 1) else step for k in range(len(film))]
        options = {"quality": 80, "method": 2} if format == "webp" else {"optimize": False}
        with io.BytesIO() as buffer:
            film[0].save(buffer, format, save_all=True, append_images=film[1:], duration=times, loop=0, **options)
            return buffer.getvalue()

    def _frames(self):
        if not self.frames:
            raise ValueError("expected a recorded call, got none: pass it as `callback_on_step_end` first")
        return self.frames

    def _panels(self, frame, index, size, both):
        """[latents, clean picture or None] as square RGB pictures."""
        if not 0 <= index < len(frame.latents):
            raise ValueError(f"expected `index` below {len(frame.latents)}, the pictures of the batch, got {index}")
        low, high = self.data_range
        middle, half = (low + high) / 2, (high - low) / 2
        # noise has two standard deviations of room beside what is left of the picture, so greys do not jump
        room = half * frame.alpha**0.5 + 2 * (1 - frame.alpha) ** 0.5
        # the model's own pixels: smoothed, noise would look like something else
        nearest = Image.Resampling.NEAREST
        shown = [_panel(frame.latents[index], middle * frame.alpha**0.5, room, size, nearest)]
        if both:
            # with next to no noise, on the first frame, the latents are the picture
            clean = frame.latents if frame.predicted is None and frame.alpha > 0.999 else frame.predicted
            shown.append(None if clean is None else _panel(clean[index], middle, half, size))
        return shown


def check_steps(pipeline):
    """Raise ValueError unless a call of `pipeline` has steps that can be recorded."""
    if "callback_on_step_end" not in inspect.signature(pipeline.__call__).parameters:
        kind = type(pipeline).__name__
        raise ValueError(f"expected a pipeline that goes step by step to record its trajectory, got a {kind}")


def predicted_picture(x, new_x, alpha, new_alpha):
    """Two latents of one DDIM step -> the x_0 that both hold, as a tensor of their shape.

    Args:
        x, new_x: (B, C, H, W), before and after the step, either way.
        alpha, new_alpha: their alpha bar. Where they are the same (the last step, with `set_alpha_to_one: false`) the
            step has changed nothing and says nothing: None.
    """
    if alpha == new_alpha:
        return None
    a, b, c, d = alpha**0.5, (1 - alpha) ** 0.5, new_alpha**0.5, (1 - new_alpha) ** 0.5
    return (d * x - b * new_x) / (a * d - b * c)


def steps_are_lines(scheduler):
    """True where a step keeps x_0 and eps: DDIM that neither clips nor thresholds."""
    config = scheduler.config
    return type(scheduler).__name__ == "DDIMScheduler" and not config.clip_sample and not config.thresholding


def level_after(scheduler, t):
    """The timestep that a decoding step from `t` arrives at; below 0: the picture itself."""
    if type(scheduler).__name__ == "DDIMScheduler":  # goes by its own step length, whatever its list says
        return t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    smaller = [int(s) for s in scheduler.timesteps if s < t]
    return max(smaller, default=-1)


def signal_level(scheduler, level):
    """alpha bar of a timestep; below 0 that of the picture itself."""
    if level < 0:
        return float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    return float(scheduler.alphas_cumprod[level])


def _panel(picture, middle, half, size, grow=Image.Resampling.BICUBIC):
    """(C, H, W) -> square RGB PIL image; `middle` is grey, `half` below and above it black and white."""
    grey = ((picture.mean(0) - middle) / (2 * half) + 0.5).clamp(0, 1).numpy()
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
    arrow = "image \u2192 noise" if frame.going == "inversion" else "noise \u2192 image"
    words = f"{frame.going} ({arrow})    noise level {frame.level}"
    write_words(draw, (GAP, y), words, text, BRIGHT, page.width - 2 * GAP)
    draw.rectangle([GAP, page.height - 4, GAP + round(done * (page.width - 2 * GAP)), page.height - 3], fill=LINE)
    return page
