"""Losses are made where the model is, as no test on a CPU sees. "meta" stands for a device: it has shapes and no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.vqa import BlipVqa
from tests.one_process import Words, batch_of
from tests.tiny import TINY, TINY2, TINY_CAPTION, TINY_LLAMA, TINY_OPT, TINY_T5, TINY_VQA, tiny_llm
from training import caption, losses, pretrain, stage1, stage2, vqa
from training.pretrain import BlipFinetune
from training.stage2 import Answered, Told
from training.step import Step
from training.task import moved
from training.vqa import Questions

META = torch.device("meta")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class OneDevice(TorchDispatchMode):
    """Fails where an operation mixes devices as a GPU does not: all but a single number must be there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor.is_meta for tensor in tensors if tensor.dim() or tensor.is_meta]
        assert func in COPIES or len(set(there)) < 2, f"{func} mixes devices"
        return func(*args, **(kwargs or {}))


BATCH = batch_of(slice(0, 4), TINY2.text.vocab)
IDS, MASK, PICTURES = BATCH.ids, BATCH.mask, BATCH.image
TOLD, ANSWERED = Told(PICTURES, IDS, MASK, MASK), Answered(PICTURES, IDS, MASK, IDS, MASK)
QUESTIONS = Questions(PICTURES, IDS, MASK, IDS, MASK, torch.arange(4), torch.ones(4))
LLMS = {"opt": (TINY_OPT, stage2.told_loss, TOLD), "llama": (TINY_LLAMA, stage2.told_loss, TOLD)} | {
    "t5": (TINY_T5, stage2.answered_loss, ANSWERED)
}


def three(losses_of: Callable[..., Step], matching: bool, **more: Any) -> Callable[..., Step]:
    return lambda model, batch: losses_of(model, Words, batch, torch.Generator().manual_seed(1), matching, **more)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], Any]] = {
    **{
        f"{kind.__name__}-{matching}": (
            lambda kind=kind: kind(TINY2 if kind is Blip2Stage1 else TINY),
            three(stage1.losses_of if kind is Blip2Stage1 else pretrain.losses_of, matching),
            BATCH,
        )
        for kind in (Blip2Stage1, BlipPretrain, BlipFinetune)
        for matching in (True, False)
    },
    "own": (lambda: BlipFinetune(TINY), three(pretrain.losses_of, True, own_negatives=True), BATCH),
    "caption": (lambda: BlipCaptioner(TINY_CAPTION), caption.told_loss, TOLD),
    "vqa": (lambda: BlipVqa(TINY_VQA), vqa.answers_loss, QUESTIONS),
    **{name: (lambda llm=llm: Blip2Llm(tiny_llm(llm)), loss, batch) for name, (llm, loss, batch) in LLMS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_made_where_the_model_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def itm(model: nn.Module, ids: Tensor, mask: Tensor, feat: Tensor, kv: object, *negatives: Tensor) -> Tensor:
        assert all(number.is_meta for number in negatives)  # which pairs these are depends on values, and meta has none
        return feat.sum()

    monkeypatch.setattr(losses, "itm", itm)
    make, loss, batch = CASES[name]
    with META:
        model = make()
    with torch.no_grad(), OneDevice():
        found = loss(model, moved(batch, META))
    assert all(value.is_meta for value in ([found.itc, found.itm, found.lm] if isinstance(found, Step) else [found]))


def test_a_mix_is_seen() -> None:
    with OneDevice(), pytest.raises(AssertionError, match="mixes devices"):
        torch.ones(3, device=META) + torch.ones(3)
