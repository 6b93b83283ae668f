"""training/caption.py and vqa.py against the same computed one text and one word at a time; training/lora.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from export import parity, to_onnx
from export.graphs import module_for
from export.sizes import traced
from export.write import blank_inputs
from models.blip2_llm import Blip2Llm
from models.captioner import BlipCaptioner
from models.decoder import TextDecoder
from models.errors import Misuse
from models.spec import graph_specs
from models.vqa import BlipVqa
from tests.test_losses import log_softmax
from tests.test_stage2 import LEARNT, MASK, B, pictures, ready, words
from tests.tiny import TINY_CAPTION, TINY_LLAMA, TINY_OPT, TINY_OPT_350M, TINY_T5, TINY_VQA, random_generator
from training import caption, stage2, vqa
from training.lora import Lora, add_lora, merged
from training.stage2 import Told
from training.vqa import Questions

# Sums of at most 60 terms in float32: 2e-6 was the largest difference seen, of losses up to 60.
EXACT = 1e-5


def plain(decoder: TextDecoder, source: Tensor, ids: Tensor, first: int) -> list[float]:
    """What each word from number `first` on costs, of one text without padding (1, L) that looks at `source` (1, T, D)."""
    cross = decoder.bert.image_kv(source)
    nothing = [(k[:, :, :0], v[:, :, :0]) for k, v in cross]
    costs = []
    for place in range(first, ids.shape[1]):
        before = ids[:, None, :place]
        none = before[:, :, :0]
        logits, _ = decoder.next_words(before, torch.arange(place)[None, None], torch.ones_like(before), nothing, none, cross)
        scores = log_softmax(logits[0, 0].tolist())
        costs.append(-(0.9 * scores[int(ids[0, place])] + 0.1 * sum(scores) / len(scores)))
    return costs


def test_captions_of_blip() -> None:
    model = random_generator(TINY_CAPTION)
    assert isinstance(model, BlipCaptioner)
    ids, learnt = words(TINY_CAPTION.decoder.vocab), LEARNT.clone()
    learnt[2] = MASK[2]  # the first word is never foretold
    terms = []
    for row in range(B):
        count = int(MASK[row].sum())
        first = max(1, int(learnt[row].argmax()))
        terms += plain(model.text_decoder, model.image_feat(pictures()[row : row + 1]), ids[row : row + 1, :count], first)
    batch = Told(pictures(), ids, MASK, learnt)
    found = caption.told_loss(model, batch)
    assert len(terms) == 4 + 2 + 4
    assert found.item() == pytest.approx(sum(terms) / len(terms), abs=EXACT)
    whole = caption.told_loss(model, dataclasses.replace(batch, learnt=MASK))  # the check can fail: the prompt learnt too
    assert abs(whole.item() - found.item()) > 100 * EXACT


def test_answers_of_blip() -> None:
    """Two of the answers are to the last question, none to the first."""
    model = random_generator(TINY_VQA)
    assert isinstance(model, BlipVqa)
    ids, answer = words(TINY_VQA.text.vocab), words(TINY_VQA.decoder.vocab, 2)
    question, weight = torch.tensor([1, 2, 2]), torch.tensor([1.0, 0.7, 0.3])
    total = 0.0
    for row in range(B):
        asked = int(question[row])
        count, length = int(MASK[asked].sum()), int(MASK[row].sum())
        feat = model.image_feat(pictures()[asked : asked + 1])
        states = model.question_states(ids[asked : asked + 1, :count], MASK[asked : asked + 1, :count], feat)
        total += float(weight[row]) * sum(plain(model.text_decoder, states, answer[row : row + 1, :length], 1))
    batch = Questions(pictures(), ids, MASK, answer, MASK, question, weight)
    found = vqa.answers_loss(model, batch).item()
    assert found == pytest.approx(total / B, rel=1e-6)
    for wrong in (dataclasses.replace(batch, weight=torch.ones(3)), dataclasses.replace(batch, mask=torch.ones_like(MASK))):
        assert abs(vqa.answers_loss(model, wrong).item() - found) > 1e-3


# LoRA


def learnt(model: Blip2Llm, seed: int = 3) -> None:
    """Narrow matrices as training might leave them."""
    random = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, Lora):
            part.up.data.normal_(std=0.1, generator=random)


def said(model: Blip2Llm) -> Tensor:
    """A loss: of T5 that of answers."""
    ids = words(model.cfg.llm.vocab)
    if model.cfg.llm.family == "t5":
        return stage2.answered_loss(model, stage2.Answered(pictures(), ids, MASK, ids, MASK))
    return stage2.told_loss(model, Told(pictures(), ids, MASK, LEARNT))


def test_lora_is_merged_into_half_precision_without_rounding() -> None:
    """Rounded to float16 again, the matrices would be up to 2e-4 off (measured), and the texts other ones."""
    model = ready(TINY_OPT)
    add_lora(model.llm_model, rank=4, alpha=8)
    learnt(model)
    name = "llm_model.model.decoder.layers.0.self_attn.q_proj"
    part = model.get_submodule(name)
    assert isinstance(part, Lora)
    part.base.half()
    found = merged(model, model.state_dict())[f"{name}.weight"]
    wanted = part.base.weight.float() + part.scale * part.up @ part.down
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)
    assert (found.half().float() - wanted).abs().max() > 1e-5


@pytest.mark.parametrize("llm", [TINY_OPT, TINY_OPT_350M, TINY_LLAMA, TINY_T5], ids=["opt", "opt-350m", "llama", "t5"])
def test_lora_merged_is_lora(llm: object) -> None:
    model = ready(llm)
    names, before = list(model.state_dict()), said(model).item()
    add_lora(model.llm_model, rank=4, alpha=8)
    assert said(model).item() == before  # nothing has been learnt yet
    layers = 3 if llm is TINY_T5 else 1  # of T5 the encoder's, and the decoder's that look at words and at what was read
    assert sum(isinstance(part, Lora) for part in model.modules()) == 2 * layers * model.cfg.llm.depth
    learnt(model)
    apart = said(model)
    apart.backward()
    trained = {n for n, p in model.llm_model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.llm_model.named_parameters() if n.endswith((".up", ".down"))}
    alone = merged(model, model.state_dict())
    assert list(alone) == names
    whole = ready(llm)
    whole.load_state_dict(alone)
    assert said(whole).item() == pytest.approx(apart.item(), abs=1e-5)
    assert said(model).item() == apart.item()  # which stays as it was
    assert abs(apart.item() - before) > 1e-3


def test_a_lora_model_is_exported(tmp_path: Path) -> None:
    """Merged it passes parity; and the graph is not that of the model before."""
    learns, model = ready(TINY_OPT), ready(TINY_OPT).requires_grad_(False)
    spec, path = graph_specs(model.cfg)["llm"], tmp_path / "llm.onnx"
    add_lora(learns.llm_model, rank=4, alpha=8)
    learnt(learns)
    model.load_state_dict(merged(learns, learns.state_dict()))
    module, case = module_for("llm", model), parity.cases_for(spec, model.cfg)
    to_onnx.write_onnx(module, spec, blank_inputs(traced(model.cfg).bind(spec)), path, "ort", 18)
    assert onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_outputs()
    assert all(row.ok for row in parity.measure(model, module, spec, path, case))
    other = ready(TINY_OPT).requires_grad_(False)
    assert not all(row.ok for row in parity.measure(other, module_for("llm", other), spec, path, case))


def test_dropout_of_lora_is_for_training_alone() -> None:
    lora = Lora(torch.nn.Linear(64, 64), 4, 8, dropout=0.5)
    lora.up.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.ones(2, 64)
    assert not torch.equal(lora.train()(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))


@pytest.mark.parametrize("rank", [0, 56, 1000])
def test_a_rank_that_is_not_narrow(rank: int) -> None:
    with pytest.raises(Misuse, match=rf"rank is {rank}; expected 1 to 55"):
        add_lora(ready(TINY_OPT).llm_model, rank, 8)
