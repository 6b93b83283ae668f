"""`blip-pre classify`: what it writes from each source, that the three agree, and what a wrong input costs."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from click.testing import Result
from PIL import Image

from models import manifest
from models.config_file import to_dict
from models.errors import UserError
from preprocess import workers
from preprocess.__main__ import main
from preprocess.dataset import read_classify
from preprocess.images import normalise, read_image
from preprocess.tensors import FILES, LAYOUTS, PACKED, FileTensor, Writer
from preprocess.text import CaptionTokenizer
from tests.chain import TOKENS, call, done, refusal
from tests.test_cifar import FINE, Runs, batch, pictures, write_cifar100
from tests.tiny import TINY, TINY2

SPOKEN = [name.replace("_", " ") for name in FINE]
SIZE = TINY.vision.image_size


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder with the same pictures in the three forms, and the command."""

    root: Path
    graphs: Path

    @property
    def out(self) -> Path:
        return self.root / "data"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def call(self, *options: object) -> Result:
        return call(main, "classify", "--graphs", self.graphs, "--out", self.out, "--workers", 1, *options)

    def folders(self, *options: object) -> Result:
        return self.call("--images", self.images, *options)

    def refused(self, *options: object, code: int = 1) -> str:
        """Run, expect a failure that leaves every file as it was. Returns all that it said."""
        before = {path: path.stat().st_mtime_ns for path in self.root.rglob("*")}
        result = self.call(*options)
        refusal(result, code)
        assert not result.stdout
        assert {path: path.stat().st_mtime_ns for path in self.root.rglob("*")} == before
        return result.stderr.removeprefix("Error: ")


def names_and_labels() -> list[tuple[str, int]]:
    """The pictures of `Work` in the order of its class folders."""
    values = batch()
    return sorted(zip(values["filenames"], values["fine_labels"], strict=True), key=lambda pair: (pair[1], pair[0]))


@pytest.fixture
def work(tmp_path: Path, ort_graphs: Path) -> Work:
    """Six pictures of three classes: class folders, annotations, and CIFAR-100's test part, in the order of the folders."""
    values = batch()
    number = {name: n for n, name in enumerate(values["filenames"])}
    order = [number[name] for name, _ in names_and_labels()]
    for n in order:
        path = tmp_path / "images" / FINE[values["fine_labels"][n]] / values["filenames"][n]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures()[n].reshape(3, 32, 32).transpose(1, 2, 0)).save(path)
    entries = [{"image": f"{FINE[label]}/{name}", "label": label} for name, label in names_and_labels()]
    (tmp_path / "labels.json").write_text(json.dumps({"classes": SPOKEN, "samples": entries}), "utf-8")
    lists = {key: [values[key][n] for n in order] for key in ("filenames", "fine_labels", "coarse_labels")}
    write_cifar100(tmp_path, batch(data=pictures()[order], **lists))
    return Work(tmp_path, ort_graphs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written(work: Work, layout: str) -> None:
    said = done(work.folders("--layout", layout))
    assert said.splitlines() == [f"{work.out}: 6 pictures, 3 classes", "pictures of a class: 2 to 2"]
    data = read_classify(work.out, verify=True)
    names = [f"{FINE[label]}/{name}" for name, label in names_and_labels()]
    assert data.images == [{"image": name, "width": 32, "height": 32} for name in names]
    assert data.classes == SPOKEN
    assert (data.img.shape, data.img.dtype) == ((6, 3, SIZE, SIZE), np.float32)
    assert (data.label.shape, data.label.dtype) == ((6,), np.int64)
    assert isinstance(data.label, FileTensor if layout == FILES else np.memmap)
    assert np.asarray(data.label).tolist() == [0, 0, 1, 1, 2, 2]
    for number, name in enumerate(names):
        pixels = read_image(work.images / name, SIZE, "bicubic")
        assert data.img[number].tobytes() == normalise(pixels, TINY.protocol.mean, TINY.protocol.std).tobytes()
    assert data.broken == []
    tokenizer = CaptionTokenizer.load(work.graphs / "tokenizer", TINY)
    assert data.protocol == {
        **json.loads(json.dumps(dataclasses.asdict(TINY.protocol))),
        "image_size": SIZE,
        "vocab": TINY.text.vocab,
        "encode_id": tokenizer.encode_id,
        "decode_id": tokenizer.decode_id,
        "pad_id": 0,
        "tokenizer_sha256": tokenizer.sha256,
        "pillow": PIL.__version__,
    }
    content = data.source.content
    assert (content["task"], content["layout"]) == ("classify", layout)
    assert content["source"] == {"kind": "folders", "folder": str(work.images)}
    assert not list(work.root.glob(".*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_sources_of_the_same_pictures(work: Work, layout: str) -> None:
    sources = {
        "folders": ("--images", work.images),
        "annotations": ("--images", work.images, "--annotations", work.root / "labels.json"),
        "cifar": ("--cifar", work.root),
    }
    found = {}
    for kind, options in sources.items():
        done(work.call(*options, "--layout", layout))
        data = read_classify(work.out)
        assert data.source.content["source"]["kind"] == kind
        names = [image["image"].rpartition("/")[2] for image in data.images]
        found[kind] = (np.asarray(data.img).tobytes(), np.asarray(data.label).tolist(), data.classes, names, data.protocol)
    assert found["annotations"] == found["folders"]
    assert found["cifar"] == found["folders"]


def test_cifar_options(work: Work) -> None:
    said = done(work.call("--cifar", work.root / "cifar-100-python", "--labels", "coarse", "--limit", 5))
    assert said.splitlines() == [f"{work.out}: 5 pictures, 2 classes", "pictures of a class: 2 to 3"]
    data = read_classify(work.out)
    assert (data.classes, np.asarray(data.label).tolist()) == (["people", "small mammals"], [0, 1, 1, 0, 0])
    (work.root / "cifar-100-python/test").rename(work.root / "cifar-100-python/train")
    done(work.call("--cifar", work.root, "--split", "train"))
    assert read_classify(work.out).source.content["source"]["split"] == "train"
    assert work.refused("--cifar", work.root).startswith(f"{work.root / 'cifar-100-python/test'} does not exist;")


def test_limit_keeps_the_classes(work: Work) -> None:
    said = done(work.folders("--limit", 3))
    assert said.splitlines() == [f"{work.out}: 3 pictures, 3 classes", "pictures of a class: 0 to 2"]
    assert read_classify(work.out).classes == SPOKEN


def test_another_interpolation_is_written_and_said(work: Work) -> None:
    result = work.folders("--interpolation", "bilinear")
    done(result)
    assert result.stderr == "Warning: bilinear deviates from the model's protocol, bicubic; the figures will differ.\n"
    assert read_classify(work.out).protocol["interpolation"] == "bilinear"


@pytest.mark.parametrize("cifar", [False, True])
def test_workers_write_the_same_bytes_as_one_process(work: Work, cifar: bool) -> None:
    count = workers.FEW + 3
    if cifar:
        labels = [n % 3 for n in range(count)]
        write_cifar100(work.root, batch(data=pictures(count), fine_labels=labels, coarse_labels=[0] * count, filenames=None))
    else:
        for n in range(count):
            shutil.copy(work.images / "baby/apple_s_000002.png", work.images / f"baby/{n}.png")
    options = ("--cifar", work.root) if cifar else ("--images", work.images)
    done(work.call(*options))
    alone = manifest.read(work.out, "data").digest
    done(work.call(*options, "--workers", 2))
    assert manifest.read(work.out, "data").digest == alone


def test_graphs_of_blip2(work: Work, tmp_path: Path) -> None:
    """Its protocol matches captions and pictures without an [ENC] of its own."""
    graphs = tmp_path / "blip2"
    (graphs / "tokenizer").mkdir(parents=True)
    file = graphs / "tokenizer/vocab.txt"
    file.write_text("\n".join(TOKENS) + "\n", "utf-8")
    record = {"file": "tokenizer/vocab.txt", "sha256": manifest.file_record(file)["sha256"]}
    manifest.write(graphs, "graphs", {"config": to_dict(TINY2), "tokenizer": record})
    done(work.folders("--graphs", graphs))
    data = read_classify(work.out)
    assert (data.protocol["encode_id"], data.protocol["vocab"]) == (TOKENS.index("[CLS]"), TINY2.text.vocab)
    assert data.img.shape == (6, 3, TINY2.vision.image_size, TINY2.vision.image_size)


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_broken_pictures_are_all_named_and_nothing_is_lost(work: Work) -> None:
    done(work.folders())
    before = manifest.read(work.out, "data", verify=True).digest
    spoil(work.images / "apple/apple_s_000003.png")
    (work.images / "baby/apple_s_000002.png").write_bytes(b"")
    assert work.refused("--images", work.images) == (
        "1 of 6 pictures cannot be used:\n"
        "  baby/apple_s_000002.png (entry 4): is empty (0 bytes)\n"
        "Mend them, or leave them out with --skip-broken.\n"
    )
    (work.images / "baby/apple_s_000002.png").unlink()
    options = ("--images", work.images, "--annotations", work.root / "labels.json")
    assert "  baby/apple_s_000002.png (entry 4): does not exist\nMend them" in work.refused(*options)
    assert work.refused("--images", work.images).startswith(
        "1 of 5 pictures cannot be used:\n  apple/apple_s_000003.png (entry 1): cannot be decoded"
    )
    assert manifest.read(work.out, "data", verify=True).digest == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_broken_drops_lists_and_counts(work: Work, layout: str) -> None:
    spoil(work.images / "apple/apple_s_000000.png")
    (work.images / "apple/apple_s_000003.png").write_bytes(b"")
    spoil(work.images / "baby/apple_s_000002.png")
    said = done(work.folders("--skip-broken", "--layout", layout))
    assert said.splitlines() == [
        f"{work.out}: 3 pictures, 3 classes",
        "pictures of a class: 0 to 2",
        "left out: 3 broken pictures; the manifest lists them",
    ]
    data = read_classify(work.out, verify=True)
    assert [image["image"].rpartition("/")[2] for image in data.images] == [f"apple_s_00000{n}.png" for n in (1, 4, 5)]
    assert (np.asarray(data.label).tolist(), data.classes) == ([1, 1, 2], SPOKEN)
    assert [(record["image"], record["entry"]) for record in data.broken] == [
        ("apple/apple_s_000000.png", 0),
        ("apple/apple_s_000003.png", 1),
        ("baby/apple_s_000002.png", 4),
    ]
    last = read_image(work.images / "baby/apple_s_000005.png", SIZE, "bicubic")
    np.testing.assert_array_equal(data.img[2], normalise(last, TINY.protocol.mean, TINY.protocol.std))
    for path in work.images.rglob("*.png"):
        path.write_bytes(b"")
    message = work.refused("--images", work.images, "--skip-broken")
    assert message.startswith("6 of 6 pictures cannot be used:\n")
    assert message.endswith("Nothing would remain.\n")


def no_memory(*_: object) -> None:
    raise MemoryError


def test_no_memory(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.pictures.open_rgb", no_memory)
    message = work.refused("--images", work.images)
    assert message == f"Not enough memory to decode {work.images}/apple/apple_s_000000.png. Run again with fewer --workers.\n"


@pytest.mark.parametrize("older", [False, True])
def test_a_source_that_cannot_be_read(work: Work, older: bool) -> None:
    """The command line says what the reader says, and an older result stays."""
    if older:
        done(work.folders())
    (work.images / "notes.txt").touch()
    assert work.refused("--images", work.images).startswith(f"{work.images} holds notes.txt beside its class folders;")
    mark = work.root / "ran"
    (work.root / "cifar-100-python/test").write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    assert "test is refused: reading it would run code ('posix.system')." in work.refused("--cifar", work.root)
    assert not mark.exists()
    (work.root / "labels.json").write_text('[{"image": "a.png", "label": 3}]')
    options = ("--images", work.images, "--annotations", work.root / "labels.json")
    assert "entry 0 (a.png): its label is a number, but the file has no 'classes'" in work.refused(*options)
    (work.images / "notes.txt").unlink()
    assert work.refused("--images", work.images, "--graphs", work.root).startswith(f"{work.root} holds no manifest.json")


def test_misuse(work: Work) -> None:
    images = ("--images", work.images)
    for options, says in (
        ((), "No pictures are named: give --images FOLDER"),
        (("--annotations", "a.json"), "--annotations needs --images"),
        ((*images, "--cifar", work.root), "choose one source of pictures."),
        ((*images, "--split", "test"), "--split and --labels choose from CIFAR"),
        ((*images, "--labels", "fine"), "--split and --labels choose from CIFAR"),
        (("--cifar", work.root, "--split", "val"), "'val' is not one of 'test', 'train'."),
        (("--cifar", work.root, "--labels", "all"), "'all' is not one of 'fine', 'coarse'."),
        ((*images, "--limit", "0"), "0 is not in the range x>=1."),
        ((*images, "--layout", "x"), "is not one of 'packed', 'files'."),
        ((*images, "--workers", "0"), "0 is not in the range"),
    ):
        assert says in work.refused(*options, code=2)
    work.out.mkdir()
    (work.out / "letter").touch()
    assert "is not empty and is not a data folder" in work.refused(*images, code=2)


CONTENT: dict[str, Any] = {
    "task": "classify",
    "protocol": {"image_size": 4},
    "images": [{"image": f"{n}.png", "width": 4, "height": 4} for n in range(3)],
    "classes": ["cat", "dog"],
    "broken": [],
}


def data_folder(folder: Path, label: np.ndarray | None = None, written: str = PACKED, **changes: Any) -> Path:
    """A data/ folder for classification; `changes` replace parts of its manifest, None removes one."""
    folder.mkdir()
    labels = np.array([0, 1, 1]) if label is None else label
    infos = {}
    for name, array in (("img", np.zeros((3, 3, 4, 4), np.float32)), ("label", labels)):
        with closing(Writer(folder, name, array.dtype.name, array.shape, written)) as writer:
            writer.write(0, array)
            infos[name] = writer.info()
    content = {**CONTENT, "layout": written, "tensors": infos, **changes}
    manifest.write(folder, "data", {key: value for key, value in content.items() if value is not None})
    return folder


def unreadable(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_classify(folder)
    assert "\n" not in error.value.message
    return error.value.message


@pytest.mark.parametrize("layout", LAYOUTS)
def test_read_classify(tmp_path: Path, layout: str) -> None:
    data = read_classify(data_folder(tmp_path / "data", written=layout), verify=True)
    assert (data.classes, np.asarray(data.label).tolist(), data.img.shape) == (["cat", "dog"], [0, 1, 1], (3, 3, 4, 4))
    assert (data.images, data.protocol, data.broken) == (CONTENT["images"], {"image_size": 4}, [])


def test_another_task(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "data", task="retrieval")
    assert unreadable(folder) == f"{folder} was made for the task 'retrieval', expected 'classify'. Use blip-pre classify."


@pytest.mark.parametrize("part", ["protocol", "images", "classes", "broken", "tensors", "layout"])
def test_a_part_is_missing(tmp_path: Path, part: str) -> None:
    assert repr(part) in unreadable(data_folder(tmp_path / "data", **{part: None}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": []}, "contradicts itself: {'images': 0, 'img': 3, 'label': 3}."),
        ({"label": np.array([0, 1])}, "contradicts itself: {'images': 3, 'img': 3, 'label': 2}."),
        ({"label": np.array([0, 1, 2])}, "contradicts itself: a label is beyond the 2 classes."),
        ({"label": np.array([0, 1, -1])}, "contradicts itself: a label is beyond the 2 classes."),
        ({"label": np.zeros(3, np.float32)}, "contradicts itself: label is float32 (3,), expected int64 (3,)."),
        ({"label": np.zeros((3, 1), np.int64)}, "contradicts itself: label is int64 (3, 1), expected int64 (3,)."),
        ({"classes": ["cat", "cat"]}, "contradicts itself: its classes are not names, each another one."),
        ({"classes": ["cat", " "]}, "contradicts itself: its classes are not names, each another one."),
        ({"classes": ["cat", 3]}, "contradicts itself: its classes are not names, each another one."),
        ({"classes": "ab"}, "lacks or garbles its classes, expected a list. Write it again with blip-pre classify."),
        ({"images": 3}, "lacks or garbles object of type 'int' has no len(). Write it again with blip-pre classify."),
        ({"protocol": 3}, "lacks or garbles 'int' object is not iterable. Write it again with blip-pre classify."),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = data_folder(tmp_path / "data", **changes)
    assert unreadable(folder) == f"{folder / manifest.NAME} {says}"


@pytest.mark.real_data
def test_pictures_of_cifar_100(work: Work) -> None:
    """300 pictures, 3 of each class, from annotations and from class folders made of them."""
    root = Path(os.environ["BLIP_REAL_DATA"]) / "cifar100_300"
    said = done(work.call("--images", root, "--annotations", root / "annotations.json", "--workers", 2))
    assert said.splitlines() == [f"{work.out}: 300 pictures, 100 classes", "pictures of a class: 3 to 3"]
    data = read_classify(work.out, verify=True)
    assert (data.classes[:3], len(data.classes)) == (["apple", "aquarium fish", "baby"], 100)
    assert np.bincount(data.label).tolist() == [3] * 100
    entries = json.loads((root / "annotations.json").read_text("utf-8"))["samples"]
    for number in range(0, 300, 37):
        with Image.open(root / entries[number]["image"]) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_array_equal(data.img[number], normalise(pixels, TINY.protocol.mean, TINY.protocol.std))
    for entry in entries:
        folder = work.root / "classes" / entry["class_name"].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / entry["image"], folder)
    want = {entry["image"]: (data.img[n].tobytes(), int(data.label[n])) for n, entry in enumerate(entries)}
    done(work.call("--images", work.root / "classes"))
    data = read_classify(work.out)
    for number, image in enumerate(data.images):
        assert (data.img[number].tobytes(), int(data.label[number])) == want[image["image"].rpartition("/")[2]]
