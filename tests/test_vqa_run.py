"""blip-run vqa: answers that are written and answers that are chosen, against the model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import manifest
from models.errors import UserError
from preprocess.dataset import read_vqa as read_data
from runtime import rank as ranking
from runtime import text_run
from runtime.outputs import VqaOutputs, read_vqa
from tests import chain
from tests.generators import export_generator
from tests.text_graphs import ANSWERS, CONFIGS, QUESTIONS, TorchDecoder, call_run, chain_of, stand_in, vqa_data

WRITERS = ("vqa", "opt", "llama", "t5")
TOLERANCE = 1e-4  # measured: 4e-6 of scores about 10, from the real graphs 7e-6


class Made:
    """Graphs of one kind, questions prepared for them, and the runs over both."""

    def __init__(self, root: Path, kind: str, graphs: Path, data: Path) -> None:
        self.root, self.kind, self.graphs, self.data, self.out = root, kind, graphs, data, root / "outputs"

    def run(self, *options: object, code: int = 0) -> str:
        """What the command prints; of one that fails, what it says."""
        result = call_run("vqa", self.graphs, self.out, "--data", self.data, *options)
        return chain.refusal(result, code) if code else chain.done(result)

    def answers(self, *options: object) -> VqaOutputs:
        self.run(*options)
        return read_vqa(self.out)

    @property
    def answer_file(self) -> Path:
        return self.data.parent / "answers.json"

    def choices(self, *options: object) -> VqaOutputs:
        """With the list of answers."""
        return self.answers("--answer-list", self.answer_file, *options)


Make = Callable[[str], Made]


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Every model reads the questions of BLIP's: data of one picture size and mean."""
    stand_in(monkeypatch)

    def made(kind: str) -> Made:
        root, base = tmp_path / kind, tmp_path_factory.getbasetemp()
        graphs = chain_of(root, kind, base) / "graphs"
        return Made(root, kind, graphs, chain_of(tmp_path / "asked", "vqa", base) / "data")

    return made


@pytest.fixture(params=WRITERS)
def made(request: pytest.FixtureRequest, make: Make) -> Made:
    return make(request.param)


@pytest.fixture
def blip(make: Make) -> Made:
    return make("vqa")


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real graphs for questions, of batches of 3 and 3 answers at a time."""
    return export_generator(tmp_path_factory.mktemp("static"), "vqa", "atc", "--batchsize", 3, "--beams", 3)


def texts(outputs: VqaOutputs) -> list[list[str]]:
    return [row["texts"] for row in outputs.generated]


def vocabulary(made: Made) -> list[str]:
    return [*(made.graphs / "tokenizer" / "vocab.txt").read_text("utf-8").split(), "[DEC]", "[ENC]"]


def ids_of(made: Made, text: str) -> list[int]:
    """WordPiece without the library, for the few words that are asked here."""
    found = vocabulary(made)
    ids = []
    for word in text.replace("?", " ?").replace("'", " ' ").replace("fish", " ##fish").split():
        ids.append(found.index(word) if word in found else found.index("[UNK]"))
    return ids


def states_of(made: Made, model: Any, picture: np.ndarray, question: str) -> Tensor:
    """(1, L, D): the question read beside the picture, [ENC] first, without padding."""
    ids = torch.tensor([[31, *ids_of(made, question), 3]])
    states: Tensor = model.question_states(ids, torch.ones_like(ids), model.image_feat(torch.tensor(picture)[None]))
    return states


def ranked(made: Made, model: Any, states: Tensor, k: int, smoothing: float = 0.1) -> list[tuple[str, float]]:
    """The answers as salesforce/BLIP ranks them: one batch of k whole answers, padded, and torch's own loss."""
    rows = [[30, *ids_of(made, answer), 3] for answer in ANSWERS]  # [DEC] ... [SEP]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    cross = model.cross_kv(states)
    first = model.text_decoder(ids[:1, :1], torch.ones(1, 1, dtype=torch.int64), cross)[:, 0].softmax(1)
    chosen = first[0, ids[:, 1]].argsort(descending=True, stable=True)[:k]  # topk, with an order among equals
    words = ids[chosen]
    wide = [(key.expand(k, -1, -1, -1), value.expand(k, -1, -1, -1)) for key, value in cross]
    logits = model.text_decoder(words, (words != 0).to(torch.int64), wide)[:, :-1]  # (k, W, V)
    targets = words.masked_fill(words == 0, -100)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    total = -loss.view(k, -1).sum(1)
    return sorted(((ANSWERS[a], float(score)) for a, score in zip(chosen, total, strict=True)), key=lambda pair: -pair[1])


def test_outputs(made: Made) -> None:
    outputs = made.answers("--num-return", 2)
    data = read_data(made.data)
    assert (
        [each["question_id"] for each in outputs.answers] == [q["question_id"] for q in data.questions] == list(range(100, 109))
    )
    assert [each["answer"] for each in outputs.answers] == [row[0] for row in texts(outputs)]
    assert [list(row) for row in outputs.generated] == [["question", "prompt", "texts", "scores", "tokens"]] * 9
    template = "{}" if made.kind == "vqa" else "Question: {} Short answer:"
    assert [row["prompt"] for row in outputs.generated[:2]] == [
        template.format("what color is the car?"),
        template.format("two?"),
    ]
    assert max(max(row["tokens"]) for row in outputs.generated) <= (9 if made.kind == "vqa" else 10)
    run = outputs.run
    assert run["task"] == "vqa"
    assert (run["options"]["inference"], run["options"]["num_return"]) == ("generate", 2)
    assert sorted(outputs.source.files) == ["answers.json", "generated.json", "journal.jsonl"]


@pytest.mark.parametrize("options", [(), ("--do-sample", "--seed", 3)], ids=str)
def test_batches_do_not_matter(made: Made, options: tuple[object, ...]) -> None:
    """Questions of unequal length, alone and together, in whatever order the pictures bring them."""
    one = texts(made.answers("--batchsize", 1, *options))
    assert texts(made.answers("--batchsize", 3, *options)) == one


def test_greedy_answers_are_the_models_own(blip: Made) -> None:
    model, data = TorchDecoder(CONFIGS["vqa"]).model, read_data(blip.data)
    outputs, words = blip.answers("--num-beams", 1), vocabulary(blip)
    for question, row in zip(data.questions, outputs.generated, strict=True):
        cross = model.cross_kv(states_of(blip, model, data.img[question["image"]], row["prompt"]))
        ids = [30]
        while len(ids) < 10 and ids[-1] != 3:
            said = torch.tensor([ids])
            ids.append(int(model.text_decoder(said, torch.ones_like(said), cross)[0, -1].argmax()))
        assert row["tokens"] == [len(ids) - 1 - (ids[-1] == 3)]
        spoken = [words[n] for n in ids[1:] if n not in range(5) and n < 30]
        assert row["texts"][0].replace(" ", "") == "".join(spoken).replace("##", "")


@pytest.mark.parametrize("k", [1, 4, 7, 128])
def test_ranked_answers_are_torchs_own(blip: Made, k: int) -> None:
    model, data = TorchDecoder(CONFIGS["vqa"]).model, read_data(blip.data)
    outputs = blip.choices("--k-test", k, "--num-return", 12)
    assert outputs.run["options"]["inference"] == "rank"  # of itself, where there is a list
    for question, row in zip(data.questions, outputs.generated, strict=True):
        states = states_of(blip, model, data.img[question["image"]], row["prompt"])
        wanted = ranked(blip, model, states, min(k, len(ANSWERS)))
        np.testing.assert_allclose(row["scores"], [score for _, score in wanted], atol=TOLERANCE)
        assert row["texts"] == [answer for answer, _ in wanted]
        assert outputs.answers[row["question"]]["answer"] == row["texts"][0]
    assert len({row[0] for row in texts(outputs)}) > 1  # questions matter


def test_the_smoothing_counts(blip: Made) -> None:
    """Scores without it would be others: the comparison above can fail."""
    model, data = TorchDecoder(CONFIGS["vqa"]).model, read_data(blip.data)
    row, question = blip.choices("--num-return", 12).generated[0], data.questions[0]
    states = states_of(blip, model, data.img[question["image"]], row["prompt"])
    unsmoothed = [score for _, score in ranked(blip, model, states, 12, smoothing=0.0)]
    assert np.abs(np.array(row["scores"]) - unsmoothed).max() > 100 * TOLERANCE


def test_ranking_in_parts(blip: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many questions fit the memory, and however many answers a graph takes at a time."""
    whole = blip.choices("--num-return", 5)
    monkeypatch.setattr(ranking, "BLOCK_BYTES", 1)
    assert texts(blip.choices("--num-return", 5, "--restart")) == texts(whole)
    monkeypatch.setattr("runtime.generator.columns_of", lambda graphs: 5)
    parts = blip.choices("--num-return", 5, "--restart")
    assert texts(parts) == texts(whole)
    np.testing.assert_allclose(*([row["scores"] for row in found.generated] for found in (whole, parts)), atol=1e-5)


def test_the_list_may_be_part_of_the_data(blip: Made) -> None:
    given = blip.choices()
    blip.data = vqa_data(blip.data.parent, blip.graphs, "--answer-list", blip.answer_file)
    own = blip.answers()
    assert (own.run["options"]["answers"], texts(own)) == ([*ANSWERS], texts(given))
    assert blip.answers("--inference", "generate").run["options"]["inference"] == "generate"
    assert own.run["options"]["k_test"] == 12
    assert "larger than the list" not in blip.run("--restart")  # nobody asked for 128
    assert "k_test 128 is larger than the list: all 12 answers are ranked." in blip.run("--restart", "--k-test", 128)
    (blip.root / "few.json").write_text('["cat", "two"]', "utf-8")
    assert {row[0] for row in texts(blip.answers("--answer-list", blip.root / "few.json"))} <= {"cat", "two"}


def test_a_list_that_nobody_named_is_in_nobodys_way(make: Make) -> None:
    """That of the data, with a model that writes."""
    opt = make("opt")
    vqa_data(opt.data.parent, opt.data.parent / "graphs", "--answer-list", opt.answer_file)
    assert read_data(opt.data).answer_list == [*ANSWERS]
    assert opt.answers().run["options"]["inference"] == "generate"


def test_padding_is_looked_at_only_when_asked(blip: Made) -> None:
    """The original's `generate` looks at it, and answers depend on the longest question of a batch."""
    alone = blip.answers("--attend-padding", "--batchsize", 1, "--num-beams", 1).generated
    assert [row["scores"] for row in alone] == [
        row["scores"] for row in blip.answers("--num-beams", 1, "--batchsize", 1).generated
    ]
    together = blip.answers("--attend-padding", "--num-beams", 1).generated
    assert max(abs(a["scores"][0] - b["scores"][0]) for a, b in zip(alone, together, strict=True)) > 100 * TOLERANCE


def test_each_picture_is_looked_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = stand_in(monkeypatch)
    make("vqa").run("--batchsize", 3)
    assert opened[0].looked == [3, 1]  # 4 pictures, 9 questions


def test_templates(make: Make) -> None:
    opt, llama = make("opt"), make("llama")
    prompts = [row["prompt"] for row in opt.answers("--prompt", "Question: {} Answer:").generated]
    assert prompts[0] == "Question: what color is the car? Answer:"
    assert texts(read_vqa(opt.out)) != texts(opt.answers())
    row = llama.answers("--as", "mindformers").generated[0]
    assert row["prompt"] == "question what color is the car? answer"
    assert not row["texts"][0].startswith(row["prompt"])  # its captions echo the prompt; what scores answers would not take it
    (row, *_) = llama.answers("--as", "mindformers", "--echo-prompt", "true").generated
    assert row["texts"][0].startswith(row["prompt"])


@pytest.mark.parametrize("kind", ["vqa", "opt"])
def test_questions_on_the_command_line(make: Make, kind: str) -> None:
    made = make(kind)
    images = ",".join(str(made.root / "images" / f"{n}.png") for n in range(3))
    asked = ("--images", images, "--questions", ",".join(QUESTIONS[:3]))
    printed = chain.done(call_run("vqa", made.graphs, made.out, *asked))
    outputs = read_vqa(made.out)
    assert [each["question_id"] for each in outputs.answers] == [0, 1, 2]
    for n, row in enumerate(texts(outputs)):
        assert f"{made.root}/images/{n}.png: {QUESTIONS[n]} {row[0]}\n" in printed
    file = made.root / "lines.txt"
    file.write_text("\n".join(QUESTIONS[:3]) + "\n", "utf-8")
    again = chain.done(call_run("vqa", made.graphs, made.out, "--images", images, "--questions-file", file))
    assert "nothing to do" in again
    assert again.count(".png: ") == 3
    if made.kind == "vqa":
        chain.done(call_run("vqa", made.graphs, made.out, *asked, "--answer-list", made.answer_file))
        assert {row[0] for row in texts(read_vqa(made.out))} <= set(ANSWERS)


def test_a_stopped_run_goes_on(blip: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards never part the questions about a picture, whose files are merged into the order of the data."""
    monkeypatch.setattr(text_run, "REQUESTS_PER_SHARD", 2)
    names = ("answers.json", "generated.json")
    blip.choices()
    wanted = [(blip.out / name).read_bytes() for name in names]
    blip.out.rename(blip.root / "first")
    real = text_run.Rows.write

    def stopped(self: text_run.Rows, start: int, rows: list[Any]) -> None:
        real(self, start, rows)
        if start:
            raise KeyboardInterrupt

    monkeypatch.setattr(text_run.Rows, "write", stopped)
    result = call_run("vqa", blip.graphs, blip.out, "--data", blip.data, "--answer-list", blip.answer_file)
    assert result.exit_code == 130
    monkeypatch.setattr(text_run.Rows, "write", real)
    resumed = blip.choices()
    assert [(blip.out / name).read_bytes() for name in names] == wanted
    assert resumed.run["timings"][0]["resumed"] == 3  # of picture 0


def test_long_questions_are_cut_and_it_is_said(blip: Made) -> None:
    blip.run()
    (blip.root / "lines.txt").write_text("is a red dog " * 20, "utf-8")
    asked = ("--images", blip.root / "images" / "0.png", "--questions-file", blip.root / "lines.txt")
    for more in ((), ("--answer-list", blip.answer_file)):
        printed = chain.done(call_run("vqa", blip.graphs, blip.out, *asked, *more))
        assert "prompts have more than 35 tokens; they are cut, as the original does." in printed


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("generated.json", lambda rows: rows[0].update(texts=["x"])),
        ("generated.json", lambda rows: rows[0].update(question=3)),
        ("answers.json", lambda rows: rows.reverse()),
        ("answers.json", lambda rows: rows[0].update(question_id=True)),
    ],
)
def test_damaged_outputs(blip: Made, file: str, change: Any) -> None:
    blip.run("--max-length", 3)
    rows = json.loads((blip.out / file).read_text("utf-8"))
    change(rows)
    (blip.out / file).write_text(json.dumps(rows), "utf-8")
    found = json.loads((blip.out / manifest.NAME).read_text("utf-8"))
    manifest.write(blip.out, "outputs", {key: found[key] for key in found.keys() - {"format", "kind", "made_by", "files"}})
    with pytest.raises(UserError, match="contradicts itself"):
        read_vqa(blip.out)


def test_real_graphs_say_what_the_model_says(static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static ones: answers written by 3 beams, and 12 ranked where 3 go through the decoder at a time."""
    made = Made(tmp_path, "vqa", static, vqa_data(tmp_path, static))
    options = [("--batchsize", 4, "--num-return", 3), ("--answer-list", made.answer_file, "--num-return", 12)]
    ours = [made.answers(*each) for each in options]
    stand_in(monkeypatch)
    theirs = [made.answers(*each, "--restart") for each in options]
    for our, their in zip(ours, theirs, strict=True):
        assert texts(our) == texts(their)
        scores = [np.array([row["scores"] for row in outputs.generated]) for outputs in (our, their)]
        np.testing.assert_allclose(*scores, atol=TOLERANCE)
