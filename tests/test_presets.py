"""The published models by name: sizes, the names that others use, JSON and back, the graphs of each."""

from __future__ import annotations

import pytest

from models.config import Blip2LlmConfig, BlipCaptionConfig, BlipVqaConfig, GenerationConfig
from models.config_file import from_dict, to_dict
from models.errors import Misuse, UserError
from models.llm_config import BAICHUAN, T5Config
from models.presets import ALIASES, PRESETS, preset
from models.spec import graph_specs, spec_from_dict, spec_to_dict
from tests.tiny import GENERATORS

WRITING = [name for name, known in PRESETS.items() if isinstance(known, GenerationConfig)]


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name: str) -> None:
    assert from_dict(to_dict(PRESETS[name]), "here") == PRESETS[name]


@pytest.mark.parametrize("kind", GENERATORS)
def test_small_ones_and_back(kind: str) -> None:
    assert from_dict(to_dict(GENERATORS[kind]), "here") == GENERATORS[kind]


def test_names_of_others() -> None:
    assert all(known in PRESETS for known in ALIASES.values())
    assert preset("itt_blip2_stage2_vit_g_llama_7b") == PRESETS["blip2-llama-7b"]
    assert preset("paddlemix/blip2-caption-opt2.7b").vision.image_size == 364
    assert preset("Salesforce/blip2-flan-t5-xl") == PRESETS["blip2-flan-t5-xl"]
    baichuan = preset("itt_blip2_stage2_vit_g_baichuan_7b")
    assert isinstance(baichuan, Blip2LlmConfig)
    assert (baichuan.llm.family, baichuan.llm.vocab) == (BAICHUAN, 64_000)
    with pytest.raises(Misuse, match=r"No model is called 'blip2-opt-2\.7'\. Did you mean 'blip2-opt-2\.7b'\?"):
        preset("blip2-opt-2.7")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", WRITING)
def test_graphs_bind_to_numbers(name: str, static: bool) -> None:
    for spec in graph_specs(PRESETS[name], static).values():
        assert spec_from_dict(spec.name, spec_to_dict(spec)) == spec
        bound = spec.bind(4, 9, M=3, P=5, R=12, Q=32, C=41, S=64)
        assert bound.is_static
        assert all(isinstance(dim, int) for tensor in bound.outputs for dim in tensor.shape)


def test_sums_and_products_of_axes() -> None:
    specs = graph_specs(GENERATORS["caption"])
    present = specs["text_decoder"].bind(2, 3, M=5, P=7).output("present.0.key")
    assert present.shape == (10, 4, 10, 10)
    assert specs["text_decoder"].bind(2, 3).output("present.0.key").shape == ("B*M", 4, "P+L", 10)  # M and P are still open
    prefill = graph_specs(GENERATORS["opt"], static=True)["llm_prefill"].bind(2, 5).output("present")
    assert prefill.shape == (2, 4, 7, 11, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"llm": {"family": "gpt"}}, "family is 'gpt', expected one of opt, llama, vicuna, baichuan, t5"),
        (
            {"llm": {**to_dict(GENERATORS["t5"])["llm"], "activation": "relu"}},
            "llm.activation is 'relu', expected 'gelu' or 'gelu_new'",
        ),
        ({"llm": {**to_dict(GENERATORS["t5"])["llm"], "buckets": 6}}, "llm.buckets is 6"),
        ({"llm": {**to_dict(GENERATORS["opt"])["llm"], "pre_norm": 1}}, "pre_norm must be true or false, found 1"),
        ({"llm": {**to_dict(GENERATORS["opt"])["llm"], "heads": 5}}, r"llm.width by llm.heads does not divide \(56 / 5\)"),
        ({"llm": {**to_dict(GENERATORS["llama"])["llm"], "heads": 8}}, "rotated positions need an even number"),
        (
            {"llm": {**to_dict(GENERATORS["opt"])["llm"], "positions": 20}},
            "protocol.max_length is 32, but llm.positions is only 20",
        ),
        ({"llm": []}, "family is None"),
        ({"vision": to_dict(GENERATORS["caption"])["vision"]}, "vision.kind is 'vit', expected eva or clip"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(to_dict(GENERATORS["opt"]) | changed, "here")


def test_kinds_are_told_by_their_parts() -> None:
    assert isinstance(from_dict(to_dict(GENERATORS["caption"]), "here"), BlipCaptionConfig)
    assert isinstance(from_dict(to_dict(GENERATORS["vqa"]), "here"), BlipVqaConfig)
    found = from_dict(to_dict(GENERATORS["t5"]), "here")
    assert isinstance(found, Blip2LlmConfig)
    assert isinstance(found.llm, T5Config)
