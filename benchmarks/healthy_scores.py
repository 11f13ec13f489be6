"""Healthy scores of the shipped models, with quantiles of the healthy maps, which `cxr-diffusers calibrate` refuses.

    python benchmarks/healthy_scores.py --data DATA --named "WHAT THEY ARE" cxr_cfg_128 cxr_classifier_128 ...

DATA as in `cxr-diffusers evaluate`; MODEL is a folder or the name of a shipped model. Prints a table and writes
`healthy_scores.json` into each model's folder; `map_threshold` is printed and stays as it is.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np

from cxr_diffusers import load_pipeline
from cxr_diffusers.data import open_dataset
from cxr_diffusers.hub.loading import default_checkpoint
from cxr_diffusers.inference.calibration import calibrate_model
from cxr_diffusers.inference.reference_scores import keep_scores
from cxr_diffusers.precision import use_dtype


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True, help="healthy images that the models have not learned from")
    parser.add_argument("--named", help="what they are, for the reader of a figure (default: DATA)")
    options = parser.parse_args(arguments)
    dataset = open_dataset(options.data)
    print("| model | images | lowest | median | highest | map_threshold |\n|---|---|---|---|---|---|")
    for model in options.models:
        folder = model if Path(model).is_dir() else default_checkpoint(model)
        pipeline = load_pipeline(folder)
        use_dtype(pipeline, "auto")
        with tempfile.TemporaryDirectory() as copy:
            shutil.copy(Path(folder) / "model_index.json", copy)
            result = calibrate_model(copy, dataset, options.named or options.data, pipeline=pipeline)
        keep_scores(result.scores, folder)
        scores = result.scores.scores
        low, middle, high = (f"{value:.4f}" for value in np.quantile(scores, [0, 0.5, 1]))
        print(f"| {Path(folder).name} | {len(scores)} | {low} | {middle} | {high} | {result.map_threshold:g} |")


if __name__ == "__main__":
    main()
