"""Run the notebooks, keep their outputs, and write into each which weights they came from.

python benchmarks/notebooks.py            # all of them, about a quarter of an hour on two cores
python benchmarks/notebooks.py 02         # those whose names begin with 02
"""

import base64
import io
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
    models = sorted(path.parent.name for path in CHECKPOINTS.glob("*/model_index.json"))
    for path in tqdm(paths, desc="notebooks"):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        tidy(notebook)
        stamp = " ".join(f"{name}={checkpoint_digest(default_checkpoint(name))}" for name in models)
        notebook.metadata["weights"] = stamp
        nbformat.write(notebook, path)


def tidy(notebook) -> None:
    """Remove times of day and progress bars, and store images as JPEG: a radiograph takes a tenth of its PNG."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for data in (output.get("data", {}) for output in outputs):
            if "image/png" in data:
                with io.BytesIO() as buffer:
                    png = PIL.Image.open(io.BytesIO(base64.b64decode(data.pop("image/png"))))
                    png.convert("RGB").save(buffer, "JPEG", quality=75)
                    data["image/jpeg"] = base64.b64encode(buffer.getvalue()).decode()
        if "outputs" in cell:
            cell.outputs = outputs


if __name__ == "__main__":
    main(sys.argv[1:])
