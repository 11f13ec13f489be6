"""Renders an `Analysis` for the page and for its downloads, in memory."""

import base64
import html
import io
import json
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..evaluation.masks import threshold_map
from ..files import safe_name
from ..inference.reference_scores import ReferenceScores, short_number
from ..visualization import map_colours, side_by_side, to_grey
from .analysis import Analysis, Step
from .uploads import Upload

# in words of the page
STAGES = {
    "inversion": "adding noise",
    "decoding": "removing noise, towards healthy",
    "inpainting": "drawing the most suspicious part anew",
}


def headline(
    analysis: Analysis, reference: ReferenceScores | None, fits: bool, meaning: str, warnings: list[str]
) -> str:
    """HTML: the rank of the score among healthy images, then the score, then the warnings of the upload.

    Args:
        reference: None where the model has no scores of healthy images.
        fits: whether the reference was measured with the settings of this analysis; else there is no comparison.
        meaning: of the score of this model, in words.
    """
    if reference is None:
        first = "No healthy images to compare with"
    elif not fits:
        first = "Other settings than those of the healthy images: no comparison"
    else:
        below, count = reference.share_below(analysis.score)
        p = short_number(reference.p_value(analysis.score))
        first = f"Higher than <b>{below} of {count}</b> healthy images (p = {p})"
    zone = f" Largest part of the map: {analysis.zone} zone." if analysis.zone else ""
    notes = "".join(f'<p class="warning" role="status">{escape(text)}</p>' for text in warnings)
    return (
        f'<p class="rank" id="rank">{first}</p><p class="score">Anomaly score <b id="score">{analysis.score:.3f}</b>: '
        f'{meaning}.{zone}</p><p class="hint source">{escape(analysis.name)} \u00b7 {escape(analysis.model)}</p>{notes}'
    )


def comparison_card(analysis: Analysis, reference: ReferenceScores | None, fits: bool) -> str:
    """HTML: a plot of the score among the scores of healthy images, with its explanation; arguments as `headline`."""
    if reference is None:
        return NO_REFERENCE
    if not fits:
        return OTHER_SETTINGS
    label, count = escape(reference.data), len(reference.scores)
    return (
        f'<img alt="The score among those of {label}" src="{score_figure(analysis.score, reference)}">'
        f'<p class="hint">Grey: {label}, with the same model and settings. Orange: this image. p is the share of '
        f"images that score as high or higher, among the {count} healthy ones and this one. Many diseased chests score "
        "like healthy ones.</p>"
    )


NO_REFERENCE = (
    '<p class="hint">No scores of healthy images are stored with this model. Start the page with '
    "<code>--healthy DATA</code> to measure some.</p>"
)
OTHER_SETTINGS = (
    '<p class="hint">The scores of healthy images were measured with the default settings of the model, and this image '
    "with others, so the two cannot be compared. Reset the settings for a comparison.</p>"
)


def score_figure(score: float, reference: ReferenceScores) -> str:
    """A data URI (SVG): one dot for each healthy image, stacked, and a line at `score`."""
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


def viewer_data(analysis: Analysis) -> str:
    """JSON for viewer.js. The map is a PNG of 16-bit values, 65535 * value: high byte in red, low byte in green."""
    levels = (analysis.display_map * 65535).round().astype(np.uint16)
    two_bytes = np.stack([levels >> 8, levels & 255, np.zeros_like(levels)], -1).astype(np.uint8)
    healthy = analysis.counterfactual
    return json.dumps(
        {
            "input": data_uri(grey_png(analysis.image)),
            "counterfactual": None if healthy is None else data_uri(grey_png(healthy)),
            "map": data_uri(png(Image.fromarray(two_bytes))),
            "vmax": analysis.vmax,
            "threshold": analysis.threshold,
            "colours": map_colours().ravel().tolist(),
        }
    )


def before_and_after(analysis: Analysis) -> list[str] | None:
    """[input, counterfactual] as data URIs; None for a method that makes no counterfactual."""
    if analysis.counterfactual is None:
        return None
    return [data_uri(grey_png(image)) for image in (analysis.image, analysis.counterfactual)]


def map_file(analysis: Analysis) -> tuple[str, bytes]:
    """(file name, content): the raw map at the resolution of the upload, a 16-bit PNG of 65535 * value."""
    return f"{stem(analysis)}_map.png", png(Image.fromarray((analysis.full_map() * 65535).round().astype(np.uint16)))


def mask_file(analysis: Analysis, factor: float = 1.0) -> tuple[str, bytes]:
    """(file name, content): 255 where the map is above `factor` * threshold, at the resolution of the upload."""
    threshold = factor * analysis.threshold
    mask = threshold_map(analysis.full_map(), threshold)
    return f"{stem(analysis)}_mask_{threshold:.4f}.png", png(Image.fromarray(mask.astype(np.uint8) * 255))


def panels_file(analysis: Analysis, opacity: float = 0.8) -> tuple[str, bytes]:
    """(file name, content): input | counterfactual, if any | map with its colour bar, as `cxr-diffusers detect`."""
    title = f"{analysis.name}    score {analysis.score:.3f}    {analysis.model}    research use only"
    options: dict[str, Any] = {"vmax": analysis.vmax, "title": title, "panel_size": 512, "opacity": opacity}
    sheet = side_by_side(analysis.image, analysis.counterfactual, analysis.display_map, **options)
    return f"{stem(analysis)}_images.png", png(sheet)


def film_file(analysis: Analysis) -> tuple[str, bytes]:
    """(file name, content): a WebP film of all steps; ValueError for a method of one step."""
    if analysis.trajectory is None:
        raise ValueError(f"{analysis.model} works in one step: there is no film of it.")
    return f"{stem(analysis)}_trajectory.webp", analysis.trajectory.film_bytes()


def stem(analysis: Analysis) -> str:
    """The beginning of the name of a download, in safe letters."""
    name = analysis.name.rsplit(".", 1)[0]
    return safe_name(name).strip(".")[:80] or "radiograph"


def live_view(step: Step) -> str:
    """HTML: the panels of a step with their captions."""
    captions = ("Noisy image", "Estimate without noise")
    figures = "".join(
        f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{data_uri(jpeg(panel), "image/jpeg")}">'
        "</figure>"
        for caption, panel in zip(captions, step.panels, strict=False)
    )
    share = 100 * step.number / step.total
    return (
        f'<p class="step" data-step="{step.number}">Step {step.number} of {step.total}: {STAGES[step.stage]}</p>'
        f'<div class="progress"><i style="width: {share:.0f}%"></i></div><div class="frames">{figures}</div>'
    )


def film_card(analysis: Analysis) -> str:
    """HTML: the film, and some of its frames side by side."""
    if analysis.trajectory is None:
        return '<p class="hint">This method works in one step: there is no film of it.</p>'
    film = data_uri(analysis.trajectory.film_bytes(panel_size=224), "image/webp")
    strip = data_uri(png(analysis.trajectory.strip(columns=7, panel_size=106)))
    inpainted = any(frame.direction == "inpainting" for frame in analysis.trajectory.frames)
    about = ABOUT_FILM.format(inpainting=ABOUT_INPAINTING if inpainted else "")
    return (
        f'<div class="steps"><img class="film" alt="Film: noise is added to the image and removed again" src="{film}">'
        f'{about}</div><div class="strip" tabindex="0"><img alt="Frames of the film, from left to right" '
        f'src="{strip}"></div>'
    )


ABOUT_INPAINTING = (
    "<p><b>Inpainting</b> draws the most suspicious part anew, from noise, so that it fits the rest of your image. It "
    "serves the map alone.</p>"
)
ABOUT_FILM = (
    '<div class="hint"><p><b>Inversion</b> adds noise to your image step by step, in such a way that removing it would '
    "give your image again.</p><p><b>Decoding</b> removes the noise, but towards a <i>healthy</i> chest. What does not "
    "belong to a healthy chest disappears.</p>{inpainting}<p>Left: the noisy image. Right: the model's estimate of the "
    "image without noise.</p></div>"
)


def upload_card(upload: Upload) -> str:
    """HTML: thumbnail, name and size of an upload; nothing of a DICOM header."""
    image = upload.image
    small = ImageOps.fit(to_grey(image), (144, 144))
    depth = "8 bits" if image.mode == "L" else "16 bits"
    return (
        f'<div class="chosen"><img alt="" src="{data_uri(png(small))}"><p><b>{escape(upload.name)}</b><br>'
        f"{image.width} \u00d7 {image.height} pixels, {depth}</p></div>"
    )


def grey_png(array: np.ndarray) -> bytes:
    """(H, W) floats in [0, 1] -> the content of an 8-bit PNG."""
    return png(to_grey(array.clip(0, 1)))


def png(image: Image.Image) -> bytes:
    """The content of a PNG file."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="png")
        return buffer.getvalue()


def jpeg(image: Image.Image) -> bytes:
    """The content of a JPEG file, for images that are replaced several times a second."""
    with io.BytesIO() as buffer:
        image.save(buffer, format="jpeg", quality=85)
        return buffer.getvalue()


def data_uri(content: bytes, media_type: str = "image/png") -> str:
    """A `data:` URI, so that images travel inside the page."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def escape(text: str) -> str:
    """Text as HTML, quotes included."""
    return html.escape(text, quote=True)
