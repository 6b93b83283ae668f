"""demo/: the drawn pictures and their captions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from demo import shapes
from demo.captions import captions
from demo.scenes import NOTHING, SPLITS, TOGETHER, Scene, Things, is_held_out, near_duplicates, random_scene, scenes
from models import manifest
from models.errors import Misuse
from models.presets import PRESETS
from preprocess.annotations import read_annotations
from preprocess.text import CaptionTokenizer, pre_caption

VOCABULARY = Path(__file__).parent.parent / "demo" / "tokenizer" / "vocab.txt"
SCENE = Scene(False, "grey", Things(1, "red", "circle", "small"), Things(2, "blue", "square", "large"))


def drawn(split: str, count: int, seed: int = 1) -> list[Scene]:
    return [scene for scene, _, _ in scenes(split, count, seed)]


def test_same_arguments_draw_the_same(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert shapes.write(tmp_path / folder, "test", 7, 3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 7 + 2
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_seed_draws_another_set(tmp_path: Path) -> None:
    assert shapes.write(tmp_path, "test", 7, 3)
    before = (tmp_path / "test.json").read_text("utf-8")
    assert not shapes.write(tmp_path, "test", 7, 3)
    assert shapes.write(tmp_path, "test", 7, 4)
    assert (tmp_path / "test.json").read_text("utf-8") != before


def test_pictures_that_were_removed_are_drawn_again(tmp_path: Path) -> None:
    shapes.write(tmp_path, "test", 3, 1)
    shutil.rmtree(tmp_path / "test")
    assert shapes.write(tmp_path, "test", 3, 1)
    assert len(list((tmp_path / "test").iterdir())) == 3


def test_a_smaller_set_replaces_a_larger_one(tmp_path: Path) -> None:
    shapes.write(tmp_path, "test", 10, 1)
    shapes.write(tmp_path, "test", 5, 1)
    assert len(list((tmp_path / "test").iterdir())) == len(json.loads((tmp_path / "test.json").read_text("utf-8"))) == 5


def test_a_stopped_run_is_not_taken_for_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "captions", stop)
    with pytest.raises(KeyboardInterrupt):
        shapes.write(tmp_path, "test", 5, 1)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert shapes.write(tmp_path, "test", 5, 1)


@pytest.mark.parametrize("theirs", ["test.json", "test/photo.jpg"])
def test_what_others_made_is_not_replaced(theirs: str, tmp_path: Path) -> None:
    file = tmp_path / theirs
    file.parent.mkdir(exist_ok=True)
    file.write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Misuse, match=r"not drawn by demo\.shapes"):
        shapes.write(tmp_path, "test", 5, 1)
    assert sorted(tmp_path.rglob("*")) == before
    assert file.read_text() == "kept"
    assert shapes.write(tmp_path, "train", 5, 1)  # has other names


def test_a_run_stopped_between_its_renames_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures lie there and the annotations do not: they count as drawn here, and the set is not taken for whole."""
    plain = manifest.write_text

    def stop(path: Path, text: str) -> None:
        if path.name == "test.json":
            raise KeyboardInterrupt
        plain(path, text)

    monkeypatch.setattr(manifest, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        shapes.write(tmp_path, "test", 5, 1)
    assert (tmp_path / "test" / "0005.png").is_file()
    monkeypatch.undo()
    assert shapes.write(tmp_path, "test", 5, 1)
    assert len(read_annotations(tmp_path / "test.json").images) == 5


def test_the_form_is_karpathys(tmp_path: Path) -> None:
    shapes.write(tmp_path, "test", 5, 1)
    found = read_annotations(tmp_path / "test.json")
    assert found.images[0] == "test/0001.png"
    assert len(found.captions) == 25
    assert [e["image_id"] for e in json.loads((tmp_path / "test.json").read_text("utf-8"))] == [1, 2, 3, 4, 5]
    with Image.open(tmp_path / found.images[0]) as picture:
        assert picture.size == (shapes.SIDE, shapes.SIDE)
        assert picture.mode == "RGB"


@pytest.mark.parametrize("seed", [1, 2])
def test_held_out_scenes_are_never_trained_on(seed: int) -> None:
    trained, held_out = {s.key for s in drawn("train", 1500, 1)}, {s.key for s in drawn("test", 500, seed)}
    assert not trained & held_out
    # By construction: the scene alone decides, so no seed and no count can mix the splits.
    assert all(is_held_out(s) for s in drawn("test", 500, seed))
    assert not any(is_held_out(s) for s in drawn("train", 1500, seed))


def test_size_and_layout_do_not_hold_out() -> None:
    other = Scene(False, "grey", Things(1, "red", "circle", "large"), Things(2, "blue", "square", "small"))
    assert other.key == SCENE.key


def test_held_out_scenes_all_differ_and_show_two_groups() -> None:
    found = drawn("test", 500)
    assert len({s.key for s in found}) == 500
    assert not any(s.simple for s in found)


def test_simple_scenes_come_first_in_training() -> None:
    simple = [s.simple for s in drawn("train", 300)]
    assert all(simple[:100])
    assert not any(simple[100:])


def test_families_differ_from_their_first_in_one_thing() -> None:
    found = drawn("test", 100)
    for start in range(0, 100, TOGETHER):
        first, *others = found[start : start + TOGETHER]
        assert len({s.key for s in (first, *others)}) == TOGETHER
        near = {s.key for kind in near_duplicates(first) for s in kind}
        assert all(s.key in near for s in others)


def test_every_kind_of_near_duplicate_is_there() -> None:
    kinds = near_duplicates(SCENE)
    assert [len(kind) for kind in kinds] == [1, 1, 1, 1, 4, 8, 10, 4]
    assert {s.key for s in kinds[0] + kinds[2]} == {
        "1 blue circle | 2 red square on grey",  # colours swapped: the same words, the same colours
        "2 blue square | 1 red circle on grey",  # sides swapped
    }


def test_simple_scenes_have_near_duplicates_of_one_group() -> None:
    simple = Scene(True, "grey", NOTHING, SCENE.second)
    assert all(s.simple and s.sound for kind in near_duplicates(simple) for s in kind)


def test_five_captions_of_different_build() -> None:
    texts = captions(SCENE, np.random.default_rng(0))
    assert len(set(texts)) == 5
    words = [set(text.split()) for text in texts]
    for n, a in enumerate(words):
        for b in words[n + 1 :]:
            # The share of common words between two forms: at most 0.57 here; one template with synonyms would have nearly all.
            assert len(a & b) / len(a | b) < 0.65


def test_captions_tell_all_scenes_apart() -> None:
    """A caption of a held-out picture is a caption of no other held-out picture."""
    seen: dict[str, int] = {}
    for number, (scene, _, wording) in enumerate(scenes("test", 500, 1)):
        for text in captions(scene, np.random.default_rng(wording)):
            assert seen.setdefault(text, number) == number


def test_words_alone_do_not_tell_pictures_apart() -> None:
    """Near-duplicates whose captions have the very same words in another order are in the set."""
    bags: dict[str, set[int]] = {}
    for number, (scene, _, wording) in enumerate(scenes("test", 500, 1)):
        for text in captions(scene, np.random.default_rng(wording)):
            bags.setdefault(" ".join(sorted(text.split())), set()).add(number)
    shared = sum(len(pictures) > 1 for pictures in bags.values())
    assert shared > 100  # 158 of 2,331 bags


def test_no_caption_has_an_unknown_word() -> None:
    config = PRESETS["blip-demo"]
    tokenizer = CaptionTokenizer.load(VOCABULARY, config)
    assert tokenizer.size == config.text.vocab
    unknown = VOCABULARY.read_text("utf-8").split("\n").index("[UNK]")
    rng = np.random.default_rng(0)
    texts = [text for n in range(1500) for text in captions(random_scene(rng, simple=n % 3 == 0), rng)]
    ids, mask = tokenizer.encode([pre_caption(t, config.protocol.max_words) for t in texts], config.protocol.max_length)
    assert not (ids == unknown).any()
    # No caption is cut: of each the last token is [SEP] and stands before the end.
    assert (mask.sum(1) == [len(t.split()) + 2 for t in texts]).all()


def test_the_picture_shows_the_colours_where_the_scene_says() -> None:
    pixels = np.asarray(shapes.draw(SCENE, np.random.default_rng(0)))
    half = shapes.SIDE // 2

    def share(part: np.ndarray, colour: str) -> float:
        return float((np.abs(part.astype(int) - shapes.COLOURS[colour]).max(2) < 3).mean())

    assert share(pixels[:, :half], "red") > 0.02
    assert share(pixels[:, half:], "blue") > 0.1
    assert share(pixels[:, half:], "red") == share(pixels[:, :half], "blue") == 0


@pytest.mark.parametrize("kind", shapes.OUTLINES)
def test_shapes_stay_inside_the_picture(kind: str) -> None:
    things = Things(3, "red", kind, "large")
    for seed in range(20):
        pixels = np.asarray(shapes.draw(Scene(False, "grey", things, SCENE.second), np.random.default_rng(seed)))
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == shapes.BACKGROUNDS["grey"]).all()


@pytest.mark.parametrize(("split", "count"), [("test", 0), ("test", -1), ("train", SPLITS["train"] + 1)])
def test_counts_out_of_reach(split: str, count: int, tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="--count"):
        shapes.write(tmp_path, split, count, 1)


def test_the_command(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--split", "test", "--count", "5", "--seed", "9"]
    first, second = (CliRunner().invoke(shapes.main, arguments) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert first.output.strip().endswith("5 pictures")
    assert second.output.strip().endswith("drawn before")
    wrong = CliRunner().invoke(shapes.main, ["--count", "0", "--out", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "Traceback" not in wrong.output
