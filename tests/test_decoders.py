"""The decoders against transformers' own on the same random weights: all words at once, and word by word with what was kept.

Tolerances: over all cases here the largest difference is 3e-6 of the largest logit (about 10).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from models.bert import KeysValues
from models.caches import Before, Bias, bias_after
from models.decoder import TextDecoder
from models.llama import Llama
from models.llm_config import LlamaConfig, OptConfig, T5Config
from models.opt import Opt
from models.t5 import T5
from tests.tiny import TINY_CAPTION, TINY_LLAMA, TINY_OPT, TINY_OPT_350M, TINY_T5, fill

CLOSE = 2e-5
ROWS, LENGTH = 3, 7
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 1, 1]])  # padded on the left


def ready(model: nn.Module, std: float = 0.2) -> Any:
    fill(model, 0, std)
    return model.eval().requires_grad_(False)


def words(vocab: int) -> Tensor:
    return torch.randint(3, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def nothing_before(rows: int, heads: int, width: int, layers: int) -> list[KeysValues]:
    empty = torch.zeros(rows, heads, 0, width)
    return [(empty, empty)] * layers


def their_opt(cfg: OptConfig) -> Any:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=cfg.vocab,
            hidden_size=cfg.width,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads,
            ffn_dim=cfg.ffn,
            max_position_embeddings=cfg.positions,
            do_layer_norm_before=cfg.pre_norm,
            word_embed_proj_dim=cfg.embed,
            attn_implementation="eager",
        )
    )


def their_llama(cfg: LlamaConfig) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=cfg.vocab,
            hidden_size=cfg.width,
            num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads,
            intermediate_size=cfg.ffn,
            max_position_embeddings=cfg.positions,
            rms_norm_eps=cfg.eps,
            attn_implementation="eager",
        )
    )


def their_t5(cfg: T5Config) -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=cfg.vocab,
            d_model=cfg.width,
            num_layers=cfg.depth,
            num_heads=cfg.heads,
            d_kv=cfg.head_width,
            d_ff=cfg.ffn,
            relative_attention_num_buckets=cfg.buckets,
            relative_attention_max_distance=cfg.farthest,
            feed_forward_proj="gated-gelu",
            dense_act_fn="gelu",
            tie_word_embeddings=False,
        )
    )


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= CLOSE * wanted.abs().max())


@pytest.mark.parametrize("cfg", [TINY_OPT, TINY_OPT_350M, TINY_LLAMA], ids=["opt", "opt-350m", "llama"])
def test_decoder_only_models(cfg: OptConfig | LlamaConfig) -> None:
    theirs = ready(their_opt(cfg) if isinstance(cfg, OptConfig) else their_llama(cfg))
    ours: Opt | Llama = Opt(cfg) if isinstance(cfg, OptConfig) else Llama(cfg)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    ours.load_state_dict(state)
    ids, positions = words(cfg.vocab), MASK.cumsum(1) - 1
    positions = positions.clamp_min(0)
    past = nothing_before(ROWS, cfg.heads, cfg.width // cfg.heads, cfg.depth)
    # Rows of padding see only padding: there transformers divides by the number of words, and we add -1e4 to all.
    for length in (1, 4, LENGTH):
        at, mask = slice(LENGTH - length, LENGTH), MASK[:, LENGTH - length :]
        mask = torch.ones_like(mask) if length < LENGTH else mask
        places = mask.cumsum(1) - 1
        wanted = theirs(input_ids=ids[:, at], attention_mask=mask).logits[:, -1]
        bias = Bias(bias_after(mask, length, torch.zeros(ROWS, 0, dtype=torch.int64)))
        found, _ = ours(ours.embed(ids[:, at]), places.clamp_min(0), bias, [Before(pair) for pair in past])
        assert close(found, wanted)
    # Word by word.
    kept, seen = past, torch.zeros(ROWS, 0, dtype=torch.int64)
    for n in range(LENGTH):
        bias = Bias(bias_after(MASK[:, n : n + 1], 1, seen))
        found, present = ours(ours.embed(ids[:, n : n + 1]), positions[:, n : n + 1], bias, [Before(pair) for pair in kept])
        kept, seen = [p.all for p in present], MASK[:, : n + 1]
    assert close(found, theirs(input_ids=ids, attention_mask=MASK).logits[:, -1])


def test_t5() -> None:
    theirs = ready(their_t5(TINY_T5))
    ours = T5(TINY_T5)
    ours.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if "embed_tokens" not in name})
    read, said, mask = words(TINY_T5.vocab).repeat(1, 6), words(TINY_T5.vocab), torch.ones(ROWS, 42, dtype=torch.int64)
    mask[0, 30:] = 0
    wanted = theirs(input_ids=read, attention_mask=mask, decoder_input_ids=said)
    states = ours.encode(ours.embed(read), mask)
    assert close(states[0, :30], wanted.encoder_last_hidden_state[0, :30])
    cross = ours.cross_kv(states)
    kept = nothing_before(ROWS, TINY_T5.heads, TINY_T5.head_width, TINY_T5.depth)
    for n in range(LENGTH):
        place = torch.full((ROWS, 1, 1), n)
        seen = torch.ones(ROWS, 1, n, dtype=torch.int64)
        logits, present = ours.next_words(said[:, None, n : n + 1], place, None, kept, seen, cross, mask)
        assert close(logits[:, 0], wanted.logits[:, n])
        kept = [p.all for p in present]


def test_blip_decoder() -> None:
    cfg = TINY_CAPTION.decoder
    theirs = ready(
        transformers.models.blip.modeling_blip_text.BlipTextLMHeadModel(
            transformers.BlipTextConfig(
                vocab_size=cfg.vocab,
                hidden_size=cfg.width,
                encoder_hidden_size=48,
                num_hidden_layers=cfg.depth,
                num_attention_heads=cfg.heads,
                intermediate_size=cfg.ffn,
                max_position_embeddings=cfg.positions,
                layer_norm_eps=cfg.eps,
                is_decoder=True,
                bos_token_id=1,
                sep_token_id=2,
            )
        )
    )
    ours = TextDecoder(cfg, 48)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()}
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    feat = torch.randn(ROWS, 17, 48, generator=torch.Generator().manual_seed(2))
    ids = words(cfg.vocab)
    wanted = theirs(input_ids=ids, encoder_hidden_states=feat, attention_mask=torch.ones_like(ids)).logits
    cross = ours.bert.image_kv(feat)
    kept = nothing_before(ROWS, cfg.heads, cfg.width // cfg.heads, cfg.depth)
    ones = torch.ones(ROWS, 1, LENGTH, dtype=torch.int64)
    everything, _ = ours.next_words(ids[:, None], ones.cumsum(2) - 1, ones, kept, ones[:, :, :0], cross)
    assert close(everything[:, 0], wanted[:, -1])
    for n in range(LENGTH):
        place = torch.full((ROWS, 1, 1), n)
        logits, present = ours.next_words(ids[:, None, n : n + 1], place, None, kept, ones[:, :, :n], cross)
        assert close(logits[:, 0], wanted[:, n])
        kept = [p.all for p in present]
    # Several sequences of one picture share what it shows.
    both = torch.stack([ids, ids.flip(0)], dim=1)  # (B, 2, L)
    ones = torch.ones_like(both)
    kept = nothing_before(2 * ROWS, cfg.heads, cfg.width // cfg.heads, cfg.depth)
    together, _ = ours.next_words(both, ones.cumsum(2) - 1, ones, kept, ones[:, :, :0], cross)
    assert close(together[:, 0], wanted[:, -1])
    alone = theirs(input_ids=ids.flip(0), encoder_hidden_states=feat, attention_mask=torch.ones_like(ids)).logits
    assert close(together[:, 1], alone[:, -1])


def test_a_wrong_position_is_seen() -> None:
    """The check can fail: one position further on, the logits are others."""
    theirs = ready(their_llama(TINY_LLAMA))
    ours = Llama(TINY_LLAMA)
    ours.load_state_dict({name: tensor for name, tensor in theirs.state_dict().items() if name in ours.state_dict()})
    ids, ones = words(TINY_LLAMA.vocab), torch.ones(ROWS, LENGTH, dtype=torch.int64)
    places = ones.cumsum(1) - 1
    places[:, -1] += 1
    past = nothing_before(ROWS, TINY_LLAMA.heads, TINY_LLAMA.width // TINY_LLAMA.heads, TINY_LLAMA.depth)
    found, _ = ours(ours.embed(ids), places, Bias(bias_after(ones, LENGTH, ones[:, :0])), [Before(pair) for pair in past])
    assert not close(found, theirs(input_ids=ids).logits[:, -1])
