"""`blip-pre caption`: what it writes from each source, and that a wrong input costs one message and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
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
from models.config import Config
from models.config_file import to_dict
from models.errors import UserError
from preprocess import workers
from preprocess.__main__ import main
from preprocess.dataset import read_caption, read_classify
from preprocess.images import normalise, read_image
from preprocess.tensors import LAYOUTS, PACKED, Writer
from tests.chain import call, done, refusal
from tests.tiny import TINY, TINY2, TINY_CAPTION, TINY_OPT, TINY_T5, TINY_VQA, tiny_llm

SIZE = TINY.vision.image_size
NAMES = ("a.png", "b/c_7.png", "COCO_val2014_000000000042.jpg")
CAPTIONS = [["A dog.", " two "], ["cat 😀"], ["One", "two", "three"]]


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder with everything that the command reads, and the command."""

    root: Path
    graphs: Path

    @property
    def out(self) -> Path:
        return self.root / "data"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def list(self) -> Path:
        return self.root / "list.json"

    def write(self, values: object) -> Path:
        self.list.write_text(json.dumps(values), "utf-8")
        return self.list

    def call(self, *options: object) -> Result:
        named = ("--images", self.images, "--graphs", self.graphs, "--out", self.out, "--workers", 1)
        return call(main, "caption", *named, *options)

    def listed(self, *options: object) -> Result:
        return self.call("--annotations", self.list, *options)

    def refused(self, *options: object, code: int = 1) -> str:
        """Run, expect a failure that leaves every file as it was. Returns all that it said."""
        before = {path: path.stat().st_mtime_ns for path in self.root.rglob("*")}
        result = self.call(*options)
        refusal(result, code)
        assert not result.stdout
        assert {path: path.stat().st_mtime_ns for path in self.root.rglob("*")} == before
        return result.stderr.removeprefix("Error: ")


def entries() -> list[dict[str, Any]]:
    return [{"image": name, "caption": texts} for name, texts in zip(NAMES, CAPTIONS, strict=True)]


@pytest.fixture
def work(tmp_path: Path, ort_graphs: Path) -> Work:
    """Three pictures, and a list of them with captions, in another order than the folder's."""
    work = Work(tmp_path, ort_graphs)
    for number, name in enumerate(NAMES):
        path = work.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30 + number, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    work.write(entries())
    return work


def same_pictures(work: Work, img: Any, names: list[str]) -> None:
    assert (img.shape, img.dtype) == ((len(names), 3, SIZE, SIZE), np.float32)
    for number, name in enumerate(names):
        pixels = read_image(work.images / name, SIZE, "bicubic")
        assert img[number].tobytes() == normalise(pixels, TINY.protocol.mean, TINY.protocol.std).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written(work: Work, layout: str) -> None:
    assert done(work.listed("--layout", layout)) == f"{work.out}: 3 pictures, 6 captions to compare with\n"
    data = read_caption(work.out, verify=True)
    same_pictures(work, data.img, list(NAMES))
    assert data.images == [
        {"image": name, "width": 30 + n, "height": 20, "image_id": each}
        for n, (name, each) in enumerate(zip(NAMES, ("a.png", 7, 42), strict=True))
    ]
    assert (data.references, data.prompts, data.broken) == (CAPTIONS, None, [])
    assert data.protocol == {
        **json.loads(json.dumps(dataclasses.asdict(TINY.protocol))),
        "image_size": SIZE,
        "tokenizer_sha256": manifest.file_record(work.graphs / "tokenizer/vocab.txt")["sha256"],
        "pillow": PIL.__version__,
    }
    content = data.source.content
    assert (content["task"], content["layout"], content["source"]["kind"]) == ("caption", layout, "annotations")
    assert "prompts" not in content
    assert not list(work.root.glob(".*"))


def test_a_folder(work: Work) -> None:
    assert done(work.call()) == f"{work.out}: 3 pictures, no captions to compare with\n"
    data = read_caption(work.out, verify=True)
    names = sorted(NAMES)
    same_pictures(work, data.img, names)
    assert [image["image"] for image in data.images] == names
    assert (data.references, data.prompts) == ([[], [], []], None)


def test_prompts(work: Work) -> None:
    text = work.root / "prompts.txt"
    text.write_text("a dog of\nb\nc\n")
    said = done(work.listed("--prompts-file", text))
    assert said.splitlines()[1:] == ["each picture has a prompt of its own"]
    assert read_caption(work.out).prompts == ["a dog of", "b", "c"]
    done(work.listed("--prompts-file", text, "--limit", 2))
    data = read_caption(work.out)
    assert (data.prompts, len(data.img)) == (["a dog of", "b"], 2)
    text.write_text("one\ntwo\n")
    assert "holds 2 prompts for 3 pictures" in work.refused("--prompts-file", text)
    work.write([{**entry, "prompt": f"p{n}"} for n, entry in enumerate(entries())])
    done(work.listed())
    assert read_caption(work.out).prompts == ["p0", "p1", "p2"]
    assert "Both --prompts-file and" in work.refused("--annotations", work.list, "--prompts-file", text, code=2)


def test_forms_agree(work: Work) -> None:
    """BLIP's list, COCO's form and Flickr8k's give the same folder, but for where it comes from."""
    done(work.listed())
    want = read_caption(work.out)
    ids = [image["image_id"] for image in want.images]
    coco = {
        "images": [{"id": each, "file_name": name} for each, name in zip(ids, NAMES, strict=True)],
        "annotations": [{"image_id": each, "caption": text} for each, texts in zip(ids, CAPTIONS, strict=True) for text in texts],
    }
    tokens = "".join(f"{name}#{n}\t{text}\n" for name, texts in zip(NAMES, CAPTIONS, strict=True) for n, text in enumerate(texts))
    (work.root / "Flickr8k.token.txt").write_text(tokens, "utf-8")
    for path, options in ((work.write(coco), ()), (work.root / "Flickr8k.token.txt", ("--split", "all"))):
        done(work.call("--annotations", path, *options))
        found = read_caption(work.out)
        assert (found.images, found.references) == (want.images, want.references)
        assert np.asarray(found.img).tobytes() == np.asarray(want.img).tobytes()


def test_another_interpolation_is_written_and_said(work: Work) -> None:
    result = work.call("--interpolation", "bilinear")
    done(result)
    assert result.stderr == "Warning: bilinear deviates from the model's protocol, bicubic; the figures will differ.\n"
    assert read_caption(work.out).protocol["interpolation"] == "bilinear"


def test_workers_write_the_same_bytes_as_one_process(work: Work) -> None:
    for n in range(workers.FEW):
        shutil.copy(work.images / NAMES[n % 2], work.images / f"more_{100 + n}.png")
    done(work.call())
    alone = manifest.read(work.out, "data").digest
    done(work.call("--workers", 2))
    assert manifest.read(work.out, "data").digest == alone


@pytest.mark.parametrize("config", [TINY2, TINY_CAPTION, TINY_VQA, tiny_llm(TINY_OPT), tiny_llm(TINY_T5)], ids=str)
def test_graphs_of_every_kind(work: Work, tmp_path: Path, config: Config) -> None:
    """Sizes and protocol are all that is read: the tokenizer may be of any family, and is not opened."""
    graphs = tmp_path / "other"
    graphs.mkdir()
    (graphs / "words.bin").write_bytes(b"no vocabulary")
    record = {"file": "words.bin", "sha256": manifest.file_record(graphs / "words.bin")["sha256"]}
    manifest.write(graphs, "graphs", {"config": to_dict(config), "tokenizer": record})
    done(work.listed("--graphs", graphs))
    data = read_caption(work.out)
    assert data.img.shape == (3, 3, config.vision.image_size, config.vision.image_size)
    assert (data.protocol["tokenizer_sha256"], data.protocol["max_length"]) == (record["sha256"], config.protocol.max_length)


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_graphs_that_say_too_little(work: Work, tmp_path: Path, part: str) -> None:
    content = {"config": to_dict(TINY), "tokenizer": {"sha256": "x"}}
    (tmp_path / "other").mkdir()
    manifest.write(tmp_path / "other", "graphs", {name: value for name, value in content.items() if name != part})
    message = work.refused("--graphs", tmp_path / "other")
    assert message.endswith(f"names no config or tokenizer ('{part}'). Write it again with blip-export.\n")


def test_broken_pictures_are_named_and_nothing_is_lost(work: Work) -> None:
    done(work.listed())
    before = manifest.read(work.out, "data", verify=True).digest
    path = work.images / NAMES[2]
    path.write_bytes(path.read_bytes()[:-200])
    (work.images / NAMES[0]).unlink()
    message = work.refused("--annotations", work.list)
    assert message == (
        "1 of 3 pictures cannot be used:\n  a.png (entry 0): does not exist\n"
        "Mend them, or leave them and their captions out with --skip-broken.\n"
    )
    assert work.refused().endswith("Mend them, or leave them out with --skip-broken.\n")
    assert manifest.read(work.out, "data", verify=True).digest == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_skip_broken_keeps_texts_with_their_pictures(work: Work, layout: str) -> None:
    work.write([{**entry, "prompt": f"p{n}"} for n, entry in enumerate(entries())])
    (work.images / NAMES[1]).write_bytes(b"text")
    said = done(work.listed("--skip-broken", "--layout", layout))
    assert said.splitlines() == [
        f"{work.out}: 2 pictures, 5 captions to compare with",
        "each picture has a prompt of its own",
        "left out: 1 broken pictures; the manifest lists them",
    ]
    data = read_caption(work.out, verify=True)
    same_pictures(work, data.img, [NAMES[0], NAMES[2]])
    assert [image["image_id"] for image in data.images] == ["a.png", 42]
    assert (data.references, data.prompts) == ([CAPTIONS[0], CAPTIONS[2]], ["p0", "p2"])
    assert [(record["image"], record["entry"]) for record in data.broken] == [(NAMES[1], 1)]


def test_misuse(work: Work) -> None:
    for options, says in (
        (("--split", "test"), "--split chooses from a list of pictures"),
        (("--limit", "0"), "0 is not in the range x>=1."),
        (("--layout", "x"), "is not one of 'packed', 'files'."),
        (("--questions", "q.json"), "No such option"),
    ):
        assert says in work.refused(*options, code=2)
    assert call(main, "caption").exit_code == 2


def test_another_task_is_not_replaced(work: Work) -> None:
    done(work.call())
    message = refusal(call(main, "retrieval", "--annotations", work.list, *_shared(work)), 2)
    assert "is of the task 'caption', this is 'retrieval'" in message
    with pytest.raises(UserError, match=r"made for the task 'caption', expected 'classify'\. Use blip-pre classify\."):
        read_classify(work.out)


def _shared(work: Work) -> tuple[object, ...]:
    return ("--images", work.images, "--graphs", work.graphs, "--out", work.out)


CONTENT: dict[str, Any] = {
    "task": "caption",
    "protocol": {"image_size": 4},
    "images": [{"image": f"{n}.png", "width": 4, "height": 4, "image_id": n} for n in range(2)],
    "references": [["one", "two"], []],
    "prompts": ["a", "b"],
    "broken": [],
}


def data_folder(folder: Path, **changes: Any) -> Path:
    """A data/ folder for captioning; `changes` replace parts of its manifest, None removes one."""
    folder.mkdir()
    with closing(Writer(folder, "img", "float32", (2, 3, 4, 4), PACKED)) as writer:
        writer.write(0, np.zeros((2, 3, 4, 4), np.float32))
    content = {**CONTENT, "layout": PACKED, "tensors": {"img": writer.info()}, **changes}
    manifest.write(folder, "data", {key: value for key, value in content.items() if value is not None})
    return folder


def test_read_caption(tmp_path: Path) -> None:
    data = read_caption(data_folder(tmp_path / "data"), verify=True)
    assert (data.images, data.references, data.prompts) == (CONTENT["images"], CONTENT["references"], ["a", "b"])
    assert read_caption(data_folder(tmp_path / "other", prompts=None)).prompts is None


def renamed(**changes: Any) -> list[dict[str, Any]]:
    return [CONTENT["images"][0], {**CONTENT["images"][1], **changes}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "vqa"}, "was made for the task 'vqa', expected 'caption'. Use blip-pre caption."),
        *(({part: None}, f"'{part}'") for part in ("protocol", "images", "references", "broken", "tensors", "layout")),
        ({"images": CONTENT["images"][:1]}, "contradicts itself: {'images': 1, 'img': 2, 'references': 2, 'prompts': 2}."),
        ({"references": [[]]}, "contradicts itself: {'images': 2, 'img': 2, 'references': 1, 'prompts': 2}."),
        ({"prompts": ["a"]}, "contradicts itself: {'images': 2, 'img': 2, 'references': 2, 'prompts': 1}."),
        ({"prompts": "ab"}, "lacks or garbles its prompts, expected texts. Write it again with blip-pre caption."),
        ({"prompts": ["a", 3]}, "lacks or garbles its prompts, expected texts."),
        ({"references": [["one"], "two"]}, "lacks or garbles its references of picture 1, expected texts."),
        ({"references": [["one"], [3]]}, "lacks or garbles its references of picture 1, expected texts."),
        ({"references": 3}, "lacks or garbles object of type 'int' has no len()."),
        ({"images": [3, 4]}, "lacks or garbles 'int' object is not subscriptable."),
        ({"images": renamed(image_id=0)}, "contradicts itself: two pictures have the same image_id."),
        ({"images": renamed(image_id=True)}, "lacks or garbles its image_id, expected a whole number."),
        ({"images": renamed(image_id=None)}, "lacks or garbles its image_id, expected a whole number."),
    ],
)
def test_folders_that_contradict_themselves(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        read_caption(data_folder(tmp_path / "data", **changes))
    assert says in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.real_data
def test_photographs_of_coco(work: Work) -> None:
    """108 photographs, one of them grey, in two forms of annotations."""
    root = Path(os.environ["BLIP_REAL_DATA"]) / "coco108"
    digests = []
    for name in ("annotations.json", "annotations_gt.json"):
        said = done(work.call("--images", root / "images", "--annotations", root / name, "--workers", 2))
        assert said == f"{work.out}: 108 pictures, 540 captions to compare with\n"
        data = read_caption(work.out, verify=True)
        content = {key: value for key, value in data.source.content.items() if key != "source"}
        digests.append(json.dumps([content, data.source.files], sort_keys=True))
    assert digests[0] == digests[1]
    listed = json.loads((root / "annotations.json").read_text("utf-8"))
    assert [image["image_id"] for image in data.images] == [entry["image_id"] for entry in listed]
    assert data.references == [entry["caption"] for entry in listed]
    for number in range(0, 108, 27):
        with Image.open(root / "images" / listed[number]["image"]) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_array_equal(data.img[number], normalise(pixels, TINY.protocol.mean, TINY.protocol.std))
