"""Pictures with labels: the three sources agree, and each wrong one costs one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models import manifest
from models.errors import Misuse, UserError
from preprocess.labelled import Labelled, from_annotations, from_cifar, from_folders, read_labelled
from tests.test_cifar import batch, pictures, write_cifar100

CLASSES = ["apple", "aquarium fish", "baby"]


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three class folders; the pictures were not made in the order of their names."""
    for name in ("baby/b.png", "aquarium_fish/2.jpg", "baby/a.PNG", "apple/x.jpeg", "aquarium_fish/10.jpg"):
        image(tmp_path / "images" / name)
    return tmp_path / "images"


def annotate(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(values), "utf-8")
    return path


def test_folders(images: Path) -> None:
    found = from_folders(images)
    assert found.classes == CLASSES
    assert found.pictures.names == ["apple/x.jpeg", "aquarium_fish/10.jpg", "aquarium_fish/2.jpg", "baby/a.PNG", "baby/b.png"]
    assert found.pictures.sources == [images / name for name in found.pictures.names]
    assert found.labels == [0, 1, 1, 2, 2]
    assert found.pictures.entries == [0, 1, 2, 3, 4]
    assert found.source == {"kind": "folders", "folder": str(images)}


def test_what_is_hidden_is_left_out_and_what_lies_deeper_is_found(images: Path) -> None:
    for name in (".git/x.png", "apple/.cache/x.png", "apple/sub/b.png", "apple/sub-a/c.png", "apple/y.png"):
        image(images / name)
    (images / ".DS_Store").touch()
    (images / "apple/.DS_Store").touch()
    # The order of torchvision's ImageFolder: folder by folder, their paths as texts.
    assert from_folders(images).pictures.names[:4] == ["apple/x.jpeg", "apple/y.png", "apple/sub/b.png", "apple/sub-a/c.png"]
    assert len(from_folders(images).pictures.names) == 8


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        work()
    assert "\n" not in error.value.message
    return error.value.message


def _linked(images: Path) -> None:
    (images / "apple/more").symlink_to(images / "baby")


FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (
        lambda images: (images / "cat").mkdir(),
        "The class folder {}/cat holds no picture; remove it, or add the pictures of this class.",
    ),
    (lambda images: image(images / "cat/.hidden.png"), "The class folder {}/cat holds no picture;"),
    (
        lambda images: (images / "apple/Thumbs.db").touch(),
        "{}/apple holds what is no picture by its suffix: Thumbs.db. Remove it, or hide it with a dot before its name.",
    ),
    (
        lambda images: [(images / f"apple/{n}.txt").touch() for n in range(9)],
        "{}/apple holds what is no picture by its suffix: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more. Remove it",
    ),
    (_linked, "{}/apple holds what is no picture by its suffix: more. Remove it"),
    (lambda images: image(images / "b.png"), "{} holds b.png beside its class folders; move or remove what belongs to no class."),
    (lambda images: (images / "readme.txt").touch(), "{} holds readme.txt beside its class folders;"),
    (
        lambda images: image(images / "aquarium fish/x.png"),
        "{}: two classes are called 'aquarium fish'; give each a name of its own.",
    ),
    (lambda images: image(images / "_/x.png"), "{}: class 0 is an empty text; expected the name of a class."),
    (lambda images: image(images / "apple/\udcff.png"), "{}: the file name 'apple/\\udcff.png' is not UTF-8. Rename it."),
    (lambda images: image(images / "\udcff/a.png"), "{}: the file name '\\udcff/a.png' is not UTF-8. Rename it."),
]


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_folders_that_are_not_as_expected(images: Path, number: int) -> None:
    spoil, says = FOLDERS[number]
    spoil(images)
    assert refused(lambda: from_folders(images)).startswith(says.format(images))


def test_no_class_folders(images: Path) -> None:
    assert refused(lambda: from_folders(images / "apple")) == (
        f"{images / 'apple'} holds no class folders; expected one folder of pictures per class. Pictures that lie in one folder "
        "need --annotations."
    )
    (images / "empty").mkdir()
    assert "holds no class folders" in refused(lambda: from_folders(images / "empty"))
    for path in (images / "absent", images / "apple/x.jpeg"):
        assert refused(lambda path=path: from_folders(path)).startswith(
            f"There is no folder {path}; --images takes a folder that"
        )


ENTRIES = [("apple/x.jpeg", 0), ("aquarium_fish/10.jpg", 1), ("aquarium_fish/2.jpg", 1), ("baby/a.PNG", 2), ("baby/b.png", 2)]
NUMBERS = [{"image": name, "label": label} for name, label in ENTRIES]
NAMES = [{"image": name, "label": CLASSES[label], "more": 1} for name, label in ENTRIES]


@pytest.mark.parametrize(
    "values",
    [
        {"classes": CLASSES, "samples": NUMBERS},
        {"classes": CLASSES, "images": NUMBERS},
        {"classes": CLASSES, "annotations": NAMES, "info": {}},
        {"samples": NAMES},
        NAMES,
        {"classes": CLASSES, "samples": [*NUMBERS[:2], *NAMES[2:]]},
    ],
)
def test_forms_of_annotations(tmp_path: Path, images: Path, values: object) -> None:
    found = from_annotations(path := annotate(tmp_path, values), images)
    folders = from_folders(images)
    assert found == Labelled(folders.pictures, folders.labels, folders.classes, found.source)
    sha256 = manifest.file_record(path)["sha256"]
    assert found.source == {"kind": "annotations", "file": str(path), "sha256": sha256, "folder": str(images)}


def test_the_order_and_the_classes_of_annotations_stay(tmp_path: Path, images: Path) -> None:
    values = {"classes": ["zebra", "baby", "apple"], "samples": [NAMES[3], NAMES[0], NAMES[3]]}
    found = from_annotations(annotate(tmp_path, values), images)
    assert (found.labels, found.classes) == ([1, 2, 1], ["zebra", "baby", "apple"])
    assert found.pictures.names == ["baby/a.PNG", "apple/x.jpeg", "baby/a.PNG"]
    spelt = from_annotations(annotate(tmp_path, [{"image": "baby/a.PNG", "label": "new_york"}]), images)
    assert spelt.classes == ["new_york"]  # as typed


def one(**changes: Any) -> list[dict[str, Any]]:
    """A list whose entry 1 is spoilt; None removes a part."""
    entry = {**NAMES[1], **changes}
    return [NAMES[0], {key: value for key, value in entry.items() if value is not None}]


WHERE = "{}, entry 1 (aquarium_fish/10.jpg): its label"
ANNOTATIONS: list[tuple[object, str]] = [
    ("", "{} holds an empty text; expected a list of entries with 'image' and 'label'."),
    ([], "{} holds an empty list; expected a list of entries with 'image' and 'label'."),
    ({}, "{} has nothing; expected one list of pictures, under 'samples', 'images', 'annotations'."),
    ({"classes": ["a"]}, "{} has 'classes'; expected one list of pictures, under 'samples', 'images', 'annotations'."),
    ({"images": [], "annotations": []}, "{} has 'images', 'annotations'; expected one list of pictures, under 'samples',"),
    ({"samples": {}}, "{} holds an object; expected a list of entries"),
    ([NAMES[0], 3], "{}, entry 1 is a number; expected an object with 'image'."),
    (one(label=None), "{}, entry 1 has no 'label'; it has 'image', 'more'."),
    (one(image=None), "{}, entry 1 has no 'image'; it has 'label', 'more'."),
    (one(image="../a.png"), "{}, entry 1: its image '../a.png' leaves the --images folder;"),
    (one(image="/etc/passwd"), "{}, entry 1: its image '/etc/passwd' leaves the --images folder;"),
    (one(image="http://a/b.png"), "{}, entry 1: its image 'http://a/b.png' is an address;"),
    (one(label=1), WHERE + " is a number, but the file has no 'classes' that it could count. Add them."),
    (one(label=1.0), WHERE + " is a number; expected the name of a class, or its whole number."),
    (one(label=True), WHERE + " is true or false; expected the name of a class, or its whole number."),
    (one(label=["apple"]), WHERE + " is a list; expected the name of a class, or its whole number."),
    (one(label=" "), WHERE + " is an empty text; expected the name of a class."),
    (one(label="\ud800"), WHERE + ", '\\ud800', holds half a character (a lone surrogate). Correct it."),
    ({"classes": CLASSES, "samples": one(label="cat")}, WHERE + " 'cat' is none of the 3 classes that the file lists."),
    ({"classes": CLASSES, "samples": one(label=3)}, WHERE + " is none of the numbers of the 3 classes, 0 to 2."),
    ({"classes": CLASSES, "samples": one(label=-1)}, WHERE + " is none of the numbers of the 3 classes, 0 to 2."),
    ({"classes": [], "samples": NUMBERS}, "{}: its 'classes' is an empty list; expected a list of names."),
    ({"classes": None, "samples": NUMBERS}, "{}: its 'classes' is null; expected a list of names."),
    ({"classes": "abc", "samples": NUMBERS}, "{}: its 'classes' is a text; expected a list of names."),
    ({"classes": ["a", 2], "samples": NUMBERS}, "{}: its 'classes': class 1 is a number; expected the name of a class."),
    ({"classes": ["a", ""], "samples": NUMBERS}, "{}: its 'classes': class 1 is an empty text; expected the name of a class."),
    (
        {"classes": ["a", "b", "a"], "samples": NUMBERS},
        "{}: its 'classes': two classes are called 'a'; give each a name of its own.",
    ),
]


@pytest.mark.parametrize(("values", "says"), ANNOTATIONS)
def test_annotations_that_are_not_as_expected(tmp_path: Path, images: Path, values: object, says: str) -> None:
    path = annotate(tmp_path, values)
    assert refused(lambda: from_annotations(path, images)).startswith(says.format(path))


def test_files_that_are_no_annotations(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "labels.json"
    assert refused(lambda: from_annotations(path, images)) == f"There is no annotation file {path}."
    path.write_bytes(b" ")
    assert refused(lambda: from_annotations(path, images)) == f"{path} is empty; expected a JSON list of pictures and labels."
    path.write_bytes(b"\xff")
    assert refused(lambda: from_annotations(path, images)) == (
        f"{path} is not UTF-8 text (byte 0); expected a JSON list of pictures and labels."
    )
    path.write_text("[{")
    assert refused(lambda: from_annotations(path, images)).startswith(f"{path} is not JSON:")


def test_the_wrong_picture_folder(tmp_path: Path, images: Path) -> None:
    path = annotate(tmp_path, NAMES)
    assert refused(lambda: from_annotations(path, images / "apple")) == (
        f"None of the 5 pictures of {path} is in {images / 'apple'}; the first is apple/x.jpeg. "
        "--images takes the folder that these paths start from."
    )
    absent = images / "absent"
    assert refused(lambda: from_annotations(path, absent)) == (
        f"There is no folder {absent}; --images takes the folder that the paths in {path} start from."
    )


def test_cifar(tmp_path: Path) -> None:
    place = write_cifar100(tmp_path, batch())
    found = from_cifar(tmp_path, "test", "fine")
    assert found.classes == CLASSES  # with a blank for '_'
    assert found.labels == [0, 1, 2, 0, 1, 2]
    assert found.pictures.names[0] == "apple_s_000000.png"
    np.testing.assert_array_equal(found.pictures.sources[5], pictures()[5].reshape(3, 32, 32).transpose(1, 2, 0))
    assert found.source == {"kind": "cifar", "folder": str(tmp_path), "split": "test", "labels": "fine"}
    assert from_cifar(place, "test", "coarse").classes == ["people", "small mammals"]
    write_cifar100(tmp_path, batch(), fine=["a b", "a_b", "c"])
    assert refused(lambda: from_cifar(place, "test", "fine")) == (
        f"{place}: two classes are called 'a b'; give each a name of its own."
    )


def test_the_first_pictures(tmp_path: Path, images: Path) -> None:
    write_cifar100(tmp_path, batch())
    for found in (from_folders(images), from_cifar(tmp_path, "test", "fine")):
        first = found.first(2)
        assert (first.pictures.names, first.labels) == (found.pictures.names[:2], found.labels[:2])
        assert (len(first.pictures.sources), first.pictures.entries, first.classes) == (2, [0, 1], CLASSES)
        assert found.first(None).labels == found.first(99).labels == found.labels


def test_one_source(tmp_path: Path, images: Path) -> None:
    write_cifar100(tmp_path, batch())
    path = annotate(tmp_path, NAMES)
    assert read_labelled(images, None, None).source["kind"] == "folders"
    assert read_labelled(images, path, None).source["kind"] == "annotations"
    assert read_labelled(None, None, tmp_path).source == {
        **{"kind": "cifar", "folder": str(tmp_path)},
        **{"split": "test", "labels": "fine"},
    }
    assert read_labelled(None, None, tmp_path, "test", "coarse").source["labels"] == "coarse"


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        (("images", None, "cifar"), "Both --cifar and --images or --annotations are given; choose one source of pictures."),
        ((None, "labels", "cifar"), "Both --cifar and --images or --annotations are given; choose one source of pictures."),
        ((None, "labels", None), "--annotations needs --images, the folder that its paths start from."),
        ((None, None, None), "No pictures are named: give --images FOLDER, which holds one folder per class, or --cifar FOLDER."),
        (
            ("images", None, None, "test"),
            "--split and --labels choose from CIFAR; give its folder with --cifar, or leave them out.",
        ),
        (("images", "labels", None, None, "fine"), "--split and --labels choose from CIFAR; give its folder with --cifar"),
    ],
)
def test_no_source_or_two(sources: tuple[Any, ...], says: str) -> None:
    with pytest.raises(Misuse) as error:
        read_labelled(*(Path(name) if name else None for name in sources[:3]), *sources[3:])
    assert error.value.message.startswith(says)
