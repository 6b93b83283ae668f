"""Checkpoints, vocabularies and sizes that are damaged, hostile or of another model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.bad_input.damage import Hostile, holding, saved
from tests.bad_input.table import Case, Spoil, Work, options, refused
from tests.make_checkpoint import checkpoint, stage1_state, without_encoder
from tests.tiny import TINY2, random_model


def _raw(name: str, data: bytes) -> Spoil:
    """A checkpoint that holds these bytes."""

    def spoil(work: Work) -> list[object]:
        work[name].write_bytes(data)
        return ["--checkpoint", work[name]]

    return spoil


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Our own checkpoint with its tensors changed."""

    def spoil(work: Work) -> None:
        path = work["model"] / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def _cut(work: Work) -> None:
    path = work["model"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _index(work: Work) -> list[object]:
    (work["model"] / "model.safetensors").rename(work["elsewhere.safetensors"])
    index = {"weight_map": {"x": "../elsewhere.safetensors"}}
    (work["model"] / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["--checkpoint", work["model"]]


def _vocabulary(data: str | bytes) -> Spoil:
    return holding("model/vocab.txt", data)


def _sizes(change: Callable[[Any], object]) -> Spoil:
    return lambda work: work.edit("model/config.json", change)


WORD = "text_encoder.embeddings.word_embeddings.weight"
BERT = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
ORIGINAL = checkpoint(random_model(), queue=8)
OF_BLIP2 = stage1_state(TINY2)
CASES = [
    Case("truncated .pth", "export", ("bad.pth", "damaged or incomplete"), saved(ORIGINAL, keep=0.6)),
    Case("empty .pth", "export", ("bad.pth is empty (0 bytes)",), _raw("bad.pth", b"")),
    Case("text named .pth", "export", ("bad.pth", "neither a PyTorch checkpoint"), _raw("bad.pth", b"<html>not found</html>")),
    Case("noise named .pth", "export", ("bad.pth",), _raw("bad.pth", b"PK\x03\x04" + bytes(range(256)) * 9)),
    Case("list in a .pth", "export", ("bad.pth holds a list",), saved([torch.zeros(2)])),
    Case(
        "checkpoint of another model", "export", ("bad.pth is not a checkpoint of BLIP",), saved({"fc.weight": torch.zeros(2, 2)})
    ),
    Case("truncated safetensors", "export", ("model.safetensors", "damaged or incomplete"), _cut),
    Case("text named .safetensors", "export", ("bad.safetensors",), _raw("bad.safetensors", b"version https://git-lfs\n")),
    Case("NaN weights", "export", ("NaN or infinity in " + WORD,), _tensors(lambda t: t[WORD].view(-1)[7:8].fill_(math.nan))),
    Case(
        "infinite weights", "export", ("NaN or infinity in " + WORD,), _tensors(lambda t: t[WORD].view(-1)[7:8].fill_(math.inf))
    ),
    Case("tensor missing", "export", (f"{WORD} is missing",), _tensors(lambda t: t.pop(WORD))),
    Case("tensor of whole numbers", "export", (WORD, "int64"), _tensors(lambda t: t.update({WORD: t[WORD].long()}))),
    Case(
        "tensor of another shape", "export", ("itm_head.bias",), _tensors(lambda t: t.update({"itm_head.bias": torch.zeros(3)}))
    ),
    Case("no checkpoint", "export", ("no checkpoint", "nowhere.pth"), options("--checkpoint", "nowhere.pth")),
    Case("folder without weights", "export", ("holds no weights",), lambda work: ("--checkpoint", work["images"])),
    Case("shards outside of the folder", "export", ("../elsewhere.safetensors", "own folder"), _index),
    Case("other depth", "export", ("text.depth", "has 2", "has 3"), _sizes(lambda c: c["text"].update(depth=3))),
    Case("wrong vocabulary", "export", ("vocab.txt has 7 tokens", "60"), _vocabulary(BERT)),
    Case("vocabulary without [CLS]", "export", ("vocab.txt", "[CLS]"), _vocabulary("[PAD]\n[UNK]\nthe\n")),
    Case("word twice", "export", ("vocab.txt", "'the' twice", "lines 6 and 7"), _vocabulary(BERT + "the\nthe\n")),
    Case("vocabulary empty", "export", ("vocab.txt is empty",), _vocabulary("")),
    Case("vocabulary not UTF-8", "export", ("vocab.txt is not a vocabulary",), _vocabulary(b"\x80\x81")),
    Case("no vocabulary", "export", ("no tokenizer", "nowhere"), options("--tokenizer", "nowhere")),
    Case("folder without a vocabulary", "export", ("images holds neither",), lambda work: ("--tokenizer", work["images"])),
    Case(
        "sizes of the wrong type",
        "export",
        ("config.json: vision: depth", "'3'"),
        _sizes(lambda c: c["vision"].update(depth="3")),
    ),
    Case("size 0", "export", ("config.json: vision: heads", "found 0"), _sizes(lambda c: c["vision"].update(heads=0))),
    Case("size true", "export", ("config.json: embed", "found True"), _sizes(lambda c: c.update(embed=True))),
    Case("NaN in the sizes", "export", ("config.json: text: eps", "nan"), _sizes(lambda c: c["text"].update(eps=math.nan))),
    Case("unknown size", "export", ("unknown field 'colour'",), _sizes(lambda c: c.update(colour="red"))),
    Case("size missing", "export", ("'vision' is missing",), _sizes(lambda c: c.pop("vision"))),
    Case("sizes that do not divide", "export", ("does not divide", "48 / 7"), _sizes(lambda c: c["vision"].update(heads=7))),
    Case("list of sizes", "export", ("found list",), lambda work: (work["model"] / "config.json").write_text("[]") and None),
    Case("sizes not JSON", "export", ("not JSON",), lambda work: (work["model"] / "config.json").write_text("{") and None),
    Case("BLIP-2 for BLIP", "export", ("bad.pth is not a checkpoint of BLIP", "no text_encoder"), saved(OF_BLIP2)),
    Case("BLIP-2 without an image encoder for BLIP", "export", ("no visual_encoder",), saved(without_encoder(OF_BLIP2))),
    Case("an image encoder for BLIP", "export", ("--vit-checkpoint is for BLIP-2",), options("--vit-checkpoint", "eva.pth"), 2),
    Case("a Q-Former for BLIP", "export", ("unknown field 'text'",), _sizes(lambda c: c.update(qformer=[]))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints(case: Case, work: Work) -> None:
    refused(case, work)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "beside tensors"])
def test_a_pickle_that_executes_code(work: Work, inside: bool, tmp_path: Path) -> None:
    hostile = Hostile(tmp_path / "executed")
    content = {"model": random_model().state_dict(), "config": hostile} if inside else hostile
    refused(Case("pickle", "export", ("bad.pth holds Python objects and was not opened",), saved(content)), work)
    assert not hostile.mark.exists()
    torch.load(work["bad.pth"], weights_only=False)
    assert hostile.mark.exists()  # else the check above would see nothing
