"""blip-convert: what cannot be converted, and what it may not write over. It leaves the new checkpoint or nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import chain
from tests.bad_input.damage import changed, cut, given, holding, linked, saved, together, weights
from tests.bad_input.table import COMMANDS, Case, Spoil, Work, options, refused, the_message
from tests.make_checkpoint import checkpoint
from tests.tiny import random_model

LAYOUTS = ("lavis", "hf", "ours")
STAGE1 = given("--from", "stage1.pth")
WHOLE = given("--from", "whole.pth")


def _whole(*added: object, **tensors: Tensor) -> Spoil:
    """The checkpoint in one file, some tensors of it replaced."""
    return together(weights("whole.pth", lambda held: held.update(tensors)), given("--from", "whole.pth", *added))


def _lost(name: str, *added: object) -> Spoil:
    return together(weights("whole.pth", lambda held: held.pop(name)), given("--from", "whole.pth", *added))


SOURCES = [
    Case("no source", "convert", ("There is no checkpoint nowhere.pth", ".safetensors"), options("--from", "nowhere.pth")),
    Case("source without weights", "convert", ("images holds no weights",), given("--from", "images")),
    Case(
        "source of another kind",
        "convert",
        ("annotations.json", "neither a PyTorch checkpoint"),
        given("--from", "annotations.json"),
    ),
    Case("source empty", "convert", ("bad.pth is empty",), together(holding("bad.pth", b""), given("--from", "bad.pth"))),
    Case("source truncated", "convert", ("whole.pth", "damaged"), together(changed("whole.pth", cut), WHOLE)),
    Case("source of BLIP", "convert", ("no query_tokens",), saved(checkpoint(random_model(), queue=8), option="--from")),
    Case("an image encoder as source", "convert", ("eva.pth is not a checkpoint of BLIP-2",), given("--from", "eva.pth")),
    Case("no image encoder for hf", "convert", ("stage1.pth holds no image encoder", "Add --vit-checkpoint"), STAGE1),
    Case("another image encoder", "convert", ("clip.pth: vision.kind",), together(STAGE1, given("--vit-checkpoint", "clip.pth"))),
    Case("no such image encoder", "convert", ("There is no checkpoint",), together(STAGE1, options("--vit-checkpoint", "x.pth"))),
    Case("two image encoders", "convert", ("already holds",), together(WHOLE, given("--vit-checkpoint", "eva.pth")), 2),
    Case("other sizes", "convert", ("qformer.queries", "has 6", "has 7"), lambda work: work.edit("model/config.json", _seven)),
    Case("CLIP for hf", "convert", ("transformers has no BLIP-2 with CLIP",), lambda work: work.edit("model/config.json", _clip)),
]
CONTENTS = [
    case
    for to in LAYOUTS
    for case in (
        Case(
            f"NaN to {to}",
            "convert",
            ("NaN", "itm_head.bias"),
            _whole("--to", to, **{"itm_head.bias": torch.tensor([0, math.nan])}),
        ),
        Case(f"tensor missing to {to}", "convert", ("itm_head.bias is missing",), _lost("itm_head.bias", "--to", to)),
        Case(
            f"tensor misshaped to {to}",
            "convert",
            ("(3,), expected (2,)",),
            _whole("--to", to, **{"itm_head.bias": torch.ones(3)}),
        ),
    )
] + [
    Case("no type for it", "convert", ("x holds float32 sparse_coo", "no place"), _whole(x=torch.ones(2).to_sparse())),
    Case("no name for it", "convert", ("'__metadata__' is no name",), _whole("--to", "ours", __metadata__=torch.ones(2))),
    Case("half a name", "convert", ("is no name for a tensor",), _whole("--to", "ours", **{"x\ud800": torch.ones(2)})),
]
OUT = [
    Case("--out a file", "convert", ("annotations.json is there already", "Choose"), given("--out", "annotations.json"), 2),
    Case("--out a folder", "convert", ("images is there already",), given("--out", "images"), 2),
    Case("--out the source", "convert", ("is there already",), given("--out", "model/model.safetensors"), 2),
    Case("--out a link to nothing", "convert", ("is there already",), together(linked("link", "x"), given("--out", "link")), 2),
    Case("--out a link to itself", "convert", ("is there already",), together(linked("link", "link"), given("--out", "link")), 2),
    Case("--out below a file", "convert", ("annotations.json",), given("--out", "annotations.json/below")),
    Case("--out with a name too long", "convert", ("file name too long",), given("--out", "a" * 300)),
    Case("unknown layout", "convert", ("--to", "mindspore", "'hf'"), options("--to", "mindspore"), 2),
    Case("preset and sizes", "convert", ("--model and --config",), options("--model", "blip2-demo"), 2),
    Case("no such sizes", "convert", ("--config", "nowhere.json"), options("--config", "nowhere.json"), 2),
]


def _seven(sizes: dict[str, dict[str, object]]) -> None:
    sizes["qformer"]["queries"] = 7


def _clip(sizes: dict[str, dict[str, object]]) -> None:
    sizes["vision"]["kind"] = "clip"


@pytest.mark.parametrize("case", SOURCES + CONTENTS + OUT, ids=str)
def test_conversions(case: Case, work2: Work) -> None:
    refused(case, work2)


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ((), 1, "no preset has its sizes (vision.width 48"),
        (("--model", "blip2-stage1-vit-g"), 1, "vision.width: the checkpoint has 48, blip2-stage1-vit-g has 1408"),
        (("--model", "blip2_stage1_vit_q"), 2, "'blip2_stage1_vit_g'"),
        (("--model", "blip-demo"), 1, "is not a checkpoint of BLIP for retrieval: it has no text_encoder"),
    ],
)
def test_no_preset_for_it(work2: Work, model: tuple[str, ...], code: int, said: str) -> None:
    before = work2.state()
    named = ("--from", work2["whole.pth"], "--to", "hf", "--out", work2.out)
    result = chain.call(COMMANDS["convert"], *named, *model)
    assert result.exit_code == code
    assert said in the_message(result.stderr)
    assert work2.state() == before
