"""Images: from folders, zip files, idx files and datasets; augmentation against a loop over images."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from sparse_pretrain.config_data import ImagesConfig
from sparse_pretrain.data.batches import CROP, FLIP, ImageBatches
from sparse_pretrain.data.build import prepare
from sparse_pretrain.data.random_numbers import uniform
from sparse_pretrain.errors import UserError
from tests.shared_data import shared_data

SIZE = 8
CLASSES = ("cat", "dog", "owl")


def pixels(i: int, shape=(SIZE, SIZE, 3)) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, shape, np.uint8)


def encoded(array: np.ndarray | Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, form)
    return file.getvalue()


def members(split: str, count: int = 4) -> dict[str, bytes]:
    """Each class `count` images, all different."""
    first = 0 if split == "train" else 1000
    return {
        f"{split}/{name}/{i:02}.png": encoded(pixels(first + 100 * k + i))
        for k, name in enumerate(CLASSES)
        for i in range(count)
    }


def write_folder(folder, files: dict[str, bytes]):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def config(train, validation=(), **options) -> ImagesConfig:
    values = {
        "name": "toy",
        "train": [str(p) for p in train],
        "validation": [str(p) for p in validation],
        "image_size": SIZE,
        "num_workers": 0,
    }
    return ImagesConfig(**{**values, **options})


def check(store, channels=3) -> None:
    assert (store.num_examples("train"), store.num_examples("validation")) == (12, 3)
    assert (store.num_classes, store.label_names) == (3, list(CLASSES))
    assert store.column("train", "label").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = np.stack([pixels(100 * k + i) for k in range(3) for i in range(4)])
    assert np.array_equal(store.column("train", "image"), expected)
    assert np.array_equal(store.column("validation", "image"), np.stack([pixels(1000 + 100 * k) for k in range(3)]))
    assert store.manifest["mean"] == pytest.approx((expected / 255).mean((0, 1, 2)), rel=1e-12)
    assert store.manifest["std"] == pytest.approx((expected / 255).std((0, 1, 2)), rel=1e-10)


def test_folders_and_zip_files(tmp_path):
    files = [
        write_folder(tmp_path, members(split, count)) / split for split, count in (("train", 4), ("validation", 1))
    ]
    check(prepare(config(files[:1], files[1:])))
    zips = [
        write_zip(tmp_path / f"{split}.zip", members(split, count))
        for split, count in (("train", 4), ("validation", 1))
    ]
    check(prepare(config(zips[:1], zips[1:])))


def test_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(CLASSES)), "n": datasets.Value("int64")}
    )
    for split, count in (("train", 4), ("validation", 1)):
        files = members(split, count)
        rows = {
            "img": [{"bytes": content, "path": None} for content in files.values()],
            "kind": [name.split("/")[1] for name in files],
            "n": list(range(len(files))),
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    options = {
        "hf_path": str(folder),
        "hf_validation_split": "validation",
        "image_column": "img",
        "label_column": "kind",
    }
    check(prepare(config([], **options)))
    with monkeypatch.context() as patch:  # a finished store needs neither dataset nor network
        patch.setattr(datasets, "load_dataset", lambda *args, **options: pytest.fail("read again"))
        check(prepare(config([], **options)))
    with pytest.raises(UserError, match=r"data\.image_column: found image; allowed: img"):
        prepare(config([], **{**options, "image_column": "image"}))
    with pytest.raises(UserError, match=r"data\.label_column: found label; allowed: kind, n"):
        prepare(config([], **{**options, "label_column": "label"}))
    numbered = prepare(config([], **{**options, "label_column": "n"}))
    assert numbered.label_names == [str(i) for i in range(12)]
    with pytest.raises(UserError, match=r"data\.hf_train_split: found trian"):
        prepare(config([], **{**options, "hf_train_split": "trian"}))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    paths = {}
    for split, first in (("train", 0), ("validation", 50)):
        images = np.stack([pixels(first + i, (SIZE, SIZE)) for i in range(9)])
        labels = np.arange(9, dtype=np.uint8) % 3
        for name, array in (("images", images), ("labels", labels)):
            path = tmp_path / f"{split}-{name}-idx-ubyte{suffix}"
            path.write_bytes(gzip.compress(idx(array)) if suffix else idx(array))
            paths.setdefault(split, []).append(path)
    store = prepare(config(paths["train"], paths["validation"], channels=1))
    assert store.label_names == ["0", "1", "2"]
    assert store.column("train", "label").tolist() == [0, 1, 2] * 3
    assert np.array_equal(store.column("train", "image")[..., 0], np.stack([pixels(i, (SIZE, SIZE)) for i in range(9)]))
    both = prepare(config(paths["train"] + paths["validation"], channels=3, validation_share=0.4))
    everything = np.concatenate([both.column(split, "image") for split in ("train", "validation")])
    assert len(everything) == 18
    assert both.num_examples("validation") > 0
    assert np.array_equal(everything[..., 0], everything[..., 2])


def test_every_kind_of_image_is_scaled_and_cut(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200  # the square in the middle
    kinds = {
        "wide.png": encoded(wide),
        "tall.jpg": encoded(Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90), "JPEG"),
        "grey.png": encoded(wide[..., 0]),
        "palette.png": encoded(Image.fromarray(wide).convert("P")),
        "alpha.png": encoded(Image.fromarray(wide).convert("RGBA")),
        "cmyk.jpeg": encoded(Image.fromarray(wide).convert("CMYK"), "JPEG"),
    }
    write_folder(tmp_path / "train", {f"{k}/{name}": content for k in "ab" for name, content in kinds.items()})
    store = prepare(config([tmp_path / "train"], [tmp_path / "train"]))
    assert np.abs(store.column("train", "image").astype(int) - 200).max() <= 20  # JPEG and bicubic edges


def test_max_examples_takes_all_classes(tmp_path):
    write_folder(tmp_path, members("train", 20))
    store = prepare(config([tmp_path / "train"], [tmp_path / "train"], max_examples=6))
    assert store.column("train", "label").tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("flip", "padding"), [(False, 0), (True, 0), (False, 3), (True, 2)])
def test_augmentation_against_a_loop(tmp_path, flip, padding):
    write_folder(tmp_path, members("train", 10))
    store = prepare(config([tmp_path / "train"], [tmp_path / "train"]))
    mean, std = (np.array(store.manifest[name]) for name in ("mean", "std"))
    collate = ImageBatches(store, "train", seed=5, flip=flip, crop_padding=padding)
    rows = np.array([3, 29, 0, 3, 17, 8, 21, 13, 2])
    batch = collate(rows, 7)
    assert (str(batch["images"].dtype), batch["images"].shape) == ("torch.float32", (9, 3, SIZE, SIZE))
    assert batch["labels"].tolist() == store.column("train", "label")[rows].tolist()
    turned = set()
    for i, row in enumerate(rows):
        image = store.column("train", "image")[row]
        big = np.zeros((SIZE + 2 * padding, SIZE + 2 * padding, 3), np.uint8)
        big[padding : padding + SIZE, padding : padding + SIZE] = image
        y, x = (uniform(5, 7, np.array([row]), 2, CROP)[0] * (2 * padding + 1)).astype(int)
        image = big[y : y + SIZE, x : x + SIZE]
        if flip and uniform(5, 7, np.array([row]), 1, FLIP)[0, 0] < 0.5:
            image = image[:, ::-1]
            turned.add(row)
        expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
        assert np.abs(batch["images"][i].numpy() - expected).max() < 1e-5
    assert (0 < len(turned) < 8) == flip
    again = collate(rows[:4], 7)["images"]
    assert np.array_equal(again, batch["images"][:4])
    assert np.array_equal(collate(rows, 8)["images"], batch["images"]) == (not flip and not padding)


def test_validation_images_are_as_they_are(tmp_path):
    write_folder(tmp_path, members("train", 10))
    store = prepare(config([tmp_path / "train"], [tmp_path / "train"]))
    batch = ImageBatches(store, "train", 5, True, 3)(np.arange(30), None)
    assert np.abs(batch["images"].mean((0, 2, 3))).max() < 1e-5
    assert np.abs(batch["images"].std((0, 2, 3), correction=0) - 1).max() < 1e-5


def bad_zip(folder):
    (folder / "train.zip").write_bytes(b"PK no zip")
    return config([folder / "train.zip"])


def damaged_zip(folder):
    path = folder / "train.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in "ab":
            archive.writestr(f"{name}/0.png", bytes(range(256)) * 8)
    content = bytearray(path.read_bytes())
    content[30 + len("a/0.png")] = 0xFF  # the first byte behind the header: no such kind of block
    path.write_bytes(content)
    return config([path])


def bad_image(folder):
    files = members("train")
    files["train/dog/00.png"] = files["train/dog/00.png"][:60]
    return config([write_folder(folder, files) / "train"])


def no_image(folder):
    return config([write_folder(folder, {**members("train"), "train/dog/00.png": b"text"}) / "train"])


def grey_from_colour(folder):
    return config([write_folder(folder, members("train")) / "train"], channels=1)


def deep(folder):
    image = encoded(Image.fromarray(np.full((8, 8), 7000, np.uint16)))
    return config([write_folder(folder, {**members("train"), "train/dog/00.png": image}) / "train"])


def unknown_class(folder):
    write_folder(folder, {**members("train"), **members("validation", 1), "validation/cow/0.png": encoded(pixels(0))})
    return config([folder / "train"], [folder / "validation"])


def one_class(folder):
    return config([write_folder(folder, {"train/dog/0.png": encoded(pixels(0))}) / "train"])


def flat_folder(folder):
    return config([write_folder(folder, {"train/0.png": encoded(pixels(0))}) / "train"])


def idx_pair(folder, images: bytes, labels: bytes, **options):
    return config([write_folder(folder, {"i": images, "l": labels}) / name for name in ("i", "l")], **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_zip, r"data\.train: found .*train\.zip, which cannot be read"),
        (damaged_zip, r"data\.train: found .*train\.zip, which cannot be read"),
        (bad_image, r"data\.train: found .*train/dog/00\.png, which is not an image"),
        (no_image, r"data\.train: found .*train/dog/00\.png, which is not an image"),
        (grey_from_colour, r"data\.channels: found 1, but .*train/cat/00\.png is of mode RGB"),
        (deep, r"data\.channels: found 3, but .*train/dog/00\.png is of mode I;16"),
        (unknown_class, r"data\.validation: found .*validation/cow/0\.png of class cow; allowed: cat, dog, owl"),
        (one_class, r"data\.train: found 1 classes; allowed: at least two"),
        (flat_folder, r"data\.train: found .*train without images in folders"),
        (lambda f: config([f / "nothing"]), r"data\.train: found .*nothing, which is not there"),
        (lambda f: config([f / "nothing.zip"]), r"data\.train: found .*nothing\.zip, which cannot be read"),
        (lambda f: config([]), r"data\.train: found nothing; allowed: a folder or \.zip"),
        (lambda f: config([], [f]), r"data\.train: found nothing, beside files of data\.validation"),
        (lambda f: config([f], channels=2), r"data\.channels: found 2; allowed: 1, 3"),
        (lambda f: idx_pair(f, b"text", idx(np.zeros(3, np.uint8))), r"data\.train: found .*/i, which is not an idx file"),
        (lambda f: idx_pair(f, idx(np.zeros((3, 8, 8), np.uint8))[:-1], b""), r"/i, which is not an idx file or not all of one"),
        (lambda f: idx_pair(f, idx(np.zeros((3, 8, 8), np.uint8)), idx(np.zeros(2, np.uint8))), r"i of shape \(3, 8, 8\) and l of \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        prepare(make(tmp_path))


def test_an_odd_number_of_idx_files(tmp_path):
    (tmp_path / "i").write_bytes(idx(np.zeros((2, 8, 8), np.uint8)))
    with pytest.raises(UserError, match=r"data\.train: found 1 files; allowed: .*pairs of idx files"):
        prepare(config([tmp_path / "i"]))


def test_cifar10():
    train, test = shared_data("vision/cifar10-train-jpg.zip"), shared_data("vision/cifar10-test-even-jpg.zip")
    with zipfile.ZipFile(train) as archive:
        assert sum(name.endswith(".jpg") for name in archive.namelist()) == 50_000
    store = prepare(config([train], [test], image_size=32, max_examples=500))
    assert (store.num_examples("train"), store.num_examples("validation")) == (500, 500)
    assert np.bincount(store.column("train", "label")).tolist() == [50] * 10
    assert store.label_names[:3] == ["airplane", "automobile", "bird"]
    assert store.manifest["mean"] == pytest.approx([0.491, 0.482, 0.447], abs=0.02)  # of the whole train split
    assert store.manifest["std"] == pytest.approx([0.247, 0.243, 0.262], abs=0.02)


def test_fashion_mnist():
    folder = shared_data("vision/fashion-mnist")
    files = [folder / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    store = prepare(config(files, image_size=28, channels=1))
    assert store.num_examples("train") + store.num_examples("validation") == 10_000
    assert 400 < store.num_examples("validation") < 600
    assert store.num_classes == 10
