"""Checkpoints of BLIP-2 that are damaged, hostile, incomplete or of another model, in one file or in two; wrong sizes."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.bad_input.damage import Change, Hostile, changed, cut, flipped, given, holding, saved, together, weights
from tests.bad_input.table import Case, Spoil, Work, refused
from tests.make_checkpoint import checkpoint, stage1_state
from tests.mindspore_file import mindspore_items, value, write_ckpt
from tests.tiny import TINY2, random_model

VIT = "--vit-checkpoint"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
NORM, DECODER = "blocks.1.norm1.bias", "Qformer.cls.predictions.decoder.bias"
OF_BLIP = checkpoint(random_model(), queue=8)
STAGE1 = given("--checkpoint", "stage1.pth")  # without an image encoder
WHOLE = given("--checkpoint", "whole.pth")
EVA = given(VIT, "eva.pth")
INDEX = "model.safetensors.index.json"
KEYS = "visual_encoder.blocks.0.attention.dense2.weight"  # of the first block, by MindSpore


def _vit(name: str, *spoils: Spoil) -> Spoil:
    """A checkpoint in two files, of which `name` is the image encoder's."""
    return together(STAGE1, *spoils, given(VIT, name))


def _eva(**tensors: Tensor) -> Spoil:
    return _vit("eva.pth", weights("eva.pth", lambda held: held.update(tensors)))


def _whole(**tensors: Tensor) -> Spoil:
    return together(weights("whole.pth", lambda held: held.update(tensors)), WHOLE)


def _stage2(state: dict[str, Tensor]) -> None:
    """What LAVIS leaves of the Q-Former in the second stage, and what it adds."""
    for name in [name for name in state if "Qformer.bert.embeddings" in name or "Qformer.cls" in name]:
        del state[name]
    state["opt_proj.weight"] = torch.zeros(8, 40)


def _shards(change: Callable[[Path], object]) -> Spoil:
    """A Hugging Face folder in two shards, with the head and the temperature beside them."""

    def spoil(work: Work) -> list[object]:
        folder = work["hf"]
        folder.mkdir()
        for n, file in enumerate((FIRST, SECOND)):
            save_file({f"qformer.{n}": torch.zeros(2)}, folder / file)
        (folder / INDEX).write_text(json.dumps({"weight_map": {"qformer.0": FIRST, "qformer.1": SECOND}}))
        save_file({"temp": torch.tensor(0.07)}, folder / "lavis_extras.safetensors")
        change(folder)
        return ["--checkpoint", folder]

    return spoil


def _index(content: Any) -> Spoil:
    return _shards(lambda folder: (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content)))


def _ckpt(
    change: Callable[[dict[str, Tensor]], object] = bool, after: Callable[[bytes], bytes] = bytes, more: bytes = b""
) -> Spoil:
    """A MindSpore file of the whole model whose tensors, or then whose bytes, are changed; `more` follows its last entry."""

    def spoil(work: Work) -> list[object]:
        items = {name: tensor.clone() for name, tensor in mindspore_items(stage1_state(TINY2, std=0.2), crossed=True)}
        change(items)
        write_ckpt(work["bad.ckpt"], items, crc=not more)
        work["bad.ckpt"].write_bytes(after(work["bad.ckpt"].read_bytes() + more))
        return ["--checkpoint", work["bad.ckpt"]]

    return spoil


def _sizes(change: Change) -> Spoil:
    return lambda work: work.edit("model/config.json", change)


CLIP_SIZES = _sizes(lambda c: c["vision"].update(kind="clip"))


def _nested() -> Tensor:
    """A tensor of tensors, which has no shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.zeros(48)])


ENCODERS = [
    Case("no image encoder", "export", ("stage1.pth holds no image encoder", "Add --vit-checkpoint eva_vit_g.pth"), STAGE1),
    Case("no such image encoder", "export", ("There is no checkpoint", "nowhere.pth"), _vit("nowhere.pth")),
    Case("empty image encoder", "export", ("bad.pth is empty (0 bytes)",), _vit("bad.pth", holding("bad.pth", b""))),
    Case(
        "a page as image encoder",
        "export",
        ("bad.pth", "neither a PyTorch checkpoint"),
        _vit("bad.pth", holding("bad.pth", "<html>404")),
    ),
    Case("a folder as image encoder", "export", ("images holds no weights", "expected model.safetensors"), _vit("images")),
    Case("truncated image encoder", "export", ("eva.pth", "damaged or incomplete"), _vit("eva.pth", changed("eva.pth", cut))),
    Case("a list as image encoder", "export", ("bad.pth holds a list",), together(STAGE1, saved([1], option=VIT))),
    Case("CLIP for EVA", "export", ("clip.pth: vision.kind", "has clip", "has eva"), _vit("clip.pth")),
    Case("EVA for CLIP", "export", ("eva.pth: vision.kind", "has eva", "has clip"), together(CLIP_SIZES, STAGE1, EVA)),
    Case("the checkpoint as its own encoder", "export", ("stage1.pth holds no image encoder", "eva_vit_g"), _vit("stage1.pth")),
    Case("narrow encoder", "export", ("eva.pth: vision.width", "has 40", "48"), _eva(cls_token=torch.zeros(1, 1, 40))),
    Case(
        "encoder without a tensor", "export", (f"{NORM} is missing",), _vit("eva.pth", weights("eva.pth", lambda t: t.pop(NORM)))
    ),
    Case("NaN in the encoder", "export", ("eva.pth holds NaN", NORM), _eva(**{NORM: torch.full((48,), math.nan)})),
    Case("positions of no square", "export", ("for 15 tokens", "expected a square"), _eva(pos_embed=torch.zeros(1, 15, 48))),
    Case("tensor of tensors", "export", (f"{NORM} is missing",), _eva(**{NORM: _nested()})),
    Case("two image encoders", "export", ("whole.pth already holds an", "Leave --vit-checkpoint out"), together(WHOLE, EVA), 2),
]
MAIN = [
    Case("truncated stage 1", "export", ("stage1.pth", "damaged"), together(changed("stage1.pth", cut), STAGE1, EVA)),
    Case("stage 2", "export", ("is a stage-2 checkpoint", "stage-1"), together(weights("stage1.pth", _stage2), STAGE1, EVA)),
    Case(
        "an image encoder alone",
        "export",
        ("eva.pth is not a checkpoint of BLIP-2", "no query_tokens"),
        given("--checkpoint", "eva.pth"),
    ),
    Case("BLIP for BLIP-2", "export", ("bad.pth is not a checkpoint of BLIP-2", "no query_tokens"), saved(OF_BLIP)),
    Case("BLIP and an encoder", "export", ("bad.pth is not a checkpoint of BLIP-2",), together(saved(OF_BLIP), EVA)),
    Case("temperature 0", "export", ("temp, the temperature, is 0",), _whole(temp=torch.tensor(0.0))),
    Case("temperature NaN", "export", ("the temperature, is nan", "one number above 0"), _whole(temp=torch.tensor(math.nan))),
    Case("two temperatures", "export", ("the temperature, is (2,)",), _whole(temp=torch.ones(2))),
    Case("copies that differ", "export", ("decoder.bias differs from",), _whole(**{DECODER: torch.ones(TINY2.qformer.vocab)})),
]
SHARDS = [
    Case("shard missing", "export", ("00002-of-00002.safetensors is missing", INDEX), _shards(lambda hf: (hf / SECOND).unlink())),
    Case("shard empty", "export", ("00002-of-00002.safetensors is empty",), _shards(lambda hf: (hf / SECOND).write_bytes(b""))),
    Case("shard twice", "export", ("hf holds qformer.0 in two",), _shards(lambda hf: shutil.copy(hf / FIRST, hf / SECOND))),
    Case("shard cut", "export", ("damaged or incomplete",), _shards(lambda hf: os.truncate(hf / SECOND, 50))),
    Case("shards that leave the folder", "export", ("'/etc/passwd'", "own folder"), _index({"weight_map": {"x": "/etc/passwd"}})),
    Case("shards of no name", "export", ("lists '.'",), _index({"weight_map": {"x": "."}})),
    Case("index without a map", "export", (f"{INDEX} is damaged",), _index({})),
    Case("index of nothing", "export", (f"{INDEX} lists no files",), _index({"weight_map": {}})),
    Case("index that is no JSON", "export", (f"{INDEX} is damaged",), _index("{")),
    Case("half of the model", "export", ("hf holds no image encoder",), _shards(bool)),
]
CKPT = [
    Case("truncated .ckpt", "export", ("bad.ckpt is a damaged or incomplete MindSpore file",), _ckpt(after=cut)),
    Case("one bit of a .ckpt", "export", ("bad.ckpt is a damaged", "checksum differs"), _ckpt(after=flipped)),
    Case(
        "encrypted .ckpt", "export", ("bad.ckpt", "encrypted", "without a key"), _ckpt(after=lambda b: bytes(x ^ 90 for x in b))
    ),
    Case(".ckpt without keys", "export", ("dense1, 2 and 3 are (48, 48), missing",), _ckpt(lambda t: t.pop(KEYS))),
    Case(
        "impossible shape in a .ckpt",
        "export",
        ("'x' has the impossible shape (0, ",),
        _ckpt(more=value("x", [0, -1], "Float32", b"")),
    ),
    Case("entry twice in a .ckpt", "export", ("'temp' is there twice",), _ckpt(more=value("temp", [1], "Float32", bytes(4)))),
]
SIZES = [
    Case("qformer a number", "export", ("config.json: qformer", "found int"), _sizes(lambda c: c.update(qformer=7))),
    Case("qformer empty", "export", ("config.json: qformer", "'vocab' is missing"), _sizes(lambda c: c.update(qformer={}))),
    Case("a text encoder too", "export", ("unknown field 'text'", "qformer"), _sizes(lambda c: c.update(text=c["qformer"]))),
    Case("unknown part", "export", ("unknown field 'colour'", "cross_every"), _sizes(lambda c: c["qformer"].update(colour=1))),
    Case("no queries", "export", ("qformer: queries", "found 0"), _sizes(lambda c: c["qformer"].update(queries=0))),
    Case("other queries", "export", ("qformer.queries", "has 6", "has 7"), _sizes(lambda c: c["qformer"].update(queries=7))),
    Case("never crossing", "export", ("qformer: cross_every", "found 0"), _sizes(lambda c: c["qformer"].update(cross_every=0))),
    Case(
        "crossing too rarely", "export", ("cross_every", "has 2", "has 4"), _sizes(lambda c: c["qformer"].update(cross_every=4))
    ),
    Case("crossing too often", "export", ("cross_every", "has 2", "has 1"), _sizes(lambda c: c["qformer"].update(cross_every=1))),
    Case("heads that do not divide", "export", ("qformer.width by", "40 / 7"), _sizes(lambda c: c["qformer"].update(heads=7))),
    Case("BLIP's encoder", "export", ("vision.kind is 'vit'", "eva or clip"), _sizes(lambda c: c["vision"].update(kind="vit"))),
    Case(
        "a width that no memory holds",
        "export",
        ("vision: width", "at most"),
        _sizes(lambda c: c["vision"].update(width=6 * 10**15)),
    ),
    Case(
        "no token", "export", ("encode_token must be a text, found ''",), _sizes(lambda c: c["protocol"].update(encode_token=""))
    ),
    Case(
        "half a token", "export", ("decode_token must be a text",), _sizes(lambda c: c["protocol"].update(decode_token="\ud800"))
    ),
    Case(
        "BLIP's token", "export", ("vocab.txt has 60 tokens", "59"), _sizes(lambda c: c["protocol"].update(encode_token="[ENC]"))
    ),
]


@pytest.mark.parametrize("case", ENCODERS + MAIN + SHARDS + CKPT + SIZES, ids=str)
def test_checkpoints(case: Case, work2: Work) -> None:
    refused(case, work2)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "beside tensors"])
def test_an_image_encoder_that_executes_code(work2: Work, inside: bool, tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "executed")
    content = {**torch.load(work2["eva.pth"], weights_only=True), "config": hostile} if inside else hostile
    said = ("bad.pth holds Python objects and was not opened",)
    refused(Case("pickle", "export", said, together(STAGE1, saved(content, option=VIT))), work2)
    assert not hostile.mark.exists()
    torch.load(work2["bad.pth"], weights_only=False)
    assert hostile.mark.exists()  # else the check above would see nothing
