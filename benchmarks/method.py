"""What each choice of the method is worth and what it costs: the table and the image of docs/method.md.

    cxr-diffusers evaluate --config method root=DATA --on implants --out results_method
    python benchmarks/method.py --results results_method --figure method_cost.png

Of the plan's other data sets, where they were evaluated, it prints a table each. The figures are those of the
evaluation. Forwards are counted by a hook on a tiny UNet with the same steps, one for each image that passes through
it. What they take is measured by benchmarks/detect.py.
"""

import argparse
import json
from pathlib import Path

from diffusers import UNet2DModel
from machine import markdown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from PIL import Image

from cxr_diffusers import CFGAnomalyPipeline, load_pipeline
from cxr_diffusers.evaluation import load_plan
from cxr_diffusers.evaluation.controls import CHANCE, LOCATION, mean_map_of
from cxr_diffusers.files import save_png

PLAN = Path(__file__).parent.parent / "configs" / "plans" / "method.yaml"


def main(arguments=None):
    options = parser().parse_args(arguments)
    plan = load_plan(options.config, ["root=."])
    summary = json.loads((options.results / options.data / "summary.json").read_text())
    names = [name for name in plan.methods if name in summary["rows"]]
    forwards = {name: count_forwards(plan.methods[name]) for name in names}
    print(table(summary, names, forwards))
    for other in plan.data:
        path = options.results / other / "summary.json"
        if other != options.data and path.is_file():
            print(f"\n{other}:\n\n{short_table(json.loads(path.read_text()), names)}")
    if options.figure:
        save_png(cost_figure(summary, names, forwards), options.figure)


def table(summary, names, forwards):
    first, strata = names[0], {key.rpartition(" = ")[2]: value for key, value in summary["strata"].items()}
    styles = [key for key in ("A", "C") if key in strata]
    header = ["", "pixel AP", f"{first} - it", *styles, "pixel AUROC", "hit rate", "forwards"]
    controls = [mean_map_of(first, names), LOCATION, CHANCE]
    rows = []
    for name in [*names, *(control for control in controls if control in summary["rows"])]:
        result, difference = summary["rows"][name], summary["differences"].get(f"{first} - {name}", {})
        rows.append(
            [
                name,
                interval(result["pixel_ap"]),
                interval(difference.get("pixel_ap"), "+"),
                *(number(strata[style]["rows"].get(name, {}).get("pixel_ap")) for style in styles),
                number(result["pixel_auroc"]),
                number(result.get("hit_rate")),
                str(forwards.get(name, "–")),
            ]
        )
    return markdown(header, rows)


def short_table(summary, names):
    """Of a data set that was not chosen on: what its boxes and its scores say of each row."""
    first = next(name for name in names if name in summary["rows"])
    rows = []
    for name in [*names, LOCATION, CHANCE]:
        if name not in summary["rows"]:
            continue
        result, difference = summary["rows"][name], summary["differences"].get(f"{first} - {name}", {})
        cells = [interval(result["pixel_ap"]), interval(difference.get("pixel_ap"), "+"), number(result["pixel_auroc"])]
        cells += [interval(result.get("image_auroc")), interval(difference.get("image_auroc"), "+")]
        rows.append([name, *cells])
    return markdown(["", "pixel AP", f"{first} - it", "pixel AUROC", "image AUROC", f"{first} - it"], rows)


def interval(result, sign=""):
    return (
        "–"
        if result is None
        else f"{result['value']:{sign}.3f} [{result['low']:{sign}.3f}, {result['high']:{sign}.3f}]"
    )


def number(result):
    return "–" if result is None else f"{result['value']:.3f}"


def count_forwards(method):
    """UNet forwards an image, whose view is given, of a row of the plan."""
    model = load_pipeline(method["model"])
    channels, classes = model.unet.config.in_channels, model.unet.config.num_class_embeds
    tiny = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=classes,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
    )
    named = {key: model.config[key] for key in ("class_names", "settings", "has_null_label", "views")}
    pipeline = CFGAnomalyPipeline(tiny.eval(), model.scheduler, lung_segmenter=model.lung_segmenter, **named)
    pipeline.set_progress_bar_config(disable=True)
    counted = []
    tiny.register_forward_hook(lambda unet, inputs, output: counted.append(len(inputs[0])))
    call = {key: value for key, value in method.items() if key != "model"}
    pipeline(Image.new("L", (8, 8)), **call, view=pipeline.conditions.views[0] if pipeline.conditions.views else None)
    return sum(counted)


def cost_figure(summary, names, forwards):
    """matplotlib `Figure`: pixel AP with its interval over the forwards of an image."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="UNet forwards an image", ylabel="pixel AP, 95 % over patients")
    axes.spines[["top", "right"]].set_visible(False)
    same_cost = {}  # rows that cost the same stand beside each other
    for name in names:
        k = same_cost[forwards[name]] = same_cost.get(forwards[name], -1) + 1
        result, x = summary["rows"][name]["pixel_ap"], forwards[name] * 1.035**k
        error = [[result["value"] - result["low"]], [result["high"] - result["value"]]]
        colour = {names[0]: "#D55E00", "original": "#0072B2"}.get(name)
        axes.errorbar(x, result["value"], error, fmt="o", ms=4, lw=1, color=colour or "0.65", zorder=3 if colour else 2)
        if colour:
            axes.annotate(name, (x, result["high"]), (0, 4), textcoords="offset points", color=colour, ha="center")
    chance = summary["rows"][CHANCE]["pixel_ap"]["value"]
    axes.axhline(chance, color="0.5", linestyle=":", linewidth=1)
    axes.text(0.6, chance, "chance", transform=axes.get_yaxis_transform(), va="bottom", ha="center", color="0.5")
    axes.set_xticks([n for n in (5, 10, 20, 50, 100, 200, 500, 1000) if min(same_cost) / 2 <= n <= max(same_cost)])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    return figure


def parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="what evaluate wrote")
    parser.add_argument("--config", type=Path, default=PLAN, help="the plan it followed")
    parser.add_argument("--data", default="implants", help="the plan's data set to show")
    parser.add_argument("--figure", type=Path, help="write pixel AP over forwards to this PNG")
    return parser


if __name__ == "__main__":
    main()
