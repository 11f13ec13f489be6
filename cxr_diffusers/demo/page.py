"""The page: what stands where, and what happens when something is pressed."""

import base64
import json
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

try:
    import gradio as gr
except ImportError as error:
    missing = f"the web page needs Gradio ({error}): pip install 'cxr_diffusers[demo]'"
    raise ModuleNotFoundError(missing, name="gradio") from None

from ..data.images import list_images
from ..inference.out_of_distribution import unlikeness_warnings
from . import answers
from .uploads import MAX_MEGAPIXELS, read_upload

HERE = files(__package__)
SAMPLES = list_images(Path(__file__).parent.parent / "samples")
PRIVATE = {"api_visibility": "private"}  # the page is for people; no endpoint is offered to programs
KEPT_FOR = 3600  # seconds that a session's picture and answer stay in memory when nobody asks for them
HEAD = """<div id="head"><h1>Where is this chest X-ray abnormal?</h1>
<p>The same chest as if healthy, and what had to change. By models that learned from image labels alone.</p></div>
<div id="notice" role="note"><b>Research use only. Not for diagnosis.</b> It marks what looks unusual to it, and misses
much.</div>"""
DROP = '<p class="hint">png, jpg, tif or DICOM. It is read into memory and not kept.</p>'
OR_SAMPLE = '<p class="hint">Or a sample, drawn by a model, of nobody:</p>'
NOTHING_YET = "Choose a radiograph first: drop a file, or click a sample."
GONE = "The answer is gone from the server's memory: run it again."
WAY = {"inversion": "to noise", "decoding": "and back, as if healthy"}  # said beside the progress
FILES = {  # downloads: kind -> (label, what it is)
    "map": ("Map", "16-bit PNG, value / 65535"),
    "mask": ("Mask", "PNG, above the threshold"),
    "picture": ("Picture", "PNG, all three"),
    "film": ("Film", "WebP, noise and back"),
}
THRESHOLD = {  # what 1 is, by whether the model has a threshold
    True: "1 is the model's own, from healthy chests",
    False: "this model has none: 3 is this map's highest 0.5 %",
}
DARK = "() => document.body.classList.add('dark')"
MOVE = "(opacity, times) => { Object.assign(cxrView, { opacity: opacity / 100, times }); cxrView.draw(); }"
DOWNLOAD = """(text) => {
  if (!text) return;
  const file = JSON.parse(text), link = document.createElement("a");
  const bytes = Uint8Array.from(atob(file.data), (c) => c.charCodeAt(0));
  link.href = URL.createObjectURL(new Blob([bytes], { type: file.type }));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}"""
PICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("select", { index: Number(button.dataset.index), value: button.title });
});"""


def build_page(models, reference_of, max_megapixels=MAX_MEGAPIXELS):
    """The page as `gr.Blocks`.

    Args:
        models: {name: pipeline}, the first is chosen at first.
        reference_of: `reference_of(name, progress)` -> `ReferenceScores` or None.
        max_megapixels: pictures with more are refused.
    """
    choices = name_choices(models)
    with gr.Blocks(title="Where is this chest X-ray abnormal?", analytics_enabled=False, delete_cache=(60, 60)) as page:
        state = SimpleNamespace(upload=gr.State(time_to_live=KEPT_FOR), answer=gr.State(time_to_live=KEPT_FOR))
        gr.HTML(HEAD)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=290, elem_id="left"):
                left = question_side(choices, models)
            with gr.Column(scale=3, min_width=300):
                right = answer_side()
        parcel = gr.Textbox(visible="hidden", elem_id="parcel")
        listen_to_question(state, left, choices, models, max_megapixels)
        listen_to_start(state, left, right, choices, models, reference_of)
        listen_to_answer(state, right, parcel)
    return page


def question_side(choices, models):
    """Components of the left: a radiograph, a method and its settings, and the button."""
    first = models[next(iter(choices.values()))]
    side = SimpleNamespace()
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Radiograph</h2>")
        side.file = gr.File(show_label=False, height=116, elem_id="drop")
        gr.HTML(DROP + OR_SAMPLE)
        side.samples = gr.HTML(thumbnails(SAMPLES), js_on_load=PICK, elem_id="samples")
        side.chosen = gr.HTML(elem_id="chosen", visible=False)
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Method</h2>")
        side.method = gr.Dropdown(
            list(choices), value=next(iter(choices)), show_label=False, container=False, elem_id="method"
        )
        side.about = gr.HTML(about_method(first))
        with gr.Accordion("Settings", open=False, elem_id="settings", visible=has_sliders(first)) as side.settings:
            side.sliders = [gr.Slider(**look) for look in slider_looks(first)]
            side.reset = gr.Button("Reset to the model's own", size="sm")
    side.start = gr.Button("Find what is abnormal", variant="primary", size="lg", elem_id="start")
    side.message = gr.HTML(elem_id="message", visible=False)
    return side


def answer_side():
    """Components of the right: the pictures with their sliders and downloads; comparison, score and film below."""
    side = SimpleNamespace()
    with gr.Column(elem_classes="card"):
        template, script = ((HERE / f"viewer.{kind}").read_text() for kind in ("html", "js"))
        side.viewer = gr.HTML(None, html_template=template, js_on_load=script, elem_id="viewer")
        with gr.Row(visible=False) as side.tools:
            side.opacity = gr.Slider(
                0, 100, 80, step=1, label="Opacity", info="of the strongest colour, in per cent", elem_id="opacity"
            )
            side.times = gr.Slider(0, 3, 1, step=0.05, label="Threshold", info=THRESHOLD[True], elem_id="times")
        with gr.Row(visible=False) as side.downloads:
            side.buttons = {
                kind: gr.Button(f"\u2193 {label}", size="sm", elem_id=f"get-{kind}", min_width=100)
                for kind, (label, _) in FILES.items()
            }
        side.hint = gr.HTML(f'<p class="hint">{describe_files()}</p>', visible=False)
    with gr.Row(visible=False, equal_height=True) as side.details:
        with gr.Column(elem_classes="card", min_width=290):
            gr.HTML("<h2>Before and after</h2>")
            side.compare = gr.ImageSlider(
                show_label=False, container=False, interactive=False, buttons=[], elem_id="compare"
            )
            side.caption = gr.HTML()
        with gr.Column(elem_classes="card", min_width=290):
            gr.HTML("<h2>How unusual is it?</h2>")
            side.score = gr.HTML(elem_id="score-card")
    with gr.Column(elem_classes="card", visible=False) as side.way:
        gr.HTML("<h2>To noise and back</h2>")
        side.film = gr.HTML(elem_id="film")
    return side


def listen_to_question(state, left, choices, models, max_megapixels):
    """A dropped file or a sample becomes the session's `Upload`; a method brings its own sliders."""

    def take_file(path):
        try:
            return take(read_upload(path, max_megapixels))
        except ValueError as error:
            return [None, gr.update(visible=False), say(str(error)), None]
        finally:
            forget(path)

    def take_sample(event: gr.EventData):
        return take(read_upload(SAMPLES[int(event._data["index"]) % len(SAMPLES)]))

    def choose(choice):
        pipeline = models[choices[choice]]
        looks = [gr.update(**look) for look in slider_looks(pipeline)]
        return [about_method(pipeline), gr.update(visible=has_sliders(pipeline)), *looks]

    taken = [state.upload, left.chosen, left.message, left.file]
    looks = [left.about, left.settings, *left.sliders]
    left.file.upload(take_file, left.file, taken, show_progress="hidden", **PRIVATE)
    left.samples.select(take_sample, None, taken, show_progress="hidden", **PRIVATE)
    left.method.change(choose, left.method, looks, show_progress="hidden", **PRIVATE)
    left.reset.click(choose, left.method, looks, show_progress="hidden", **PRIVATE)


def listen_to_start(state, left, right, choices, models, reference_of):
    """The button runs the model, one session's at a time, and fills the right side."""
    later = [right.tools, right.downloads, right.hint, right.details, right.way]
    filled = [right.viewer, right.caption, right.score, right.film, right.buttons["film"], right.times]

    def run(upload, choice, times, *values, progress=gr.Progress()):  # noqa: B008
        unchanged = [gr.skip()] * len(filled + later)
        if upload is None:
            return [gr.skip(), say(NOTHING_YET), *unchanged]
        name = choices[choice]
        pipeline, call = models[name], call_of(models[name], values)
        try:
            progress(0, desc="starting")
            answer = answers.ask(pipeline, name, upload, call, lambda i, n, going: progress((i, n), desc=WAY[going]))
            unlike = [f"This image {text}." for text in unlikeness_warnings(pipeline, [upload.picture])[0]]
            reference = reference_of(name, lambda i, n: progress((i, n), desc="scoring healthy radiographs"))
        except ValueError as error:
            return [gr.skip(), say(str(error)), *unchanged]
        fits = reference is not None and reference.fits(pipeline, call)
        return [
            answer,
            say(*upload.warnings, *unlike, kind="warning"),
            answers.viewer_data(answer),
            caption(answer),
            answers.score_card(answer, reference, fits, pipeline.describe_score()),
            answers.film_card(answer),
            gr.update(interactive=answer.trajectory is not None),
            threshold_span(answer, times),
            *[gr.update(visible=True)] * len(later),
        ]

    started = left.start.click(
        run,
        [state.upload, left.method, right.times, *left.sliders],
        [state.answer, left.message, *filled, *later],
        show_progress_on=right.viewer,
        concurrency_limit=1,
        **PRIVATE,
    )
    # not postprocessed: the slider's own way of taking pictures writes them to disk
    hidden = {"show_progress": "hidden", "postprocess": False}
    started.success(compare, state.answer, right.compare, **hidden, **PRIVATE)


def listen_to_answer(state, right, parcel):
    """The sliders act in the browser; a download is made in memory when it is asked for."""
    for slider in (right.opacity, right.times):
        slider.change(None, [right.opacity, right.times], None, js=MOVE, **PRIVATE)
    for kind, button in right.buttons.items():
        inputs = [state.answer, right.opacity, right.times]
        packed = button.click(packer(kind), inputs, parcel, show_progress="hidden", **PRIVATE)
        packed.success(None, parcel, None, js=DOWNLOAD, **PRIVATE)


def compare(answer):
    """The value of the image slider: two pictures that travel inside the page."""
    pair = answer and answers.compared(answer)
    return gr.update(value=pair and [{"path": None, "url": uri} for uri in pair], visible=bool(pair))


def take(upload):
    """A picture that was read -> the values of `taken`: kept, shown small, warned of, and the drop zone emptied."""
    card = gr.update(value=answers.upload_card(upload), visible=True)
    return [upload, card, say(*upload.warnings, kind="warning"), None]


def say(*sentences, kind="error"):
    """An update of the message under the button: an error, warnings, or nothing."""
    role = "alert" if kind == "error" else "status"
    lines = [f'<p class="{kind}" role="{role}">{answers.escape(sentence)}</p>' for sentence in sentences]
    return gr.update(value="".join(lines), visible=bool(lines))


def packer(kind):
    """The function of a download button: (answer, opacity in per cent, times the threshold) -> JSON for `DOWNLOAD`."""

    def pack(answer, opacity, times):
        if answer is None:
            raise gr.Error(GONE, print_exception=False)
        name, content = {
            "map": lambda: answers.map_file(answer),
            "mask": lambda: answers.mask_file(answer, times),
            "picture": lambda: answers.picture_file(answer, opacity / 100),
            "film": lambda: answers.film_file(answer),
        }[kind]()
        mime = "image/webp" if name.endswith(".webp") else "image/png"
        return json.dumps({"name": name, "type": mime, "data": base64.b64encode(content).decode()})

    return pack


def forget(path):
    """Take an upload, and the folder that Gradio made for it alone, off the disk."""
    with suppress(OSError):
        Path(path).unlink()
        Path(path).parent.rmdir()  # only where it is empty: the path comes from the browser


def name_choices(models):
    """{what the page calls it: name}: by the method, and by the name too where several do the same."""
    titles = [pipeline.title for pipeline in models.values()]
    named = zip(titles, models, strict=True)
    return {title if titles.count(title) == 1 else f"{title}: {name}": name for title, name in named}


def about_method(pipeline):
    name = answers.escape(Path(str(pipeline.config.get("_name_or_path") or "")).name)
    return f'<p class="hint">{pipeline.summary}{f" Model: <code>{name}</code>." if name else ""}</p>'


def threshold_span(answer, times):
    """An update of the threshold's slider: as far as the colours go, and back to 1 where it stands beyond."""
    highest = max(1.0, round(int(answer.vmax / answer.threshold / 0.05) * 0.05, 2))
    return gr.update(maximum=highest, value=times if times <= highest else 1, info=THRESHOLD[answer.own_threshold])


def caption(answer):
    if answer.counterfactual is None:
        return '<p class="hint">This method makes no healthy picture to compare with.</p>'
    return '<p class="hint ends"><span>\u25c2 your picture</span><span>as if healthy \u25b8</span></p>'


def describe_files():
    return ". ".join(f"{label}: {what}" for label, what in FILES.values()) + "."


def slider_looks(pipeline):
    """Keywords of the sliders of `answers.SLIDERS`, in their order: visible where the pipeline's call has them, and at
    the checkpoint's own values."""
    own, looks = pipeline.settings(), []
    for name, (label, info, low, high, step) in answers.SLIDERS.items():
        value = own[name] if is_number(own.get(name)) else low
        span = {"minimum": min(low, value), "maximum": max(high, value), "step": step, "value": value}
        looks.append({"label": label, "info": info, "visible": is_number(own.get(name)), **span})
    return looks


def is_number(value):
    """Not so for what a call does not have, nor for several noise levels at once."""
    return isinstance(value, (int, float))


def has_sliders(pipeline):
    return any(look["visible"] for look in slider_looks(pipeline))


def call_of(pipeline, values):
    """The sliders' values -> arguments of the pipeline's call, those that it has; steps and timesteps are whole."""
    own = pipeline.settings()
    named = zip(answers.SLIDERS, values, strict=True)
    # not in the type of its own: a scale of 4 may become 4.5
    kinds = {name: float if name.endswith("_scale") else int for name in answers.SLIDERS}
    return {name: kinds[name](value) for name, value in named if is_number(own.get(name))}


def thumbnails(paths):
    """HTML: a button with a small picture for each file."""
    buttons = []
    for i, path in enumerate(paths, 1):
        picture = f'<img alt="sample {i}" src="{answers.data_uri(path.read_bytes())}">'
        buttons.append(f'<button data-index="{i - 1}" title="sample {i}">{picture}</button>')
    return f'<div class="thumbs">{"".join(buttons)}</div>'


def look():
    """The theme: dark in every browser; the font comes with Gradio, none from elsewhere."""
    # its semibold knows few letters, so there is none between regular and bold
    fonts = [gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"]
    theme = gr.themes.Base(primary_hue="orange", neutral_hue="slate", font=fonts)
    return theme.set(**{f"{name}{mode}": value for name, value in COLOURS.items() for mode in ("", "_dark")})


COLOURS = {
    "body_background_fill": "#0e1116",
    "body_text_color": "#d7dde5",
    "body_text_color_subdued": "#8b95a5",
    "background_fill_primary": "#161b22",
    "background_fill_secondary": "#1d232c",
    "block_background_fill": "#161b22",
    "block_border_color": "#262d37",
    "block_title_text_color": "#d7dde5",
    "block_info_text_color": "#8b95a5",
    "border_color_primary": "#313a46",
    "input_background_fill": "#1d232c",
    "input_border_color": "#313a46",
    "button_primary_background_fill": "#f59e42",
    "button_primary_background_fill_hover": "#ffb366",
    "button_primary_text_color": "#1a1206",
    "button_secondary_background_fill": "#222933",
    "button_secondary_background_fill_hover": "#2d3642",
    "button_secondary_text_color": "#d7dde5",
    "slider_color": "#f59e42",
}
