"""Images and their classes: decoded once, to arrays of bytes of one size."""

from __future__ import annotations

import collections
import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sparse_pretrain.data.albums import Album, Picture, open_albums
from sparse_pretrain.data.corpus import Split, is_held_out
from sparse_pretrain.data.example_store import Column, Entries, ExampleStore, Plan
from sparse_pretrain.data.example_store import prepare as prepare_store
from sparse_pretrain.errors import UserError

if TYPE_CHECKING:
    from sparse_pretrain.config_data import ImagesConfig

VERSION = 1
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # what Pillow reads without other programs
MODES = {1: ("1", "L", "LA"), 3: ("RGB", "RGBA", "P", "CMYK", "YCbCr", "1", "L", "LA")}  # by channels
SMALLEST_STD = 1 / 255  # of a channel that is the same everywhere


def prepare(cfg: ImagesConfig) -> ExampleStore:
    """The store of images: columns label (int32) and image (size, size, channels) uint8, and in the manifest mean and
    std of each channel over the train split, in shares of 255.

    An image is scaled until its shorter side is `data.image_size` and then cut to a square in its middle.

    Raises:
        UserError: naming the option at fault.
    """
    if cfg.channels not in MODES:
        raise UserError("data.channels", cfg.channels, [str(channels) for channels in MODES])
    train, validation = open_albums(cfg)
    facts: dict[str, Any] = {}
    settings = {
        "version": VERSION,
        "albums": [album and album.settings for album in (train, validation)],
        "shape": [cfg.image_size, cfg.channels],
        "share": None if validation else cfg.validation_share,
        "max_examples": cfg.max_examples,
    }
    return prepare_store(
        Plan(
            cfg.name,
            {"task": cfg.task, **settings},
            {"label": Column("int32"), "image": Column("uint8", (cfg.image_size, cfg.image_size, cfg.channels))},
            lambda: _examples(cfg, train, validation, facts),
            lambda: facts,
        )
    )


def _examples(
    cfg: ImagesConfig, train: Album, validation: Album | None, facts: dict[str, Any]
) -> Iterator[tuple[Split, Entries]]:
    """Of both splits. When all are read, what is known of them is in `facts`."""
    moments = Moments(cfg.channels)
    names, pictures = train.open()
    if len(names) < 2:
        raise UserError(train.option, f"{len(names)} classes", "at least two")
    for label, array in _decoded(pictures, names, cfg, train.option):
        held_out = validation is None and is_held_out(hashlib.sha256(array.tobytes()).hexdigest(), cfg.validation_share)
        if not held_out:
            moments.add(array)
        yield ("validation" if held_out else "train"), {"label": label, "image": array}
    if validation is not None:
        for label, array in _decoded(validation.open()[1], names, cfg, validation.option):
            yield "validation", {"label": label, "image": array}
    facts.update({"num_classes": len(names), "label_names": list(names), **moments.as_facts()})


def _decoded(
    pictures: Iterator[Picture], names: list[str], cfg: ImagesConfig, option: str
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each picture's class and what it becomes, in their order; as many threads as cores decode them.

    Raises:
        UserError: naming `option`, for a class that is not one of `names`; and as `as_array` does.
    """
    numbers = {name: number for number, name in enumerate(names)}
    workers = os.cpu_count() or 1
    waiting: collections.deque[tuple[int, Future[np.ndarray]]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for picture in pictures:
            if picture.label not in numbers:
                raise UserError(option, f"{picture.origin} of class {picture.label}", names)
            future = pool.submit(as_array, picture, cfg.image_size, cfg.channels, option)
            waiting.append((numbers[picture.label], future))
            if len(waiting) > 4 * workers:
                label, future = waiting.popleft()
                yield label, future.result()
        for label, future in waiting:
            yield label, future.result()


def as_array(picture: Picture, size: int, channels: int, option: str) -> np.ndarray:
    """A picture decoded, scaled and cut: (size, size, channels) uint8.

    Raises:
        UserError: naming `option` and the picture, if it cannot be read; data.channels, if it has colours and there is
            one channel, or no colours that Pillow converts.
    """
    try:
        if isinstance(picture.content, bytes):
            image: Image.Image = Image.open(io.BytesIO(picture.content), formats=FORMATS)
            image.load()
        else:
            image = Image.fromarray(picture.content)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(option, f"{picture.origin}, which is not an image ({error})", ", ".join(FORMATS)) from error
    if image.mode not in MODES[channels]:
        modes = f"images of mode {', '.join(MODES[channels])} with {channels} channels"
        raise UserError("data.channels", f"{channels}, but {picture.origin} is of mode {image.mode}", modes)
    image = image.convert("L" if channels == 1 else "RGB")
    if min(image.size) != size:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).reshape(size, size, channels)


class Moments:
    """Sums over the pixels of images, exact: integers."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = np.zeros((2, channels), np.uint64)  # of values, and of their squares

    def add(self, array: np.ndarray) -> None:
        """array: (height, width, channels) uint8."""
        values = array.reshape(-1, array.shape[-1]).astype(np.uint32)
        self.count += len(values)
        self.sums += np.stack([values.sum(0, np.uint64), (values * values).sum(0, np.uint64)])

    def as_facts(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, in shares of 255."""
        mean, squares = self.sums / self.count / np.array([[255.0], [255.0**2]])
        std = np.sqrt(np.maximum(squares - mean**2, SMALLEST_STD**2))
        return {"mean": mean.tolist(), "std": std.tolist()}
