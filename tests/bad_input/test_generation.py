"""blip-run caption and vqa: options, prompts, questions, answers, data and graphs that cannot be.

PyTorch stands in for the graphs (tests/text_graphs.py) but where graphs of fixed size are what refuses.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests import chain
from tests.bad_input import table
from tests.bad_input.damage import changed, cut, edited, flipped, given, gone, holding, signed, together
from tests.bad_input.table import Case, Spoil, Work, options, refused
from tests.generators import export_generator
from tests.text_graphs import call_run, caption_data, stand_in, vqa_data, write_graphs

CAPTION, VQA, LLM = "run caption", "run vqa", "run llm"  # LLM: captions by BLIP-2


class TextWork(Work):
    """The chains of three models that write words, side by side."""

    def usual(self, step: str) -> list[object]:
        kind, task = {CAPTION: ("caption", "caption"), VQA: ("vqa", "vqa"), LLM: ("opt", "caption")}[step]
        named = ("--graphs", self[f"{kind}/graphs"], "--data", self[f"{kind}/data"], "--out", self.out, "--threads", 1)
        return [task, *named, *([] if kind == "vqa" else ["--max-length", 9])]

    def call(self, step: str, *added: object) -> Result:
        usual = self.usual(step)
        if "--images" in added:  # in the place of --data
            at = usual.index("--data")
            usual = usual[:at] + usual[at + 2 :]
        return chain.call(table.COMMANDS["run"], *usual, *added)


@pytest.fixture(scope="session")
def good3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs, data and outputs of a captioner, of BLIP for questions, and of BLIP-2 with OPT. Read only."""
    root = tmp_path_factory.mktemp("good3")
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        for kind in ("caption", "vqa", "opt"):
            graphs = write_graphs(root / kind, kind)
            data = (vqa_data if kind == "vqa" else caption_data)(root / kind, graphs)
            task = "vqa" if kind == "vqa" else "caption"
            chain.done(call_run(task, graphs, root / kind / "outputs", "--data", data, "--num-beams", 1, "--min-length", 1))
    return root


@pytest.fixture
def work3(good3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TextWork]:
    """A copy to spoil."""
    stand_in(monkeypatch)
    for step, kind in ((CAPTION, "caption"), (VQA, "vqa"), (LLM, "opt")):
        monkeypatch.setitem(table.OLDER, step, f"{kind}/outputs")
    root = tmp_path / "work"
    shutil.copytree(good3, root)
    yield TextWork(root)
    shutil.rmtree(root)


def _misuse(name: str, step: str, said: tuple[str, ...], *values: object) -> Case:
    return Case(name, step, said, options(*values), 2)


def _pictures(count: int, *others: object) -> Spoil:
    """`count` good pictures on the command line, and `others`."""

    def spoil(work: Work) -> list[object]:
        return ["--images", ",".join(str(work["caption/images"] / f"{n}.png") for n in range(count)), *others]

    return spoil


def _of_three(name: str, step: str, said: tuple[str, ...], *others: object, code: int = 2) -> Case:
    return Case(name, step, said, _pictures(3, *others), code)


def _lines(file: str, data: str | bytes, option: str) -> Spoil:
    return together(holding(file, data), given(option, file))


def _data(kind: str, change: Callable[[Any], object]) -> Spoil:
    return signed(f"{kind}/data", change)


def _more_words(work: Work) -> None:
    """A vocabulary that has a token more than the model has words."""
    work.edit("opt/graphs/tokenizer/vocab.json", lambda tokens: tokens.update(zebra=len(tokens)))
    work.resign("opt/graphs")


DECODING = [
    _misuse("no beams", CAPTION, ("num_beams is 0; expected a whole number, 1 or more",), "--num-beams", 0),
    _misuse("beams a fraction", CAPTION, ("--num-beams", "2.5"), "--num-beams", 2.5),
    _misuse("min above max", CAPTION, ("min_length 12 is above max_length 9",), "--min-length", 12),
    _misuse("min above max of the preset", LLM, ("min_length 8 is above max_length 5",), "--max-length", 5),
    _misuse("min below 0", CAPTION, ("min_length is -1",), "--min-length", -1),
    _misuse("no room for a word", CAPTION, ("max_length 4 leaves no room", "prompt is 'a picture of '"), "--max-length", 4,
            "--min-length", 0),
    _misuse("more words than positions", CAPTION, ("196 new words", "positions for 44"), "--max-length", 200),
    _misuse("more positions than BLIP-2 has", LLM, ("positions for 80", "smaller --max-length"), "--max-length", 99),
    _misuse("more returned than beams", CAPTION, ("num_return 4 is above num_beams 3",), "--num-return", 4),
    _misuse("nothing returned", CAPTION, ("num_return is 0",), "--num-return", 0),
    _misuse("drawn beams", CAPTION, ("do_sample goes with num_beams 1, not 3",), "--do-sample", "--num-beams", 3),
    _misuse("top_k without drawing", CAPTION, ("top_k is 3", "do_sample alone"), "--top-k", 3),
    _misuse("top_k below 0", CAPTION, ("top_k is -1",), "--do-sample", "--top-k", -1),
    _misuse("top_p above 1", CAPTION, ("top_p is 1.5",), "--do-sample", "--top-p", 1.5),
    _misuse("temperature 0", CAPTION, ("temperature is 0.0",), "--do-sample", "--temperature", 0),
    _misuse("temperature NaN", CAPTION, ("temperature is nan",), "--do-sample", "--temperature", "nan"),
    _misuse("seed below 0", CAPTION, ("seed is -1",), "--do-sample", "--seed", -1),
    _misuse("penalty 0", CAPTION, ("repetition_penalty is 0.0",), "--repetition-penalty", 0),
    _misuse("penalty infinite", CAPTION, ("length_penalty is inf",), "--length-penalty", "inf"),
    _misuse("unknown rule", CAPTION, ("--rule", "newest", "'transformers'"), "--rule", "newest"),
    _misuse("unknown stopping", CAPTION, ("--early-stopping", "'never'"), "--early-stopping", "soon"),
    _misuse("never with BLIP's rule", CAPTION, ("knows no early_stopping 'never'",), "--early-stopping", "never"),
    _misuse("unknown preset", CAPTION, ("--as", "lavsi", "'lavis'"), "--as", "lavsi"),
    _misuse("preset without such a model", CAPTION, ("mindformers has no BLIP; presets of this model: blip, lavis",), "--as",
            "mindformers"),
    _misuse("preset of BLIP for BLIP-2", LLM, ("blip has no BLIP-2 with opt",), "--as", "blip"),
    _misuse("past neither true nor false", CAPTION, ("--use-past", "perhaps"), "--use-past", "perhaps"),
    _misuse("option of another task", CAPTION, ("--k-test",), "--k-test", 3),
    _misuse("no batch", CAPTION, ("--batchsize",), "--batchsize", 0),
]  # fmt: skip
PROMPTS = [
    Case("no file of prompts", CAPTION, ("nowhere.txt", "one prompt in each line"), options("--prompts-file", "nowhere.txt")),
    Case("empty file of prompts", CAPTION, ("is empty",), _lines("p.txt", "", "--prompts-file")),
    Case("prompts not UTF-8", CAPTION, ("is not UTF-8 text (byte 6)",), _lines("p.txt", b"word1\n\xff\n", "--prompts-file")),
    Case("too few prompts", CAPTION, ("holds 2 prompts for 7 pictures",), _lines("p.txt", "a\nb\n", "--prompts-file")),
    Case("prompts from two places", CAPTION, ("Both --prompt and --prompts-file are given",),
         together(_lines("p.txt", "a\n" * 7, "--prompts-file"), options("--prompt", "a")), 2),
    _misuse("a list of prompts for data", CAPTION, ("--prompts goes with --images",), "--prompts", "a,b"),
    _misuse("half a character", CAPTION, ("expected a text",), "--prompt", "\udcff"),
    _of_three("too few paired prompts", CAPTION, ("--images names 3, --prompts 2: expected one prompt for each picture",),
              "--prompts", "a,b"),
    _of_three("a comma within a prompt", CAPTION, ("Commas part them: if one holds a comma, give all in --prompts-file",),
              "--prompts", "a,b, or c,d"),
    _of_three("too many paired prompts", CAPTION, ("--prompts 4: expected",), "--prompts", "a,,b,"),
    _of_three("an empty list of prompts", CAPTION, ("--images names 3, --prompts 1: expected",), "--prompts", ""),
    _of_three("half a paired prompt", CAPTION, ("half a character",), "--prompts", "a,\udcff,b", code=1),
    _of_three("paired and one for all", CAPTION, ("Both --prompt and --prompts are",), "--prompts", "a,b,c", "--prompt", "a"),
    _of_three("a list too short in a file", CAPTION, ("nowhere.txt",), "--prompts-file", "nowhere.txt", code=1),
    Case("pictures and data", LLM, ("Both --data and --images are given",),
         lambda work: ("--images", work["opt/images"] / "0.png", "--data", work["opt/data"]), 2),
    _misuse("no picture", CAPTION, ("--images is ''", "none of them blank"), "--images", ""),
    _misuse("a comma too many", CAPTION, ("none of them blank",), "--images", "a.png,"),
    Case("no such picture", CAPTION, ("nowhere.png does not exist",), options("--images", "nowhere.png")),
    Case("picture that is a folder", CAPTION, ("caption/images is not a file",), given("--images", "caption/images")),
    Case("picture that is none", CAPTION, ("is not a picture",), together(holding("a.png", "no"), given("--images", "a.png"))),
    _misuse("a prompt too long", LLM, ("new words", "positions for 80"), "--prompt", "word " * 60, "--max-length", 50),
]  # fmt: skip
QUESTIONS = [
    _misuse("template without a place", VQA, ("The template 'a' must hold one {}",), "--prompt", "a"),
    _misuse("template with two", VQA, ("must hold one {}",), "--prompt", "{} {}"),
    _misuse("questions for data", VQA, ("go with --images",), "--questions", "a"),
    _of_three("no questions", VQA, ("wants a question for each picture",)),
    _of_three("questions from two places", VQA, ("wants a question for each",), "--questions", "a", "--questions-file", "b"),
    _of_three("too few questions", VQA, ("--images names 3, --questions 1: expected one question",), "--questions", "a"),
    _of_three("a comma within a question", VQA, ("give all in --questions-file",), "--questions", "a,b, or c,d"),
    _of_three("blank question", VQA, ("Question 2 is ''",), "--questions", "a,,b"),
    _of_three("half a question", VQA, ("Question 2 is '\\udcff'",), "--questions", "a,\udcff,b"),
    _of_three("no file of questions", VQA, ("one question in each line",), "--questions-file", "nowhere.txt", code=1),
    _misuse("no answers to rank", VQA, ("There are no answers to rank; give --answer-list",), "--inference", "rank"),
    _misuse("unknown inference", VQA, ("--inference", "choose"), "--inference", "choose"),
    _misuse("ranking no answer", VQA, ("--k-test",), "--k-test", 0),
    _misuse("ranking fewer of no list", VQA, ("k_test is read with the inference 'rank' alone",), "--k-test", 3),
    Case("a list while writing", VQA, ("answer_list is read with the inference 'rank' alone", "Leave it out"),
         together(_lines("a.json", '["a"]', "--answer-list"), options("--inference", "generate")), 2),
    Case("padding while ranking", VQA, ("--attend-padding is of BLIP's answers with --inference generate alone",),
         together(_lines("a.json", '["a"]', "--answer-list"), options("--attend-padding")), 2),
    Case("no list of answers", VQA, ("no file nowhere.json",), options("--answer-list", "nowhere.json")),
    Case("answers no JSON", VQA, ("a.json",), _lines("a.json", "cat", "--answer-list")),
    Case("answers an object", VQA, ("expected a list of answers",), _lines("a.json", '{"a": 1}', "--answer-list")),
    Case("no answers", VQA, ("an empty list",), _lines("a.json", "[]", "--answer-list")),
    Case("answer a number", VQA, ("answer 1 is a number; expected a text",), _lines("a.json", '["a", 7]', "--answer-list")),
    Case("answer blank", VQA, ("answer 0 is",), _lines("a.json", '[" "]', "--answer-list")),
    Case("answer half a character", VQA, ("half a character",), _lines("a.json", '["\\ud800"]', "--answer-list")),
    Case("decoding while ranking", VQA, ("num_beams is read with", "--inference generate without --answer-list"),
         together(_lines("a.json", '["a"]', "--answer-list"), options("--inference", "rank", "--num-beams", 3)), 2),
    Case("ranking with a language model", LLM, ("No such option", "--inference"), options("--inference", "rank"), 2),
]  # fmt: skip
DATA = [
    Case("data of questions", CAPTION, ("task 'vqa', expected 'caption'",), given("--data", "vqa/data")),
    Case("data of captions", VQA, ("task 'caption', expected 'vqa'",), given("--data", "caption/data")),
    Case("no data", CAPTION, ("no folder nowhere",), options("--data", "nowhere")),
    Case("graphs for data", CAPTION, ("is a 'graphs' folder",), given("--data", "caption/graphs")),
    Case("pictures of another size", CAPTION, ("image_size 64", "graphs want 32", "blip-pre caption"),
         _data("caption", lambda m: m["protocol"].update(image_size=64))),
    Case("pictures of another mean", CAPTION, ("mean",), _data("caption", lambda m: m["protocol"].update(mean=[0, 0, 0]))),
    Case("one bit of the pictures", CAPTION, ("img.npy", "sha256"), changed("caption/data/img.npy", flipped, "--verify")),
    Case("fewer images", CAPTION, ("'images': 6",), _data("caption", lambda m: m["images"].pop())),
    Case("questions lost", VQA, ("garbles 'questions'",), _data("vqa", lambda m: m.pop("questions"))),
    Case("question of no picture", VQA, ("beyond the 4 images",), _data("vqa", lambda m: m["questions"][0].update(image=4))),
]  # fmt: skip
GRAPHS = [
    Case("graphs for questions", CAPTION, ("BLIP for questions, for vqa; caption wants",), given("--graphs", "vqa/graphs")),
    Case("graphs of a captioner", VQA, ("BLIP's captioner, for caption; vqa wants",), given("--graphs", "caption/graphs")),
    Case("no graphs", CAPTION, ("no folder nowhere",), options("--graphs", "nowhere")),
    Case("vocabulary lost", CAPTION, ("vocab.txt is missing",), gone("caption/graphs/tokenizer/vocab.txt")),
    Case("vocabulary cut", LLM, ("merges.txt",), changed("opt/graphs/tokenizer/merges.txt", cut)),
    Case("another vocabulary", LLM, ("another model's",), _more_words),
    Case("vocabulary exchanged", LLM, ("its sha256 differs",), signed("opt/graphs", lambda m: m["tokenizer"].update(sha256="0"))),
    Case("graph not listed", CAPTION, ("manifest.json",), edited("caption/graphs", lambda m: m.pop("graphs"))),
]  # fmt: skip


@pytest.mark.parametrize("case", DECODING + PROMPTS + QUESTIONS + DATA + GRAPHS, ids=str)
def test_refused(case: Case, work3: TextWork) -> None:
    refused(case, work3)


OF_BLIP2 = [
    (("--attend-padding",), "--attend-padding is of BLIP's answers with --inference generate alone. Leave it out."),
    (("--answer-list", "answers.json"), "answer_list is read with the inference 'rank' alone, and answers are written here."),
    (("--k-test", 3), "k_test is read with the inference 'rank' alone"),
]


@pytest.mark.parametrize(("asked", "said"), OF_BLIP2, ids=str)
def test_what_blip_alone_does(work3: TextWork, asked: tuple[object, ...], said: str) -> None:
    (work3["answers.json"]).write_text('["a"]', "utf-8")
    asked = tuple(work3[part] if part == "answers.json" else part for part in asked)
    named = ("--images", work3["opt/images"] / "0.png", "--questions", "a")
    assert said in chain.refusal(call_run("vqa", work3["opt/graphs"], work3.out, *named, *asked), 2)
    assert not work3.out.exists()


def test_lengths_that_contradict_each_other_are_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they count different things: mindformers' fewest words are new ones, its most are queries and prompt, too."""
    stand_in(monkeypatch)
    graphs = write_graphs(tmp_path, "llama")
    data = caption_data(tmp_path, graphs, pictures=1)
    asked = ("--data", data, "--as", "mindformers", "--min-length", 60)
    said = chain.refusal(call_run("caption", graphs, tmp_path / "out", *asked), 2)
    assert "min_length 60 counts the new words, max_length 64 counts queries, prompt and new words: after the prompt" in said
    assert "that is 60 new words or more, and " in said
    assert not list(tmp_path.glob(".out*"))


def test_a_prompt_of_nothing_with_graphs_of_fixed_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prefill pads every prompt, and has nothing but padding to go on from."""
    stand_in(monkeypatch)
    graphs = write_graphs(tmp_path, "llama", static=True)
    work = TextWork(tmp_path)
    work.edit("graphs/manifest.json", lambda found: found.update(target="atc"))
    work.resign("graphs")
    data = caption_data(tmp_path, graphs, pictures=1)
    said = chain.refusal(call_run("caption", graphs, tmp_path / "out", "--data", data, "--prompt", ""), 1)
    assert "The prompt '' has no token, and llm_prefill reads one at least. Give it a word, or export" in said
    chain.done(call_run("caption", graphs, tmp_path / "out", "--data", data, "--prompt", "a", "--max-length", 12))


def test_a_half_finished_run_of_others_is_not_touched(work3: TextWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another task, and with other options: nothing of it is lost."""
    monkeypatch.setattr("runtime.text_run.Rows.merged", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert work3.call(CAPTION).exit_code == 130
    before = work3.state()
    assert "half-finished run with another task (caption, now vqa)" in chain.refusal(work3.call(VQA), 2)
    assert "half-finished run with another prompt" in chain.refusal(work3.call(CAPTION, "--prompt", "the"))
    assert work3.state() == before


def test_outputs_of_another_task_are_not_replaced(work3: TextWork) -> None:
    shutil.copytree(work3["caption/outputs"], work3.out)
    before = work3.state()
    assert "is of the task 'caption', this is 'vqa'" in chain.refusal(work3.call(VQA), 2)
    assert work3.state() == before


def test_graphs_of_fixed_size_say_what_they_have_no_room_for(tmp_path: Path) -> None:
    """Before the work begins: more texts at a time, more words, a longer prompt than they were exported for."""
    options = ("--beams", 2, "--slots", 13, "--length", 6, "--batchsize", 2)
    graphs = export_generator(tmp_path, "caption", "atc", *options)
    data, out = caption_data(tmp_path, graphs), tmp_path / "out"
    for asked, said in (
        (("--num-beams", 3), "3 texts at a time are asked for, and the graphs were exported for 2 of a prompt"),
        (("--num-beams", 2), "16 new words are asked for, and after a prompt of 4 tokens the graphs have room for 11"),
        (("--num-beams", 2, "--max-length", 16), "room for 11. Give a smaller --max-length, or export them with more --slots"),
        (("--num-beams", 2, "--use-past", "false"), "Leave --use-past false out"),
    ):
        assert said in chain.refusal(call_run("caption", graphs, out, "--data", data, *asked), 2)
        assert not list(tmp_path.glob(".out*"))
    chain.done(call_run("caption", graphs, out, "--data", data, "--num-beams", 2, "--max-length", 15))
    assert max(row["tokens"][0] for row in json.loads((out / "generated.json").read_text("utf-8"))) == 11
