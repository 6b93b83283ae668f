"""`blip-train probe`: the losses of a stage-1 checkpoint on pictures with captions, and what is said when it cannot be done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from models import config_file
from models.blip2 import Blip2Stage1
from models.huggingface import to_huggingface
from preprocess.text import CaptionTokenizer
from tests.chain import TOKENS
from tests.test_stage1 import plain_itc, plain_itm, plain_lm, plain_negatives, plain_sims
from tests.tiny import TINY2, random_stage1, save_weights
from training import probe
from training.__main__ import main
from training.step import Batch

LINE = re.compile(r"overall ([\d.]+)  itc ([\d.]+)  itm ([\d.]+)  lm ([\d.]+)\n?")
CAPTIONS = ["word1 word2 word3", "Word7, (word8)!", "word4 " * 40, "long1er1 word9"]
# Six digits are printed, and the losses differ by up to 1.2e-6 from plain re-computations (tests/test_stage1.py).
EXACT = 3e-6


@pytest.fixture(scope="module")
def model() -> Blip2Stage1:
    return random_stage1()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, model: Blip2Stage1) -> Path:
    """Pictures, sizes, a vocabulary, and the model in the layouts that a checkpoint may have."""
    folder = tmp_path_factory.mktemp("probe")
    random = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "vocab.txt").write_text("\n".join(TOKENS) + "\n", "utf-8")
    (folder / "sizes.json").write_text(json.dumps(config_file.to_dict(TINY2)), "utf-8")
    save_weights(model, folder / "ours.safetensors")
    write_lavis(folder, model)
    save_file(to_huggingface(model.state_dict(), TINY2), folder / "huggingface.safetensors")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0broken")
    return folder


def write_lavis(folder: Path, model: Blip2Stage1) -> None:
    """lavis.pth as LAVIS writes it: under "model", with the tied copies; stage1.pth without the image encoder, vit.pth it."""
    state = dict(model.state_dict())
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(TINY2.qformer.positions)[None]
    state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
    state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    torch.save({"model": state}, folder / "lavis.pth")
    torch.save({"model": {n: t for n, t in state.items() if not n.startswith("visual_encoder.")}}, folder / "stage1.pth")
    torch.save(model.visual_encoder.state_dict(), folder / "vit.pth")


def run(work: Path, *more: object, weights: str = "ours.safetensors") -> Result:
    """blip-train probe with what `more` says."""
    fixed: list[object] = ["--config", work / "sizes.json", "--tokenizer", work / "vocab.txt", "--checkpoint", work / weights]
    return CliRunner().invoke(main, ["probe", *map(str, [*fixed, *more])])


def pairs(work: Path, pictures: str, texts: list[str] | None = None) -> list[object]:
    """Options for pictures by their letters, each with the caption at its place."""
    names = [option for name in pictures for option in ("--image", work / f"{name}.png")]
    return names + [option for text in texts or CAPTIONS[: len(pictures)] for option in ("--text", text)]


def losses(result: Result) -> list[float]:
    """Overall, ITC, ITM and LM as they were printed."""
    assert result.exit_code == 0, result.output
    found = LINE.fullmatch(result.stdout.splitlines()[-1])
    assert found, result.stdout
    return [float(value) for value in found.groups()]


def batch_of(work: Path, pictures: str) -> Batch:
    """What `pairs` names, read plainly."""
    words = CaptionTokenizer.load(work / "vocab.txt", TINY2)
    captions = ["word1 word2 word3", "word7, word8", " ".join(["word4"] * 40), "long1er1 word9"][: len(pictures)]
    ids, mask = (torch.from_numpy(x) for x in words.encode(captions, 32))
    protocol, rows = TINY2.protocol, []
    for name in pictures:
        with Image.open(work / f"{name}.png") as file:
            pixels = np.asarray(file.resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
        rows.append(torch.from_numpy(((pixels - protocol.mean) / protocol.std).transpose(2, 0, 1)).float())
    return Batch(torch.tensor(["abcd".index(name) for name in pictures]), torch.stack(rows), ids, mask)


@pytest.mark.parametrize("weights", ["ours.safetensors", "lavis.pth"])
def test_one_pair(weights: str, work: Path, model: Blip2Stage1) -> None:
    result = run(work, *pairs(work, "a"), weights=weights)
    overall, itc, itm, lm = losses(result)
    batch = batch_of(work, "a")
    assert "itc 0.000000" in result.stdout
    assert "-0.000000" not in result.stdout
    assert itm == pytest.approx(plain_itm(model, batch, [0], [0])[0], abs=EXACT)
    assert lm == pytest.approx(plain_lm(model, batch, len(TOKENS)), abs=EXACT)
    assert overall == pytest.approx(itc + itm + lm, abs=EXACT)


@pytest.mark.parametrize("pictures", ["abcd", "abac"], ids=["all different", "one twice"])
def test_several_pairs(pictures: str, work: Path, model: Blip2Stage1) -> None:
    batch = batch_of(work, pictures)
    overall, itc, itm, lm = losses(run(work, *pairs(work, pictures), "--seed", 7))
    sims, numbers = plain_sims(model, batch), batch.pictures.tolist()
    assert itc == pytest.approx(plain_itc(sims, numbers), abs=EXACT)
    assert itm == pytest.approx(plain_itm(model, batch, *plain_negatives(sims, numbers))[0], abs=EXACT)
    assert lm == pytest.approx(plain_lm(model, batch, len(TOKENS)), abs=EXACT)
    assert overall == pytest.approx(itc + itm + lm, abs=EXACT)
    assert itc > 0.1


def test_layouts_say_the_same_and_seeds_draw_other_negatives(work: Path) -> None:
    said = [
        losses(run(work, *pairs(work, "abcd"), *more, weights=weights))
        for weights, more in (("ours.safetensors", []), ("lavis.pth", []), ("stage1.pth", ["--vit-checkpoint", work / "vit.pth"]))
    ]
    assert said[0] == said[1] == said[2]
    others = [losses(run(work, *pairs(work, "abcd"), "--seed", seed)) for seed in range(1, 5)]
    assert {other[2] for other in others} != {said[0][2]}  # ITM alone depends on what is drawn
    assert all((other[1], other[3]) == (said[0][1], said[0][3]) for other in others)


def test_a_picture_has_one_number_however_it_is_spelt(work: Path) -> None:
    words = CaptionTokenizer.load(work / "vocab.txt", TINY2)
    (work / "below").mkdir(exist_ok=True)
    batch = probe.pairs(TINY2, words, [work / "a.png", work / "b.png", work / "below" / ".." / "a.png"], CAPTIONS[:3])
    assert batch.pictures.tolist() == [0, 1, 0]
    assert batch.ids.shape == batch.mask.shape == (3, 32)  # the third caption is longer, and cut
    assert torch.equal(batch.image[0], batch.image[2])


@pytest.mark.parametrize(
    ("more", "weights", "code", "said"),
    [
        (["--image", "none.png", "--text", "word1"], "ours.safetensors", 1, "none.png does not exist"),
        (["--image", "broken.jpg", "--text", "word1"], "ours.safetensors", 1, "broken.jpg cannot be decoded"),
        (["--image", "vocab.txt", "--text", "word1"], "ours.safetensors", 1, "vocab.txt is not a picture"),
        (["--image", ".", "--text", "word1"], "ours.safetensors", 1, "is not a file"),
        (["--image", "a.png", "--image", "b.png", "--text", "word1"], "ours.safetensors", 2, "2 pictures and 1 texts"),
        (["--image", "a.png"], "ours.safetensors", 2, "Missing option '--text'"),
        (["--text", "word1"], "ours.safetensors", 2, "Missing option '--image'"),
        (["--image", "a.png", "--text", " .!"], "ours.safetensors", 2, "The text ' .!' has no words"),
        (["--image", "a.png", "--text", "\u200b"], "ours.safetensors", 2, "has no words. Write a caption"),
        (["--image", "a.png", "--text", "word1"], "none.safetensors", 1, "There is no checkpoint"),
        (["--image", "a.png", "--text", "word1"], "huggingface.safetensors", 1, "head over the vocabulary"),
        (["--image", "a.png", "--text", "word1"], "stage1.pth", 1, "Add --vit-checkpoint"),
        (["--image", "a.png", "--text", "word1"], "vocab.txt", 1, "vocab.txt"),
        (["--image", "a.png", "--text", "word1", "--vit-checkpoint", "vit.pth"], "ours.safetensors", 2, "already holds"),
        (["--image", "a.png", "--text", "word1", "--vit-checkpoint", "none.pth"], "stage1.pth", 1, "There is no checkpoint"),
        (["--image", "a.png", "--text", "word1", "--model", "blip2-demo"], "ours.safetensors", 2, "both give the sizes"),
    ],
)
def test_refusals(more: list[str], weights: str, code: int, said: str, work: Path) -> None:
    files = {"none.png", "none.pth", "vit.pth", "broken.jpg", "vocab.txt", ".", "a.png", "b.png"}
    result = run(work, *(work / option if option in files else option for option in more), weights=weights)
    assert result.exit_code == code, result.output
    assert said in result.output
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, Exception)
    assert not result.stdout


def test_other_models_and_vocabularies_are_refused(work: Path) -> None:
    sizes: list[object] = ["--model", "blip-demo"]
    result = CliRunner().invoke(main, ["probe", *map(str, [*sizes, *pairs(work, "a")])])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "blip-demo has the sizes of Blip; expected those of BLIP-2's first stage" in result.output
    result = run(work, *pairs(work, "a"), "--tokenizer", Path(__file__).parent.parent / "demo" / "tokenizer")
    assert result.exit_code == 1
    assert "has 84 tokens" in result.output
    assert "has 59" in result.output


def test_pictures_and_texts_are_looked_at_before_the_checkpoint(work: Path) -> None:
    """A published one takes a minute to read."""
    result = run(work, "--image", work / "none.png", "--text", "word1", weights="none.safetensors")
    assert "none.png does not exist" in result.output
