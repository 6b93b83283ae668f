"""`blip-pre retrieval`: what it writes, and that a wrong input costs one sentence and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from models import manifest
from models.config import BlipConfig, Protocol, TextConfig, VisionConfig
from models.config_file import to_dict
from preprocess import workers
from preprocess.__main__ import main
from preprocess.dataset import read_retrieval
from preprocess.images import normalise, read_image
from preprocess.tensors import LAYOUTS
from preprocess.text import CaptionTokenizer, pre_caption

WORDS = [
    *("a", "the", "dog", "##s", "cat", "two", "red", "house", "on", "picture", "number"),
    *"0123456789",
    *("##0", "##1", "##2", "##3"),
]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
CONFIG = BlipConfig(
    VisionConfig(image_size=24, patch=8, width=16, depth=1, heads=2, mlp=16),
    TextConfig(vocab=len(TOKENS) + 2, width=16, depth=1, heads=2, ffn=16, positions=16),
    protocol=Protocol(max_length=12, max_words=6),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """A folder with everything that the command reads, and the command."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "build" / "data"

    @property
    def annotations(self) -> Path:
        return self.root / "annotations.json"

    def picture(self, name: str, size: tuple[int, int] = (30, 20)) -> None:
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)

    def annotate(self, entries: object) -> None:
        self.annotations.write_text(json.dumps(entries), "utf-8")

    def run(self, *options: str) -> Result:
        words = ["--annotations", str(self.annotations), "--images", str(self.root / "images")]
        words += ["--graphs", str(self.root / "graphs"), "--out", str(self.out)]
        return CliRunner().invoke(main, ["retrieval", *words, *options])

    def refused(self, *options: str, code: int = 1) -> str:
        """Run, expect one message, no traceback and nothing on disk but what was there. Returns the message."""
        before = {path: path.stat().st_mtime_ns for path in self.root.rglob("*") if path.is_file()}
        result = self.run(*options)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code
        assert not result.stdout
        assert {path: path.stat().st_mtime_ns for path in self.root.rglob("*") if path.is_file()} == before
        assert not list(self.root.rglob(".data.part"))
        return result.stderr


def write_graphs(folder: Path, config: BlipConfig = CONFIG, tokens: list[str] = TOKENS, without: str = "") -> None:
    """What preprocess reads of a graphs/ folder."""
    (folder / "tokenizer").mkdir(parents=True)
    file = folder / "tokenizer" / "vocab.txt"
    file.write_text("\n".join(tokens) + "\n", "utf-8")
    tokenizer = CaptionTokenizer.load(file)
    record = {"file": "tokenizer/vocab.txt", "sha256": tokenizer.sha256, "size": tokenizer.size}
    content = {"model": "tiny", "config": to_dict(config), "tokenizer": record}
    manifest.write(folder, "graphs", {key: value for key, value in content.items() if key != without})


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Three pictures with two captions each, in the order of the captions' numbers."""
    work = Work(tmp_path)
    write_graphs(tmp_path / "graphs")
    for name, size in (("a.png", (30, 20)), ("val/b.png", (8, 9)), ("c.jpg", (24, 24))):
        work.picture(name, size)
    work.annotate(
        [
            {"image": "a.png", "caption": ["A dog.", "two dogs on the red red red house"]},
            {"image": "val/b.png", "caption": ["(picture) number 3!", "cat"]},
            {"image": "c.jpg", "caption": ["a 😀", "the cat, the dog"]},
        ]
    )
    return work


def test_a_vocabulary_of_other_captions_is_noticed(work: Work) -> None:
    work.annotate([{"image": "a.png", "caption": ["zebras graze near acacias", "a dog"]}])
    result = work.run()
    assert result.exit_code == 0, result.output
    assert "Warning: 67% of the captions' tokens are [UNK]; is this the vocabulary" in result.stdout


def many(work: Work, count: int) -> None:
    for number in range(count):
        work.picture(f"many/{number}.png", (10 + number, 12))
    work.annotate([{"image": f"many/{n}.png", "caption": [f"picture number {n}"]} for n in range(count)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written(work: Work, layout: str) -> None:
    result = work.run("--layout", layout)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"{work.out}: 3 pictures, 6 captions", "caption length: 3 to 9 tokens, mean 5.33"]
    data = read_retrieval(work.out, verify=True)
    tokenizer = CaptionTokenizer.load(work.root / "graphs/tokenizer")
    for number, name in enumerate(["a.png", "val/b.png", "c.jpg"]):
        pixels = read_image(work.root / "images" / name, 24, "bicubic")
        assert data.img[number].tobytes() == normalise(pixels, CONFIG.protocol.mean, CONFIG.protocol.std).tobytes()
    assert data.images == [
        {"image": "a.png", "width": 30, "height": 20},
        {"image": "val/b.png", "width": 8, "height": 9},
        {"image": "c.jpg", "width": 24, "height": 24},
    ]
    assert data.captions[1] == "two dogs on the red red red house"
    ids, mask = tokenizer.encode([pre_caption(caption, 6) for caption in data.captions], 12)
    np.testing.assert_array_equal(np.asarray(data.ids), ids)
    np.testing.assert_array_equal(np.asarray(data.mask), mask)
    assert data.image_of_text.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.broken == []
    assert data.protocol == {
        **json.loads(json.dumps(dataclasses.asdict(CONFIG.protocol))),
        "image_size": 24,
        "vocab": len(TOKENS) + 2,
        "encode_id": len(TOKENS) + 1,
        "decode_id": len(TOKENS),
        "pad_id": 0,
        "tokenizer_sha256": tokenizer.sha256,
        "pillow": PIL.__version__,
    }
    content = data.source.content
    assert content["images_root"] == str(work.root / "images")
    assert content["annotations"] == {"file": str(work.annotations), "sha256": manifest.file_record(work.annotations)["sha256"]}
    assert not list(work.out.parent.glob(".*"))


def test_workers_write_the_same_bytes_as_one_process(work: Work) -> None:
    many(work, workers.FEW + 5)
    assert work.run("--workers", "1").exit_code == 0
    alone = manifest.read(work.out, "data")
    result = work.run("--workers", "2")
    assert result.exit_code == 0, result.output
    assert manifest.read(work.out, "data").digest == alone.digest


def test_limit_keeps_the_first_pictures(work: Work) -> None:
    assert work.run("--limit", "2").exit_code == 0
    data = read_retrieval(work.out)
    assert ([image["image"] for image in data.images], len(data.captions)) == (["a.png", "val/b.png"], 4)
    assert work.run("--limit", "99").exit_code == 0
    assert len(read_retrieval(work.out).images) == 3


def test_split_of_karpathys_own_file(work: Work) -> None:
    pictures = [
        {"filename": name, "split": split, "sentences": [{"raw": "a dog"}]}
        for name, split in (("a.png", "test"), ("c.jpg", "val"))
    ]
    work.annotate({"images": pictures})
    assert work.run("--split", "val").exit_code == 0
    assert read_retrieval(work.out).images[0]["image"] == "c.jpg"
    assert "no picture in the split 'x'; it has test (1), val (1)" in work.refused("--split", "x")


def test_another_interpolation_is_written_and_said(work: Work) -> None:
    assert not work.run().stderr
    result = work.run("--interpolation", "bilinear")
    assert result.exit_code == 0
    assert result.stderr == "Warning: bilinear deviates from the model's protocol, bicubic; the figures will differ.\n"
    data = read_retrieval(work.out)
    assert data.protocol["interpolation"] == "bilinear"
    pixels = read_image(work.root / "images/a.png", 24, "bilinear")
    np.testing.assert_array_equal(data.img[0], normalise(pixels, CONFIG.protocol.mean, CONFIG.protocol.std))
    assert not work.run("--interpolation", "bicubic").stderr


def spoil(work: Work, name: str) -> None:
    path = work.root / "images" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("count", [3, workers.FEW + 8])
def test_broken_pictures_are_all_named_and_nothing_is_lost(work: Work, count: int) -> None:
    many(work, count)
    assert work.run("--workers", "2").exit_code == 0
    before = manifest.read(work.out, "data", verify=True).digest
    spoil(work, "many/0.png")
    spoil(work, "many/2.png")
    assert work.refused("--workers", "2") == (
        f"Error: 2 of {count} pictures cannot be used:\n"
        "  many/0.png (entry 0): cannot be decoded: image file is truncated\n"
        "  many/2.png (entry 2): cannot be decoded: image file is truncated\n"
        "Mend them, or leave them and their captions out with --skip-broken.\n"
    )
    assert manifest.read(work.out, "data", verify=True).digest == before


def test_missing_pictures_are_found_before_any_is_decoded(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    many(work, 15)
    for number in range(1, 15):
        (work.root / f"images/many/{number}.png").unlink()
    (work.root / "images/many/3.png").mkdir()
    (work.root / "images/many/4.png").touch()
    monkeypatch.setattr("preprocess.pictures.decode", lambda *_, **__: pytest.fail("decoded"))
    message = work.refused()
    assert message.startswith("Error: 14 of 15 pictures cannot be used:\n  many/1.png (entry 1): does not exist\n")
    assert "many/3.png (entry 3): is not a file\n  many/4.png (entry 4): is empty (0 bytes)\n" in message
    assert "\n  many/10.png (entry 10): does not exist\n  and 4 more\nMend them" in message


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", ["1", "2"])
def test_skip_broken_drops_lists_and_counts(work: Work, layout: str, number: str) -> None:
    count = workers.FEW + 8
    many(work, count)
    spoil(work, "many/1.png")
    (work.root / "images/many/7.png").unlink()
    (work.root / "images/many/39.png").write_text("text")
    result = work.run("--skip-broken", "--layout", layout, "--workers", number)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"{work.out}: 37 pictures, 37 captions"
    assert result.stdout.splitlines()[-1] == "left out: 3 broken pictures and their captions; the manifest lists them"
    data = read_retrieval(work.out, verify=True)
    kept = [n for n in range(count) if n not in (1, 7, 39)]
    assert [image["image"] for image in data.images] == [f"many/{n}.png" for n in kept]
    assert data.captions == [f"picture number {n}" for n in kept]
    assert data.image_of_text.tolist() == list(range(37))
    assert data.broken == [
        {"image": "many/1.png", "entry": 1, "reason": "cannot be decoded: image file is truncated"},
        {"image": "many/7.png", "entry": 7, "reason": "does not exist"},
        {"image": "many/39.png", "entry": 39, "reason": "is not a picture in a format that Pillow decodes by itself"},
    ]
    last = read_image(work.root / "images/many/38.png", 24, "bicubic")
    np.testing.assert_array_equal(data.img[36], normalise(last, CONFIG.protocol.mean, CONFIG.protocol.std))
    assert data.img.shape == (37, 3, 24, 24)


def test_nothing_remains(work: Work) -> None:
    many(work, 3)
    for number in range(3):
        (work.root / f"images/many/{number}.png").write_text("text")
    message = work.refused("--skip-broken")
    assert message.startswith("Error: 3 of 3 pictures cannot be used:\n  many/0.png (entry 0): is not a picture")
    assert message.endswith("Nothing would remain.\n")
    for number in range(3):
        (work.root / f"images/many/{number}.png").write_bytes(b"")
    assert work.refused("--skip-broken").endswith("Nothing would remain.\n")


def test_the_wrong_picture_folder(work: Work) -> None:
    wrong = work.root / "wrong"
    wrong.mkdir()
    assert work.refused("--images", str(wrong)) == (
        f"Error: None of the 3 pictures of {work.annotations} is in {wrong}; the first is a.png. "
        "--images takes the folder that these paths start from.\n"
    )
    assert work.refused("--images", str(work.root / "absent")).startswith(f"Error: There is no folder {work.root / 'absent'};")
    assert work.refused("--images", str(work.annotations)).startswith("Error: There is no folder")


def rewrite(work: Work, **arguments: Any) -> None:
    shutil.rmtree(work.root / "graphs")
    write_graphs(work.root / "graphs", **arguments)


def change_vocabulary(work: Work) -> None:
    path = work.root / "graphs/tokenizer/vocab.txt"
    path.write_text(path.read_text("utf-8").replace("dog", "cow"), "utf-8")  # the size stays


GRAPHS: list[tuple[Callable[[Work], object], str]] = [
    (lambda work: shutil.rmtree(work.root / "graphs"), "There is no folder"),
    (
        lambda work: (work.root / "graphs/manifest.json").unlink(),
        "it is not a complete graphs folder. Write the folder again with blip-export.",
    ),
    (lambda work: (work.root / "graphs/tokenizer/vocab.txt").unlink(), "vocab.txt is missing"),
    (change_vocabulary, "vocab.txt is not the file that was exported: its sha256 differs."),
    (lambda work: rewrite(work, without="tokenizer"), "names no config or tokenizer ('tokenizer')"),
    (lambda work: rewrite(work, without="config"), "names no config or tokenizer ('config')"),
    (
        lambda work: rewrite(work, tokens=[*TOKENS, "cow"]),
        f"has {len(TOKENS) + 3} tokens, counting those BLIP adds, but the model has {len(TOKENS) + 2}",
    ),
    (
        lambda work: rewrite(work, config=dataclasses.replace(CONFIG, protocol=Protocol(interpolation="lanczos", max_length=12))),
        "protocol.interpolation is 'lanczos', expected bicubic or bilinear",
    ),
]


@pytest.mark.parametrize("number", range(len(GRAPHS)))
def test_graphs_that_do_not_fit(work: Work, number: int) -> None:
    change, says = GRAPHS[number]
    change(work)
    message = work.refused()
    assert says in message
    assert message.count("\n") == 1


def test_misuse(work: Work) -> None:
    for options in (
        ["--workers", "0"],
        ["--limit", "0"],
        ["--layout", "x"],
        ["--interpolation", "nearest"],
        ["--nonsense"],
        ["--split"],
    ):
        work.refused(*options, code=2)
    assert CliRunner().invoke(main, ["retrieval"]).exit_code == 2
    assert CliRunner().invoke(main, ["retrieve"]).exit_code == 2


def test_an_out_that_is_not_ours_is_left_alone(work: Work) -> None:
    (work.out / "letters").mkdir(parents=True)
    assert "is not empty and is not a data folder" in work.refused(code=2)
    assert work.refused("--out", str(work.annotations), code=2) == f"Error: {work.annotations} is a file; --out takes a folder.\n"


def test_an_out_that_is_being_written(work: Work) -> None:
    with manifest.new_folder(work.out, "data"):
        result = work.run()
    assert result.exit_code == 1
    assert result.stderr == f"Error: Another run is writing {work.out}; wait for it, or choose another --out.\n"


def test_a_full_disk(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    assert work.run().exit_code == 0
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert re.fullmatch(r"Error: The disk is full while writing .*/img\.npy\. Free some space and run .*\n", work.refused())


def no_memory(*_: object) -> None:
    raise MemoryError


def test_no_memory(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocess.pictures.open_rgb", no_memory)
    assert work.refused() == f"Error: Not enough memory to decode {work.root}/images/a.png. Run again with fewer --workers.\n"


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_half_way(work: Work, number: signal.Signals, code: int) -> None:
    """Ctrl-C and kill -9: the older folder stays, no worker outlives its parent, and the next run does its work."""
    assert work.run().exit_code == 0
    before = manifest.read(work.out, "data").digest
    Image.new("RGB", (4000, 4000)).save(work.root / "images/slow.png")
    entries = [{"image": "slow.png", "caption": [f"picture {n}"]} for n in range(500)]
    (work.root / "slow.json").write_text(json.dumps(entries))
    words = ["--annotations", work.root / "slow.json", "--images", work.root / "images", "--graphs", work.root / "graphs"]
    command = [sys.executable, "-m", "preprocess", "retrieval", *map(str, words), "--out", str(work.out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: len(listing.read_text().split()) >= 3, "two workers and the resource tracker start")
    started = [int(child) for child in listing.read_text().split()]
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, "")
    wait_for(lambda: not any(map(alive, started)), "the workers end")
    assert manifest.read(work.out, "data", verify=True).digest == before
    if number == signal.SIGINT:
        assert not list(work.out.parent.glob(".*"))
        assert "Stopped." in stderr
        assert "Traceback" not in stderr, stderr
    assert work.run().exit_code == 0
    assert not list(work.out.parent.glob(".*"))


@pytest.mark.real_data
@pytest.mark.parametrize("layout", LAYOUTS)
def test_photographs_of_coco(work: Work, layout: str) -> None:
    """108 photographs, one of them grey, at the model's size."""
    data = Path(os.environ["BLIP_REAL_DATA"])
    vocabulary = (data / "tokenizers/bert-base-uncased/vocab.txt").read_text("utf-8").removesuffix("\n").split("\n")
    config = dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(CONFIG.vision, image_size=384),
        text=dataclasses.replace(CONFIG.text, vocab=30524, positions=512),
        protocol=Protocol(),
    )
    rewrite(work, config=config, tokens=vocabulary)
    root = data / "coco108"
    result = work.run(
        "--annotations", str(root / "annotations.json"), "--images", str(root / "images"), "--layout", layout, "--workers", "2"
    )
    assert result.exit_code == 0, result.output
    written = read_retrieval(work.out)
    entries = json.loads((root / "annotations.json").read_text("utf-8"))
    assert written.img.shape == (108, 3, 384, 384)
    assert [image["image"] for image in written.images] == [entry["image"] for entry in entries]
    modes = []
    for number, entry in enumerate(entries):
        with Image.open(root / "images" / entry["image"]) as picture:
            modes.append(picture.mode)
            assert (written.images[number]["width"], written.images[number]["height"]) == picture.size
            want = picture.convert("RGB").resize((384, 384), Image.Resampling.BICUBIC)
        if number % 9 == 0 or modes[-1] != "RGB":
            pixels = np.asarray(want).transpose(2, 0, 1)
            np.testing.assert_array_equal(written.img[number], normalise(pixels, config.protocol.mean, config.protocol.std))
    assert sum(mode != "RGB" for mode in modes) == 1
