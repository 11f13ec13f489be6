"""Run the notebooks, keep their outputs, and write into each which weights they came from.

python benchmarks/notebooks.py            # all of them, about a quarter of an hour on two cores
python benchmarks/notebooks.py 02         # those whose names begin with 02
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm.auto import tqdm

from cxr_diffusers import default_checkpoint
from cxr_diffusers.fingerprints import checkpoint_digest
from cxr_diffusers.hub.loading import CHECKPOINTS

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def main(prefixes: list[str]) -> None:
    paths = sorted(p for p in NOTEBOOKS.glob("*.ipynb") if not prefixes or p.name.startswith(tuple(prefixes)))
    models = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
    for path in tqdm(paths, desc="notebooks"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day: a difference at every run
        stamp = " ".join(f"{name}={checkpoint_digest(default_checkpoint(name))}" for name in models)
        notebook.metadata["weights"] = stamp
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
