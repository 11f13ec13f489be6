"""Run the notebooks, keep their outputs, and write into each which weights they came from.

python benchmarks/notebooks.py            # all of them, about a quarter of an hour on two cores
python benchmarks/notebooks.py 02         # those whose names begin with 02
"""

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
import PIL.Image
from nbclient import NotebookClient
from tqdm.auto import tqdm

from cxr_diffusers import default_checkpoint
from cxr_diffusers.fingerprints import checkpoint_digest
from cxr_diffusers.hub.loading import CHECKPOINTS

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def main(prefixes: list[str]) -> None:
    """Run and write those notebooks whose names begin with one of the prefixes; all of them without any."""
    paths = sorted(p for p in NOTEBOOKS.glob("*.ipynb") if not prefixes or p.name.startswith(tuple(prefixes)))
    os.environ["TQDM_DISABLE"] = "1"  # in the kernels: a bar is hundreds of lines in the file
    models = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
    for path in tqdm(paths, desc="notebooks"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day: a difference at every run
            for output in cell.get("outputs", []):
                shrink(output.get("data", {}))
        stamp = " ".join(f"{name}={checkpoint_digest(default_checkpoint(name))}" for name in models)
        notebook.metadata["weights"] = stamp
        nbformat.write(notebook, path)


def shrink(data: dict) -> None:
    """Replace the PNG of an output by a JPEG: radiographs take a tenth of the space."""
    if "image/png" in data:
        with io.BytesIO() as buffer:
            png = PIL.Image.open(io.BytesIO(base64.b64decode(data.pop("image/png"))))
            png.convert("RGB").save(buffer, "JPEG", quality=75)
            data["image/jpeg"] = base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main(sys.argv[1:])
