"""CIFAR's pickles: the official form is read as it is, and whatever else a pickle can do is not done."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from models.errors import Misuse, UserError
from preprocess import cifar
from preprocess.cifar import Cifar, load_pickle, read_cifar

FINE, COARSE = ["apple", "aquarium_fish", "baby"], ["people", "small_mammals"]
COUNT = 6


class Python2(pickle._Pickler):
    """Writes what Python 2 wrote, protocol 2: a text is a string of bytes, and so are the bytes of an array."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        size = struct.pack("<B", len(data)) if len(data) < 256 else struct.pack("<i", len(data))
        self.write((pickle.SHORT_BINSTRING if len(data) < 256 else pickle.BINSTRING) + size + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(values: object) -> bytes:
    """The bytes of a pickle as CIFAR's authors wrote theirs."""
    file = io.BytesIO()
    Python2(file, 2).dump(values)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")  # the module's name before numpy 2


def pictures(count: int = COUNT, seed: int = 0) -> np.ndarray:
    """(count, 3072) uint8: three planes a row."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def batch(**changes: Any) -> dict[str, Any]:
    """The dictionary of a CIFAR-100 part; `changes` replace parts of it, None removes one."""
    values = {
        "filenames": [f"apple_s_{n:06d}.png" for n in range(COUNT)],
        "batch_label": "testing batch 1 of 1",
        "fine_labels": [n % 3 for n in range(COUNT)],
        "coarse_labels": [n % 2 for n in range(COUNT)],
        "data": pictures(),
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def write_cifar100(folder: Path, values: dict[str, Any], fine: list[str] = FINE, coarse: list[str] = COARSE) -> Path:
    """`cifar-100-python` with its test part, in the official form."""
    place = folder / "cifar-100-python"
    place.mkdir(parents=True, exist_ok=True)
    (place / "meta").write_bytes(python2({"fine_label_names": fine, "coarse_label_names": coarse}))
    (place / "test").write_bytes(python2(values))
    return place


def check(found: Cifar) -> None:
    planes = pictures().reshape(COUNT, 3, 32, 32)
    np.testing.assert_array_equal(found.pixels, planes.transpose(0, 2, 3, 1))
    assert found.pixels.dtype == np.uint8
    assert found.labels == [0, 1, 2, 0, 1, 2]
    assert found.classes == FINE
    assert found.names == [f"apple_s_{n:06d}.png" for n in range(COUNT)]


def test_the_official_form(tmp_path: Path) -> None:
    place = write_cifar100(tmp_path, batch())
    # What everyone else reads in it, so that it is what it claims to be.
    usual = pickle.loads((place / "test").read_bytes(), encoding="bytes")
    assert set(usual) == {b"filenames", b"batch_label", b"fine_labels", b"coarse_labels", b"data"}
    np.testing.assert_array_equal(usual[b"data"], pictures())
    check(read_cifar(place))
    check(read_cifar(tmp_path))  # the folder that holds it
    coarse = read_cifar(place, "test", "coarse")
    assert (coarse.labels, coarse.classes) == ([0, 1, 0, 1, 0, 1], COARSE)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [str, str.encode])
def test_written_again_by_python_3(tmp_path: Path, protocol: int, kind: Callable[[str], Any]) -> None:
    place = write_cifar100(tmp_path, batch())
    names = [kind(name) for name in batch()["filenames"]]
    frozen = pictures()
    frozen.setflags(write=False)  # bytes, in protocol 5, and not a bytearray
    for data in (pictures(), np.asfortranarray(pictures()), np.repeat(pictures(), 2, axis=1)[:, ::2], frozen):
        values = {kind(key): value for key, value in batch(filenames=names, data=data, note=kind("")).items()}
        (place / "test").write_bytes(pickle.dumps(values, protocol))
        check(read_cifar(place))


def test_a_protocol_5_array_of_numpy_1(tmp_path: Path) -> None:
    place = write_cifar100(tmp_path, batch())
    written, new = pickle.dumps(batch(), 5), b"\x8c\x13numpy._core.numeric"
    assert (written[:3], written.count(new)) == (b"\x80\x05\x95", 1)
    body = written[11:].replace(new, b"\x8c\x12numpy.core.numeric")  # without the frame, which counts its bytes
    (place / "test").write_bytes(written[:2] + body)
    check(read_cifar(place))


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_as_many_file_names_as_there_are(tmp_path: Path, protocol: int) -> None:
    """The train part has 50,000 pictures, and each of their names is a call: 700,045 steps at most, measured."""
    path, names = tmp_path / "train", [b"apple_s_%06d.png" % n for n in range(50_000)]
    path.write_bytes(pickle.dumps({b"filenames": names, b"fine_labels": [7] * 50_000, b"coarse_labels": [8] * 50_000}, protocol))
    assert load_pickle(path)["filenames"][-1] == "apple_s_049999.png"


def test_an_array_kept_by_columns(tmp_path: Path) -> None:
    check(read_cifar(write_cifar100(tmp_path, batch(data=np.asfortranarray(pictures())))))


def test_numbers_where_no_file_names_are_kept(tmp_path: Path) -> None:
    assert read_cifar(write_cifar100(tmp_path, batch(filenames=None))).names == ["0", "1", "2", "3", "4", "5"]


def test_cifar_10(tmp_path: Path) -> None:
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    (place / "batches.meta").write_bytes(python2({"label_names": ["airplane", "cat"], "num_vis": 3072}))
    for n in range(1, 6):
        values = {"data": pictures(2, seed=n), "labels": [n % 2, 0], "filenames": [f"{n}a.png", f"{n}b.png"]}
        (place / f"data_batch_{n}").write_bytes(python2(values))
    (place / "test_batch").write_bytes(python2({"data": pictures(1), "labels": [1]}))
    train = read_cifar(tmp_path, "train")
    assert train.classes == ["airplane", "cat"]
    assert (train.labels, train.names[:3]) == ([1, 0, 0, 0, 1, 0, 0, 0, 1, 0], ["1a.png", "1b.png", "2a.png"])
    np.testing.assert_array_equal(train.pixels[8], pictures(2, seed=5).reshape(2, 3, 32, 32)[0].transpose(1, 2, 0))
    assert (read_cifar(place).labels, read_cifar(place).names) == ([1], ["0"])
    with pytest.raises(Misuse, match=r"^CIFAR-10 has no coarse labels; leave --labels out\.$"):
        read_cifar(place, "test", "coarse")
    write_cifar100(tmp_path, batch())
    assert refused(tmp_path) == (
        f"{tmp_path} holds more than one data set; choose: --cifar {tmp_path / 'cifar-100-python'} or {place}."
    )


def refused(folder: Path, split: str = "test") -> str:
    with pytest.raises(UserError) as error:
        read_cifar(folder, split)
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400
    return error.value.message


def spoilt(tmp_path: Path, **changes: Any) -> str:
    """The message on a part with these changes, without its path."""
    path = write_cifar100(tmp_path, batch(**changes)) / "test"
    message = refused(tmp_path)
    assert message.startswith(str(path))
    return message.removeprefix(str(path)).lstrip(": ")


class Runs:
    """A pickle that calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("file", ["meta", "test"])
def test_nothing_in_a_pickle_runs(tmp_path: Path, file: str, protocol: int) -> None:
    place, mark = write_cifar100(tmp_path, batch()), tmp_path / "ran"
    evil = pickle.dumps({"data": Runs(os.system, f"touch {mark}")}, protocol)
    (place / file).write_bytes(evil)
    assert refused(tmp_path) == (
        f"{place / file} is refused: reading it would run code ('posix.system'). CIFAR's own files ask for none; "
        "download them again from their authors."
    )
    assert not mark.exists()
    pickle.loads(evil)  # it is not that the pickle would do nothing
    assert mark.exists()


CALLS = {
    "by its class": b"(S'touch MARK'\nios\nsystem\n.",  # INST
    "class on the stack": b"(cos\nsystem\nS'touch MARK'\no.",  # OBJ
    "attribute of what is known": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "an import alone": b"cthis\nd\n.",
    "builtin": b'cbuiltins\neval\n(S\'open("MARK", "w")\'\ntR.',
    "copyreg": b"ccopyreg\n_reconstructor\n.",
    "other numpy": b"cnumpy\nload\n(S'MARK'\ntR.",
}


@pytest.mark.parametrize("name", CALLS)
def test_other_ways_to_call(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "evil"
    path.write_bytes(CALLS[name].replace(b"MARK", str(mark).encode()))
    with pytest.raises(UserError, match=r"evil is refused: reading it would run code \('"):
        load_pickle(path)
    assert not mark.exists()


HARMLESS = {
    "arguments for an array": b"}(S'data'\ncnumpy\nndarray\n((J\xff\xff\xff\x7ftS'O'\ntRu.",
    "a record for a class": b"}(S'data'\ncnumpy\nndarray\n}S'__setstate__'\nS'x'\nsbu.",
    "attributes for a class": b"}(S'data'\ncnumpy\ndtype\n(N}S'__init__'\nS'x'\nstbu.",
    "an object of another's memory": b"Pabc\n.",
    "an extension": b"\x82\x01.",
    "attributes for the maker of bytes": b"}(S'data'\nc_codecs\nencode\n(N}S'__new__'\nS'x'\nstbu.",
    "another encoding": b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
    "no encoding": b"c_codecs\nencode\n(Vx\ntR.",
    "bytes of a number": b"c_codecs\nencode\n(I9\nVlatin1\ntR.",
    "a buffer that says too much": b"}(S'data'\ncnumpy.core.numeric\n_frombuffer\n(S'x'\nN(J\xff\xff\xff\x7ftS'C'\ntRu.",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_known_can_do_no_harm(tmp_path: Path, name: str) -> None:
    place = write_cifar100(tmp_path, batch())
    good = (place / "test").read_bytes()
    (place / "test").write_bytes(HARMLESS[name])
    assert "its data is an array; expected uint8" in (message := refused(place)) or "is no pickle, or was cut off (" in message
    (place / "test").write_bytes(good)
    check(read_cifar(place))  # nothing stays behind


BOMBS = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "bytes in memory": b"\x80\x04B" + struct.pack("<I", 0xFFFFFFF0) + b"x.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b"x.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "whole number": b"\x80\x02\x8b" + struct.pack("<I", 0x7FFFFFF0) + b"x.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"x.",
    "memo": b"\x80\x02}r" + struct.pack("<I", 0xFFFFFFF0) + b".",
    "memo, in words": b"}p4294967280\n.",
    "tuples in tuples, hashed": b"\x80\x02}(N" + b"\x85" * 1_000_000 + b"Nu.",
    "tuples in tuples, by way of calls": b"cnumpy\nndarray\nq\0)q\1" + b"h\0h\1\x85q\1R" * 20_000 + b"}h\1Ns.",
    "empty bytes": b"c__builtin__\nbytes\n(L1099511627776L\ntR.",
    "more steps than pictures": b"\x80\x02]" + b"]" * 100_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are declared and not there take no memory."""
    monkeypatch.setattr(cifar, "MOST_STEPS", 100_000)  # the walk is slow while memory is traced
    path = tmp_path / "test"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"test is (no pickle, or was cut off|refused: it asks for more memory)"):
            load_pickle(path)
        # Measured: 1.005 MB for the longest, which is the file and 5 kB.
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


def test_many_calls_on_one_text_take_no_memory(tmp_path: Path) -> None:
    """The same 100 kB as bytes 5,000 times: each honest call has a text of its own."""
    path, size = tmp_path / "test", 100_000
    text = b"X" + struct.pack("<I", size) + b"x" * size + b"q\0"
    calls = b"c_codecs\nencode\nq\1h\0X\6\0\0\0latin1q\2\x86R" + b"h\1h\0h\2\x86R" * 4_999
    path.write_bytes(b"\x80\2}X\1\0\0\0k(" + text + b"0" + calls + b"ls.")
    tracemalloc.start()
    try:
        assert [len(value) for value in load_pickle(path)["k"]] == [size] * 5_000
        # Measured: 0.34 MB; 500 MB where the calls are made, by pickle.loads.
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_bomb_goes_off_where_nothing_is_checked() -> None:
    tracemalloc.start()
    try:
        pickle.loads(BOMBS["more steps than pictures"])
        assert tracemalloc.get_traced_memory()[1] > 4e6  # measured: 6.5 MB for a file of 0.1
    finally:
        tracemalloc.stop()


def test_a_shape_that_is_not_there(tmp_path: Path) -> None:
    """An array that says it has a million million pictures."""
    place = write_cifar100(tmp_path, batch())
    good = (place / "test").read_bytes()
    shape = pickle.BININT1 + bytes([COUNT]) + pickle.BININT2 + struct.pack("<H", 3072)
    assert good.count(shape) == 1
    for rows, says in (
        (pickle.BININT + struct.pack("<i", 1 << 27), "data has 18,432 bytes for 134,217,728 pictures of 3,072."),
        (pickle.LONG1 + b"\x08" + struct.pack("<q", 1 << 60), "data is an array; expected uint8 (N, 3,072)."),
        (pickle.LONG4 + struct.pack("<i", 3000) + b"\1" * 3000, "data is an array; expected uint8 (N, 3,072)."),
        (pickle.BININT1 + b"\0", "data is 'u1' (0, 3,072); expected uint8 (N, 3,072)."),
    ):
        (place / "test").write_bytes(good.replace(shape, rows + shape[2:]))
        assert f"its {says}" in refused(place)


@pytest.mark.parametrize("size", [1, 2, 30, 100, -30, -2, -1])
@pytest.mark.parametrize("file", ["meta", "test"])
def test_cut_off(tmp_path: Path, file: str, size: int) -> None:
    place = write_cifar100(tmp_path, batch())
    (place / file).write_bytes((place / file).read_bytes()[:size])
    assert refused(tmp_path).startswith(f"{place / file} is no pickle, or was cut off (")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty (0 bytes); expected a file of CIFAR's Python version. Unpack its archive again."),
        (b"\x1f\x8b\x08\0archive", "is no pickle, or was cut off (ValueError). Unpack the archive of CIFAR again."),
        (b"<html>404</html>", "is no pickle, or was cut off ("),
        (b"." * 9, "is no pickle, or was cut off ("),
        (b"\x80\x63N.", "is no pickle, or was cut off ("),
        (python2([1, 2]), "holds a list; expected the dictionary of CIFAR's Python version."),
        (python2("x"), "holds a text; expected the dictionary of CIFAR's Python version."),
        (python2({1: 2}), "has no 'data'; it has nothing."),
        (python2({"fine_label_names": ["a"]}), "has no 'data'; it has 'fine_label_names'."),
    ],
)
def test_another_file(tmp_path: Path, data: bytes, says: str) -> None:
    place = write_cifar100(tmp_path, batch())
    (place / "test").write_bytes(data)
    assert refused(tmp_path).startswith(f"{place / 'test'} {says}")


def test_no_file(tmp_path: Path) -> None:
    place = write_cifar100(tmp_path, batch())
    assert refused(place, "train").startswith(f"{place / 'train'} does not exist; expected a file of CIFAR's Python version.")
    os.mkfifo(place / "train")
    assert refused(place, "train").startswith(f"{place / 'train'} is not a file;")
    with (place / "test").open("wb") as file:
        file.truncate(cifar.LARGEST + 1)  # sparse
    assert refused(place) == f"{place / 'test'} has 268,435,457 bytes; CIFAR's own files have less than 268,435,456."
    (place / "meta").unlink()
    assert refused(place).startswith(
        f"{place} holds neither the meta of CIFAR-100 nor the batches.meta of CIFAR-10; --cifar takes"
    )
    assert refused(place / "absent").startswith(f"There is no folder {place / 'absent'}; --cifar takes the unpacked")
    assert refused(place / "test").startswith("There is no folder")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": None}, "has no 'data'; it has 'filenames', 'batch_label', 'fine_labels', 'coarse_labels'."),
        ({"data": pictures().astype(np.float32)}, "its data is 'f4' (6, 3,072); expected uint8 (N, 3,072)."),
        ({"data": pictures().astype(np.int8)}, "its data is 'i1' (6, 3,072); expected uint8 (N, 3,072)."),
        ({"data": pictures()[:, :-1].copy()}, "its data is 'u1' (6, 3,071); expected uint8 (N, 3,072)."),
        ({"data": pictures()[0].copy()}, "its data is an array; expected uint8 (N, 3,072)."),
        ({"data": pictures(0)}, "its data is 'u1' (0, 3,072); expected uint8 (N, 3,072)."),
        ({"data": "pictures"}, "its data is a text; expected uint8 (N, 3,072)."),
        ({"data": pictures(5)}, "has 5 pictures, but 6 entries in 'fine_labels'. Unpack the archive again."),
        ({"filenames": ["a.png"]}, "has 6 pictures, but 1 entries in 'filenames'. Unpack the archive again."),
        ({"filenames": []}, "its 'filenames' is an empty list; expected a list of texts."),
        ({"filenames": [3] * COUNT}, "its 'filenames' holds a number in entry 0; expected texts alone."),
        ({"fine_labels": None}, "has no 'fine_labels'; it has 'filenames', 'batch_label', 'coarse_labels', 'data'."),
        ({"fine_labels": [0] * 5}, "has 6 pictures, but 5 entries in 'fine_labels'. Unpack the archive again."),
        ({"fine_labels": np.zeros(6, np.uint8)}, "its 'fine_labels' is an array; expected a list of whole numbers."),
        ({"fine_labels": [0, 1, 2, 3, 0, 0]}, "entry 3 of its 'fine_labels' is no whole number from 0 to 2."),
        ({"fine_labels": [0, -1, 2, 0, 0, 0]}, "entry 1 of its 'fine_labels' is no whole number from 0 to 2."),
        ({"fine_labels": [True] * 6}, "entry 0 of its 'fine_labels' is no whole number from 0 to 2."),
        ({"fine_labels": [0.0] * 6}, "entry 0 of its 'fine_labels' is no whole number from 0 to 2."),
        ({"fine_labels": [10**5000] * 6}, "entry 0 of its 'fine_labels' is no whole number from 0 to 2."),
    ],
)
def test_a_part_that_is_not_as_expected(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    assert spoilt(tmp_path, **changes) == says


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "is an empty list; expected a list of texts."),
        ("apple", "is a text; expected a list of texts."),
        (["apple", None], "holds null in entry 1; expected texts alone."),
        (["apple", ""], "holds an empty text in entry 1; expected texts alone."),
    ],
)
def test_names_of_classes_that_are_none(tmp_path: Path, names: Any, says: str) -> None:
    place = write_cifar100(tmp_path, batch(), fine=names)
    assert refused(place) == f"{place / 'meta'}: its 'fine_label_names' {says}"


def test_half_a_character(tmp_path: Path) -> None:
    place = write_cifar100(tmp_path, batch())
    (place / "meta").write_bytes(b"\x80\x04}X\x10\0\0\0fine_label_names]X\3\0\0\0\xed\xa0\x80as.")
    assert refused(place).endswith("its 'fine_label_names' holds half a character in entry 0. Unpack the archive again.")
