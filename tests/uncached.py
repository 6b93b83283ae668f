"""A decoder without caches: every text is read from its first word at each step. What the decoding loop is tested over.

It also holds the loop to what `Steps` promises: prompts ascend and never come back, and no row goes on with another prompt's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

Reader = Callable[[np.ndarray, np.ndarray], np.ndarray]  # prompts (R,) and their new words (R, L) to logits (R, V)


class Uncached:
    """Steps over N prompts. `asked` collects how many prompts each call was for."""

    def __init__(self, count: int, read: Reader) -> None:
        self.read = read
        self.owner = np.arange(count)
        self.texts = np.zeros((count, 0), np.int64)
        self.asked: list[int] = []

    def start(self) -> np.ndarray:
        return self._logits(len(self.owner))

    def step(self, ids: np.ndarray, parents: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        assert ids.dtype == parents.dtype == prompts.dtype == np.int64
        assert ids.shape == parents.shape == (len(prompts), ids.shape[1])
        assert (np.diff(prompts) > 0).all()
        assert (self.owner[parents] == prompts[:, None]).all()
        self.owner = np.repeat(prompts, ids.shape[1])
        self.texts = np.concatenate([self.texts[parents.ravel()], ids.reshape(-1, 1)], axis=1)
        return self._logits(len(prompts)).reshape(*ids.shape, -1)

    def _logits(self, prompts: int) -> np.ndarray:
        self.asked.append(prompts)
        return self.read(self.owner, self.texts)


class Table:
    """Logits from the last two words, the place and the prompt, looked up in random tables: float32, of `vocab` words."""

    def __init__(self, seed: int, vocab: int, stop_ids: tuple[int, ...] = (), towards_stop: float = 0.0, spread: float = 1.5):
        random = np.random.default_rng(seed)
        self.last, self.prompt = (random.standard_normal((2, vocab + 1, vocab)) * spread).astype(np.float32)
        self.place, self.before = random.standard_normal((2, 64, vocab)).astype(np.float32)
        self.last[:, list(stop_ids)] += np.float32(towards_stop)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """(R, V) of the word after ids (R, L), the first of which is the prompt's own."""
        before = ids[:, -2] if ids.shape[1] > 1 else ids[:, -1]
        found: np.ndarray = self.last[ids[:, -1]] + self.prompt[ids[:, 0]] + self.place[ids.shape[1]] + self.before[before % 64]
        return found

    def steps(self, counted: np.ndarray) -> Uncached:
        return Uncached(len(counted), lambda prompts, texts: self.logits(np.concatenate([counted[prompts], texts], axis=1)))


class TableModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The same table as transformers generates from it, to the last bit."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, table: Table) -> None:
        super().__init__(PretrainedConfig(vocab_size=table.last.shape[1]))
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # transformers asks a model for its dtype and device
        self.table = table
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=torch.from_numpy(self.table.logits(input_ids.numpy()))[:, None])


def language_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random OPT or LLaMA of 60 words, so uneven that its texts are long, short and different."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64}
    if kind == "opt":
        model = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, init_std=0.4, **sizes, **tokens))
    else:
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, initializer_range=0.4, **sizes, **tokens))
    return model.eval().requires_grad_(False)


def read_language_model(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> Reader:
    """Over prompts ids and mask (N, L), padded on the left."""

    def read(prompts: np.ndarray, texts: np.ndarray) -> np.ndarray:
        new = torch.from_numpy(texts)
        seen = torch.cat([mask[prompts], torch.ones_like(new)], dim=1)
        places = (seen.cumsum(1) - 1).clamp(min=0)
        found = model(torch.cat([ids[prompts], new], dim=1), attention_mask=seen, position_ids=places, use_cache=False)
        return found.logits[:, -1].numpy()

    return read


def read_soft_prompts(model: PreTrainedModel, prompts: torch.Tensor) -> Reader:
    """Over vectors (N, L, D) that stand for words, as BLIP-2 puts them before a text."""

    def read(chosen: np.ndarray, texts: np.ndarray) -> np.ndarray:
        words = model.get_input_embeddings()(torch.from_numpy(texts))
        seen = torch.cat([prompts[chosen], words], dim=1)
        return model(inputs_embeds=seen, attention_mask=torch.ones(seen.shape[:2]), use_cache=False).logits[:, -1].numpy()

    return read


def t5(seed: int = 1) -> T5ForConditionalGeneration:
    """A tiny random T5 of 40 words. Its head is its own, or it would say one word again and again."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=4 if "shared" in name else 0.2)
    model.lm_head.weight = torch.nn.Parameter(2 * torch.randn(40, 32))
    return model.eval().requires_grad_(False)


def read_t5(model: T5ForConditionalGeneration, ids: torch.Tensor, mask: torch.Tensor) -> Reader:
    """Over texts ids and mask (N, L) that the encoder reads."""
    states = model.encoder(ids, attention_mask=mask)[0]  # (N, L, D)

    def read(prompts: np.ndarray, texts: np.ndarray) -> np.ndarray:
        words = torch.from_numpy(np.pad(texts, ((0, 0), (1, 0))))
        found = model(encoder_outputs=(states[prompts],), attention_mask=mask[prompts], decoder_input_ids=words, use_cache=False)
        return found.logits[:, -1].numpy()

    return read


def table_model(table: Table) -> TableModel:
    return TableModel(table).eval().requires_grad_(False)


def up_to_stop(row: list[int], stop_ids: tuple[int, ...]) -> tuple[list[int], bool]:
    """What came before the stop word, and whether there is one. What follows it is padding of one kind or another."""
    for place, word in enumerate(row):
        if word in stop_ids:
            return row[:place], True
    return row, False
