"""MindSpore's checkpoints, written here by protobuf's own library, give the same model; damaged ones give one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoint import load_model, load_stage1
from models.mindspore import to_our_name, to_their_name
from models.weights_file import read_weights
from tests.make_checkpoint import stage1_state
from tests.mindspore_file import CHECKPOINT, KINDS, mindspore_state, value, write_ckpt
from tests.test_blip2_checkpoint import assert_equal, refusal
from tests.test_checkpoint import resident
from tests.tiny import TINY2

BLOCK = "visual_encoder.blocks.1."
State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    """LAVIS's of TINY2; a test may change it."""
    return stage1_state(TINY2, std=0.2)


@pytest.mark.parametrize("form", ["ckpt", "crossed", "slices", "checksum", "old", "npz", "safetensors"])
def test_mindspore(tmp_path: Path, state: State, form: str) -> None:
    theirs, path = mindspore_state(state, crossed=form == "crossed"), tmp_path / "blip2.ckpt"
    if form == "npz":
        path = tmp_path / "blip2.npz"
        np.savez(path, note=np.array(["MindSpore"]), **{name: tensor.numpy() for name, tensor in theirs.items()})
    elif form == "safetensors":
        path = tmp_path / "blip2.safetensors"
        save_file({name: tensor.clone() for name, tensor in theirs.items()}, path)
    else:
        write_ckpt(path, theirs, cut=1000 if form == "slices" else 1 << 29, crc=form == "checksum", old=form == "old")
    model, report = load_stage1(TINY2, path)
    assert_equal(model, state)
    assert (report.layout, report.temperature) == ("mindspore", pytest.approx(0.07))
    assert report.unexpected == (("note",) if form == "npz" else ())
    assert len(report.notes) == (form == "crossed")


def test_a_checkpoint_that_mindspore_saved_while_training(tmp_path: Path, state: State) -> None:
    """With the optimizer's copies, counters, a norm that is built and not used, and the tied tensor under one name only."""
    theirs = mindspore_state(state)
    slots = {f"adam_m.{name}": torch.zeros_like(tensor) for name, tensor in theirs.items() if "position_ids" not in name}
    more = {"visual_encoder.fc_norm.gamma": torch.ones(48), "epoch_num": torch.tensor(3, dtype=torch.int32)}
    theirs["qformer.cls.predictions.decoder.bias"] = theirs.pop("qformer.cls.predictions.bias")
    write_ckpt(tmp_path / "m.ckpt", theirs | slots | more)
    with (tmp_path / "m.ckpt").open("ab") as file:
        file.write(value("random_op", [0], "random_op", b"\x08\x01"))
    model, report = load_stage1(TINY2, tmp_path / "m.ckpt")
    assert_equal(model, state)
    assert report.unexpected == ("random_op",)
    assert report.ignored["records of the training run"] == len(slots) + 1
    assert report.ignored["tensors of the image encoder's end, which BLIP-2 leaves out"] == 1


def test_only_what_is_used_of_a_ckpt_stays_in_memory(tmp_path: Path, state: State) -> None:
    theirs = mindspore_state(state)
    write_ckpt(tmp_path / "first.ckpt", theirs)
    load_model(TINY2, tmp_path / "first.ckpt")  # torch's own memory
    write_ckpt(tmp_path / "m.ckpt", theirs | {"adam_v.qformer": torch.zeros(8_000_000)})
    before = resident()
    kept = load_model(TINY2, tmp_path / "m.ckpt")
    assert resident() - before < 8e6  # 2.1 MB measured; the optimizer's copy has 32
    del kept


@pytest.mark.parametrize("dtype", [*KINDS, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)], ids=str)
def test_types_and_shapes(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    kinds = ["UInt8", "Uint8"] if dtype == torch.uint8 else [KINDS[dtype]]
    (tmp_path / "m.ckpt").write_bytes(b"".join(value(kind, list(shape), kind, content) for kind in kinds))
    found = read_weights(tmp_path / "m.ckpt").tensors
    assert found.keys() == set(kinds)
    assert all(held.dtype == dtype and torch.equal(held, tensor) for held in found.values())


def test_a_file_that_is_one_message(tmp_path: Path, state: State) -> None:
    """And whose shapes are written without a key for each number, as protobuf may."""
    write_ckpt(tmp_path / "m.ckpt", mindspore_state(state))
    whole = CHECKPOINT.FromString((tmp_path / "m.ckpt").read_bytes())
    assert len(whole.value) == len(mindspore_state(state))
    packed = b"\x0a\x02\x02\x03" + b"\x12\x05Int64" + b"\x1a\x30" + bytes(48)  # dims 2 and 3
    entry = b"\x0a\x01x" + b"\x12" + bytes([len(packed)]) + packed
    (tmp_path / "m.ckpt").write_bytes(whole.SerializeToString() + b"\x0a" + bytes([len(entry)]) + entry)
    tensors = read_weights(tmp_path / "m.ckpt").tensors
    assert torch.equal(tensors.pop("x"), torch.zeros(2, 3, dtype=torch.int64))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in mindspore_state(state).items())


def test_names_go_both_ways(state: State) -> None:
    for name in state:
        if not name.endswith("attn.qkv.weight"):
            assert to_our_name(to_their_name(name)) == name
    assert to_their_name(f"{BLOCK}attn.qkv.weight") == f"{BLOCK}attention.dense1.weight"


# What is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.pop(f"{BLOCK}attention.dense3.weight"),
            f"{BLOCK}attention.dense1, 2 and 3 are (48, 48), (48, 48), missing, expected three matrices of one shape.",
        ),
        (
            lambda t: t.update({f"{BLOCK}attention.dense2.weight": torch.zeros(48)}),
            f"{BLOCK}attention.dense1, 2 and 3 are (48, 48), (48,), (48, 48), expected three",
        ),
        (lambda t: t.pop(f"{BLOCK}output.mapping.weight"), f"{BLOCK}output.mapping.weight is missing"),
        (lambda t: t.pop(f"{BLOCK}attention.dense1.bias"), f"{BLOCK}attention.dense1.bias is missing"),
        (
            lambda t: t.update({f"{BLOCK}attention.projection.weight": torch.zeros(48)}),
            f"{BLOCK}attention.projection.weight is (48,), expected (48, 48)",
        ),
        (lambda t: t[f"{BLOCK}layernorm1.gamma"][:1].fill_(float("nan")), f"NaN or infinity in {BLOCK}layernorm1.gamma."),
        (lambda t: t.update({"ln_vision.weight": torch.zeros(48)}), "holds ln_vision.weight twice"),
    ],
    ids=["third missing", "third misshaped", "matrix missing", "bias missing", "row", "NaN", "twice"],
)
def test_tensors_that_do_not_fit(tmp_path: Path, state: State, change: Callable[[State], object], said: str) -> None:
    theirs = mindspore_state(state)
    change(theirs)
    write_ckpt(tmp_path / "m.ckpt", theirs)
    assert said in refusal(tmp_path / "m.ckpt")


def entry(tag: bytes, tensor: bytes) -> bytes:
    """An entry with these bytes."""
    inner = b"\x0a" + bytes([len(tag)]) + tag + b"\x12" + bytes([len(tensor)]) + tensor
    return b"\x0a" + bytes([len(inner)]) + inner


WHOLE = value("a", [2, 3], "Float32", bytes(24))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (WHOLE[:-1], "it ends 1 bytes too early"),
        (WHOLE + b"\x0a", "it ends too early"),
        (WHOLE + b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "bytes too early"),
        (b"\x0a" + b"\xff" * 20, "it holds what is no entry of a checkpoint"),
        (b"\n\n<html>404 Not Found</html>", "is a damaged or incomplete MindSpore file"),
        (WHOLE + b"\x12\x00", "it holds what is no entry"),
        (WHOLE + b"\x08\x01", "it holds what is no entry"),
        (WHOLE + b"\x0f", "it holds what is no entry"),
        (WHOLE + b"\x0d\x00", "it holds what is no entry"),
        (value("a", [2, 3], "Float32", bytes(20)), "'a' has 20 bytes, its shape takes 24"),
        (value("a", [-1, 3], "Float32", bytes(12)), "'a' has 12 bytes, its shape takes"),
        (value("a", [1 << 62, 1 << 62], "Float32", b""), "'a' has 0 bytes, its shape takes"),
        (WHOLE + value("b", [1], "Float32", bytes(4)) + WHOLE, "'a' is there twice"),
        (value("a", [2], "Float32", bytes(4)) + value("a", [3], "Float32", bytes(8)), "the parts of 'a' have different shapes"),
        (value("a", [2], "Float32", bytes(4)) + value("a", [2], "Int32", bytes(4)), "the parts of 'a' have different shapes"),
        (value("", [1], "Float32", bytes(4)), "an entry has no name"),
        (entry(b"\xff\xfe", b""), "a name in it is no text"),
        (entry(b"a", b"\x0a\x01\x80"), "it ends too early"),
        (WHOLE + b"crc_num" + bytes(10), "its checksum differs"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_damaged_files(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "m.ckpt").write_bytes(data)
    found = refusal(tmp_path / "m.ckpt")
    assert "is a damaged or incomplete MindSpore file: " in found
    assert said in found


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, state: State, keep: float) -> None:
    write_ckpt(tmp_path / "m.ckpt", mindspore_state(state))
    data = (tmp_path / "m.ckpt").read_bytes()
    (tmp_path / "m.ckpt").write_bytes(data[: int(len(data) * keep)])
    assert "bytes too early" in refusal(tmp_path / "m.ckpt")


def test_encrypted_files(tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(b"\x3c\x9a" + bytes(range(200)))
    assert "or it is encrypted (MindSpore's enc_key)" in refusal(tmp_path / "m.ckpt")


@pytest.mark.parametrize("spoil", ["object", "cut"])
def test_damaged_npz(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / "m.npz"
    np.savez(path, x=np.array([{}], dtype=object) if spoil == "object" else np.zeros(3000))
    if spoil == "cut":
        data = bytearray(path.read_bytes())
        data[400] ^= 1
        path.write_bytes(data)
    assert "is a damaged or incomplete numpy file" in refusal(path)
