"""The defaults of each reference system, stated a second time, and what is made of them and of what the user asks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from models.config import GenerationConfig
from models.errors import Misuse
from runtime.decoding import check
from runtime.generation_presets import AS, NEW, OPTIONS, TABLE, Settings, family_of, settings_for
from runtime.prompts import caption_prompt, question_prompt
from tests.text_graphs import CONFIGS

# preset, model, task: prompt, beams, most new words after as many ids as that model begins with, fewest, length penalty,
# repetition penalty, rule
SHORT = "Question: {} Short answer:"
BLIP_CAPTION = ("a picture of ", 3, 16, 1, 1.0, 1.0, "original-4.15")  # after [DEC] a picture of
BLIP_VQA = ("{}", 3, 9, 0, 1.0, 1.0, "original-4.15")
WANTED: dict[tuple[str, str, str], tuple[object, ...]] = {
    ("blip", "caption", "caption"): BLIP_CAPTION,
    ("blip", "vqa", "vqa"): BLIP_VQA,
    ("lavis", "caption", "caption"): BLIP_CAPTION,
    ("lavis", "vqa", "vqa"): BLIP_VQA,
    ("lavis", "opt", "caption"): ("a photo of", 5, 29, 7, 0.0, 1.15, "original"),
    ("lavis", "t5", "caption"): ("a photo of", 5, 30, 7, 0.0, 1.15, "original"),
    ("lavis", "vicuna", "caption"): ("", 5, 255, 0, 1.0, 1.5, "original"),
    ("lavis", "opt", "vqa"): (SHORT, 5, 10, 0, 0.0, 1.0, "original"),
    ("lavis", "t5", "vqa"): (SHORT, 5, 10, 0, -1.0, 1.0, "original"),
    ("lavis", "vicuna", "vqa"): (SHORT, 5, 9, 0, 0.0, 1.5, "original"),
    ("paddlemix", "opt", "caption"): ("a photo of ", 1, 30, 8, 1.0, 1.0, "original"),
    ("paddlemix", "t5", "caption"): ("a photo of ", 1, 30, 8, 1.0, 1.0, "original"),
    ("paddlemix", "opt", "vqa"): (SHORT, 1, 10, 1, 0.0, 1.0, "original"),
    ("mindformers", "llama", "caption"): ("a picture of", 1, 28, 0, 1.0, 1.0, "original"),  # 32 queries and 4 of the prompt
    ("mindformers", "baichuan", "vqa"): ("Question: {} Answer:", 1, 28, 0, 1.0, 1.0, "original"),
}
BEFORE = {"caption": 4, "vqa": 1, "opt": 1, "t5": 1, "vicuna": 1, "llama": 36, "baichuan": 36}  # ids that count


def asked(kind: str, task: str, preset: str | None = None, **options: Any) -> Settings:
    return settings_for(CONFIGS[kind], task, preset, options)


@pytest.mark.parametrize(("preset", "kind", "task"), WANTED)
def test_defaults(preset: str, kind: str, task: str) -> None:
    found, before = asked(kind, task, preset), BEFORE[kind]
    counted = found.after(before)
    assert (
        found.prompt,
        counted.num_beams,
        counted.max_length - before,
        max(counted.min_length - before, 0),
        counted.length_penalty,
        counted.repetition_penalty,
        counted.rule,
    ) == WANTED[preset, kind, task]
    assert (counted.num_return, counted.early_stopping, counted.do_sample, counted.temperature) == (1, False, False, 1.0)
    assert found.clean_prompt == (preset == "mindformers")
    assert found.echo_prompt == (preset == "mindformers" and task == "caption")


def test_models_that_lavis_has_not_are_taken_as_opt() -> None:
    for task in ("caption", "vqa"):
        assert asked("llama", task) == asked("baichuan", task) == asked("opt", task)


def test_every_row_can_be_decoded_with() -> None:
    """And a row of the table is not read by one model alone because another stands before it."""
    seen: dict[tuple[str, str, str], int] = {}
    for (preset, task, families), row in TABLE.items():
        assert preset in AS
        for family in families:
            seen[preset, task, family] = seen.get((preset, task, family), 0) + 1
            (config,) = {
                repr(c): c for k, c in CONFIGS.items() if family_of(c) == family and (family != "med" or k == task)
            }.values()
            for sample in ({}, {"do_sample": True}):
                settings = settings_for(config, task, preset, sample)
                assert settings.prompt == row.prompt
                check(settings.after(before=5))
    assert set(seen.values()) == {1}


@pytest.mark.parametrize(
    ("kind", "preset"), [("caption", "blip"), ("vqa", "blip"), ("opt", "lavis"), ("t5", "lavis"), ("llama", "lavis")]
)
def test_whose_defaults_when_nobody_says(kind: str, preset: str) -> None:
    task = kind if kind in ("caption", "vqa") else "caption"
    assert asked(kind, task) == asked(kind, task, preset)


def test_drawn_words() -> None:
    """BLIP's nucleus sampling: one sequence, its own penalty, and the 50 likeliest words that transformers takes by itself."""
    drawn = asked("caption", "caption", do_sample=True).decoding
    assert (drawn.num_beams, drawn.top_k, drawn.top_p, drawn.repetition_penalty) == (1, 50, 0.9, 1.1)
    assert asked("caption", "caption").decoding.repetition_penalty == 1.0
    lavis = asked("opt", "caption", do_sample=True).decoding
    assert (lavis.num_beams, lavis.top_k, lavis.top_p, lavis.repetition_penalty) == (1, 50, 0.9, 1.15)
    mindformers = asked("llama", "caption", "mindformers", do_sample=True, top_k=3).decoding
    assert (mindformers.top_k, mindformers.top_p, mindformers.temperature) == (3, 1.0, 1.0)


def test_what_is_asked_takes_the_place_of_a_default() -> None:
    options: dict[str, Any] = {
        "prompt": "the", "num_beams": 4, "max_length": 12, "min_length": 2, "length_penalty": -1, "repetition_penalty": 2.0,
        "num_return": 2, "early_stopping": "never", "seed": 7, "clean_prompt": True, "echo_prompt": True,
    }  # fmt: skip
    content = asked("opt", "caption", "lavis", **options).content()
    assert {name: content[name] for name in options} == options
    assert content["as"] == "lavis"
    assert set(OPTIONS) <= content.keys()
    sampled = asked("caption", "caption", do_sample=True, top_k=0, top_p=1, temperature=0.5, repetition_penalty=1).decoding
    assert (sampled.top_k, sampled.top_p, sampled.temperature, sampled.repetition_penalty) == (0, 1, 0.5, 1)


@pytest.mark.parametrize("kind", ["caption", "opt", "t5", "llama"])
def test_new_words_count_under_the_rule_of_transformers(kind: str) -> None:
    settings = asked(kind, "caption", rule="transformers", max_length=12, min_length=3)
    assert (settings.max_counts, settings.min_counts) == (NEW, NEW)
    for before in (0, 1, 40):
        counted = settings.after(before)
        assert (counted.max_length - before, counted.min_length - before) == (12, 3)


def test_original_is_the_original_of_the_model() -> None:
    assert asked("caption", "caption", rule="original").decoding.rule == "original-4.15"
    assert asked("opt", "caption", rule="original").decoding.rule == "original"


@pytest.mark.parametrize(
    ("kind", "task", "preset", "options", "said"),
    [
        ("opt", "caption", "blip", {}, "blip has no BLIP-2 with opt; presets of this model: lavis, paddlemix."),
        ("caption", "caption", "mindformers", {}, "mindformers has no BLIP; presets of this model: blip, lavis."),
        ("opt", "caption", "mindformers", {}, "mindformers has no BLIP-2 with opt"),
        ("vicuna", "vqa", "paddlemix", {}, "presets of this model: lavis, mindformers."),
        ("opt", "caption", "lavi", {}, "There is no preset 'lavi'; known presets: blip, lavis"),
        ("opt", "caption", 7, {}, "There is no preset 7"),
        (
            "opt",
            "caption",
            None,
            {"num_beam": 3},
            "There is no option 'num_beam'. Did you mean 'num_beams'? Known options: prompt",
        ),
        ("opt", "caption", None, {"xyz": 3}, "There is no option 'xyz'. Known options"),
        ("opt", "caption", None, {"prompt": None}, "prompt is None; expected a text."),
        ("opt", "caption", None, {"prompt": "\ud800"}, "expected a text."),
        ("opt", "vqa", None, {"prompt": "What?"}, "The template 'What?' must hold one {}, where the question goes"),
        ("opt", "vqa", None, {"prompt": "{} {}"}, "must hold one {}"),
        ("opt", "caption", None, {"echo_prompt": 1}, "echo_prompt is 1; expected True or False."),
        ("opt", "caption", None, {"clean_prompt": "no"}, "clean_prompt is 'no'; expected True or False."),
        ("opt", "caption", None, {"top_k": 3}, "top_k is 3, but it is read with do_sample alone."),
        ("opt", "caption", None, {"temperature": 2}, "temperature is 2, but it is read with do_sample alone."),
        ("opt", "caption", None, {"do_sample": True, "num_beams": 5}, "do_sample goes with num_beams 1, not 5"),
        ("opt", "caption", None, {"do_sample": "yes"}, "do_sample is 'yes'"),
        ("opt", "caption", None, {"num_beams": 0}, "num_beams is 0"),
        ("opt", "caption", None, {"max_length": 5}, "min_length 8 is above max_length 5"),
        ("opt", "caption", None, {"length_penalty": float("nan")}, "length_penalty is nan"),
        ("opt", "caption", None, {"num_return": 6}, "num_return 6 is above num_beams 5"),
        ("opt", "caption", None, {"rule": "newest"}, "There is no rule 'newest'"),
    ],
)
def test_refused(kind: str, task: str, preset: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Misuse) as caught:
        settings_for(CONFIGS[kind], task, preset, options)
    assert said in caught.value.message


def settings_of(config: GenerationConfig, task: str, **options: Any) -> Settings:
    return settings_for(config, task, None, options)


def test_prompts_are_cleaned_by_mindformers_alone() -> None:
    """A LAVIS prompt is read as it is; mindformers cleans it with the caption (CaptionTransform)."""
    prompt = 'Question: What? Answer: "a  cat!"'
    for preset, wanted in (("lavis", prompt), ("mindformers", "question what? answer a cat")):
        assert caption_prompt(prompt, settings_for(CONFIGS["llama"], "caption", preset, {}), 50) == wanted
    kept = settings_for(CONFIGS["llama"], "caption", "mindformers", {"clean_prompt": False})
    assert caption_prompt(prompt, kept, 50) == prompt
    assert caption_prompt("a b c d", settings_of(CONFIGS["llama"], "caption", clean_prompt=True), 3) == "a b c"


def test_questions_are_cleaned_by_all() -> None:
    question = '"Hello";  World!!  (test)#1: a~b*c'
    cleaned = "hello  world  test1 abc"
    assert question_prompt(question, settings_of(CONFIGS["vqa"], "vqa"), 50) == cleaned
    assert question_prompt(question, settings_of(CONFIGS["opt"], "vqa"), 50) == f"Question: {cleaned} Short answer:"
    notebook = settings_of(CONFIGS["opt"], "vqa", prompt="Question: {} Answer:")
    assert question_prompt("What?", notebook, 50) == "Question: what? Answer:"
    mindformers = settings_for(CONFIGS["llama"], "vqa", "mindformers", {})
    assert question_prompt(question, mindformers, 50) == "question hello world test 1 a b c answer"
    assert question_prompt("a {} b", settings_of(CONFIGS["vqa"], "vqa"), 50) == "a {} b"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        asked("opt", "caption").prompt = "x"  # type: ignore[misc]
