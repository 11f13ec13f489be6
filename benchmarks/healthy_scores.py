"""The scores of healthy images, kept beside models: what the web page puts an image's score beside.

    python benchmarks/healthy_scores.py --data DATA --named "WHAT THEY ARE" cxr_cfg_128 cxr_classifier_128 ...

DATA as in `cxr-diffusers evaluate`; MODEL is a folder or the name of a shipped model. Prints a table and writes
`healthy_scores.json` into each model's folder.
"""

import argparse
from pathlib import Path

import numpy as np

from cxr_diffusers import load_pipeline
from cxr_diffusers.data import open_dataset
from cxr_diffusers.hub.loading import default_checkpoint
from cxr_diffusers.inference.reference_scores import keep_scores, measure_scores


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True, help="healthy images that the models have not learned from")
    parser.add_argument("--named", help="what they are, for the reader of a figure (default: DATA)")
    options = parser.parse_args(arguments)
    dataset = open_dataset(options.data)
    print("| model | images | lowest | median | highest |\n|---|---|---|---|---|")
    for model in options.models:
        folder = model if Path(model).is_dir() else default_checkpoint(model)
        reference = measure_scores(load_pipeline(folder), dataset, options.named or options.data)
        keep_scores(reference, folder)
        low, middle, high = np.quantile(reference.scores, [0, 0.5, 1])
        print(f"| {Path(folder).name} | {len(reference.scores)} | {low:.4f} | {middle:.4f} | {high:.4f} |")


if __name__ == "__main__":
    main()
