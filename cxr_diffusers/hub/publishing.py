"""Publishing a pipeline folder on the Hub."""

from pathlib import Path

from huggingface_hub import HfApi

from ..files import write_file
from .loading import class_named, read_index


def publish(folder, repo_id, *, private=None, token=None, create_pr=False):
    """Upload a finished pipeline folder (a training run's, too) to the Hub.

    Only the model is uploaded: the index, the components, code, card and the pictures it shows. A run's checkpoints,
    logs and validation pictures stay at home. The name in the card's example becomes `repo_id`.

    Args:
        repo_id: USER/NAME, or NAME for your own; made if there is none.
        private: of a new repository; None: as your account has it.

    Returns:
        the address of the commit.

    Raises:
        FileNotFoundError: `folder` has no `model_index.json` (nothing was saved there), or no card. ValueError: it is
            the shipped model's, which has no code beside it, or an export.
    """
    from .. import pipelines
    from ..pipelines.cxr_portable import rename_card

    folder = Path(folder)
    index = read_index(folder)
    class_name = index["_class_name"]
    if class_name in pipelines.__all__ or class_name[0] == "installed_pipelines":
        raise ValueError(
            f"expected a folder with its code beside it, got {folder}: open it and use pipeline.push_to_hub"
        )
    if any(isinstance(part, list) and part[-1] == "ExportedNet" for part in index.values()):
        # diffusers fetches no *.onnx, and of OpenVINO's two files one: what is there could not be opened
        raise ValueError(f"{folder} is an export, which does not open from the Hub: publish the model it was made from")
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"no README.md in {folder}: a model goes out with its card, see write_model_card")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = (folder / "README.md").read_text()
    if rename_card(card, repo_id) != card:
        write_file(folder / "README.md", rename_card(card, repo_id).encode())
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=finished_files(folder, index),
        commit_message=f"Upload {class_named(index)}",
        create_pr=create_pr,
    ).commit_url


def finished_files(folder, index):
    """The files of a pipeline folder that belong to the model, as paths below it; whatever else lies there stays.

    They are the index, the card and the pictures it shows, the licence, the scores of healthy images, the code that the
    index names with the siblings it imports, and the components.
    """
    from diffusers.utils.dynamic_modules_utils import get_relative_imports

    beside = [folder / name for name in ("model_index.json", "conversion.json", "README.md", "healthy_scores.json")]
    beside += folder.glob("LICENSE*")
    card = (folder / "README.md").read_text()
    beside += [path for path in folder.glob("*.png") if f"({path.name})" in card]
    if isinstance(index["_class_name"], list):
        code = folder / f"{index['_class_name'][0]}.py"
        beside += [code, *(folder / f"{name}.py" for name in get_relative_imports(code))]
    beside = [path for path in beside if path.is_file()]
    components = [folder / name for name, value in index.items() if isinstance(value, list)]
    inside = [path for component in components if component.is_dir() for path in component.rglob("*") if path.is_file()]
    shown = [path.relative_to(folder) for path in beside + inside if path.suffix != ".tmp"]
    return sorted(path.as_posix() for path in shown if not any(part.startswith(".") for part in path.parts))
