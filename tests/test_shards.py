"""Tar shards: read through webdataset, shuffled and split the same way for a seed, and one sentence for what is wrong."""

from __future__ import annotations

import builtins
import io
import json
import sys
import tarfile
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import Misuse, UserError
from training.loader import Encoded, Loaded, load
from training.order import PICTURE, START, Position, randomness
from training.shards import Shards, count_samples, open_shards, planned_shards, read_shard
from training.transforms import Transform

TRANSFORM = Transform(12)
COUNT, EACH = 4, 6  # shards, and samples of each


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (14, 15, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def files_of(shard: int) -> dict[str, bytes]:
    """Odd samples have a text, even ones JSON with two captions, as data sets on the web mix them."""
    files: dict[str, bytes] = {"__notes__": b"of the one who wrote it"}
    for n in range(shard * EACH, (shard + 1) * EACH):
        files[f"{n:04d}.PNG" if n == 3 else f"{n:04d}.png"] = png(n)
        if n % 2:
            files[f"{n:04d}.txt"] = f"number {n}\n".encode()
        else:
            files[f"{n:04d}.json"] = json.dumps({"caption": [f"number {n}", f"no {n}"]}).encode()
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("shards")
    for shard in range(COUNT):
        write_tar(found / f"set-{shard:02d}.tar", files_of(shard))
    return found


@pytest.fixture
def shards(folder: Path) -> Shards:
    return open_shards(str(folder / "set-{00..03}.tar"), buffer=5)


def taken(shards: Shards, count: int, workers: int = 0, start: Position = START, rank: int = 0, ranks: int = 1) -> list[Loaded]:
    with closing(load(planned_shards(shards, TRANSFORM, 7, 3, start, rank, ranks), workers)) as batches:
        return list(islice(batches, count))


def numbers(batches: list[Loaded]) -> list[int]:
    return [int(text.split()[-1]) for batch in batches for text in batch.texts]


def assert_same(one: list[Loaded], other: list[Loaded]) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a.position, a.texts) == (b.position, b.texts)
        np.testing.assert_array_equal(a.picture, b.picture)
        np.testing.assert_array_equal(a.pixels, b.pixels)


def test_braces_name_the_shards_and_their_samples_are_counted(folder: Path, shards: Shards) -> None:
    assert shards.files == tuple(folder / f"set-{n:02d}.tar" for n in range(COUNT))
    assert shards.samples == COUNT * EACH
    assert shards.batches_per_epoch(3) == 8
    assert shards.batches_per_epoch(3, ranks=3) == 2
    assert open_shards(str(folder / "set-00.tar"), samples=100).samples == 100
    assert open_shards(f"{folder}/set-0{{0,2}}.tar").samples == 2 * EACH


def test_a_pass_has_each_sample_once_in_another_order(shards: Shards) -> None:
    batches = taken(shards, 16)
    first, second = numbers(batches[:8]), numbers(batches[8:])
    assert sorted(first) == sorted(second) == list(range(COUNT * EACH))
    assert first != second
    assert first != sorted(first)
    assert [batch.position for batch in batches[7:9]] == [Position(0, 7), Position(1, 0)]
    assert {text.split()[0] for batch in taken(shards, 40) for text in batch.texts} == {"number", "no"}


def test_the_buffer_mixes_shards(folder: Path) -> None:
    """With a buffer of one sample, samples of a shard stay in the order of their file."""
    for buffer, mixed in ((1, False), (24, True)):
        order = numbers(taken(open_shards(str(folder / "set-{00..03}.tar"), buffer=buffer), 8))
        parts = [order[n : n + EACH] for n in range(0, COUNT * EACH, EACH)]
        assert all(part == list(range(part[0], part[0] + EACH)) for part in parts) != mixed


def test_pictures_are_decoded_and_cropped(shards: Shards) -> None:
    batch = taken(shards, 1)[0]
    for row, number in enumerate(numbers([batch])):
        image = Image.open(io.BytesIO(png(number)))
        np.testing.assert_array_equal(batch.pixels[row], TRANSFORM(image, randomness(PICTURE, 7, 0, row)))


def test_a_picture_has_one_number(shards: Shards) -> None:
    """In every epoch and every process: a queue of past batches knows it again."""
    known: dict[int, int] = {}
    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        for batch in taken(shards, 16, rank=rank, ranks=ranks):
            for number, picture in zip(numbers([batch]), batch.picture.tolist(), strict=True):
                assert known.setdefault(number, picture) == picture
    assert len(set(known.values())) == len(known) == COUNT * EACH


def test_the_number_of_workers_changes_nothing(shards: Shards) -> None:
    assert_same(taken(shards, 10, workers=2), taken(shards, 10))


@pytest.mark.parametrize("stop", [0, 4, 7, 9])
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
def test_after_a_stop_come_the_batches_that_were_left(shards: Shards, stop: int, rank: int, ranks: int) -> None:
    whole = taken(shards, 12, rank=rank, ranks=ranks)
    position = Position(whole[stop].position.epoch, whole[stop].position.batch + 1)
    assert_same(taken(shards, 11 - stop, start=position, rank=rank, ranks=ranks), whole[stop + 1 :])


def test_processes_read_different_shards(shards: Shards) -> None:
    for epoch in range(3):
        parts = [numbers(taken(shards, 4, start=Position(epoch), rank=rank, ranks=2)) for rank in range(2)]
        assert sorted(parts[0] + parts[1]) == list(range(COUNT * EACH))
    ids = [batch.picture for rank in range(2) for batch in taken(shards, 4, rank=rank, ranks=2)]
    assert len(np.unique(np.concatenate(ids))) == COUNT * EACH


def test_a_process_with_few_samples_begins_again(folder: Path) -> None:
    """So all processes have as many batches."""
    three = Shards(tuple(folder / f"set-{n:02d}.tar" for n in range(3)), samples=3 * EACH, buffer=4)
    parts = [numbers(taken(three, 3, rank=rank, ranks=2)) for rank in range(2)]
    assert sorted(len(set(part)) for part in parts) == [EACH, 9]  # one has a shard and a half of it again, one has two


def test_shards_that_the_library_wrote(tmp_path: Path) -> None:
    import webdataset

    for name in ("a.tar", "b.tar.gz"):
        with webdataset.TarWriter(str(tmp_path / name)) as writer:
            writer.write({"__key__": "one", "jpg": np.zeros((8, 8, 3), np.uint8), "json": {"caption": "black"}})
        assert count_samples(tmp_path / name) == 1
        sample = next(read_shard(tmp_path / name))
        assert (sample["__key__"], json.loads(sample["json"])) == ("one", {"caption": "black"})
        plan = planned_shards(Shards((tmp_path / name,), 1), TRANSFORM, 1, 1)
        draw = next(plan).draws[0]
        assert draw.text == "black"
        assert isinstance(draw.file, Encoded)


def test_without_the_library_a_sentence_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("webdataset", "braceexpand")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def absent(name: str, *others: Any) -> Any:
        if name.split(".")[0] in ("webdataset", "braceexpand"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="webdataset")
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", absent)
    sentence = r"This needs webdataset, which is not installed. Install it with: pip install -c constraints.txt '\.\[shards\]'"
    with pytest.raises(UserError, match=sentence):
        open_shards(str(folder / "set-00.tar"))
    with pytest.raises(UserError, match=sentence):
        next(planned_shards(Shards((folder / "set-00.tar",), 3), TRANSFORM, 1, 1))


@pytest.mark.parametrize("pattern", ["https://x.org/{0..9}.tar", "pipe:cat a.tar", "s3://a/b.tar"])
def test_only_files_are_read(pattern: str) -> None:
    with pytest.raises(Misuse, match="are not on this machine; expected the names of files"):
        open_shards(pattern)


def test_missing_shards_are_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"There is no shard .*set-04.tar, nor are 1 others of the 6. Give the names"):
        open_shards(str(folder / "set-{00..05}.tar"))
    with pytest.raises(UserError, match=r"There is no shard .*none.tar. Give the names"):
        open_shards(str(folder / "none.tar"))
    with pytest.raises(Misuse, match=r"The braces in .* have no meaning: Unbalanced braces"):
        open_shards(str(folder / "set-{00..05.tar"))


def damaged(folder: Path, to: Path, kind: str) -> Path:
    data = bytearray((folder / "set-01.tar").read_bytes())
    if kind in ("cut", "ended"):  # within a file, and between two
        with tarfile.open(folder / "set-01.tar") as tar:
            del data[[member.offset for member in tar][5] + (600 if kind == "cut" else 0) :]
    elif kind == "head":  # of its third file
        with tarfile.open(folder / "set-01.tar") as tar:
            start = [member.offset for member in tar][2]
        data[start : start + 300] = b"\xff" * 300
    elif kind == "text":
        data[:] = b"not a tar at all" * 100
    else:
        data.clear()
    to.write_bytes(data)
    return to


@pytest.mark.parametrize("kind", ["cut", "ended", "head", "text", "empty"])
def test_a_damaged_shard_is_named(folder: Path, tmp_path: Path, kind: str) -> None:
    """When it is counted, and when it is read without having been counted."""
    path = damaged(folder, tmp_path / "bad.tar", kind)
    with pytest.raises(UserError, match=r"bad.tar is no whole tar of samples: .+\. Copy or make it again\."):
        open_shards(str(path))
    with pytest.raises(UserError, match=r"bad.tar is no whole tar of samples: [^@]+\. Copy or make it again\."):
        list(read_shard(path))
    with pytest.raises(UserError, match=r"bad.tar is no whole tar"):
        taken(open_shards(str(path), samples=6), 2)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.txt": b"x"}, r"bad.tar, sample a has no picture; expected a file that ends in jpg, jpeg, png, webp"),
        ({"a.jpg": b"x"}, r"bad.tar, sample a has no caption; expected a file that ends in txt or json"),
        ({"a.jpg": b"x", "a.txt": b"y"}, r"bad.tar, sample a is not a picture in a format that Pillow decodes"),
        ({"a.jpg": b"x", "a.txt": b" "}, r"bad.tar, sample a: its caption is an empty text; expected a text"),
        ({"a.jpg": b"x", "a.txt": b"\xff"}, r"bad.tar, sample a: its caption is no UTF-8 text or JSON"),
        ({"a.jpg": b"x", "a.json": b"{"}, r"bad.tar, sample a: its caption is no UTF-8 text or JSON"),
        ({"a.jpg": b"x", "a.json": b"{}"}, r"bad.tar, sample a: its JSON has null for a caption"),
        ({"a.jpg": b"x", "a.json": b'{"caption": []}'}, r"bad.tar, sample a: its caption is an empty list"),
    ],
)
def test_a_wrong_sample_is_named(tmp_path: Path, files: dict[str, bytes], sentence: str) -> None:
    path = write_tar(tmp_path / "bad.tar", files)
    with pytest.raises(UserError, match=sentence):
        next(load(planned_shards(open_shards(str(path)), TRANSFORM, 1, 1)))


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "none.tar", {"__notes__": b"x"})
    with pytest.raises(UserError, match=r"none.tar holds no sample; expected pictures with their captions"):
        open_shards(str(path))
    with pytest.raises(UserError, match=r"none.tar and the others hold no sample"):
        taken(open_shards(str(path), samples=9), 1)


def test_too_few_samples_or_shards_are_one_sentence(shards: Shards) -> None:
    with pytest.raises(Misuse, match="A batch has 30 samples over all processes, but an epoch of the shards has only 24"):
        next(planned_shards(shards, TRANSFORM, 1, 15, ranks=2))
    with pytest.raises(Misuse, match="There are 4 shards for 5 processes; expected one each at least"):
        next(planned_shards(shards, TRANSFORM, 1, 1, ranks=5))
