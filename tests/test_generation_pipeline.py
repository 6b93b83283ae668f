"""The Python interface of what writes texts: equal to blip-run, every option of a call counts, and its forms."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import Misuse, UserError
from runtime.outputs import read_caption, read_vqa
from runtime.pipeline import pipeline
from tests import chain
from tests.bad_input.table import LONGEST
from tests.text_graphs import ANSWERS, CONFIGS, QUESTIONS, call_run, caption_data, chain_of, stand_in, vqa_data

BRIEF = {"num_beams": 2, "min_length": 2, "max_length": 12}


class Made:
    """Graphs of one kind and pictures; `writer` and `asker` are pipelines over them."""

    def __init__(self, root: Path, kind: str, base: Path) -> None:
        self.root, self.kind, self.graphs = chain_of(root, kind, base), kind, root / "graphs"
        self.paths = [root / "images" / f"{n}.png" for n in range(len(list((root / "images").iterdir())))]

    def writer(self, **options: Any) -> Any:
        return pipeline("image_to_text_generation", self.graphs, threads=1, **{"batchsize": 3, **BRIEF, **options})

    def asker(self, **options: Any) -> Any:
        return pipeline("visual-question-answering", self.graphs, threads=1, **{"batchsize": 3, **options})

    def run(self, task: str, *options: object) -> Path:
        shutil.rmtree(self.root / "data", ignore_errors=True)  # of either task
        data = (caption_data if task == "caption" else vqa_data)(self.root, self.graphs)
        chain.done(call_run(task, self.graphs, self.root / "outputs", "--data", data, *options))
        return self.root / "outputs"


@pytest.fixture
def make(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Made]:
    stand_in(monkeypatch)
    return lambda kind: Made(tmp_path, kind, tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("kind", ["caption", "opt", "llama", "t5"])
def test_captions_equal_the_run(make: Callable[[str], Made], kind: str) -> None:
    made = make(kind)
    options = [part for name, value in BRIEF.items() for part in (f"--{name.replace('_', '-')}", value)]
    wanted = [each["caption"] for each in read_caption(made.run("caption", *options)).captions]
    assert made.writer()(made.paths) == wanted


@pytest.mark.parametrize("kind", ["vqa", "opt"])
def test_answers_equal_the_run(make: Callable[[str], Made], kind: str) -> None:
    made = make(kind)
    outputs = read_vqa(made.run("vqa", "--num-return", 2))
    pictures = [made.paths[5 * n % 4] for n in range(9)]
    found = made.asker()(pictures, [QUESTIONS[n % 5] for n in range(9)], top_k=2)
    assert [[entry["answer"] for entry in row] for row in found] == [row["texts"] for row in outputs.generated]
    wanted = [row["scores"] for row in outputs.generated]
    np.testing.assert_allclose([[entry["score"] for entry in row] for row in found], wanted, atol=1e-4)


def test_chosen_answers_equal_the_run(make: Callable[[str], Made]) -> None:
    made = make("vqa")
    made.run("vqa")  # writes the list
    outputs = read_vqa(made.run("vqa", "--answer-list", made.root / "answers.json", "--num-return", 3, "--k-test", 7))
    ask = made.asker(answer_list=ANSWERS, k_test=7)
    found = [ask(made.paths[5 * n % 4], QUESTIONS[n % 5], top_k=3) for n in range(9)]
    assert [[entry["answer"] for entry in row] for row in found] == [row["texts"] for row in outputs.generated]
    assert ask(made.paths[0], QUESTIONS[0])[0]["answer"] in ANSWERS


def test_forms_of_captions(make: Callable[[str], Made]) -> None:
    made = make("caption")
    write = made.writer()
    one, others = write(made.paths[0]), write(made.paths[1:3])
    assert isinstance(one, str)
    assert write([made.paths[0]]) == [one]
    assert write([]) == []
    assert write(str(made.paths[0])) == write(Image.open(made.paths[0])) == write({"image": made.paths[0]}) == one
    assert write([made.paths[0], {"image": made.paths[1]}, np.asarray(Image.open(made.paths[2]))]) == [one, *others]
    several = write(made.paths[0], num_return=2)
    assert (several[0], len(several)) == (one, 2)
    assert write(made.paths[:2], num_return=2)[0] == several


def test_forms_of_answers(make: Callable[[str], Made]) -> None:
    made = make("vqa")
    ask = made.asker()
    (answer,) = ask(made.paths[0], QUESTIONS[0])
    assert list(answer) == ["answer", "score"]
    assert ask([made.paths[0]], QUESTIONS[0]) == ask(made.paths[0], [QUESTIONS[0]]) == [[answer]]
    assert ask([], []) == ask([], QUESTIONS[0]) == ask(made.paths[0], []) == []
    many = ask(made.paths[0], QUESTIONS)
    assert [row[0]["answer"] for row in many] == [ask(made.paths[0], question)[0]["answer"] for question in QUESTIONS]
    asked = [{"image": made.paths[0], "question": question} for question in QUESTIONS]
    assert [row[0]["answer"] for row in ask(asked)] == [row[0]["answer"] for row in many]
    assert ask(asked[1]) == ask(made.paths[0], QUESTIONS[1])
    both = ask(made.paths[:2], QUESTIONS[0])
    assert [row[0]["answer"] for row in both] == [ask(path, QUESTIONS[0])[0]["answer"] for path in made.paths[:2]]
    scores = [entry["score"] for entry in ask(made.paths[0], QUESTIONS[0], top_k=3)]
    assert scores == sorted(scores, reverse=True)


def test_prompts_and_templates(make: Callable[[str], Made]) -> None:
    made = make("llama")
    write = made.writer(preset="mindformers", num_beams=1, max_length=30, clean_prompt=False)
    picture = made.paths[0]
    assert write(picture).startswith("a picture of")  # the preset's, echoed
    the = write(picture, prompt="the dog")
    assert the.startswith("the dog")
    assert write({"image": picture, "prompt": "the dog"}) == write({"image": picture, "prompt": "the dog"}, prompt="x") == the
    assert write(picture, hypothesis_template="the dog ") == write(picture, "dog", hypothesis_template=" the {}") == the
    assert write([picture] * 2, prompt=["the dog", "a"])[0] == the
    assert write([picture] * 2, hypothesis_template=["the dog", ""])[0] == the  # as mindformers' scripts give their prompts
    assert made.writer(preset="mindformers", num_beams=1, max_length=30)(picture, prompt="The DOG!") == the
    assert not made.writer(preset="mindformers", num_beams=1, max_length=30, echo_prompt=False)(picture, "the dog").startswith(
        "the"
    )


def test_every_option_of_a_call_counts(make: Callable[[str], Made]) -> None:
    """mindformers takes top_k and its like in a call and drops them."""
    made = make("opt")
    plain = {"num_beams": 2, "max_length": 9, "min_length": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}
    drawn = {"num_beams": 1, "do_sample": True, "max_length": 9, "repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0}
    write, pictures = made.writer(), made.paths[:3]
    for base, changes in (
        (plain, [{"num_beams": 5}, {"max_length": 5}, {"repetition_penalty": 3.0}, {"prompt": "the"}]),
        (drawn, [{"top_k": 3}, {"top_p": 0.3}, {"temperature": 5.0}, {"seed": 1}, {"num_return": 2}]),
    ):
        found = write(pictures, **base)
        assert write(pictures, **base) == found
        for change in changes:
            assert write(pictures, **{**base, **change}) != found, change
        assert made.writer(**base)(pictures) == found
        assert made.writer(**{**base, **changes[0]})(pictures) != found
    assert write(pictures, **{**drawn, "top_k": 1}) == write(pictures, num_beams=1, max_length=9, repetition_penalty=1.0)
    short = made.asker(preset="paddlemix")(made.paths[0], "two?", max_length=2)
    assert short != made.asker(preset="paddlemix")(made.paths[0], "two?")


def test_presets(make: Callable[[str], Made]) -> None:
    made = make("opt")
    assert made.writer(preset="paddlemix")(made.paths) != made.writer(preset="lavis")(made.paths)


def test_graphs_are_opened_once_and_late(make: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch) -> None:
    opened = stand_in(monkeypatch)
    made = make("caption")
    write = made.writer()
    assert not opened
    write(made.paths)
    write(made.paths[0])
    assert len(opened) == 1
    assert opened[0].looked == [3, 3, 1, 1]


def test_a_cut_prompt_is_said(make: Callable[[str], Made]) -> None:
    made = make("opt")
    with pytest.warns(UserWarning, match="1 of 1 prompts have more than 32 tokens; they are cut"):
        made.writer()(made.paths[0], prompt="a photo of " * 20)


MISUSE: list[tuple[str, Callable[[Made], Any], str]] = [
    ("caption", lambda m: m.writer(num_beam=3), "There is no option 'num_beam'. Did you mean 'num_beams'?"),
    ("caption", lambda m: m.writer()(m.paths, topk=3), "There is no option 'topk'. Did you mean 'top_k'?"),
    ("caption", lambda m: m.writer()(m.paths, top_k=3), "it is read with do_sample alone"),
    ("caption", lambda m: m.writer(num_beams=65), "num_beams is 65; expected at most 64."),
    ("caption", lambda m: m.writer(num_beams=1, length_penalty=2.0), "it is read with num_beams above 1 alone"),
    ("caption", lambda m: m.writer(preset="mindformers"), "mindformers has no BLIP; presets of this model: blip, lavis."),
    ("caption", lambda m: m.writer(preset=7), "There is no preset 7"),
    ("caption", lambda m: m.writer(use_past="no"), "use_past is 'no'; expected True or False."),
    ("caption", lambda m: m.writer(max_length=True), "max_length is True"),
    ("caption", lambda m: m.writer(temperature="hot"), "temperature is 'hot'"),
    ("caption", lambda m: m.writer()(m.paths, prompt=["a"]), "7 pictures, and prompt has 1 texts"),
    ("caption", lambda m: m.writer()(m.paths, prompt=7), "prompt 0 is 7, of type int; expected a str."),
    ("caption", lambda m: m.writer()(m.paths[0], prompt="\ud800"), "prompt 0 is '\\ud800'"),
    ("caption", lambda m: m.writer()(m.paths[0], hypothesis_template=[None]), "hypothesis_template 0 is None"),
    ("caption", lambda m: m.writer()({"picture": m.paths[0]}), "Input 0 has the keys 'picture'; expected 'image'"),
    ("caption", lambda m: m.writer()([{"image": m.paths[0], "text": "a"}]), "Input 0 has the keys 'image', 'text'"),
    ("caption", lambda m: m.writer()({"image": m.paths[0], "prompt": 7}), "prompt 0 is 7"),
    ("caption", lambda m: m.writer()(m.paths[0], prompt="a picture of a dog " * 3), "leaves no room for a new word"),
    ("caption", lambda m: m.writer(max_length=60)(m.paths[0]), "the model has positions for 44. Give a smaller --max-length."),
    ("vqa", lambda m: m.asker(answer_list=ANSWERS, inference="generate"), "answer_list is read with the inference 'rank' alone"),
    ("vqa", lambda m: m.asker(k_test=3), "k_test is read with the inference 'rank' alone, and answers are written here."),
    ("opt", lambda m: m.asker(answer_list=ANSWERS), "answer_list is read with the inference 'rank' alone"),
    ("vqa", lambda m: m.asker(prompt="a"), "The template 'a' must hold one {}"),
    ("vqa", lambda m: m.asker(inference="rank"), "There are no answers to rank; give --answer-list"),
    ("vqa", lambda m: m.asker(inference="choose"), "There is no inference 'choose'; expected 'generate' or 'rank'."),
    ("vqa", lambda m: m.asker(answer_list=[]), "answer_list is empty"),
    ("vqa", lambda m: m.asker(answer_list=["a", " "]), "answer_list is empty, or holds a blank answer"),
    ("vqa", lambda m: m.asker(answer_list=[7]), "answer 0 is 7, of type int"),
    ("vqa", lambda m: m.asker(answer_list=ANSWERS, k_test=0), "k_test is 0; expected a whole number above 0."),
    ("vqa", lambda m: m.asker(answer_list=ANSWERS, num_beams=3), "num_beams is read with the inference 'generate' alone"),
    ("vqa", lambda m: m.asker()(m.paths[:2], ["a"]), "2 pictures and 1 questions; expected one for each, or one for all."),
    ("vqa", lambda m: m.asker()(m.paths[0], ["a", " "]), "question 1 is blank; expected a text."),
    ("vqa", lambda m: m.asker()(m.paths[0], [None]), "question 0 is None"),
    ("vqa", lambda m: m.asker()(m.paths[0]), "Picture 0 has no question; give `question`, or {'image': ..., 'question': ...}."),
    ("vqa", lambda m: m.asker()([{"image": m.paths[0], "question": "a"}, m.paths[1]]), "Picture 1 has no question"),
    ("vqa", lambda m: m.asker()({"image": m.paths[0], "question": "a"}, "b"), "There are questions beside the pictures, and"),
    ("vqa", lambda m: m.asker()({"image": m.paths[0], "prompt": "a"}), "expected 'image', and 'question' where it has one"),
    ("vqa", lambda m: m.asker()(m.paths[0], "a", top_k=0), "top_k is 0; expected a whole number above 0."),
    ("vqa", lambda m: m.asker()(m.paths[0], "a", top_k=4), "num_return 4 is above num_beams 3"),
    ("opt", lambda m: m.asker(inference="rank", answer_list=ANSWERS), "Only BLIP ranks answers"),
    ("opt", lambda m: pipeline("image_to_text_generation", m.graphs, batchsize=0), "batchsize is 0"),
    ("opt", lambda m: pipeline("image_to_text_generation", m.graphs, provider="tpu"), "There is no provider 'tpu'"),
]
FAILED: list[tuple[str, Callable[[Made], Any], str]] = [
    ("vqa", lambda m: m.writer(), "holds graphs of BLIP for questions, for vqa; caption wants graphs of another model."),
    ("caption", lambda m: m.asker(), "holds graphs of BLIP's captioner, for caption; vqa wants"),
    ("caption", lambda m: m.writer()("nowhere.png"), "nowhere.png does not exist"),
    ("caption", lambda m: m.writer()([None]), "Picture 0 is of type NoneType"),
    ("caption", lambda m: pipeline("image_to_text_generation", "nowhere"), "There is no folder nowhere"),
    (
        "opt",
        lambda m: pipeline("feature_extraction", m.graphs),
        "with a language model, for caption, vqa; retrieval wants graphs of another model.",
    ),
]


@pytest.mark.parametrize(("kind", "call", "said"), [*MISUSE, *FAILED], ids=[said for _, _, said in (*MISUSE, *FAILED)])
def test_refused(make: Callable[[str], Made], kind: str, call: Callable[[Made], Any], said: str) -> None:
    made = make(kind)
    with pytest.raises(UserError) as caught:
        call(made)
    assert said in caught.value.message
    assert (type(caught.value) is Misuse) == ((kind, call, said) in MISUSE)
    assert caught.value.message.endswith((".", "?"))
    assert len(caught.value.message) <= LONGEST


def test_no_torch_is_needed(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; import runtime.generation_pipeline, runtime.__main__"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert set(CONFIGS) >= {"caption", "vqa", "opt", "llama", "t5"}
