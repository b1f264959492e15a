"""What is opened is what was written, and what cannot be learned from is refused with a sentence."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from slimdit.sampling.seeds import seeded
from slimdit.training import data as data_module
from slimdit.training.data import ArrayImages, open_data, read_idx, read_idx_images


def test_array_images_are_scaled_to_minus_one_to_one():
    images = np.array([0, 255, 51, 204], np.uint8).reshape(1, 1, 2, 2)
    batch, labels = ArrayImages(images, np.array([3])).batch(torch.tensor([0, 0]), seeded(0))
    assert batch.shape == (2, 1, 2, 2)
    assert torch.allclose(batch[1].flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))
    assert labels.tolist() == [3, 3]


def test_flip_mirrors_about_half_of_the_images_and_repeats_with_the_same_generator():
    image = np.arange(8, dtype=np.uint8).reshape(1, 1, 2, 4)
    data = ArrayImages(image, np.array([0]), flip=True)
    plain = ArrayImages(image, np.array([0])).batch(torch.tensor([0]), seeded(0))[0][0]
    batch, _ = data.batch(torch.zeros(400, dtype=torch.int64), seeded(1))
    straight = (batch == plain).flatten(1).all(1)
    flipped = (batch == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(straight, ~flipped)
    assert 150 < int(flipped.sum()) < 250
    assert torch.equal(batch, data.batch(torch.zeros(400, dtype=torch.int64), seeded(1))[0])


@pytest.mark.parametrize(("labels", "sentence"), [
    (np.array([0, -1]), "label -1 is not a class number"),
    (np.array([0, 1 << 40]), "is not a class number"),
    (np.array([0.0, 1.5]), "must be whole numbers"),
    (np.array([0]), "one label per image"),
    (np.array([[0], [1]]), "one label per image"),
])
def test_labels_that_are_no_class_numbers_are_refused(labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        ArrayImages(np.zeros((2, 1, 4, 4), np.uint8), labels)


def test_no_images_and_wrong_types_are_refused():
    with pytest.raises(ValueError, match="and an image"):
        ArrayImages(np.zeros((0, 1, 4, 4), np.uint8), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="must be uint8"):
        ArrayImages(np.zeros((1, 1, 4, 4), np.float32), np.zeros(1, np.int64))


# IDX


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_folder(folder: Path, images: np.ndarray, labels: np.ndarray, split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def test_idx_folder_is_padded_to_size_and_test_means_t10k(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    idx_folder(tmp_path, train, np.array([0, 1, 2], np.uint8))
    idx_folder(tmp_path, test, np.array([2, 2, 9], np.uint8), "t10k")

    data = open_data(str(tmp_path), size=8)
    assert (data.shape, data.classes, len(data)) == ((1, 8, 8), 3, 3)
    expected = np.zeros((3, 8, 8), np.uint8)
    expected[:, 1:6, 2:6] = train
    assert np.array_equal(data.images[:, 0].numpy(), expected)

    other = open_data(str(tmp_path), split="test")
    assert (other.shape, other.labels.tolist()) == ((1, 5, 4), [2, 2, 9])
    assert np.array_equal(other.images[:, 0].numpy(), test)


def test_idx_images_larger_than_size_are_refused(tmp_path):
    idx_folder(tmp_path, np.zeros((1, 8, 8), np.uint8), np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="do not fit in 4 pixels"):
        read_idx_images(tmp_path, size=4)


def test_idx_folder_without_the_split_or_with_missing_labels_is_refused(tmp_path):
    idx_folder(tmp_path, np.zeros((2, 8, 8), np.uint8), np.zeros(1, np.uint8))
    with pytest.raises(FileNotFoundError, match="has no t10k-images"):
        open_data(str(tmp_path), split="test")
    with pytest.raises(ValueError, match="one label per image"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "not an IDX file"),
    (b"\0\0\x08", "not an IDX file"),
    (b"\0\0\x08\x03\0\0\0\x01", "not an IDX file"),
    (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0\0\0\0", "not an IDX file of unsigned bytes"),
    (idx(np.zeros(10, np.uint8))[:-1], "is truncated: 9 bytes of 10"),
    (idx(np.zeros(10, np.uint8)) + b"x", "goes on after the 10 bytes"),
    (b"\0\0\x08\x03" + struct.pack(">3I", *[0xFFFFFFFF] * 3), "over the limit"),
])
def test_idx_of_another_kind_is_refused(tmp_path, content, sentence, zipped):
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=sentence):
        read_idx(path)


def test_idx_unzips_no_more_than_its_header_claims(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx(np.zeros(10, np.uint8)) + b"\0" * 50_000_000))
    asked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or read(self, size))
    with pytest.raises(ValueError, match="goes on after"):
        read_idx(path)
    assert asked and all(0 <= size <= 11 for size in asked)


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "cut.gz"
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match="is damaged"):
        read_idx(path)
    path.write_bytes(whole[:100] + b"\xff" * 100 + whole[200:])
    with pytest.raises(ValueError, match="is damaged"):
        read_idx(path)


# .npz


@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
def test_npz_of_colour_images(tmp_path, names):
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", **dict(zip(names, (images, np.array([0, 3, 1, 1])))))
    data = open_data(str(tmp_path / "set.npz"))
    assert (data.shape, data.classes) == ((3, 6, 5), 4)
    batch, labels = data.batch(torch.tensor([2, 0]), seeded(0))
    assert torch.equal(((batch + 1) * 127.5).round().byte(), torch.from_numpy(images[[2, 0]]).permute(0, 3, 1, 2))
    assert labels.tolist() == [1, 0]


def test_npz_is_cropped_and_resized(tmp_path):
    images = np.zeros((2, 8, 32), np.uint8)  # gray, and wider than high
    images[:, :, 4:28] = 200  # the centred square, 12 to 20, and as far around it as the resizing looks
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([0, 1]))
    data = open_data(str(tmp_path / "set.npz"), size=4)
    assert data.shape == (1, 4, 4)
    assert (data.images == 200).all()


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_that_is_not_labelled_images_is_refused(tmp_path):
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="it holds arr_0, not arr_0 and arr_1"):
        open_data(str(npz(tmp_path / "a.npz", arr_0=images)))
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        open_data(str(npz(tmp_path / "b.npz", arr_0=images.transpose(0, 3, 1, 2), arr_1=labels)))
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        open_data(str(npz(tmp_path / "c.npz", arr_0=images.astype(np.float32), arr_1=labels)))
    with pytest.raises(ValueError, match="label -5"):
        open_data(str(npz(tmp_path / "d.npz", arr_0=images, arr_1=labels - 5)))


def test_npz_with_a_pickle_is_refused_unread(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{"a": 1}], dtype=object), arr_1=np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="allow_pickle"):
        open_data(str(tmp_path / "a.npz"))


def test_npz_that_is_truncated_or_foreign_is_refused(tmp_path):
    path = npz(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"is not an .npz"):
        open_data(str(path))
    path.write_bytes(b"not a zip at all")
    with pytest.raises(ValueError, match=r"is not an .npz"):
        open_data(str(path))


def test_npz_larger_than_memory_is_refused_unread(tmp_path, monkeypatch):
    path = npz(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    monkeypatch.setattr(data_module, "LARGEST_ARRAY", 100)
    with pytest.raises(ValueError, match="over the limit"):
        open_data(str(path))


def test_npz_whose_header_lies_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10, 3)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"\0" * 100)
        archive.writestr("arr_1.npy", header.getvalue())
    with pytest.raises(ValueError, match=r"is not an .npz"):
        open_data(str(tmp_path / "a.npz"))


# folders of images


def picture(path: Path, colour, mode: str = "RGB", size=(12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_folder_numbers_classes_in_sorted_order_and_resizes(tmp_path):
    picture(tmp_path / "zebra" / "a.png", (255, 0, 0))
    picture(tmp_path / "ant" / "deep" / "b.webp", (0, 255, 0))
    picture(tmp_path / "ant" / "c.JPEG", (0, 0, 255), size=(9, 30))
    picture(tmp_path / "ant" / "gray.png", 51, "L")
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden").mkdir()
    data = open_data(str(tmp_path), size=4)
    assert (data.shape, data.classes, len(data)) == ((3, 4, 4), 2, 4)
    batch, labels = data.batch(torch.arange(4), seeded(0))
    assert labels.tolist() == [0, 0, 0, 1]
    colours = batch.mean((2, 3))
    expected = {"c.JPEG": [-1, -1, 1], "b.webp": [-1, 1, -1], "gray.png": [-0.6, -0.6, -0.6], "a.png": [1, -1, -1]}
    for index, colour in enumerate(colours):
        name = Path(data.name(index)).name
        assert torch.allclose(colour, torch.tensor(expected[name], dtype=torch.float32), atol=0.15), name


def test_folder_crops_the_centre(tmp_path):
    image = np.zeros((8, 16), np.uint8)
    image[:, 4:12] = 255
    (tmp_path / "only").mkdir()
    Image.fromarray(image).save(tmp_path / "only" / "a.png")
    data = open_data(str(tmp_path), size=8)
    assert data.shape == (1, 8, 8)
    assert (data.batch(torch.tensor([0]), seeded(0))[0] == 1).all()
    assert open_data(str(tmp_path)).shape == (1, 8, 16)


def test_folder_with_splits(tmp_path):
    picture(tmp_path / "train" / "a" / "1.png", 0, "L")
    picture(tmp_path / "train" / "a" / "2.png", 0, "L")
    picture(tmp_path / "test" / "a" / "3.png", 255, "L")
    assert len(open_data(str(tmp_path))) == 2
    test = open_data(str(tmp_path), split="test")
    assert len(test) == 1 and (test.batch(torch.tensor([0]), seeded(0))[0] == 1).all()


def test_folder_flips(tmp_path):
    image = np.zeros((4, 4), np.uint8)
    image[:, 0] = 255
    (tmp_path / "only").mkdir()
    Image.fromarray(image).save(tmp_path / "only" / "a.png")
    batch, _ = open_data(str(tmp_path), flip=True).batch(torch.zeros(100, dtype=torch.int64), seeded(0))
    left = batch[:, 0, 0, 0] == 1
    assert 25 < int(left.sum()) < 75
    assert torch.equal(batch[:, 0, 0, 3] == 1, ~left)


def test_folder_refuses_what_is_not_a_class_of_pictures(tmp_path):
    with pytest.raises(ValueError, match="has no sub-folders"):
        open_data(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        open_data(str(tmp_path))
    (tmp_path / "empty" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an 8-bit picture"):
        open_data(str(tmp_path))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_folder_refuses_truncated_deep_and_enormous_pictures(tmp_path, monkeypatch):
    path = tmp_path / "a" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        open_data(str(tmp_path))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(path)
    with pytest.raises(ValueError, match="more than 8 bits"):
        open_data(str(tmp_path))
    path.write_bytes(whole)
    for limit in (3000, 1000):  # Pillow itself only warns at the first and raises at the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="limit"):
            open_data(str(tmp_path))


def test_folder_refuses_a_picture_unlike_the_others_when_its_batch_comes(tmp_path):
    for i in range(130):  # every third is looked at first
        picture(tmp_path / "a" / f"{i:03d}.png", 0, "L", (4, 4))
    picture(tmp_path / "a" / "001.png", (255, 0, 0), "RGB", (4, 4))
    picture(tmp_path / "a" / "002.png", 0, "L", (5, 4))
    data = open_data(str(tmp_path))
    assert data.shape == (1, 4, 4)
    with pytest.raises(ValueError, match=r"001\.png is coloured"):
        data.batch(torch.tensor([0, 1]), seeded(0))
    with pytest.raises(ValueError, match=r"002\.png is 5x4 where the first image is 4x4: name a size"):
        data.batch(torch.tensor([2]), seeded(0))


# names


def test_bundled_is_padded_to_32(tmp_path, monkeypatch):
    images = np.full((20, 28, 28), 255, np.uint8)
    monkeypatch.setattr(data_module, "BUNDLED", npz(tmp_path / "t10k.npz", images=images, labels=np.arange(20) % 10))
    data = open_data("bundled")
    assert (data.shape, data.classes, len(data)) == ((1, 32, 32), 10, 20)
    assert int(data.images.eq(255).sum()) == images.size and not data.images[:, :, :2].any()
    assert open_data("bundled", size=28).shape == (1, 28, 28)


def test_fashion_mnist_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        open_data("fashion-mnist")
    idx_folder(tmp_path, np.zeros((3, 28, 28), np.uint8), np.arange(3, dtype=np.uint8))
    monkeypatch.setattr(data_module, "FASHION_MNIST", tmp_path)
    assert open_data("fashion-mnist").shape == (1, 32, 32)


def test_sources_that_are_not_there_or_not_data_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_data(str(tmp_path / "absent"))
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(ValueError, match="is not data to learn from"):
        open_data(str(tmp_path / "file.txt"))
    with pytest.raises(ValueError, match="size must be at least 1"):
        open_data("bundled", size=0)


# the Hub's library


def hub_folder(folder: Path, labels: list[int], feature) -> str:
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (6, 4), (0, 40 * i, 255)) for i in range(len(labels))]
    features = datasets.Features({"img": datasets.Image(), "label": feature})
    folder.mkdir()
    datasets.Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(
        str(folder / "train.parquet"))
    return f"hf:{folder}"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_hub_data_set_from_a_folder(tmp_path, offline):
    datasets = pytest.importorskip("datasets")
    source = hub_folder(tmp_path / "set", [2, 0, 1], datasets.ClassLabel(names=["a", "b", "c", "d"]))
    data = open_data(source)
    assert (data.shape, data.classes, len(data)) == ((3, 4, 6), 4, 3)
    batch, labels = data.batch(torch.tensor([2, 0]), seeded(0))
    assert labels.tolist() == [1, 2]
    assert torch.allclose(batch.mean((2, 3))[0], torch.tensor([-1.0, 80 / 127.5 - 1, 1.0]), atol=1e-6)
    assert open_data(source, size=2).shape == (3, 2, 2)


def test_hub_data_set_without_labels_or_split_is_refused(tmp_path, offline):
    datasets = pytest.importorskip("datasets")
    source = hub_folder(tmp_path / "set", [-1, 0], datasets.Value("int64"))
    with pytest.raises(ValueError, match="label -1"):
        open_data(source)
    with pytest.raises(ValueError, match="split test cannot be opened"):
        open_data(source, split="test")
    words = hub_folder(tmp_path / "words", ["x", "y"], datasets.Value("string"))
    with pytest.raises(ValueError, match="has no column of classes among img, label"):
        open_data(words)


def test_hub_without_the_library_is_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="need the package datasets"):
        open_data("hf:anything")
