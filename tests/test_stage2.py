"""training/stage2.py against transformers' BLIP-2 on the same random weights: losses and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blip2_llm import Blip2Llm
from tests.test_decoders import their_llama, their_opt, their_t5
from tests.their_generators import untied
from tests.tiny import TINY_LLAMA, TINY_OPT, TINY_OPT_350M, TINY_T5, random_generator, tiny_llm
from training import stage2
from training.settings import Model
from training.stage2 import Answered, Told
from training.start import freeze

B = 3
# Sums of at most 20 terms in float32; the largest difference seen was 1.4e-6, of gradients 3e-6 of the largest.
EXACT, CLOSE = 5e-6, 2e-5
MASK = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
LEARNT = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])


def ready(llm: Any) -> Blip2Llm:
    model = random_generator(tiny_llm(llm))
    assert isinstance(model, Blip2Llm)
    model.requires_grad_(True)
    return model


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(B, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def words(vocab: int, seed: int = 1) -> Tensor:
    return torch.randint(3, vocab, MASK.shape, generator=torch.Generator().manual_seed(seed)) * MASK


def their(model: Blip2Llm, llm: Any) -> Any:
    """transformers' language model with the weights of ours."""
    made = {"opt": their_opt, "llama": their_llama, "t5": their_t5}[llm.family](llm)
    if llm.family == "t5":
        untied(made)
    state = model.llm_model.state_dict()
    missing = made.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    if llm.family == "opt":
        made.tie_weights()
    return made.eval()


@pytest.mark.parametrize("llm", [TINY_OPT, TINY_OPT_350M, TINY_LLAMA], ids=["opt", "opt-350m", "llama"])
def test_words_of_a_text(llm: Any) -> None:
    model, theirs = ready(llm), None
    theirs = their(model, llm)
    ids = words(llm.vocab)
    freeze(model, Model())
    found = stage2.told_loss(model, Told(pictures(), ids, MASK, LEARNT))
    found.backward()
    prompt = model.llm_prompt(model.query_embed(model.image_feat(pictures()))).detach().requires_grad_()
    queries = prompt.shape[1]
    labels = torch.cat([torch.full((B, queries), -100), ids.masked_fill(LEARNT == 0, -100)], dim=1)
    mask = torch.cat([torch.ones(B, queries, dtype=torch.int64), MASK], dim=1)
    embeds = torch.cat([prompt, theirs.get_input_embeddings()(ids)], dim=1)
    wanted = theirs(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    wanted.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=EXACT)
    # The gradient of the projection's bias is the sum of what comes back to the prompt.
    bias = model.llm_proj.bias.grad
    assert bias is not None
    total = prompt.grad.sum((0, 1))
    assert float((bias - total).abs().max()) <= CLOSE * float(total.abs().max())


def test_answers_of_t5() -> None:
    model = ready(TINY_T5)
    theirs = their(model, TINY_T5)
    ids, answer = words(TINY_T5.vocab), words(TINY_T5.vocab, 2)
    freeze(model, Model())
    found = stage2.answered_loss(model, Answered(pictures(), ids, MASK, answer, MASK))
    prompt = model.llm_prompt(model.query_embed(model.image_feat(pictures()))).detach()
    embeds = torch.cat([prompt, theirs.get_input_embeddings()(ids)], dim=1)
    mask = torch.cat([torch.ones(prompt.shape[:2], dtype=torch.int64), MASK], dim=1)
    theirs.config.decoder_start_token_id = 0
    wanted = theirs(inputs_embeds=embeds, attention_mask=mask, labels=answer.masked_fill(MASK == 0, -100)).loss
    assert found.item() == pytest.approx(wanted.item(), abs=EXACT)


def test_mindformers_labels_are_these_one_place_to_the_left() -> None:
    """-100 for all queries but the last, then the words: labels of the logits at their own place."""
    model = ready(TINY_LLAMA).requires_grad_(False)
    ids = words(TINY_LLAMA.vocab)
    llm = model.llm_model
    prompt = model.llm_prompt(model.query_embed(model.image_feat(pictures())))
    queries = prompt.shape[1]
    embeds = torch.cat([prompt, llm.embed(ids)], dim=1)
    terms = []
    for row in range(B):
        count = queries + int(MASK[row].sum())
        theirs = their(model, TINY_LLAMA)
        logits = theirs(inputs_embeds=embeds[row : row + 1, :count]).logits[0].log_softmax(-1)
        labels = [-100] * (queries - 1) + ids[row, : count - queries].tolist()
        terms += [-logits[n, word] for n, word in enumerate(labels) if word != -100]
    found = stage2.told_loss(model, Told(pictures(), ids, MASK, torch.ones_like(ids)))
    assert float(found) == pytest.approx((sum(terms) / len(terms)).item(), abs=EXACT)


def test_the_comparison_can_fail() -> None:
    model = ready(TINY_OPT).requires_grad_(False)
    batch = Told(pictures(), words(TINY_OPT.vocab), MASK, LEARNT)
    right = float(stage2.told_loss(model, batch))
    for wrong in (
        dataclasses.replace(batch, learnt=torch.ones_like(LEARNT)),
        dataclasses.replace(batch, image=pictures(3)),
        dataclasses.replace(batch, mask=torch.ones_like(MASK), learnt=LEARNT.clamp_min(1 - MASK)),
    ):
        assert abs(float(stage2.told_loss(model, wrong)) - right) > 100 * EXACT


def test_what_is_frozen() -> None:
    model = ready(TINY_OPT)
    freeze(model, Model())
    stage2.told_loss(model, Told(pictures(), words(TINY_OPT.vocab), MASK, LEARNT)).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {n for n, _ in model.named_parameters() if n.startswith(("visual_encoder.", "llm_model."))}
    freeze(model, Model(freeze_vit=False))
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("llm_model."))
