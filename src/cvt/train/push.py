"""Uploading a model to the Hugging Face hub, with its model card."""

import hashlib
import json
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    constants,
)
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects

from cvt.architecture import LIBRARY
from cvt.checkpoints import ModelSource, load_classifier, load_config, model_source
from cvt.checkpoints.adapters import read_adapter, settings
from cvt.checkpoints.source import EXPORT_FILES, MODEL_FILES, check_folder
from cvt.files import CHECKSUMS, check_checksums, checksums_text, model_folder, read_json
from cvt.hub import Repository, repository
from cvt.model_code import AUTO_MAP, carries_code, code_files, other_code
from cvt.runtime.manifest import Manifest
from cvt.train.model_card import about_code, completed, model_card

CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """What `push` uploads.

    Attributes:
        folder: the model's; of a run folder, its `best`.
        repository: the repository on the hub, and its branch.
        files: size in bytes of each file, by its name in the folder and in the repository.
        card: the model card, README.md.
        left_out: other files in the folder, which are not uploaded.
        replaced: files of the repository that had this name before; None where nothing was asked.
        deleted: files that an earlier model has left there, and that are deleted.
        url: of the commit; None of a dry run.
    """

    folder: Path
    repository: Repository
    files: dict[str, int]
    card: str
    left_out: list[str]
    replaced: list[str] | None = None
    deleted: list[str] | None = None
    url: str | None = None


def push(
    folder: str | Path,
    name: str,
    *,
    private: bool = False,
    licence: str | None = None,
    overwrite: bool = False,
    with_code: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Upload a model folder, the best model of a run, an adapter or an export, in one commit.

    The repository is created if there is none. The files of a model are uploaded and nothing else:
    no checkpoint of training, no optimizer state. A repository that this package wrote before gets
    the new files, and loses those of the old model that the new one does not have; its licence
    stays where no other is given. A folder that was saved with this package's code is uploaded
    with it.

    Args:
        folder: of the model, or of the run.
        name: USER/NAME, or USER/NAME@BRANCH; the branch is created if there is none.
        private: create a repository that only its owner sees.
        licence: of the model, as the hub calls it, such as apache-2.0; by default that of the
            card in the folder, or else of the repository.
        overwrite: upload into a repository whose files are not this package's.
        with_code: upload this package's code too, for transformers without this package.
        dry_run: upload nothing.

    Raises:
        FileExistsError: the repository has files that this package has not written, or a file of
            other content that has the name of a module of its code.
        OSError: the hub cannot be reached, or refuses; the folder is no model.
        ValueError: the folder is no model that can be uploaded, a file is damaged or has a path of
            this machine in it, its code is another version's, or `name` is none.
    """
    target = Repository.parse(name)
    if target is None or not name.startswith(target.hub_id):
        raise ValueError(f"{name}: must be USER/NAME, or USER/NAME@BRANCH")
    source = uploadable(Path(folder))
    names, others = files_of(source.path)
    files = {file: source.path / file for file in names}
    head = card_of(source)
    code: dict[str, Path | bytes] = {}
    if with_code or carries_code(source.path):
        code = code_of(source, with_code)
        head = about_code(head, load_config(source))
    card = str(completed(head, target.hub_id, licence))
    check_paths(files, card, source.path)
    contents: dict[str, Path | bytes] = {**files, **code, CARD: card.encode()}
    sizes = {
        file: len(content) if isinstance(content, bytes) else content.stat().st_size
        for file, content in sorted(contents.items())
    }
    upload = Upload(source.path, target, sizes, card, sorted(others - contents.keys()))
    return upload if dry_run else _commit(upload, contents, private, overwrite)


def uploadable(folder: Path) -> ModelSource:
    """The model in a folder, or the best one of a run folder, read and found to be whole.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it.
        ValueError: it is another thing, or the weights do not fit; names what to do.
    """
    folder = model_folder(folder)
    check_folder(folder)
    source = model_source(folder)
    check_checksums(folder)
    if source.is_export:
        Manifest.read(folder).verify(folder)
    elif source.kind == "adapter":
        read_adapter(folder)
        base = settings(folder).get("base_model_name_or_path") or ""
        if not repository(base) or Path(folder, base).exists():
            raise ValueError(
                f"{folder} is an adapter of {base or 'no named model'}, which is not on the hub: "
                "push that first and set base_model_name_or_path in adapter_config.json to its "
                "USER/NAME, or push the merged model, which `cvt train` writes beside it"
            )
    elif not source.has_weights:
        raise FileNotFoundError(f"{folder} is no model: it has no weights")
    else:
        load_classifier(source)  # strictly
    return source


def files_of(folder: Path) -> tuple[list[str], set[str]]:
    """The files in a model folder that a repository gets, and the others; its card comes beside.

    Raises:
        ValueError: its weights are pickled.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    found = set(filter_repo_objects(names, allow_patterns=list(MODEL_FILES))) - {CARD}
    if not any(name.endswith(".safetensors") or name == "export.json" for name in found):
        raise ValueError(
            f"{folder} has its weights in a pickled file, which others need not trust: "
            f"`cvt convert {folder} NEW` writes model.safetensors"
        )
    return sorted(found), names - found


def code_of(source: ModelSource, replace_other: bool) -> dict[str, Path | bytes]:
    """The modules by which transformers computes the model, and the files that name them.

    Args:
        source: the model.
        replace_other: whether this version's code may take the place of another's in the folder.

    Raises:
        ValueError: the folder is no plain model, or its code is another version's.
    """
    folder = source.path
    if source.is_export or source.kind == "adapter":
        kind = "an export" if source.is_export else "an adapter"
        raise ValueError(f"with_code: {folder} is {kind}, which no code of a model opens")
    if (others := other_code(folder)) and not replace_other:
        raise ValueError(
            f"{folder / others[0]} is not the code of this version of cvt-vision: --with-code "
            "uploads this version's"
        )
    code: dict[str, Path | bytes] = {**code_files()}
    if not carries_code(folder):
        fields = read_json(folder / "config.json") | {"auto_map": AUTO_MAP}
        config = (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
        code["config.json"] = config
        if (folder / CHECKSUMS).is_file():
            sums = read_json(folder / CHECKSUMS)
            sums["config.json"] = len(config), hashlib.sha256(config).hexdigest()
            code[CHECKSUMS] = checksums_text(sums).encode()
    return code


def card_of(source: ModelSource) -> ModelCard:
    """The model card in a folder, or a new one of what is in its files."""
    path = source.path / CARD
    if path.is_file():
        try:
            return ModelCard(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if source.is_export:
        manifest = Manifest.read(source.path)
        height, width = manifest.image_size
        about = (
            f"## Export\n\n`{manifest.file}`: {manifest.format}, in {manifest.precision}, for "
            f"images of {height} x {width} pixels."
        )
        return model_card(load_config(source), "CvT, exported", about, "export")
    config = load_config(source)
    head: dict[str, Any] = {}
    if source.kind == "adapter":
        base = Repository.parse(settings(source.path)["base_model_name_or_path"])
        head = {"base_model": base and base.hub_id, "base_model_relation": "adapter"}
    title = f"CvT of {config.parameters:,} parameters"
    return model_card(config, title, kind=source.kind, **head)


def check_paths(files: dict[str, Path], card: str, folder: Path) -> None:
    """Make sure that no file but the weights has a path of this machine in it.

    Raises:
        ValueError: one has; names the file and the path.
    """
    places = {f"{place}/" for place in (Path.home(), Path.cwd(), folder.resolve().parent)} - {"//"}
    texts = {name: path for name, path in files.items() if path.suffix != ".safetensors"}
    for place in sorted(places):
        found = [name for name, path in texts.items() if contains(path, place.encode())]
        if place in card or found:
            raise ValueError(
                f"{folder / (found or [CARD])[0]} has a path of this machine, {place}...: nothing "
                "was uploaded; edit the file, or export the model again"
            )


def contains(path: Path, text: bytes) -> bool:
    """Whether a file, of any size, has these bytes in it."""
    if not path.stat().st_size:
        return False
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(text) >= 0


def _commit(
    upload: Upload, contents: dict[str, Path | bytes], private: bool, overwrite: bool
) -> Upload:
    """Create the repository if there is none, and commit to it."""
    api, target = HfApi(library_name=LIBRARY), upload.repository
    hub_id, place = target.hub_id, f"{constants.ENDPOINT}/{target.hub_id}"
    with _in_a_sentence(f"{upload.folder} was not pushed to {place}"):
        existing = _existing(api, target)
        names = {file.rfilename for file in existing.siblings or []} if existing else set()
        if existing and not overwrite and not is_ours(existing, names):
            raise FileExistsError(
                f"{place} has files that this package has not written, such as "
                f"{min(names - {'.gitattributes'})}; nothing was overwritten (--force uploads)"
            )
        if existing and private and not existing.private:
            raise ValueError(f"{place} exists and is public: make it private in its settings")
        code = own_code(api, existing, names) if existing else set()
        theirs = names & code_files().keys() & upload.files.keys() - code
        if theirs and not overwrite:
            raise FileExistsError(
                f"{place} has files of other content, {', '.join(sorted(theirs))}; nothing was "
                "overwritten (--force uploads)"
            )
        is_export = "export.json" in names
        patterns = [each for each in MODEL_FILES if is_export or each not in EXPORT_FILES]
        stale = code.union(filter_repo_objects(sorted(names), allow_patterns=patterns))
        deleted = sorted(stale - upload.files.keys())
        if existing:
            upload = with_licence_of(existing, upload)
            contents = contents | {CARD: upload.card.encode()}
        else:
            api.create_repo(hub_id, private=private or None)
        if target.revision:
            api.create_branch(hub_id, branch=target.revision, exist_ok=True)
        done = api.create_commit(
            hub_id,
            [
                *(CommitOperationAdd(name, content) for name, content in contents.items()),
                *(CommitOperationDelete(name) for name in deleted),
            ],
            commit_message=f"Upload by {LIBRARY}",
            revision=target.revision,
            parent_commit=existing.sha if existing else None,
        )
    replaced = sorted(names & upload.files.keys())
    return replace(upload, replaced=replaced, deleted=deleted, url=done.commit_url)


def _existing(api: HfApi, target: Repository) -> ModelInfo | None:
    """The repository, as its branch is or as a new branch of it would be; None if there is none."""
    try:
        return api.model_info(target.hub_id, revision=target.revision)
    except RevisionNotFoundError:
        return api.model_info(target.hub_id)
    except RepositoryNotFoundError:
        return None


def with_licence_of(existing: ModelInfo, upload: Upload) -> Upload:
    """The upload with the licence of a repository in its card, if the card has none."""
    card, theirs = ModelCard(upload.card), existing.card_data and existing.card_data.get("license")
    if not theirs or card.data.get("license"):
        return upload
    text = str(completed(card, upload.repository.hub_id, theirs))
    return replace(upload, card=text, files=upload.files | {CARD: len(text.encode())})


def is_ours(existing: ModelInfo, names: set[str]) -> bool:
    """Whether a repository is empty, or this package's by the tag in its card."""
    card = existing.card_data
    return names <= {".gitattributes"} or (card is not None and LIBRARY in (card.tags or []))


def own_code(api: HfApi, existing: ModelInfo, names: set[str]) -> set[str]:
    """The modules of this package in a repository: its config.json takes the classes from them.

    Without that, a file of such a name is another's.
    """
    found = names & code_files().keys()
    if not found or "config.json" not in names:
        return set()
    config = api.hf_hub_download(existing.id, "config.json", revision=existing.sha)
    return found if carries_code(Path(config).parent) else set()


@contextmanager
def _in_a_sentence(fault: str) -> Iterator[None]:
    """Turn an error of the hub or of the connection into one sentence that begins with `fault`.

    Raises:
        OSError: there was one.
    """
    try:
        yield
    except FileExistsError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, HTTPError):
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        advice = {401: "run `hf auth login`; ", 403: "you may not write there; "}.get(status, "")
        report = " ".join(str(cause or error).split())
        raise OSError(f"{fault}: {advice}{report}") from error
