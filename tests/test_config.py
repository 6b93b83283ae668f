"""Configurations: what a preset says, and what a user's file may get wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from models.config import STAGE1
from models.config_file import from_dict, from_file, to_dict
from models.errors import Misuse, UserError
from models.presets import PRESETS, preset
from tests.tiny import TINY, TINY2


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(preset(name))))
    assert from_file(path) == preset(name)
    # A graphs folder keeps the text of the configuration: it must be the same whatever way it took.
    assert json.dumps(to_dict(from_file(path))) == json.dumps(to_dict(preset(name)))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    from_dict(to_dict(preset(name)), name)


def test_published_sizes() -> None:
    base, large = preset("blip-retrieval-base-coco"), preset("blip-retrieval-large-flickr")
    vit_b, vit_l = base.vision, large.vision
    assert (vit_b.tokens, vit_b.width, vit_b.depth, vit_b.heads, vit_b.mlp, vit_b.eps) == (577, 768, 12, 12, 3072, 1e-6)
    assert (vit_l.tokens, vit_l.width, vit_l.depth, vit_l.heads, vit_l.mlp, vit_l.eps) == (577, 1024, 24, 16, 4096, 1e-6)
    assert (base.text, base.embed) == (large.text, large.embed)
    assert (base.text.vocab, base.text.heads, base.text.positions, base.embed) == (30524, 12, 512, 256)
    assert (base.protocol.k_test, large.protocol.k_test) == (256, 128)
    assert base.text.eps == 1e-12


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blip-retrieval-base-coc", "Did you mean 'blip-retrieval-base-coco'?"),
        ("BLIP-demo", "Did you mean 'blip-demo'?"),
        ("zzz", "Known models: blip-retrieval-base-coco, "),
    ],
)
def test_unknown_preset(name: str, hint: str) -> None:
    with pytest.raises(Misuse) as caught:
        preset(name)
    assert hint in caught.value.message
    assert caught.value.exit_code == 2
    assert ("Did you mean" in caught.value.message) == ("Did you mean" in hint)


def test_fields_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    values = to_dict(TINY)
    del values["protocol"], values["vision"]["eps"]
    found = from_dict(values, "here")
    assert found.vision == TINY.vision
    assert found.protocol.max_words == 30
    values["protocol"] = {"k_test": 7}
    assert from_dict(values, "here").protocol.k_test == 7


def test_fields_of_blip2s_protocol_that_are_left_out_are_blip2s() -> None:
    values = to_dict(TINY2)
    for given in ({}, {"k_test": 7}):
        values["protocol"] = given
        assert from_dict(values, "here").protocol == dataclasses.replace(STAGE1, **given)
    del values["protocol"]
    assert from_dict(values, "here").protocol == STAGE1
    assert (STAGE1.encode_token, STAGE1.max_words, STAGE1.k_test) == ("[CLS]", 50, 128)


def test_errors_name_the_reader_of_the_text() -> None:
    values = to_dict(TINY2)
    values["protocol"]["max_length"] = 37
    with pytest.raises(UserError, match=r"protocol.max_length is 37, but qformer.positions is only 36\."):
        from_dict(values, "here")


def test_numbers_at_the_edge_of_what_is_allowed() -> None:
    values = to_dict(TINY)
    values["protocol"].update(mean=[0, -0.5, 0.0], max_length=3)
    protocol = from_dict(values, "here").protocol
    assert (protocol.mean, protocol.max_length) == ((0.0, -0.5, 0.0), 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("text"), "here: the field 'text' is missing"),
        (lambda v: v["vision"].pop("width"), "here: vision: the field 'width' is missing"),
        (lambda v: v["vision"].update(widht=3), "here: vision: unknown field 'widht'; VisionConfig has image_size, patch, width"),
        (lambda v: v.update(text=[1]), "here: text: expected an object with the fields of TextConfig, found list"),
        (lambda v: v["text"].update(depth=0), "here: text: depth must be a whole number above 0, found 0"),
        (lambda v: v["text"].update(depth=True), "whole number above 0, found True"),
        (lambda v: v["text"].update(depth="12"), "whole number above 0, found '12'"),
        (lambda v: v["text"].update(depth=2.5), "whole number above 0, found 2.5"),
        (lambda v: v["text"].update(eps=float("nan")), "here: text: eps must be a number, found nan"),
        (lambda v: v["text"].update(eps=float("inf")), "must be a number, found inf"),
        (lambda v: v["text"].update(eps=0), "here: text: eps must be a number above 0, found 0"),
        (lambda v: v["text"].update(eps=-1e-12), "must be a number above 0, found -1e-12"),
        (lambda v: v["text"].update(eps=10**400), "must be a number, found 1000"),
        (lambda v: v["protocol"].update(mean=[0.5, 0.5]), "here: protocol: mean must be three numbers, found [0.5, 0.5]"),
        (lambda v: v["protocol"].update(mean=[0.5, float("nan"), 0]), "here: protocol: mean must be a number, found nan"),
        (lambda v: v["protocol"].update(mean=[True, 0, 0]), "here: protocol: mean must be a number, found True"),
        (lambda v: v["protocol"].update(std=[0.5, 0, 0.5]), "here: protocol.std must be above 0 in every channel, found [0"),
        (
            lambda v: v["protocol"].update(std=[0.5, 0.5, -1]),
            "protocol.std must be above 0 in every channel, found [0.5, 0.5, -1.0]",
        ),
        (lambda v: v["protocol"].update(pad_token=0), "here: protocol: pad_token must be a text, found 0"),
        (lambda v: v["protocol"].update(interpolation="nearest"), "interpolation is 'nearest', expected bicubic or bilinear"),
        (lambda v: v["protocol"].update(max_length=2), "max_length is 2, but [CLS], a token and [SEP] take 3"),
        (lambda v: v["protocol"].update(max_length=37), "protocol.max_length is 37, but text.positions is only 36"),
        (lambda v: v["vision"].update(patch=7), "here: vision.image_size by vision.patch does not divide (32 / 7)"),
        (lambda v: v["vision"].update(heads=5), "here: vision.width by vision.heads does not divide (48 / 5)"),
        (lambda v: v["text"].update(heads=3), "here: text.width by text.heads does not divide (40 / 3)"),
    ],
)
def test_wrong_fields(change: Any, said: str) -> None:
    values = to_dict(TINY)
    change(values)
    with pytest.raises(UserError) as caught:
        from_dict(values, "here")
    assert said in caught.value.message
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "expected an object with the fields of BlipConfig, found list"),
        (b"{}", "the field 'vision' is missing"),
    ],
    ids=["empty", "cut", "no text", "deep", "list", "no fields"],
)
def test_wrong_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json") as caught:
        from_file(path)
    assert said in caught.value.message
