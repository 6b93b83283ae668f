"""Tensors on disk: both layouts back and forth, what ais_bench asks of the files, and damaged folders."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import manifest
from models.errors import UserError, plain_errors
from preprocess.dataset import RetrievalData, read_retrieval
from preprocess.tensors import FILES, LAYOUTS, PACKED, FileTensor, Writer, open_tensor

N, M, LENGTH, SIZE = 3, 7, 5, 4  # pictures, captions, tokens, side


def values(rows: int, shape: tuple[int, ...] = (2, 3), dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 100, (rows, *shape)).astype(dtype)


def save(folder: Path, layout: str, **tensors: np.ndarray) -> manifest.Manifest:
    """An outputs/ folder with these tensors, read again."""
    infos = {}
    for name, array in tensors.items():
        with closing(Writer(folder, name, array.dtype.name, array.shape, layout)) as writer:
            writer.write(0, array)
            infos[name] = writer.info()
    manifest.write(folder, "outputs", {"layout": layout, "tensors": infos})
    return manifest.read(folder, "outputs", verify=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_round_trip(tmp_path: Path, layout: str, dtype: str, shape: tuple[int, ...]) -> None:
    want = values(12, shape, dtype)
    tensor = open_tensor(save(tmp_path, layout, x=want), "x")
    assert (tensor.shape, tensor.dtype, len(tensor)) == (want.shape, want.dtype, 12)
    for index in (slice(None), slice(3, 7), slice(None, None, 5), 4, -1, np.array([7, 2, 2]), want.reshape(12, -1)[:, 0] > 50):
        np.testing.assert_array_equal(tensor[index], want[index])
    assert np.asarray(tensor).dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(tensor), want)
    with pytest.raises(IndexError):
        tensor[12]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows(tmp_path: Path, layout: str) -> None:
    tensor = open_tensor(save(tmp_path, layout, x=np.empty((0, 2), np.float32)), "x")
    assert (len(tensor), np.asarray(tensor).shape, np.asarray(tensor).dtype) == (0, (0, 2), np.float32)


def test_packed_is_mapped_and_is_plain_npy(tmp_path: Path) -> None:
    tensor = open_tensor(save(tmp_path, PACKED, x=values(4)), "x")
    assert isinstance(tensor, np.memmap)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), values(4))


def test_files_are_what_ais_bench_takes(tmp_path: Path) -> None:
    """Names that any sort puts in sample order, and modes under which nobody else may write."""
    before = os.umask(0)
    try:
        save(tmp_path, FILES, x=values(101), y=values(100))
    finally:
        os.umask(before)
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == [f"{number:03d}.bin" for number in range(101)]
    assert sorted(path.name for path in (tmp_path / "y").iterdir())[-1] == "99.bin"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x").iterdir()} == {0o640}
    assert (tmp_path / "x" / "007.bin").read_bytes() == values(101)[7].tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter(tmp_path: Path, layout: str) -> None:
    want = values(20)
    order = np.random.default_rng(0).permutation(20)
    with closing(Writer(tmp_path, "x", "float32", want.shape, layout)) as writer:
        for part in np.array_split(order, 3):
            writer.scatter(part, want[part])
        writer.scatter(np.array([], np.int64), want[:0])
        writer.scatter(order[:4], want[order[:4]])  # again, as a resumed run does
        writer.flush()
        manifest.write(tmp_path, "outputs", {"layout": layout, "tensors": {"x": writer.info()}})
    np.testing.assert_array_equal(np.asarray(open_tensor(manifest.read(tmp_path, "outputs"), "x")), want)


def test_neighbours_are_scattered_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []
    monkeypatch.setattr(Writer, "write", lambda self, start, rows: starts.append((start, len(rows))))
    with closing(Writer(tmp_path, "x", "float32", (20, 2, 3))) as writer:
        writer.scatter(np.array([5, 4, 9, 6, 0]), values(5))
    assert starts == [(0, 1), (4, 3), (9, 1)]


def test_a_writer_opened_again_keeps_what_was_written(tmp_path: Path) -> None:
    want = values(6)
    for half in (slice(0, 3), slice(3, 6)):
        with closing(Writer(tmp_path, "x", "float32", want.shape)) as writer:
            writer.write(half.start, want[half])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [100, 99, 10, 1])
def test_shrink(tmp_path: Path, layout: str, rows: int) -> None:
    want = values(101)
    with closing(Writer(tmp_path, "x", "float32", want.shape, layout)) as writer:
        writer.write(0, want[:rows])
        writer.shrink(rows)
        manifest.write(tmp_path, "outputs", {"layout": layout, "tensors": {"x": writer.info()}})
    found = manifest.read(tmp_path, "outputs")
    assert len(found.files) == (rows if layout == FILES else 1)
    np.testing.assert_array_equal(np.asarray(open_tensor(found, "x")), want[:rows])


@pytest.mark.parametrize("rows", [values(1, (3, 2)), values(1, dtype="float64"), values(5)])
def test_rows_that_do_not_fit(tmp_path: Path, rows: np.ndarray) -> None:
    with closing(Writer(tmp_path, "x", "float32", (4, 2, 3))) as writer, pytest.raises(ValueError, match="do not fit"):
        writer.write(0, rows)


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"The disk is full while writing .*/x\.npy\. Free some space"), plain_errors():
        Writer(tmp_path, "x", "float32", (4, 2, 3))
    assert not list(tmp_path.iterdir())


def test_space_is_reserved_at_once(tmp_path: Path) -> None:
    with closing(Writer(tmp_path, "x", "float32", (1000, 2, 3))):
        assert (tmp_path / "x.npy").stat().st_size >= 24_000
        assert (tmp_path / "x.npy").stat().st_blocks * 512 >= 24_000


CONTENT: dict[str, Any] = {
    "task": "retrieval",
    "protocol": {"image_size": SIZE, "encode_id": 9},
    "images": [{"image": f"{n}.jpg", "width": 4, "height": 4} for n in range(N)],
    "captions": [f"caption {n}" for n in range(M)],
    "image_of_text": [0, 0, 0, 1, 1, 2, 2],
    "broken": [],
}


def data_folder(folder: Path, written: str = PACKED, **changes: Any) -> Path:
    """A data/ folder for retrieval; `changes` replace parts of its manifest, None removes one."""
    folder.mkdir()
    tensors = {
        "img": values(N, (3, SIZE, SIZE)),
        "ids": values(M, (LENGTH,), "int64"),
        "mask": np.ones((M, LENGTH), np.int64),
    }
    infos = {}
    for name, array in tensors.items():
        with closing(Writer(folder, name, array.dtype.name, array.shape, written)) as writer:
            writer.write(0, array)
            infos[name] = writer.info()
    content = {**CONTENT, "layout": written, "tensors": infos, **changes}
    manifest.write(folder, "data", {key: value for key, value in content.items() if value is not None})
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_retrieval(tmp_path: Path, layout: str) -> None:
    data = read_retrieval(data_folder(tmp_path / "data", layout), verify=True)
    assert isinstance(data, RetrievalData)
    assert isinstance(data.img, FileTensor if layout == FILES else np.memmap)
    assert (data.img.shape, data.ids.shape, data.mask.shape) == ((N, 3, SIZE, SIZE), (M, LENGTH), (M, LENGTH))
    assert (data.images[2]["image"], data.captions[6], data.encode_id) == ("2.jpg", "caption 6", 9)
    assert data.image_of_text.tolist() == CONTENT["image_of_text"]


def refused(folder: Path, verify: bool = False) -> str:
    with pytest.raises(UserError) as error:
        read_retrieval(folder, verify)
    assert "\n" not in error.value.message
    return error.value.message


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / manifest.NAME
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


MEND = "Write the folder again with blip-pre."


def test_no_folder_or_an_unfinished_one(tmp_path: Path) -> None:
    assert refused(tmp_path / "absent") == f"There is no folder {tmp_path / 'absent'}. blip-pre writes it."
    folder = data_folder(tmp_path / "data")
    (folder / manifest.NAME).unlink()
    assert refused(folder) == f"{folder} holds no manifest.json: it is not a complete data folder. {MEND}"


@pytest.mark.parametrize("name", ["img.npy", "ids.npy"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    folder = data_folder(tmp_path / "data")
    (folder / name).unlink()
    assert refused(folder).startswith(f"{folder / name} is missing")


def test_a_missing_sample(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", FILES)
    (folder / "ids" / "3.bin").unlink()
    assert refused(folder).startswith(f"{folder / 'ids' / '3.bin'} is missing")


@pytest.mark.parametrize(("layout", "name"), [(PACKED, "mask.npy"), (FILES, "img/1.bin")])
def test_a_file_of_another_size(tmp_path: Path, layout: str, name: str) -> None:
    folder = data_folder(tmp_path / "data", layout)
    with (folder / name).open("ab") as file:
        file.write(b"x")
    message = refused(folder)
    assert message.startswith(f"{folder / name} has ")
    assert "bytes, its manifest says" in message


def test_a_changed_byte_is_found_with_verify(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data")
    data = bytearray((folder / "img.npy").read_bytes())
    data[-1] ^= 1
    (folder / "img.npy").write_bytes(data)
    read_retrieval(folder)
    assert refused(folder, verify=True).startswith(
        f"{folder / 'img.npy'} is not what its manifest describes: the sha256 differs."
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is damaged (JSONDecodeError"),
        ('{"format": 1', "is damaged (JSONDecodeError"),
        ("[]", "is damaged (TypeError"),
        ("{}", "is damaged (KeyError: 'format')"),
        ("[" * 200_000, "is damaged (RecursionError"),
        ('{"format": 1, "kind": "data", "made_by": {}, "files": {"a": 3}}', "is damaged (TypeError"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, text: str, says: str) -> None:
    folder = data_folder(tmp_path / "data")
    (folder / manifest.NAME).write_text(text)
    assert refused(folder).startswith(f"{folder / manifest.NAME} {says}")


def test_another_kind_format_or_task(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data")
    edit(folder, lambda values: values.update(kind="outputs"))
    assert refused(folder) == f"{folder} is a 'outputs' folder, expected 'data'. {MEND}"
    edit(folder, lambda values: values.update(kind="data", format=99))
    assert refused(folder) == f"{folder / manifest.NAME} has format 99, this release reads 1. {MEND}"
    edit(folder, lambda values: values.update(format=1, task="caption"))
    assert refused(folder).startswith(f"{folder} was made for the task 'caption', expected 'retrieval'.")


@pytest.mark.parametrize("part", ["protocol", "images", "captions", "image_of_text", "broken", "tensors", "layout"])
def test_a_part_is_missing(tmp_path: Path, part: str) -> None:
    assert repr(part) in refused(data_folder(tmp_path / "data", **{part: None}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"captions": ["one"]}, "contradicts itself: {'captions': 1, 'image_of_text': 7"),
        ({"images": []}, "contradicts itself"),
        ({"image_of_text": [0]}, "contradicts itself"),
        ({"image_of_text": [0, 0, 0, 1, 1, 2, 3]}, "a caption belongs to a picture beyond the 3 images"),
        ({"image_of_text": [0, 0, 0, 1, 1, 2, -1]}, "a caption belongs to a picture beyond the 3 images"),
        ({"image_of_text": ["a"] * 7}, "lacks or garbles"),
        ({"protocol": {}}, "lacks or garbles 'encode_id'"),
        ({"layout": "rolled"}, "has no usable tensor 'img' (layout 'rolled')"),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert says in refused(data_folder(tmp_path / "data", **changes))


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"dtype": "float16", "shape": [N, 3, SIZE, SIZE]}, "holds float32 (3, 3, 4, 4), its manifest says float16 (3, 3, 4, 4)"),
        ({"dtype": "float32", "shape": [N + 1, 3, SIZE, SIZE]}, "its manifest says float32 (4, 3, 4, 4)"),
        ({"dtype": "nonsense", "shape": [1]}, "has no usable tensor 'img'"),
        ({"dtype": "float32"}, "has no usable tensor 'img' ('shape')"),
    ],
)
def test_a_tensor_that_is_not_as_described(tmp_path: Path, info: dict[str, Any], says: str) -> None:
    folder = data_folder(tmp_path / "data")
    edit(folder, lambda values: values["tensors"].update(img=info))
    assert says in refused(folder)


def test_a_sample_that_is_not_as_described(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", FILES)
    edit(folder, lambda values: values["tensors"].update(img={"dtype": "float32", "shape": [N, 3, 8, 8]}))
    data = read_retrieval(folder)
    with pytest.raises(UserError, match=r"img/0\.bin holds 48 values of float32, expected shape \(3, 8, 8\)"):
        data.img[0]


def test_an_npy_that_is_a_pickle(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data")
    np.save(folder / "img.npy", np.array([{"code": "runs"}], object), allow_pickle=True)
    manifest.write(folder, "data", {**CONTENT, "layout": PACKED, "tensors": {"img": {"dtype": "float32", "shape": [1]}}})
    assert "cannot be read (Array can't be memory-mapped: Python objects in dtype.)" in refused(folder)
