"""Images with their classes, still encoded: from folders, zip files, idx files or a Hugging Face dataset."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_pretrain.data import huggingface
from sparse_pretrain.data.files import remembered_sha256
from sparse_pretrain.data.idx import idx_array
from sparse_pretrain.data.sources import UNREADABLE, find_files
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import ImagesConfig

SUFFIXES = (".jpg", ".jpeg", ".png")
FILES = "a folder or .zip of folders, one a class, of .jpg or .png; or pairs of idx files, as [images.gz,labels.gz]"


@dataclass(frozen=True)
class Picture:
    """An image.

    origin: where it comes from, for messages. content: the bytes of an image file, or an array (height, width) of
    bytes. label: the name of its class.
    """

    origin: str
    content: bytes | np.ndarray
    label: str


@dataclass(frozen=True)
class Album:
    """The images of a split.

    settings: plain values that identify them. option: that names the split, for messages. open: gives the names of the
    classes, in the order of their numbers, and starts reading.
    """

    settings: Any
    option: str
    open: Callable[[], tuple[list[str], Iterator[Picture]]]


def open_albums(cfg: ImagesConfig) -> tuple[Album, Album | None]:
    """The images of train and, if there are some of its own, of validation: of `data.train` and `data.validation`, or
    where there are none of `data.hf_path`. At most `data.max_examples` of each, evenly spread. Of a dataset nothing is
    loaded yet: a finished store needs neither it nor a network.

    Raises:
        UserError: naming the option: files or a dataset that are not there or of another form.
    """
    if cfg.train:
        return _files_album(cfg, "train"), _files_album(cfg, "validation") if cfg.validation else None
    if cfg.validation:
        raise UserError("data.train", "nothing, beside files of data.validation", FILES)
    if not cfg.hf_path:
        raise UserError("data.train", "nothing", f"{FILES}; or data.hf_path: a Hugging Face dataset")
    train = _dataset_album(cfg, cfg.hf_train_split, "data.hf_train_split")
    if cfg.hf_validation_split is None:
        return train, None
    return train, _dataset_album(cfg, cfg.hf_validation_split, "data.hf_validation_split")


def spread(count: int, limit: int | None) -> np.ndarray:
    """Which of `count` to take, at most `limit` of them: files and datasets are often sorted by class."""
    taken = count if limit is None else min(count, limit)
    return np.arange(taken) * count // max(taken, 1)


def _files_album(cfg: ImagesConfig, split: str) -> Album:
    option, entries = f"data.{split}", getattr(cfg, split)
    paths = [Path(entry).expanduser() for entry in entries]
    if any(path.is_dir() or path.suffix == ".zip" for path in paths):
        return _folder_album(paths, option, cfg.max_examples)
    return _idx_album(find_files(entries, option), option, cfg.max_examples)


def _folder_album(paths: list[Path], option: str, limit: int | None) -> Album:
    """Images whose class is the name of the folder they are in."""
    found: list[tuple[Path, str]] = []  # a folder or zip, and the name of an image in it
    settings: list[Any] = []
    for path in paths:
        try:
            names = _image_names(path)
        except (*UNREADABLE, zipfile.BadZipFile) as error:
            raise UserError(option, f"{path}, which cannot be read ({error})", FILES) from error
        if not names:
            raise UserError(option, f"{path} without images in folders", FILES)
        found += [(path, name) for name in names]
        if path.is_dir():  # by size and time: reading all images only to know them would take as long as the rest
            status = [(path / name).stat() for name in names]
            settings.append([[n, s.st_size, s.st_mtime_ns] for n, s in zip(names, status, strict=True)])
        else:
            settings.append(remembered_sha256(path))
    classes = sorted({Path(name).parent.name for _, name in found})

    def read() -> Iterator[Picture]:
        archives = {path: zipfile.ZipFile(path) for path in paths if not path.is_dir()}
        try:
            for i in spread(len(found), limit):
                path, name = found[i]
                content = archives[path].read(name) if path in archives else (path / name).read_bytes()
                yield Picture(f"{path}/{name}", content, Path(name).parent.name)
        except (*UNREADABLE, zipfile.BadZipFile) as error:
            raise UserError(option, f"{path}, which cannot be read ({error})", FILES) from error
        finally:
            for archive in archives.values():
                archive.close()

    return Album(settings, option, lambda: (classes, read()))


def _image_names(path: Path) -> list[str]:
    """The images in a folder or zip file that are in folders of their own, sorted."""
    names: Iterable[str]
    if path.is_dir():
        names = (str(file.relative_to(path)) for file in path.rglob("*"))
    else:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    return sorted(name for name in names if name.lower().endswith(SUFFIXES) and len(Path(name).parts) > 1)


def _idx_album(paths: list[Path], option: str, limit: int | None) -> Album:
    if len(paths) % 2:
        raise UserError(option, f"{len(paths)} files", FILES)

    def open() -> tuple[list[str], Iterator[Picture]]:
        images, labels = ([idx_array(path, option) for path in paths[side::2]] for side in (0, 1))
        for i, (pixels, classes) in enumerate(zip(images, labels, strict=True)):
            if pixels.ndim != 3 or classes.shape != pixels.shape[:1]:
                shapes = f"{paths[2 * i].name} of shape {pixels.shape} and {paths[2 * i + 1].name} of {classes.shape}"
                raise UserError(option, shapes, "images (n, height, width) and as many labels (n,)")
        highest = max(int(array.max(initial=0)) for array in labels)
        return [str(i) for i in range(highest + 1)], read(images, labels)

    def read(images: list[np.ndarray], labels: list[np.ndarray]) -> Iterator[Picture]:
        ends = np.cumsum([len(array) for array in images])
        for i in spread(int(ends[-1]), limit):
            file = int(np.searchsorted(ends, i, side="right"))
            row = i - (ends[file] - len(images[file]))
            yield Picture(f"{paths[2 * file]}, image {row}", images[file][row], str(labels[file][row]))

    return Album([remembered_sha256(path) for path in paths], option, open)


def _dataset_album(cfg: ImagesConfig, split: str, option: str) -> Album:
    def open() -> tuple[list[str], Iterator[Picture]]:
        import datasets  # takes a second or two: only for those who use it

        rows = huggingface.load(cfg, split, option, revision=cfg.hf_revision)
        columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        if cfg.image_column not in columns:
            raise UserError(
                "data.image_column", cfg.image_column, columns or "a column of images; this dataset has none"
            )
        if cfg.label_column not in rows.features:
            raise UserError("data.label_column", cfg.label_column, sorted(set(rows.features) - set(columns)))
        names = getattr(rows.features[cfg.label_column], "names", None)
        if names is None:
            found = rows.unique(cfg.label_column)
            integers = all(isinstance(label, int) for label in found)
            names = [str(i) for i in range(max(found, default=0) + 1)] if integers else sorted(map(str, found))
        rows = rows.select_columns([cfg.image_column, cfg.label_column])
        return names, read(rows.cast_column(cfg.image_column, datasets.Image(decode=False)), names)

    def read(rows: Any, names: list[str]) -> Iterator[Picture]:
        for i in spread(len(rows), cfg.max_examples).tolist():
            row = rows[i]
            image, label = row[cfg.image_column], row[cfg.label_column]
            if isinstance(label, int) and 0 <= label < len(names):
                label = names[label]
            content = image["bytes"] or Path(image["path"]).read_bytes()
            yield Picture(f"{cfg.hf_path}, {split}, row {i}", content, str(label))

    settings = {**huggingface.requested(cfg), "revision": cfg.hf_revision, "split": split}
    return Album([settings, cfg.image_column, cfg.label_column], option, open)
