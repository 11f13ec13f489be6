"""What the page shows of a model's answer: pictures, map, score and film, all of it in memory."""

import base64
import html
import io
import json
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ..evaluation.masks import threshold_map
from ..files import safe_name
from ..inference.panels import same_frame
from ..inference.trajectory import Trajectory, check_steps
from ..pipelines.cxr_images import restore_map
from ..pipelines.cxr_inversion import timesteps_below
from ..visualization import common_vmax, contact_sheet, map_colours, side_by_side, to_grey

SHOWN = 640  # longer side of the pictures on the page
SLIDERS = {  # arguments of a call that the page has a slider for: label, what it does, lowest, highest, step
    "guidance_scale": ("Guidance scale", "w: how far towards healthy; 0 is the plain model", 0, 10, 0.5),
    "classifier_scale": ("Classifier scale", "s: how hard the classifier pulls towards healthy", 0, 300, 5),
    "noise_level": ("Noise level", "of 1,000: how far back to noise; more may change more", 50, 1000, 10),
    "num_inference_steps": ("Steps", "of the whole chain; more are slower and more faithful", 5, 200, 5),
}


@dataclass
class Answer:
    """One picture's answer; the picture itself is not in it.

    shown, counterfactual: (h, w) in [0, 1], at most `SHOWN` pixels long; no counterfactual where the method makes none.
    small: the map at their size. square: the map as the model made it. size: (height, width) of the picture.
    threshold: the model's own, or, where it has none (`own_threshold` False), a third of the map's 99.5 % quantile.
    vmax: the map value of the last colour.
    """

    name: str
    model: str
    size: tuple[int, int]
    aspect: str
    shown: np.ndarray
    counterfactual: np.ndarray | None
    small: np.ndarray
    square: np.ndarray
    score: float
    threshold: float
    own_threshold: bool
    vmax: float
    trajectory: Trajectory | None

    def own(self):
        """(H, W) map at the picture's own resolution; made when it is asked for, it may be large."""
        return restore_map(self.square, *self.size, self.aspect)


def ask(pipeline, model, upload, call_kwargs, on_step=None):
    """Run a pipeline on an `Upload` -> `Answer`; `on_step(done, of, "inversion" or "decoding")` after each step."""
    config, picture = pipeline.config, upload.picture
    trajectory, call = None, dict(call_kwargs)
    if has_steps(pipeline):
        trajectory, total = Trajectory(), count_steps(pipeline, call_kwargs)

        def step(pipeline, i, t, kwargs):
            changed = trajectory(pipeline, i, t, kwargs)
            if on_step is not None:
                on_step(i + 1, total, trajectory.last.direction)
            return changed

        call["callback_on_step_end"] = step
    output = pipeline(picture, output_type="np", **call)
    image, counterfactual, anomaly_map = output.image[0], output.counterfactual[0], output.anomaly_map[0]
    shown, other, small = same_frame(picture, image, counterfactual, anomaly_map, config, SHOWN)
    known = config.get("map_threshold")
    threshold = float(known or common_vmax([anomaly_map]) / 3)
    return Answer(
        name=upload.name,
        model=model,
        size=(picture.height, picture.width),
        aspect=config["aspect"],
        shown=shown,
        counterfactual=None if np.array_equal(image, counterfactual) else other,
        small=small,
        square=anomaly_map,
        score=float(output.anomaly_score[0]),
        threshold=threshold,
        own_threshold=bool(known),
        vmax=min(1.0, 3 * threshold),  # a map has no higher values
        trajectory=trajectory,
    )


def has_steps(pipeline):
    try:
        check_steps(pipeline)
    except ValueError:
        return False
    return True


def count_steps(pipeline, call_kwargs):
    """How often a call will report a step: on the way to the highest noise level, and back from each."""
    settings = pipeline.settings(**call_kwargs)
    level, steps = settings["noise_level"], settings["num_inference_steps"]
    levels = set(level) if isinstance(level, (list, tuple)) else {level}
    back = [len(timesteps_below(pipeline.scheduler, level, steps)) for level in levels]
    return max(back) + sum(back)


def viewer_data(answer):
    """`Answer` -> JSON for viewer.js. The map goes as a PNG of two bytes a value, 65535 * value, red the higher."""
    levels = (answer.small * 65535).round().astype(np.uint16)
    two = np.stack([levels >> 8, levels & 255, np.zeros_like(levels)], -1).astype(np.uint8)
    return json.dumps(
        {
            "input": data_uri(grey_png(answer.shown)),
            "counterfactual": None if answer.counterfactual is None else data_uri(grey_png(answer.counterfactual)),
            "map": data_uri(png(Image.fromarray(two))),
            "vmax": answer.vmax,
            "threshold": answer.threshold,
            "colours": map_colours().ravel().tolist(),
        }
    )


def compared(answer):
    """[input, counterfactual] as data URIs, or None for a method that makes no counterfactual."""
    if answer.counterfactual is None:
        return None
    return [data_uri(grey_png(picture)) for picture in (answer.shown, answer.counterfactual)]


def map_file(answer):
    """(file name, content): the raw map at the picture's own resolution, a PNG of 16 bits, 65535 * value."""
    return f"{stem(answer)}_map.png", png(Image.fromarray((answer.own() * 65535).round().astype(np.uint16)))


def mask_file(answer, times=1.0):
    """(file name, content): where the map is above `times` the answer's threshold, 255, at the picture's resolution."""
    threshold = times * answer.threshold
    mask = threshold_map(answer.own(), threshold)
    return f"{stem(answer)}_mask_{threshold:.4f}.png", png(Image.fromarray(mask.astype(np.uint8) * 255))


def picture_file(answer, opacity=0.8):
    """(file name, content): input | counterfactual, if any | map with its colour bar, as `cxr-diffusers detect` draws
    them."""
    title = f"{answer.name}    score {answer.score:.3f}    {answer.model}    research use only"
    look = {"vmax": answer.vmax, "title": title, "panel_size": 512, "opacity": opacity}
    if answer.counterfactual is None:
        page = contact_sheet([{"image": answer.shown, "maps": {"anomaly map": answer.small}}], ["anomaly map"], **look)
    else:
        page = side_by_side(answer.shown, answer.counterfactual, answer.small, **look)
    return f"{stem(answer)}_picture.png", png(page)


def film_file(answer):
    """(file name, content): the film of the way to noise and back, a WebP; ValueError for a method without steps."""
    if answer.trajectory is None:
        raise ValueError(f"{answer.model} goes in one step: there is no film of it.")
    return f"{stem(answer)}_trajectory.webp", answer.trajectory.film_bytes()


def stem(answer):
    """The beginning of a download's name, in harmless letters."""
    name = answer.name.rsplit(".", 1)[0]
    return safe_name(name).strip(".")[:80] or "radiograph"


def score_card(answer, reference, fits, meaning):
    """HTML: the score, and where it lies among those of healthy images.

    Args:
        reference: `ReferenceScores`, or None where the model has none.
        fits: whether they were measured with the same settings as this answer; if not, they are not shown.
        meaning: of this model's score, in words.
    """
    head = f'<p class="score"><b id="score">{answer.score:.3f}</b><span>anomaly score: {meaning}</span></p>'
    if reference is None:
        return f"{head}{NO_REFERENCE}"
    if not fits:
        return f"{head}{OTHER_SETTINGS}"
    below, of = reference.share_below(answer.score)
    # conformal: the rank of this image among the healthy ones, itself counted
    p = (1 + of - below) / (1 + of)
    label = escape(reference.data)
    return (
        f'<p class="rank">Higher than <b>{below} of {of}</b> healthy radiographs; p = {p:.2g}.</p>{head}'
        f'<img alt="The score among those of {label}" src="{score_figure(answer.score, reference)}">'
        f'<p class="hint">Grey: {label}; same model, same settings. Orange: this image. p: the share of healthy images '
        f"(of {of}, and this one) that score as high or higher. Scores overlap: many diseased chests score like "
        "healthy ones.</p>"
    )


NO_REFERENCE = (
    '<p class="hint">No scores of healthy images are kept with this model, so there is nothing to compare it with. '
    "Start the page with <code>--healthy DATA</code> to measure some.</p>"
)
OTHER_SETTINGS = (
    '<p class="hint">The scores of healthy images were measured with the model\'s own settings and this picture with '
    "others, so they cannot be compared. Reset the settings to see where it lies.</p>"
)


def score_figure(score, reference):
    """A data URI (SVG): one dot a healthy image, stacked, and a line for this score."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 1.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(xlabel="anomaly score")
    values = np.asarray(reference.scores)
    low, high = min(0, values.min(), score), max(0, values.max(), score)
    margin = 0.08 * (high - low)
    low, high = low - margin * (low < 0), high + margin * (high > 0)
    bins = np.linspace(low, high, 46)
    column = np.digitize(values, bins)
    height = [int(np.sum(column[:i] == c)) for i, c in enumerate(column)]
    centre = bins[column - 1] + (high - low) / 90
    axes.scatter(centre, height, s=26, color="#8b95a5", linewidths=0)
    axes.axvline(score, color="#f59e42", linewidth=2)
    axes.set(xlim=(low, high), ylim=(-0.8, max(*height, 5) + 1), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#8b95a5")
    axes.tick_params(colors="#aab3c0", labelsize=9)
    axes.xaxis.label.set_color("#aab3c0")
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        return data_uri(buffer.getvalue(), "image/svg+xml")


def film_card(answer):
    """HTML: the film, and frames of it side by side."""
    if answer.trajectory is None:
        return '<p class="hint">This method goes in one step: there is no way to show.</p>'
    film = data_uri(answer.trajectory.film_bytes(panel_size=224), "image/webp")
    strip = data_uri(png(answer.trajectory.strip(columns=7, panel_size=106)))
    return (
        f'<div class="way"><img class="film" alt="Film: the picture goes to noise and back" src="{film}">{ABOUT_FILM}'
        f'</div><div class="strip" tabindex="0"><img alt="Frames of the film, left to right" src="{strip}"></div>'
    )


ABOUT_FILM = (
    '<div class="hint"><p><b>Inversion</b> turns your picture into noise, step by step, so that the way back would '
    "give the picture again.</p><p><b>Decoding</b> goes back, but towards <i>healthy</i>. What does not fit a healthy "
    "chest is left behind.</p><p>Beside the noisy picture: the clean picture that each step has in mind.</p></div>"
)


def grey_png(array):
    """(H, W) in [0, 1] -> the content of an 8-bit PNG."""
    return png(to_grey(array.clip(0, 1)))


def png(image):
    with io.BytesIO() as buffer:
        image.save(buffer, format="png")
        return buffer.getvalue()


def data_uri(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def upload_card(upload):
    """HTML: what was handed in, small, and what is known of it. Of a DICOM header nothing is shown."""
    picture = upload.picture
    small = ImageOps.fit(to_grey(picture), (144, 144))
    depth = "8 bits" if picture.mode == "L" else "16 bits"
    return (
        f'<div class="chosen"><img alt="" src="{data_uri(png(small))}"><p><b>{escape(upload.name)}</b><br>'
        f"{picture.width} \u00d7 {picture.height} pixels, {depth}</p></div>"
    )


def escape(text):
    return html.escape(text, quote=True)
