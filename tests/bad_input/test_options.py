"""Commands that are wrong: exit code 2. And one that is only said."""

from __future__ import annotations

import pytest

from tests import chain
from tests.bad_input.table import COMMANDS, Case, Work, options, refused, the_message


def _misuse(name: str, step: str, said: tuple[str, ...], *values: object) -> Case:
    return Case(name, step, said, options(*values), 2)


CASES = [
    *(_misuse(f"unknown option of {step}", step, ("--colour",), "--colour", "red") for step in COMMANDS),
    *(
        _misuse(f"option without a value of {step}", step, ("--out",), "--out")
        for step in ("pre", "export", "convert", "run", "post")
    ),
    _misuse("left-over word", "post", ("unexpected extra argument (build)",), "build"),
    _misuse("batch size 0", "run", ("--batchsize", "0"), "--batchsize", 0),
    _misuse("batch size -1", "run", ("--batchsize", "-1"), "--batchsize", -1),
    _misuse("batch size many", "run", ("--batchsize", "many"), "--batchsize", "many"),
    _misuse("batch size 0 of the export", "export", ("--batchsize", "0"), "--target", "atc", "--batchsize", 0),
    _misuse("batch size 0 of the bench", "bench", ("--batchsize", "0"), "--batchsize", 0),
    _misuse("batch size 0 of the matching", "run", ("--itm-batchsize", "0"), "--itm-batchsize", 0),
    _misuse("k_test 0", "run", ("--k-test", "0"), "--k-test", 0),
    _misuse("k_test a fraction", "run", ("--k-test", "2.5"), "--k-test", 2.5),
    _misuse("threads 0", "run", ("--threads", "0"), "--threads", 0),
    _misuse("unknown provider", "run", ("--provider", "tpu", "cuda"), "--provider", "tpu"),
    _misuse("unknown precision", "run", ("--feat-dtype", "int4"), "--feat-dtype", "int4"),
    _misuse("unknown layout", "pre", ("--layout", "zip", "packed"), "--layout", "zip"),
    _misuse("unknown interpolation", "pre", ("--interpolation", "nearest"), "--interpolation", "nearest"),
    _misuse("no picture wanted", "pre", ("--limit", "0"), "--limit", 0),
    _misuse("no worker", "pre", ("--workers", "0"), "--workers", 0),
    _misuse("unknown target", "export", ("--target", "tflite"), "--target", "tflite"),
    _misuse("opset 99", "export", ("opsets 18 to", "99"), "--opset", 99),
    _misuse("opset of the other target", "export", ("--target ort writes opsets 18 to 23", "17"), "--opset", 17),
    _misuse("opset too new for atc", "export", ("--target atc writes opsets 11 to 18", "20"), "--target", "atc", "--opset", 20),
    _misuse("opset a word", "export", ("--opset", "new"), "--opset", "new"),
    _misuse("fixed batch of dynamic graphs", "export", ("only --target atc",), "--batchsize", 4),
    _misuse("captions longer than the model's", "export", ("--length 99", "35"), "--target", "atc", "--length", 99),
    _misuse("unknown graph", "export", ("'video'", "text_embed"), "--graphs", "video"),
    _misuse("a graph without a name", "export", ("''", "text_embed"), "--graphs", "text_embed,"),
    _misuse("no graph", "export", ("''", "text_embed"), "--graphs", ""),
    _misuse("preset and sizes", "export", ("--model", "--config"), "--model", "blip-demo"),
    _misuse("no such sizes", "export", ("--config", "nowhere.json"), "--config", "nowhere.json"),
    _misuse("unknown keys", "post", ("--keys", "lavis"), "--keys", "lavis"),
    _misuse("unknown graph to time", "bench", ("'video'", "text_embed"), "--only", "video"),
    _misuse("captions without a comparison", "bench", ("--captions", "--compare"), "--captions", "x.json"),
    _misuse("comparison without weights", "bench", ("--checkpoint",), "--compare", "transformers"),
    _misuse("captions longer than the positions", "bench", ("--length 99", "36"), "--length", 99),
    Case("provider absent", "run", ("CUDAExecutionProvider", "--provider cpu"), options("--provider", "cuda")),
    Case("provider absent for the bench", "bench", ("CANNExecutionProvider", "--provider cpu"), options("--provider", "cann")),
]
BARE = [
    ("export", (), "--checkpoint"),
    ("export", ("--checkpoint", "x.pth", "--tokenizer", "x"), "--model PRESET"),
    ("export", ("--model", "blip-retrieval-base-cocoo", "--checkpoint", "x", "--tokenizer", "x"), "'blip-retrieval-base-coco'"),
    ("export", ("--model", "blip2_stage1_vit_q", "--checkpoint", "x", "--tokenizer", "x"), "'blip2_stage1_vit_g'"),
    ("export", ("--model", "blip2-dem", "--checkpoint", "x", "--tokenizer", "x"), "'blip2-demo'"),
    ("convert", (), "--from"),
    ("convert", ("--from", "x", "--to", "hf"), "--out"),
    ("convert", ("--from", "x", "--to", "hf", "--out", "y", "--model", "blip2-dmo"), "'blip2-demo'"),
    ("pre", ("retrieval",), "--annotations"),
    ("pre", ("caption",), "--images"),
    ("pre", ("classify",), "--images FOLDER"),
    ("pre", ("classify", "--annotations", "x"), "--images"),
    ("run", ("captions",), "'caption'"),
    ("run", ("classification",), "'classify'"),
    ("train", ("finetune",), "'finetune'"),
    ("train", ("stage3",), "'stage2'"),
    ("train", ("probe",), "--image"),
    ("train", ("probe", "--image", "x"), "--text"),
    ("train", ("probe", "--model", "blip2_stage1_vit_q", "--image", "x", "--text", "x"), "'blip2_stage1_vit_g'"),
    ("post", ("--outputs", "x"), "blip-post --recall"),
    ("post", ("--recall", "--top1"), "--recall and --top1"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options(case: Case, work: Work) -> None:
    refused(case, work)


@pytest.mark.parametrize(("step", "words", "said"), BARE)
def test_what_is_missing_or_unknown(step: str, words: tuple[str, ...], said: str) -> None:
    result = chain.call(COMMANDS[step], *words)
    assert result.exit_code == 2
    assert said in the_message(result.stderr)


def test_k_test_larger_than_the_set(work: Work) -> None:
    assert "k_test 1000 is larger than the set (4 pictures, 8 captions)" in chain.done(work.call("run", "--k-test", 1000))


def test_batches_larger_than_the_set(work: Work) -> None:
    chain.done(work.call("run", "--batchsize", 1000, "--itm-batchsize", 1000))
