"""Shares a run as a folder, or as a repository on Hugging Face's hub, with these files:

* head.safetensors: head, probes and feature mean; taught.safetensors: the classifier of `Run.teach`;
* config.json: experiment, classes, provenance, names of segments, and the run record of the validation split;
* README.md and thumbnail.webp: the model card;
* backbone.*: the file of the backbone, on request. By default it is loaded by name.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .card import THUMBNAIL, card, check_license, thumbnail
from .experiment import Experiment
from .utils.errors import StegoError, explained
from .utils.fields import BACKBONE_FILES, split_backbone
from .utils.files import atomic, checksum, fingerprint, read_json, write_json
from .utils.paths import base_name, user_path
from .utils.states import CHECKPOINT, save_state

if TYPE_CHECKING:
    from .run import Run

CONFIG, HEAD, TAUGHT = "config.json", "head.safetensors", "taught.safetensors"
# JSON files of a run folder that are copied to config.json.
PARTS = ("classes", "provenance", "names", "metrics")
# Prefix of repositories in `load_run`.
HUB = "hf:"


def save_run(
    run: "Run",
    folder: str | Path,
    images: Sequence[Any] = (),
    license: str | None = None,
    include_backbone: bool = False,
    source: str = "",
) -> None:
    """Writes the files of a shared run, see `Run.save_pretrained`. source: argument of `load_run` in the card."""
    folder, (name, file) = user_path(folder), split_backbone(run.experiment.backbone)
    if not (run.folder / "experiment.json").exists():
        raise StegoError("A released checkpoint cannot be converted. Share its .ckpt file.")
    run.check_fitted()
    if folder.exists() and any(folder.iterdir()):
        raise StegoError(f"{folder} is not empty. Choose a new folder.")
    if include_backbone and not file:
        raise StegoError(f"The backbone {name} is loaded by name. Leave include_backbone out.")
    check_license(license, run.experiment.backbone)
    kept = f"backbone{Path(file).suffix}" if include_backbone else base_name(file)
    values = run.experiment.to_record() | {"backbone": "@".join(filter(None, (name, kept)))}
    values |= {key: getattr(run.experiment, key) for key in ("precision", "feature_store")}
    config = {"library_name": "stego_lib", "experiment": values}
    config |= {part: read_json(path) for part in PARTS if (path := run.folder / f"{part}.json").exists()}
    preview = thumbnail(run, images) if images else None
    save_state(folder / HEAD, {"step": run.step, "shifts": run.shifts, "model": run.model.state_dict()})
    if (taught := run.taught) is not None:
        anonymous = {key: f"image {number}" for number, key in enumerate(taught.images)}  # without file names
        save_state(folder / TAUGHT, vars(taught) | {"images": anonymous})
    if include_backbone:
        _copy(Path(file), folder / kept)
    if preview:
        with atomic(folder / THUMBNAIL) as temporary:
            preview.save(temporary, quality=80)
    with atomic(folder / "README.md") as temporary:
        text = card(run, source or folder.name, license, include_backbone, preview is not None)
        temporary.write_text(text, encoding="utf-8")
    write_json(folder / CONFIG, config)


def push_run(run: "Run", repository: str, private: bool, **options: Any) -> None:
    """Uploads a run in one commit, see `Run.push_to_hub`. options: arguments of `save_run`."""
    from huggingface_hub import HfApi

    with TemporaryDirectory() as temporary:
        save_run(run, temporary, source=f"{HUB}{repository}", **options)
        with explained(Exception, f"{repository} cannot be uploaded", "Run `hf auth login` first."):
            HfApi().create_repo(repository, private=private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repository,
                folder_path=temporary,
                commit_message=f"Run {run.folder.name}",
                delete_patterns=[TAUGHT, THUMBNAIL, "backbone.*"],  # of an earlier upload
            )


def open_shared(path: str | Path, runs_dir: Path) -> Path:
    """Converts a shared run, a folder or "hf:NAME@REVISION", to a run folder in runs_dir/shared, unless it exists.

    The folder's name contains a fingerprint of the files.
    """
    remote = str(path).startswith(HUB)
    source = _download(str(path).removeprefix(HUB)) if remote else user_path(path)
    with explained((AttributeError, KeyError, TypeError), f"{path} is not a shared run", "Share it again."):
        config = read_json(source / CONFIG)
        values = {**config["experiment"]}
        weights = [file for file in (source / HEAD, source / TAUGHT) if file.exists()]
        title = str(path).removeprefix(HUB).partition("@")[0].replace("/", "--") if remote else source.absolute().name
        key = fingerprint(repr(config), *map(checksum, weights))[:8]
        folder = runs_dir / "shared" / f"{title}-{key}"
        if (folder / CHECKPOINT).exists():
            return folder
        name, file = split_backbone(values["backbone"])
        if file:  # only in the run folder, because paths in foreign files are not trusted
            file = base_name(file)
            values["backbone"] = "@".join(filter(None, (name, str(folder.absolute() / file))))
            if (source / file).exists():
                _copy(source / file, folder / file)
        for part in PARTS:
            if part in config:
                write_json(folder / f"{part}.json", config[part])
        write_json(folder / "experiment.json", Experiment.from_dict(values).to_dict())
        if len(weights) > 1:
            _copy(source / TAUGHT, folder / TAUGHT)
        _copy(source / HEAD, folder / CHECKPOINT)  # the last file
    return folder


def copied(folder: Path, runs_dir: Path) -> Path:
    """Copies a run, unless it exists in `runs_dir`, to a folder named by the run and its checkpoint."""
    copy = runs_dir / f"{folder.absolute().name}-{checksum(folder / CHECKPOINT)[:8]}"
    if not (copy / CHECKPOINT).exists():
        files = [path for path in (*folder.glob("*.*"), *folder.glob("kept/*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == CHECKPOINT):  # the checkpoint last
            _copy(path, copy / path.relative_to(folder))
    return copy


def _download(name: str) -> Path:
    """Downloads a repository to the hub's cache, which also works offline."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    patterns = ["*.json", *(f"*{ending}" for ending in BACKBONE_FILES)]
    with explained(Exception, f"{HUB}{name} cannot be downloaded", "Check name and network."):
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))


def _copy(source: Path, target: Path) -> None:
    with atomic(target) as temporary:
        shutil.copyfile(source, temporary)
