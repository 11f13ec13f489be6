"""Publishing a pipeline folder on the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..files import remove_dead, write_file
from .loading import class_named, read_index


def publish(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a finished pipeline folder, for example of a training run, to the Hub.

    Only the model is uploaded: index, components, code, card and the images in the card. The checkpoints, logs and
    validation images of a run are not. The example in the card gets the name `repo_id`.

    Args:
        repo_id: USER/NAME, or NAME in your own account; created if it does not exist.
        private: visibility of a new repository; None: the default of your account.

    Returns:
        the address of the commit.

    Raises:
        FileNotFoundError: `folder` has no `model_index.json` or no card.
        PermissionError: a private upload to a public repository.
        OSError: the Hub does not answer, or refuses the upload. See `uploading`.
        ValueError: the folder of a shipped model, which has no code in it, or an export.
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
        # diffusers downloads no *.onnx and only one of OpenVINO's two files: the published folder would not open
        raise ValueError(f"{folder} is an export, which does not open from the Hub: publish the model it was made from")
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"no README.md in {folder}: a model is published with its card, see write_model_card")
    remove_dead(folder)
    api = HfApi(token=token)
    with uploading(api, repo_id, private=private) as repo_id:
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


@contextmanager
def uploading(api: HfApi, repo_id: str, *, repo_type: str = "model", private: bool | None = None) -> Iterator[str]:
    """`with uploading(api, "ME/NAME") as repo_id:` create the repository, or open it, and upload in the block.

    After an error, a repository that was created here is deleted again if nothing was uploaded to it.

    Args:
        repo_id: USER/NAME, or NAME in your own account. The block gets USER/NAME.
        private: visibility of a new repository; None: the default of your account.

    Raises:
        PermissionError: `private`, and the repository exists and is public.
        OSError: an error of the network or of the Hub, in one line that says what to do. Errors of the block that are
            about its arguments (ValueError, PermissionError) or a local file are passed on.
    """
    is_new = False
    try:
        try:
            repo_id, is_new = api.create_repo(repo_id, repo_type=repo_type, private=private).repo_id, True
        except HfHubHTTPError:  # in most cases it exists; for other errors, this raises the same again
            repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
        if private and not is_new and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise PermissionError(
                f"{repo_id} exists and is public: make it private on the Hub first, or give another name"
            )
        yield repo_id
    except Exception as error:
        remains = is_new and not delete_if_empty(api, repo_id, repo_type)
        if isinstance(error, ValueError | PermissionError) or getattr(error, "filename", None):
            raise
        advice = describe_upload_error(error, api.endpoint)
        rest = f". The repository {repo_id} exists now; the same command continues" if remains else ""
        raise OSError(f"upload to {repo_id} failed: {advice}{rest}") from error


def delete_if_empty(api: HfApi, repo_id: str, repo_type: str) -> bool:
    """Delete a repository without files (the Hub itself adds `.gitattributes`); returns whether it was deleted."""
    with suppress(Exception):  # the error of the upload is the one to report
        if set(api.list_repo_files(repo_id, repo_type=repo_type)) <= {".gitattributes"}:
            api.delete_repo(repo_id, repo_type=repo_type)
            return True
    return False


def describe_upload_error(error: Exception, endpoint: str) -> str:
    """One line about an error of an upload to the Hub at `endpoint`: what was expected, what came, what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    response = getattr(error, "response", None)
    if response is not None and response.status_code in (401, 403):
        return (
            f"expected a token that may write there, got {response.status_code} {response.reason_phrase}: run "
            "`hf auth login`, or set HF_TOKEN"
        )
    if response is None and "xet" in text:
        return f"expected an upload by Xet, got {text}: to upload without Xet, set HF_HUB_DISABLE_XET=1"
    if response is None:
        return f"expected an answer of {endpoint}, got {text}: check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
    return text.split(" For more information")[0]


def finished_files(folder: Path, index: dict) -> list[str]:
    """The files of a pipeline folder that belong to the model, as paths relative to it.

    They are the index, the card and its images, the licence, the results of the calibration, the code that the index
    names with the modules that it imports, and the components.
    """
    from diffusers.utils.dynamic_modules_utils import get_relative_imports

    names = "model_index.json conversion.json README.md healthy_scores.json denoising_errors.json"
    beside = [folder / name for name in names.split()]
    beside += folder.glob("LICENSE*")
    card = (folder / "README.md").read_text()
    beside += [path for path in folder.glob("*.png") if f"({path.name})" in card]
    if isinstance(index["_class_name"], list):
        code = folder / f"{index['_class_name'][0]}.py"
        beside += [code, *(folder / f"{name}.py" for name in get_relative_imports(code))]
    beside = [path for path in beside if path.is_file()]
    components = [folder / name for name, value in index.items() if isinstance(value, list)]
    inside = [path for component in components if component.is_dir() for path in component.rglob("*") if path.is_file()]
    files = [path.relative_to(folder) for path in beside + inside if path.suffix != ".tmp"]
    return sorted(path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts))
