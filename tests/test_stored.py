"""Weights in half precision compute what they compute when they are widened beforehand, bit for bit, and are as before after."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models.blip2_llm import Blip2Llm, language_model
from models.caches import Before, Bias
from models.llm_checkpoint import open_language_model
from models.llm_config import LlmConfig, OptConfig
from models.stored import HALVES, compute_in_float32, in_float32
from models.t5 import T5
from tests.make_generator import write_llm
from tests.tiny import TINY_LLAMA, TINY_OPT, TINY_OPT_350M, TINY_T5, fill, random_generator, tiny_llm

LLMS: dict[str, LlmConfig] = {"opt": TINY_OPT, "opt-350m": TINY_OPT_350M, "llama": TINY_LLAMA, "t5": TINY_T5}
IDS = torch.tensor([[3, 9, 4, 20], [11, 5, 60, 7]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])


def logits(model: Blip2Llm) -> list[Tensor]:
    """Of the first word, and of one after it."""
    random = torch.Generator().manual_seed(3)
    prompt = model.llm_prompt(torch.randn(2, 6, 40, generator=random))
    llm, none = model.llm_model, torch.zeros(2, 1, 0, dtype=torch.int64)
    if isinstance(llm, T5):
        read = torch.cat([torch.ones(2, 6, dtype=torch.int64), MASK], dim=1)
        cross, ids = llm.cross_kv(model.encode(prompt, IDS, MASK)), IDS[:, None, :1]
        past, place = [(torch.zeros(2, 6, 0, 8),) * 2] * 2, torch.zeros(2, 1, 1, dtype=torch.int64)
        first, present = llm.next_words(ids, place, None, past, none, cross, read)
        ones = torch.ones(2, 1, 1, dtype=torch.int64)
        return [first, llm.next_words(ids, place + 1, None, [p.all for p in present], ones, cross, read)[0]]
    positions = (MASK.cumsum(1) - 1).clamp_min(0) + 6
    past = [Before((torch.zeros(2, 7, 0, 8),) * 2)] * 2
    first, present = model.next_words(prompt, IDS, MASK, positions, past, none[:, 0])
    seen = torch.cat([torch.ones(2, 6, dtype=torch.int64), MASK], dim=1)
    second, _ = model.next_words(None, IDS[:, :1], None, positions[:, -1:] + 1, [Before(p.all) for p in present], seen)
    return [first, second]


def stored(llm: LlmConfig, dtype: torch.dtype) -> tuple[Blip2Llm, Blip2Llm]:
    """A model whose language model is stored so, and the same one, widened."""
    model = random_generator(tiny_llm(llm))
    assert isinstance(model, Blip2Llm)
    model.llm_model.to(dtype)
    wide = copy.deepcopy(model)
    wide.llm_model.to(torch.float32)
    return model, wide


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", LLMS)
def test_bits_are_those_of_float32(name: str, dtype: torch.dtype) -> None:
    model, wide = stored(LLMS[name], dtype)
    weights = {n: (id(p), p.dtype) for n, p in model.named_parameters()}
    want = logits(wide)
    for _ in range(2):
        with compute_in_float32(model):
            found = logits(model)
            assert {n: (id(p), p.dtype) for n, p in model.named_parameters()} == weights
        assert all(f.dtype == torch.float32 and torch.equal(f, w) for f, w in zip(found, want, strict=True))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    # The control: these weights are not those before they were halved.
    assert not torch.equal(want[0], logits(random_generator(tiny_llm(LLMS[name])))[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LLMS)
def test_without_it_nothing_is_computed_in_half_precision_unnoticed(name: str) -> None:
    model, _ = stored(LLMS[name], torch.float16)
    with pytest.raises(RuntimeError, match=r"dtype|Half"):
        logits(model)


def test_one_inside_the_other() -> None:
    model, wide = stored(TINY_OPT, torch.float16)
    with compute_in_float32(model), compute_in_float32(model.llm_model):
        assert torch.equal(logits(model)[0], logits(wide)[0])
        assert model.llm_model.model.decoder.layers[0].fc1.weight.dtype == torch.float16  # type: ignore[union-attr, index]


def test_a_run_that_fails_leaves_the_weights() -> None:
    layer = nn.Linear(4, 4).half()
    with compute_in_float32(layer), pytest.raises(RuntimeError):
        layer(torch.zeros(3))
    assert layer.weight.dtype == torch.float16
    assert not layer._forward_hooks


def test_float32_is_left_alone() -> None:
    layer = nn.Linear(4, 4)
    with compute_in_float32(layer):
        assert not layer._forward_hooks
    assert in_float32(layer.weight) is layer.weight


def test_one_matrix_at_a_time(tmp_path: Path) -> None:
    """The weights stay mapped from their file, and of all of them no two are wide at once."""
    llm = OptConfig(vocab=20, width=512, depth=8, heads=8, ffn=2048, embed=512, positions=20)  # 50 MB in float16
    with torch.device("meta"):
        model = language_model(llm)
    zeros = {name: torch.zeros(p.shape, dtype=torch.float16) for name, p in model.named_parameters()}
    write_llm(tmp_path / "llm", llm, zeros)
    del zeros
    ctypes.CDLL(None).malloc_trim(0)  # what other tests freed would be given out again, unseen
    before = private()
    tensors = open_language_model(tmp_path / "llm", llm).tensors
    model.load_state_dict({name.removeprefix("llm_model."): tensor for name, tensor in tensors.items()}, assign=True)
    model.eval().requires_grad_(False)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())  # reads them
    assert private() - before < 15e6  # 0.1 to 3 MB measured
    wide: set[int] = set()
    for part in model.modules():
        part.register_forward_hook(
            lambda part, given, result: wide.add(sum(p.nbytes for p in model.parameters() if p.dtype == torch.float32))
        )
    past = [Before((torch.zeros(1, 8, 0, 64),) * 2)] * llm.depth
    with compute_in_float32(model):
        model(model.embed(IDS[:1, :1]), IDS[:1, :1], Bias(torch.zeros(1, 1, 1, 1)), past)
    assert max(wide) == 4 * (512 * 2048 + 2048)  # fc1
    # The control: widening all of it, which takes 100 MB, is seen.
    model.float()
    assert private() - before > 60e6


def private() -> int:
    """Bytes of this process that are in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def test_fill_reaches_every_weight() -> None:
    """Nothing here is compared that is zero in both."""
    model = random_generator(tiny_llm(TINY_T5))
    fill(model, 0, 0.2)
    assert all(bool(p.count_nonzero()) for p in model.parameters())
