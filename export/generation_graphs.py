"""What each graph that writes words computes, as a function of the model and the graph's inputs.

The names, and the order of inputs and outputs, are those of models/generation_spec.py. Axes as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.bert import KeysValues
from models.blip2_llm import Blip2Llm
from models.caches import Before, Present
from models.captioner import BlipCaptioner
from models.decoder import TextDecoder
from models.fit import Generator
from models.t5 import T5
from models.vqa import BlipVqa

Outputs = Tensor | tuple[Tensor, ...]
Computations = dict[str, Callable[..., Outputs]]


def generation_graphs(model: Generator, static: bool) -> Computations:
    """What computes each graph of `model`, by name."""
    if isinstance(model, BlipCaptioner):
        return STATIC_CAPTION if static else CAPTION
    if isinstance(model, BlipVqa):
        return STATIC_VQA if static else VQA
    if isinstance(model.llm_model, T5):
        return STATIC_T5 if static else T5_GRAPHS
    return STATIC_LLM if static else LLM


def qformer(model: Blip2Llm, image_feat: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) to query_embed (B, Q, D) and llm_prompt (B, Q, E)."""
    queries = model.query_embed(image_feat)
    return queries, model.llm_prompt(queries)


def image_kv(model: BlipCaptioner, image_feat: Tensor) -> tuple[Tensor, ...]:
    """(B, T, D) to the keys and values that the decoder looks at, (B, H, T, K) each."""
    return listed(model.cross_kv(image_feat))


def question_encoder(model: BlipVqa, text_ids: Tensor, text_atten_mask: Tensor, image_feat: Tensor) -> tuple[Tensor, ...]:
    """Questions, ids and mask (B, L), and their pictures (B, T, D) to question_states (B, L, D), and the keys and values that
    the decoder looks at, (B, H, L, K) each."""
    states = model.question_states(text_ids, text_atten_mask, image_feat)
    return states, *listed(model.cross_kv(states))


def t5_encoder(model: Blip2Llm, llm_prompt: Tensor, text_ids: Tensor, text_atten_mask: Tensor) -> tuple[Tensor, ...]:
    """The queries (B, Q, D) and the prompt, ids and mask (B, L), to the keys and values that the decoder looks at,
    (B, H, Q + L, K) each."""
    return listed(_t5(model).cross_kv(model.encode(llm_prompt, text_ids, text_atten_mask)))


def llm(
    model: Blip2Llm,
    llm_prompt: Tensor,
    text_ids: Tensor,
    text_atten_mask: Tensor,
    positions: Tensor,
    past_mask: Tensor,
    beam_index: Tensor,
    prompt_mask: Tensor,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    """Queries (B, M, Q, E) and words (B, M, L) after what all sequences of a prompt share, of which `prompt_mask` (B, C) is
    seen, and after the rows `beam_index` (B, M) of the past, of which `past_mask` (B, M, P) is seen: logits (B, M, V) of the
    word after them, and what the next step needs, (B * M, H, P + Q + L, K) each. `kept`: what is shared, (B, H, C, K) each,
    and the past, (R, H, P, K) each."""
    half = len(kept) // 2
    past = [Before(*pair) for pair in zip(_rows(kept[half:], beam_index.flatten()), _pairs(kept[:half]), strict=True)]
    ids, mask, places, seen = (x.flatten(0, 1) for x in (text_ids, text_atten_mask, positions, past_mask))  # (B * M, L or P)
    logits, present = model.next_words(llm_prompt.flatten(0, 1), ids, mask, places, past, seen, prompt_mask)
    return logits.reshape(*text_ids.shape[:2], -1), *listed([layer.all for layer in present])


def caption_decoder(
    model: BlipCaptioner,
    text_ids: Tensor,
    text_atten_mask: Tensor,
    positions: Tensor,
    past_mask: Tensor,
    beam_index: Tensor,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    """Words (B, M, L) after the rows `beam_index` (B, M) of the past: logits (B, M, V) of the word after them, and what the
    next step needs. `kept`: what they look at, (B, H, T, K) each, and the past, (R, H, P, K) each."""
    return _decode(model.text_decoder, text_ids, text_atten_mask, positions, past_mask, beam_index, None, kept)


def answer_decoder(
    model: BlipVqa | Blip2Llm,
    text_ids: Tensor,
    text_atten_mask: Tensor,
    positions: Tensor,
    past_mask: Tensor,
    beam_index: Tensor,
    cross_mask: Tensor,
    *kept: Tensor,
) -> tuple[Tensor, ...]:
    """The same when some of what they look at is padding: where `cross_mask` (B, C) is 0."""
    return _decode(decoder_of(model), text_ids, text_atten_mask, positions, past_mask, beam_index, cross_mask, kept)


def _decode(
    decoder: TextDecoder | T5,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    past_mask: Tensor,
    beam_index: Tensor,
    cross_mask: Tensor | None,
    kept: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    half = len(kept) // 2
    cross, past = _pairs(kept[:half]), _rows(kept[half:], beam_index.flatten())
    logits, present = decoder.next_words(ids, positions, mask, past, past_mask, cross, cross_mask)
    return logits, *listed([layer.all for layer in present])


def static_image_kv(model: BlipCaptioner, image_feat: Tensor) -> Tensor:
    """As `image_kv`, in one tensor (B, 2 * layers, H, T, K)."""
    return stacked(model.cross_kv(image_feat))


def static_question_encoder(
    model: BlipVqa, text_ids: Tensor, text_atten_mask: Tensor, image_feat: Tensor
) -> tuple[Tensor, Tensor]:
    """As `question_encoder`, keys and values in one tensor (B, 2 * layers, H, L, K)."""
    states = model.question_states(text_ids, text_atten_mask, image_feat)
    return states, stacked(model.cross_kv(states))


def static_t5_encoder(model: Blip2Llm, llm_prompt: Tensor, text_ids: Tensor, text_atten_mask: Tensor) -> Tensor:
    """As `t5_encoder`, in one tensor (B, 2 * layers, H, Q + L, K)."""
    return stacked(_t5(model).cross_kv(model.encode(llm_prompt, text_ids, text_atten_mask)))


def llm_prefill(
    model: Blip2Llm, llm_prompt: Tensor, text_ids: Tensor, text_atten_mask: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries (B, Q, E) and the prompt (B, L): logits (B, V) of the first word, and the keys and values of queries and prompt
    (B, 2 * layers, H, Q + L, K), which begin the buffer."""
    logits, present = model.next_words(llm_prompt, text_ids, text_atten_mask, positions, None, None)
    return logits, _new(present)


def llm_decode(model: Blip2Llm, text_ids: Tensor, positions: Tensor, past_mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """A word (B, 1) after a buffer (B, 2 * layers, H, S, K), of which `past_mask` (B, S) is seen: logits (B, V) of the next,
    and this word's keys and values (B, 2 * layers, H, 1, K)."""
    own = [Before(pair) for pair in _pairs(past.unbind(1))]
    logits, present = model.next_words(None, text_ids, None, positions, own, past_mask)
    return logits, _new(present)


def static_caption_decoder(
    model: BlipCaptioner, text_ids: Tensor, positions: Tensor, past_mask: Tensor, cross_kv: Tensor, past: Tensor
) -> tuple[Tensor, Tensor]:
    """A word (B, M, 1) of each sequence after its buffer, `past` (B * M, 2 * layers, H, S, K): logits (B, M, V) of the next, and
    this word's keys and values (B * M, 2 * layers, H, 1, K)."""
    return _decode_static(model.text_decoder, text_ids, positions, past_mask, None, cross_kv, past)


def static_answer_decoder(
    model: BlipVqa | Blip2Llm,
    text_ids: Tensor,
    positions: Tensor,
    past_mask: Tensor,
    cross_mask: Tensor,
    cross_kv: Tensor,
    past: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same when some of what they look at is padding: where `cross_mask` (B, C) is 0."""
    return _decode_static(decoder_of(model), text_ids, positions, past_mask, cross_mask, cross_kv, past)


def _decode_static(
    decoder: TextDecoder | T5,
    ids: Tensor,
    positions: Tensor,
    past_mask: Tensor,
    cross_mask: Tensor | None,
    cross_kv: Tensor,
    past: Tensor,
) -> tuple[Tensor, Tensor]:
    before, cross = _pairs(past.unbind(1)), _pairs(cross_kv.unbind(1))
    logits, present = decoder.next_words(ids, positions, None, before, past_mask, cross, cross_mask)
    return logits, _new(present)


def decoder_of(model: Generator) -> TextDecoder | T5:
    """What looks at what was read, and writes; a language model without an encoder has none."""
    return _t5(model) if isinstance(model, Blip2Llm) else model.text_decoder


def _t5(model: Blip2Llm) -> T5:
    assert isinstance(model.llm_model, T5)
    return model.llm_model


def _pairs(tensors: Sequence[Tensor]) -> list[KeysValues]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def listed(pairs: Sequence[KeysValues]) -> tuple[Tensor, ...]:
    """Keys of the first layer, its values, keys of the second, ..."""
    return tuple(tensor for pair in pairs for tensor in pair)


def stacked(pairs: Sequence[KeysValues]) -> Tensor:
    """(N, H, L, K) each to (N, 2 * layers, H, L, K)."""
    return torch.stack(listed(pairs), dim=1)


def _new(present: Sequence[Present]) -> Tensor:
    return stacked([layer.new for layer in present])


def _rows(past: Sequence[Tensor], beam_index: Tensor) -> list[KeysValues]:
    """The rows (R, H, P, K) that the new ones go on from: (N, H, P, K)."""
    return _pairs([tensor.index_select(0, beam_index) for tensor in past])


CAPTION: Computations = {"image_feat": BlipCaptioner.image_feat, "image_kv": image_kv, "text_decoder": caption_decoder}
STATIC_CAPTION: Computations = {**CAPTION, "image_kv": static_image_kv, "text_decoder": static_caption_decoder}
VQA: Computations = {
    "image_feat": BlipVqa.image_feat,
    "question_encoder": question_encoder,
    "text_decoder": answer_decoder,
}
STATIC_VQA: Computations = {**VQA, "question_encoder": static_question_encoder, "text_decoder": static_answer_decoder}
SEEING: Computations = {"image_feat": Blip2Llm.image_feat, "qformer": qformer}
LLM: Computations = {**SEEING, "llm": llm}
STATIC_LLM: Computations = {**SEEING, "llm_prefill": llm_prefill, "llm_decode": llm_decode}
T5_GRAPHS: Computations = {**SEEING, "t5_encoder": t5_encoder, "t5_decoder": answer_decoder}
STATIC_T5: Computations = {**SEEING, "t5_encoder": static_t5_encoder, "t5_decoder": static_answer_decoder}
