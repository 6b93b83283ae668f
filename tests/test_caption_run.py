"""blip-run caption: what it writes, that it is what the model says, and that a stopped run goes on.

PyTorch stands in for the graphs where the graphs are not what is tested (tests/text_graphs.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import manifest
from models.errors import UserError
from preprocess.dataset import read_caption as read_data
from preprocess.spaces import clean_up
from runtime import text_run
from runtime.listed import ids_of
from runtime.outputs import CaptionOutputs, read_caption
from runtime.text_run import on_one_line
from tests import chain
from tests.generators import export_generator
from tests.text_graphs import CONFIGS, TorchDecoder, call_run, caption_data, chain_of, stand_in

PROMPTS = ("a picture of", "the red", "", "two", "a dog", "", "what color is a cat")  # of several lengths
KINDS = ("caption", "opt", "llama", "t5")
BRIEF = ("--num-beams", 2, "--min-length", 2, "--max-length", 12)  # a model that reads all again for each word is slow


class Made:
    """Graphs of one kind, pictures prepared for them, and the runs over both."""

    def __init__(self, root: Path, kind: str, base: Path) -> None:
        self.root, self.kind = chain_of(root, kind, base), kind
        self.graphs, self.data, self.out = root / "graphs", root / "data", root / "outputs"

    def run(self, *options: object, code: int = 0) -> str:
        """What the command prints; of one that fails, what it says."""
        result = call_run("caption", self.graphs, self.out, *BRIEF, "--data", self.data, *options)
        return chain.refusal(result, code) if code else chain.done(result)

    def captions(self, *options: object) -> CaptionOutputs:
        self.run(*options)
        return read_caption(self.out)

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.glob("*.json") if path.name != manifest.NAME}

    def prompts(self, *prompts: str) -> Path:
        path = self.root / "prompts.txt"
        path.write_text("\n".join(prompts) + "\n", "utf-8")
        return path


Make = Callable[[str], Made]


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Make:
    stand_in(monkeypatch)
    return lambda kind: Made(tmp_path / kind, kind, tmp_path_factory.getbasetemp())


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, make: Make) -> Made:
    return make(request.param)


@pytest.fixture
def captioner(make: Make) -> Made:
    return make("caption")


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real graphs of the captioner, for batches of 3 pictures and 3 beams."""
    return export_generator(tmp_path_factory.mktemp("static"), "caption", "atc", "--batchsize", 3, "--beams", 3)


def listed(root: Path, count: int = 7) -> str:
    return ",".join(str(root / "images" / f"{n}.png") for n in range(count))


def texts(outputs: CaptionOutputs) -> list[list[str]]:
    return [row["texts"] for row in outputs.generated]


def test_outputs(made: Made) -> None:
    outputs = made.captions("--num-return", 2)
    data = read_data(made.data)
    assert [each["image_id"] for each in outputs.captions] == [image["image_id"] for image in data.images] == list(range(7))
    assert [each["caption"] for each in outputs.captions] == [row["texts"][0] for row in outputs.generated]
    assert [list(row) for row in outputs.generated] == [["image", "prompt", "texts", "scores", "tokens"]] * 7
    for row in outputs.generated:
        assert len(row["texts"]) == 2
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert max(row["tokens"]) <= 12
    run = outputs.run
    assert run["task"] == "caption"
    assert (run["options"]["as"], run["options"]["num_return"]) == ("blip" if made.kind == "caption" else "lavis", 2)
    assert run["data"]["digest"] == data.source.digest
    assert run["graphs"]["used"] == list(json.loads((made.graphs / manifest.NAME).read_text("utf-8"))["graphs"])
    assert run["timings"][0]["items"] == 7
    assert run["backend"]["use_past"] is True
    assert sorted(outputs.source.files) == ["captions.json", "generated.json", "journal.jsonl"]
    assert len({tuple(row) for row in texts(outputs)}) > 1  # pictures matter


def test_greedy_captions_are_the_models_own(captioner: Made) -> None:
    """Word by word from the model itself: the likeliest, none that ends the text too soon, and the prompt cut off."""
    prompt, shortest, longest = "a picture of ", 6, 12
    outputs = captioner.captions("--num-beams", 1, "--min-length", shortest, "--max-length", longest)
    model = TorchDecoder(CONFIGS["caption"]).model
    vocabulary = (captioner.graphs / "tokenizer" / "vocab.txt").read_text("utf-8").split()
    stop = vocabulary.index("[SEP]")
    for picture, row in zip(read_data(captioner.data).img[:], outputs.generated, strict=True):
        cross = model.cross_kv(model.image_feat(torch.tensor(picture)[None]))
        ids = [30, *(vocabulary.index(word) for word in prompt.split())]  # [DEC] a picture of
        while len(ids) < longest and ids[-1] != stop:
            words = torch.tensor([ids])
            logits = model.text_decoder(words, torch.ones_like(words), cross)[0, -1]
            if len(ids) < shortest:
                logits[stop] = -torch.inf
            ids.append(int(logits.argmax()))
        said = " ".join(vocabulary[n] for n in ids[1:] if n not in range(5) and n < len(vocabulary)).replace(" ##", "")
        assert row["texts"][0] == clean_up(said)[len(prompt) :].strip()
        assert row["tokens"][0] == len(ids) - 4 - (ids[-1] == stop)


@pytest.mark.parametrize("options", [(), ("--do-sample", "--num-beams", 1, "--seed", 3, "--num-return", 2)], ids=str)
def test_batches_do_not_matter(made: Made, options: tuple[object, ...]) -> None:
    """Prompts of unequal length, alone and together: the same words, also when they are drawn."""
    prompts = made.prompts(*(prompt or "on" for prompt in PROMPTS))
    one = texts(made.captions("--prompts-file", prompts, "--batchsize", 1, *options))
    assert texts(made.captions("--prompts-file", prompts, "--batchsize", 5, *options)) == one


def test_each_picture_is_looked_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = stand_in(monkeypatch)
    make("llama").run("--batchsize", 3)
    assert opened[0].looked == [3, 3, 1]


def test_drawn_words_come_from_the_seed(captioner: Made) -> None:
    draw = ("--do-sample", "--num-beams", 1, "--num-return", 3)
    first = texts(captioner.captions(*draw, "--seed", 1))
    assert texts(captioner.captions(*draw, "--seed", 1, "--restart")) == first
    assert texts(captioner.captions(*draw, "--seed", 2)) != first
    assert any(len(set(row)) > 1 for row in first)
    greedy = texts(captioner.captions("--num-beams", 1, "--repetition-penalty", 1.1))
    assert texts(captioner.captions("--do-sample", "--num-beams", 1, "--top-k", 1)) == greedy


def test_where_prompts_come_from(captioner: Made) -> None:
    def prompts(*options: object) -> list[str]:
        return [row["prompt"] for row in captioner.captions(*options).generated]

    assert prompts() == ["a picture of "] * 7
    assert prompts("--prompt", "the red") == ["the red"] * 7
    file = captioner.prompts(*"abcdefg")
    assert prompts("--prompts-file", file) == [*"abcdefg"]
    caption_data(captioner.root, captioner.graphs, "--prompts-file", captioner.prompts(*"gfedcba"))
    assert prompts() == [*"gfedcba"]
    assert prompts("--prompt", "the red") == ["the red"] * 7  # what is asked for goes before what the data has
    assert prompts("--prompts-file", captioner.prompts(*"abcdefg")) == [*"abcdefg"]
    assert prompts("--prompt", "The RED!", "--clean-prompt", "true") == ["the red"] * 7


def test_prompts_are_cut_off_or_echoed(make: Make) -> None:
    captioner, llama = make("caption"), make("llama")
    plain = texts(captioner.captions("--prompt", "the red dog"))
    echoed = texts(captioner.captions("--prompt", "the red dog", "--echo-prompt", "true"))
    assert echoed != plain
    for (short,), (long,) in zip(plain, echoed, strict=True):
        assert long.startswith("the red dog")
        assert long.removeprefix("the red dog").strip() == short
    mindformers = ("--as", "mindformers", "--num-beams", 1, "--max-length", 40)
    for row in llama.captions(*mindformers, "--prompt", "Question: what? Answer:").generated:
        assert row["prompt"] == "question what? answer"
        assert row["texts"][0].startswith("question what? answer")
    raw = llama.captions(*mindformers, "--prompt", "Question: what?", "--clean-prompt", "false", "--echo-prompt", "false")
    assert not any(row["texts"][0].startswith("Question") for row in raw.generated)


def test_mindformers_counts_positions(make: Make) -> None:
    """Queries, prompt and new words together are max_length, for each prompt by itself."""
    llama = make("llama")
    options = ("--as", "mindformers", "--images", listed(llama.root), "--prompts", ",".join(PROMPTS), "--max-length", 24)
    result = call_run("caption", llama.graphs, llama.out, *options)
    chain.done(result)
    lengths = {}
    for row in read_caption(llama.out).generated:
        lengths.setdefault(row["prompt"], set()).update(row["tokens"])
    config: Any = CONFIGS["llama"]
    assert max(lengths[""]) == 24 - config.qformer.queries
    assert max(lengths["a picture of"]) < 24 - config.qformer.queries


@pytest.mark.parametrize("kind", ["caption", "llama"])
def test_pictures_on_the_command_line(make: Make, kind: str) -> None:
    """Paired with prompts as mindformers' scripts take them, empty ones too; each text is said."""
    made = make(kind)
    options = ("--images", listed(made.root), "--prompts", ",".join(PROMPTS))
    printed = chain.done(call_run("caption", made.graphs, made.out, *BRIEF, *options))
    outputs = read_caption(made.out)
    assert [row["prompt"] for row in outputs.generated] == [*PROMPTS]
    for row in outputs.generated:
        assert f"{made.root}/images/{row['image']}.png: {on_one_line(row['texts'][0])}\n" in printed
    assert [each["image_id"] for each in outputs.captions] == list(range(7))
    assert outputs.run["data"]["images"][0]["sha256"] == manifest.file_record(made.root / "images" / "0.png")["sha256"]
    file = made.prompts(*(prompt or "on" for prompt in PROMPTS))
    from_data = made.captions("--prompts-file", file)
    again = chain.done(call_run("caption", made.graphs, made.out, *BRIEF, "--images", listed(made.root), "--prompts-file", file))
    assert texts(read_caption(made.out)) == texts(from_data)  # as from a data folder
    assert (
        call_run("caption", made.graphs, made.out, *BRIEF, "--images", listed(made.root), "--prompts-file", file).stdout.count(
            ".png: "
        )
        == 7
    )
    assert "nothing to do" not in again


def test_pictures_without_prompts_have_the_presets(captioner: Made) -> None:
    chain.done(call_run("caption", captioner.graphs, captioner.out, *BRIEF, "--images", listed(captioner.root, 2)))
    assert [row["prompt"] for row in read_caption(captioner.out).generated] == ["a picture of "] * 2
    same = f"{captioner.root}/images/0.png"
    chain.done(
        call_run("caption", captioner.graphs, captioner.out, *BRIEF, "--images", f"{same}, {same}", "--prompts", "the,what color")
    )
    found = read_caption(captioner.out)
    assert [each["image_id"] for each in found.captions] == [same, f"{same}#2"]
    assert found.generated[0]["texts"] != found.generated[1]["texts"]


def test_no_two_pictures_have_one_id() -> None:
    """Frames of several folders, pictures named again, and one that is called what such a one would be."""
    assert ids_of(["a/COCO_val2014_000000000042.jpg", "dog.jpg", "3.png"]) == [42, "dog.jpg", 3]
    assert ids_of(["x/frame_1.png", "y/frame_1.png", "2.png"]) == ["x/frame_1.png", "y/frame_1.png", 2]
    assert ids_of(["a.png"] * 3 + ["a.png#2"]) == ["a.png", "a.png#3", "a.png#4", "a.png#2"]


def test_a_prompt_of_nothing_among_others(make: Make) -> None:
    """LLaMA has no token before the text: a prompt of no token goes on from the queries, not from a word of padding."""
    llama = make("llama")
    picture = str(llama.root / "images" / "0.png")
    for options in ((), ("--rule", "transformers")):
        found = {}
        for prompts in ("", ",the red,a"):
            images = ",".join([picture] * (prompts.count(",") + 1))
            named = ("--images", images, "--prompts", prompts, *BRIEF, *options)
            chain.done(call_run("caption", llama.graphs, llama.out, *named))
            found[prompts] = read_caption(llama.out).generated[0]
        alone, beside = found.values()
        assert alone["texts"] == beside["texts"]
        np.testing.assert_allclose(alone["scores"], beside["scores"], atol=1e-5)


def test_what_is_said(captioner: Made) -> None:
    printed = captioner.run("--num-beams", 2)
    assert "7 captions as blip: prompt 'a picture of ', clean_prompt False" in printed
    assert "num_beams 2" in printed
    assert "top_k" not in printed  # no word is drawn
    assert "inference" not in printed
    assert not {"inference", "attend_padding"} & read_caption(captioner.out).run["options"].keys()
    tokens = sum(row["tokens"][0] for row in read_caption(captioner.out).generated)
    assert f"{tokens} tokens in " in printed
    assert " tokens/s." in printed
    assert "already holds this run; nothing to do" in captioner.run("--num-beams", 2)
    assert "differs in num_b" in captioner.run("--num-beams", 3)
    assert "differs in prompt, prompts" in captioner.run("--num-beams", 3, "--prompt", "the")


def test_a_stopped_run_goes_on(captioner: Made, monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, int]]) -> None:
    monkeypatch.setattr(text_run, "REQUESTS_PER_SHARD", 2)
    captioner.run()
    wanted = captioner.files()
    assert computed == [("captions", n) for n in range(4)]
    real, shards = text_run.Rows.write, []

    def stopped(self: text_run.Rows, start: int, rows: list[Any]) -> None:
        real(self, start, rows)
        shards.append(start)
        if len(shards) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(text_run.Rows, "write", stopped)
    result = call_run("caption", captioner.graphs, captioner.out, *BRIEF, "--data", captioner.data, "--restart")
    assert result.exit_code == 130
    assert captioner.files() == wanted  # the older result is there until the new one is complete
    del computed[:]
    monkeypatch.setattr(text_run.Rows, "write", real)
    captioner.run()
    assert captioner.files() == wanted
    assert not [path.name for path in captioner.out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("where", ["shard", "merged", "manifest"])
def test_wherever_it_was_stopped(captioner: Made, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Between two shards, with the rows merged, and with all files written but the manifest."""
    monkeypatch.setattr(text_run, "REQUESTS_PER_SHARD", 3)
    captioner.run()
    wanted = captioner.files()
    captioner.out.rename(captioner.root / "first")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owner, name = {
        "shard": (text_run, "slices"),
        "merged": (text_run, "lines_of"),
        "manifest": (text_run.Run, "complete"),
    }[where]
    if where == "shard":
        calls: list[int] = []
        real = text_run.slices

        def later(*args: Any) -> Any:
            calls.append(1)
            return real(*args) if len(calls) < 3 else stop()

        monkeypatch.setattr(owner, name, later)
    else:
        monkeypatch.setattr(owner, name, stop)
    assert call_run("caption", captioner.graphs, captioner.out, *BRIEF, "--data", captioner.data).exit_code == 130
    assert not captioner.out.exists()
    monkeypatch.undo()
    monkeypatch.setattr(text_run, "REQUESTS_PER_SHARD", 3)
    stand_in(monkeypatch)
    captioner.run()
    assert captioner.files() == wanted


def test_lost_rows_are_said(captioner: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_run, "REQUESTS_PER_SHARD", 3)
    monkeypatch.setattr(text_run.Rows, "merged", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call_run("caption", captioner.graphs, captioner.out, *BRIEF, "--data", captioner.data).exit_code == 130
    monkeypatch.undo()
    monkeypatch.setattr(text_run, "REQUESTS_PER_SHARD", 3)
    stand_in(monkeypatch)
    part = captioner.root / ".outputs.part" / ".rows.3.jsonl"
    part.write_bytes(part.read_bytes()[:-9])
    assert "is lost or damaged: the run cannot go on" in captioner.run(code=1)
    captioner.run("--restart")


def test_prompts_that_are_cut_are_said(make: Make) -> None:
    opt = make("opt")
    prompts = opt.prompts(*["a photo of"] * 6, "a photo of " * 20)
    assert "prompts have more than 32 tokens; they are cut, as the original does." in opt.run("--prompts-file", prompts)
    assert "Warning" not in opt.run("--prompts-file", opt.prompts(*["a photo of"] * 7))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("generated.json", lambda rows: rows[0]["texts"].pop(), "contradicts itself"),
        ("generated.json", lambda rows: rows[0].update(texts=["x"]), "contradicts itself"),
        ("generated.json", lambda rows: rows[1].update(scores=[float("nan")]), "contradicts itself"),
        ("generated.json", lambda rows: rows[1].update(tokens=[-1]), "contradicts itself"),
        ("generated.json", lambda rows: rows[1].update(image=5), "contradicts itself"),
        ("generated.json", lambda rows: rows[1].pop("prompt"), "contradicts itself"),
        ("generated.json", lambda rows: rows.append(7), "generated.json is not a list of results"),
        ("captions.json", lambda rows: rows.pop(), "contradicts itself"),
        ("captions.json", lambda rows: rows[0].update(image_id=None), "contradicts itself"),
        ("captions.json", lambda rows: rows[0].pop("caption"), "contradicts itself"),
    ],
)
def test_damaged_outputs(captioner: Made, file: str, change: Any, said: str) -> None:
    captioner.run()
    rows = json.loads((captioner.out / file).read_text("utf-8"))
    change(rows)
    (captioner.out / file).write_text(json.dumps(rows), "utf-8")
    found = json.loads((captioner.out / manifest.NAME).read_text("utf-8"))
    content = {key: found[key] for key in found.keys() - {"format", "kind", "made_by", "files"}}
    manifest.write(captioner.out, "outputs", content)
    with pytest.raises(UserError, match=said):
        read_caption(captioner.out)


def test_real_graphs_say_what_the_model_says(static: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static ones, pictures that fill no batch, prompts of unequal length: the words of the PyTorch model, 3 beams."""
    data = caption_data(tmp_path, static)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(prompt or "on" for prompt in PROMPTS), "utf-8")
    options = ("--data", data, "--prompts-file", prompts, "--batchsize", 4, "--num-return", 3, "--num-beams", 3)
    chain.done(call_run("caption", static, tmp_path / "ours", *options))
    stand_in(monkeypatch)
    chain.done(call_run("caption", static, tmp_path / "theirs", *options))
    ours, theirs = (read_caption(tmp_path / name) for name in ("ours", "theirs"))
    assert texts(ours) == texts(theirs)
    scores = [np.array([row["scores"] for row in outputs.generated]) for outputs in (ours, theirs)]
    np.testing.assert_allclose(*scores, atol=1e-4)  # measured: 2e-6


def test_use_past_is_kept_in_the_manifest(captioner: Made) -> None:
    assert captioner.captions("--use-past", "false").run["backend"]["use_past"] is False


def test_short_graphs_do_not_cut(make: Make, generator_graphs: Callable[[str, str], Path], tmp_path: Path) -> None:
    """A prompt that the original reads whole is no prompt to cut, though graphs for 8 tokens cannot read it."""
    picture = next((make("opt").root / "images").iterdir())
    asked = ("--images", picture, "--prompt", "a photo of two cats on a red chair", "--num-beams", 1)
    found = chain.refusal(call_run("caption", generator_graphs("opt", "atc"), tmp_path / "out", *BRIEF, *asked))
    assert re.match(r"A prompt has \d+ tokens, the graphs were exported for 8\. Shorten it, or export them with --length", found)
    assert not list(tmp_path.glob(".out*"))


def test_nothing_moves_the_cursor() -> None:
    assert on_one_line("a\x1b[31mb\nc\x02é 狗") == "a [31mb c é 狗"
