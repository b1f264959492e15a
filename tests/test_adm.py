"""ADM's files are read and written as other evaluators do, and a bad one is one clear sentence."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from slimdit.metrics import adm
from slimdit.metrics.quality import Statistics

random = np.random.default_rng(5)


def images(n: int = 4) -> np.ndarray:
    return random.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def test_samples_survive(tmp_path):
    sent = images()
    adm.write_samples(tmp_path / "a.npz", sent, [3, 1, 2, 0])
    got, labels = adm.read_samples(tmp_path / "a.npz")
    assert (got == sent).all() and list(labels) == [3, 1, 2, 0]
    adm.write_samples(tmp_path / "b.npz", sent)
    assert adm.read_samples(tmp_path / "b.npz")[1] is None


def test_samples_are_laid_out_as_adm_does(tmp_path):
    np.savez(tmp_path / "a.npz", images(), np.arange(4))  # what ADM's image_sample.py calls
    assert adm.read_samples(tmp_path / "a.npz")[0].shape == (4, 8, 8, 3)
    adm.write_samples(tmp_path / "b.npz", images(), [0] * 4)
    assert set(np.load(tmp_path / "b.npz").files) == {"arr_0", "arr_1"}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_samples_are_read_in_blocks(tmp_path, write):
    sent = images(5)
    write(tmp_path / "a.npz", sent, np.arange(5))
    blocks = list(adm.sample_blocks(tmp_path / "a.npz", 2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert (np.concatenate(blocks) == sent).all()


def test_blocks_take_the_memory_of_one(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((2000, 32, 32, 3), np.uint8))  # 6 MB
    tracemalloc.start()
    assert sum(len(block) for block in adm.sample_blocks(tmp_path / "a.npz", 10)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_blocks_of_what_is_no_sample_file_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images().astype(float))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    np.savez(tmp_path / "c.npz", np.asfortranarray(images()))
    np.savez(tmp_path / "d.npz", images())
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "e.npz").write_bytes(whole.replace(images_tail(whole), bytes(16)))
    for name, said in {"a": "images must be uint8", "b": "holds no samples", "c": "columns first",
                       "d": "not a whole .npz", "e": "not a whole .npz"}.items():
        with pytest.raises(ValueError, match=said):
            list(adm.sample_blocks(tmp_path / f"{name}.npz", 2))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        next(adm.sample_blocks(tmp_path / "nothing.npz", 2))


def images_tail(archive: bytes) -> bytes:
    """Some bytes of an uncompressed archive's pixels."""
    return archive[400:416]


def test_statistics_survive(tmp_path):
    pool, spatial = Statistics.of(random.random((9, 4))), Statistics.of(random.random((9, 6)))
    adm.write_statistics(tmp_path / "a.npz", pool, spatial)
    for sent, got in zip((pool, spatial), adm.read_statistics(tmp_path / "a.npz")):
        assert (got.mu == sent.mu).all() and (got.sigma == sent.sigma).all() and got.n == 9


def test_statistics_of_adm_have_no_number_and_may_lie_beside_samples(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images(), mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2))
    pool, spatial = adm.read_statistics(tmp_path / "a.npz")
    assert pool.n is None and pool.mu.shape == (3,) and spatial.mu.shape == (2,)
    assert len(adm.read_samples(tmp_path / "a.npz")[0]) == 4


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    sent = images()
    adm.write_samples(tmp_path / "a.npz", sent)
    adm.write_samples(tmp_path / "b.npz", sent)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("keep", [10, 200, -30])
def test_a_truncated_file_is_refused(tmp_path, keep):
    adm.write_samples(tmp_path / "a.npz", images())
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a whole"):
        adm.read_samples(tmp_path / "a.npz")


def test_damaged_bytes_are_refused(tmp_path):
    adm.write_samples(tmp_path / "a.npz", images())
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[300:320] = bytes(20)
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(ValueError, match="not a whole"):
        adm.read_samples(tmp_path / "a.npz")


def test_a_pickle_is_never_opened(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="not plain numbers"):
        adm.read_samples(tmp_path / "a.npz")


def test_a_file_that_claims_too_much_is_refused_unread(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((30, 1000, 1000, 3), np.uint8))
    with pytest.raises(ValueError, match="damaged or malicious"):
        adm.read_samples(tmp_path / "bomb.npz")
    adm.write_samples(tmp_path / "a.npz", images())
    with pytest.raises(ValueError, match="GB allowed"):
        adm.read_samples(tmp_path / "a.npz", limit=100)


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path):
    body = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (10 ** 6, 999, 999, 3)}
    np.lib.format.write_array_header_1_0(body, claim)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", body.getvalue() + b"123")
    with pytest.raises(ValueError, match="claims"):
        adm.read_samples(tmp_path / "a.npz")


@pytest.mark.parametrize(("arrays", "sentence"), [
    ({"other": np.zeros(3)}, "holds no samples"),
    ({"arr_0": np.zeros((2, 8, 8, 3))}, "must be uint8"),
    ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "height, width"),
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)}, "one whole number per image"),
])
def test_foreign_samples_are_refused(tmp_path, arrays, sentence):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        adm.read_samples(tmp_path / "a.npz")


@pytest.mark.parametrize(("arrays", "sentence"), [
    ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "holds no statistics"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, "no mean and covariance"),
    ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
    ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "not symmetric"),
])
def test_foreign_statistics_are_refused(tmp_path, arrays, sentence):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=sentence):
        adm.read_statistics(tmp_path / "a.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        adm.read_samples(tmp_path / "nothing.npz")
