"""demo/train_llm.py: what it writes is an OPT as published, the same for the same seed; demo/llm is one that knows captions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from torch import Tensor

from demo import train_llm
from models.caches import Before, Bias, bias_after
from models.checkpoint import load_generator
from models.llm_checkpoint import open_language_model
from models.llm_settings import check_settings, settings_of
from models.opt import Opt
from models.presets import BLIP2_OPT_DEMO, OPT_DEMO
from preprocess.bpe_words import OPT, BpeWords
from tests.test_bpe_words import assert_equal, original
from tests.their_generators import far

DEMO = Path(train_llm.__file__).parent
CLOSE = 2e-6  # of logits, as a part of the largest; 4e-7 was measured
HALF_CLOSE = 1e-5


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_llm, "SCENES", 300)
    monkeypatch.setattr(train_llm, "HELD_OUT", 50)
    monkeypatch.setattr(train_llm, "PAGES", 4)
    monkeypatch.setattr(train_llm, "LOG_EVERY", 5)


def trained(out: Path, seed: int = 1, steps: int = 10) -> Path:
    result = CliRunner().invoke(train_llm.main, ["--out", str(out), "--seed", str(seed), "--steps", str(steps)])
    assert result.exit_code == 0, result.output
    return out


def loaded(folder: Path) -> Opt:
    """As the second stage loads it, in float32."""
    source = open_language_model(folder, OPT_DEMO)
    settings = settings_of(folder)
    assert settings is not None
    check_settings(settings, OPT_DEMO, of_blip2=False)
    model = Opt(OPT_DEMO)
    tensors = {name.removeprefix("llm_model."): tensor.float() for name, tensor in source.tensors.items()}
    model.load_state_dict(tensors)
    return model.eval()


def logits(model: Opt, ids: Tensor) -> Tensor:
    places, mask = torch.arange(ids.shape[1]).expand_as(ids), torch.ones_like(ids)
    bias = Bias(bias_after(mask, ids.shape[1], None))
    return model.logits(model.states(model.embed(ids), places, bias, [Before()] * model.cfg.depth)[0])


def words_of(folder: Path) -> BpeWords:
    return BpeWords.load((folder / "vocab.json", folder / "merges.txt"))


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    folder = trained(tmp_path / "llm")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert isinstance(theirs, transformers.OPTForCausalLM)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (2, 2, 1)
    ids = torch.randint(4, OPT_DEMO.vocab, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = logits(loaded(folder), ids), theirs.eval()(input_ids=ids).logits
        assert far(found, wanted) < CLOSE
        assert far(found, theirs(input_ids=ids.flip(0)).logits) > 1e-2  # the comparison can fail


def test_its_words(tmp_path: Path) -> None:
    """transformers' tokenizer reads captions the same, each word of one is a token, and the folder fits the preset."""
    folder = trained(tmp_path / "llm", steps=1)
    lines = [line for scene in train_llm.texts("test", 50) for line in scene]
    words = words_of(folder)
    assert_equal(words, original(folder), lines, None)
    assert (words.start_ids, words.pad_id) == ((2,), 1)
    ids, mask = words.prompts([line + OPT.stop for line in lines])
    assert mask.sum(axis=1).tolist() == [len(line.split(" ")) + 2 for line in lines]
    assert {int(row[-1]) for row in ids} == set(words.stop_ids)
    assert words.size <= OPT_DEMO.vocab


def test_the_seed_says_all(tmp_path: Path) -> None:
    first, again, other = (trained(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt", train_llm.LOG):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert (first / "vocab.json").read_bytes() == (other / "vocab.json").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_its_log(tmp_path: Path) -> None:
    head, *steps, last = [
        json.loads(line) for line in (trained(tmp_path / "llm") / train_llm.LOG).read_text("utf-8").splitlines()
    ]
    assert (head["command"], head["seed"], head["steps"]) == ("python -m demo.train_llm --seed 1 --steps 10", 1, 10)
    assert [line["step"] for line in steps] == [5, 10]
    assert steps[1]["loss"] < steps[0]["loss"] < math.log(OPT_DEMO.vocab) * 1.1
    assert last["held_out_loss"] < steps[0]["loss"]


def test_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    result = CliRunner().invoke(train_llm.main, ["--out", str(tmp_path / "llm")])
    assert result.exit_code == 2
    assert "is there already" in result.output


def test_a_stopped_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is there is whole: `make train-blip2` goes on from it."""
    with monkeypatch.context() as patch:
        patch.setattr(train_llm, "write_model", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        result = CliRunner().invoke(train_llm.main, ["--out", str(tmp_path / "llm"), "--steps", "1"])
    assert result.exit_code == 130
    assert not list(tmp_path.iterdir())
    trained(tmp_path / "llm", steps=1)


def loss(model: Opt, words: BpeWords, lines: list[str]) -> float:
    """Of the words of the last line, after the others."""
    ids = train_llm.encoded(words, lines)
    page = torch.tensor([[word for line in ids for word in line]])
    count = len(ids[-1])
    with torch.no_grad():
        found = logits(model, page[:, :-1])[0, -count:].log_softmax(-1)
    return -float(found[torch.arange(count), page[0, -count:]].mean())


def test_the_demo_s_own_looks_up_what_was_said() -> None:
    """A line after another one of its scene is far likelier than after one of another scene: what the second stage builds on."""
    folder = DEMO / "llm"
    model, words = loaded(folder), words_of(folder)
    scenes = train_llm.texts("test", 50)
    own = sum(loss(model, words, [lines[0], lines[3]]) for lines in scenes) / 50
    other = sum(loss(model, words, [scenes[n - 7][0], lines[3]]) for n, lines in enumerate(scenes)) / 50
    assert own < other / 2


def test_the_demo_s_second_stage_is_whole() -> None:
    """As LAVIS publishes one: neither image encoder nor language model in its file."""
    _, report = load_generator(BLIP2_OPT_DEMO, DEMO / "blip2_opt.safetensors", DEMO / "blip2.safetensors", DEMO / "llm")
    assert report.vit is not None
    assert report.llm is not None
    assert not report.unexpected
    folder = sum(file.stat().st_size for file in (DEMO / "llm").iterdir())
    small = [DEMO / name for name in ("blip2.safetensors", "blip2_opt.safetensors")]
    assert folder + sum(file.stat().st_size for file in small) <= 12_000_000
