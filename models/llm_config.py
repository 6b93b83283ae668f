"""The sizes of the language models that BLIP-2's second stage puts words with. Imports no torch.

Sizes: the published config.json of facebook/opt-*, google/flan-t5-*, LLaMA, Vicuna and baichuan-inc/Baichuan-7B.
"""

from __future__ import annotations

from dataclasses import dataclass

OPT, LLAMA, VICUNA, BAICHUAN, T5 = "opt", "llama", "vicuna", "baichuan", "t5"  # the families, told apart by their words
GELU, GELU_TANH = "gelu", "gelu_new"  # the exact one, and its approximation by tanh


@dataclass(frozen=True)
class OptConfig:
    """OPT: learnt positions, ReLU."""

    vocab: int
    width: int
    depth: int
    heads: int
    ffn: int
    embed: int  # width of the word embeddings; where it is not `width`, projections lead in and out (350m)
    positions: int = 2048
    pre_norm: bool = True  # norms before attention and feed-forward layer; after them in 350m
    eps: float = 1e-5
    family: str = OPT


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA and those built like it: RMSNorm, rotated positions, SwiGLU."""

    vocab: int
    width: int
    depth: int
    heads: int
    ffn: int
    positions: int = 2048  # that it was trained for; no table of it exists
    theta: float = 10000.0  # base of the wavelengths that positions are rotated with
    eps: float = 1e-6
    family: str = LLAMA  # or VICUNA, BAICHUAN


@dataclass(frozen=True)
class T5Config:
    """FlanT5: an encoder and a decoder, relative positions, gated feed-forward layers."""

    vocab: int
    width: int
    depth: int  # layers of the encoder, and of the decoder
    heads: int
    head_width: int
    ffn: int
    buckets: int = 32  # of distances between words
    farthest: int = 128  # from this distance on all fall into the last bucket
    activation: str = GELU  # what LAVIS runs FlanT5 with (dense_act_fn); FlanT5 itself was trained with GELU_TANH
    eps: float = 1e-6
    family: str = T5

    @property
    def positions(self) -> int:
        """As many words as anyone will ask for: positions are relative."""
        return 1 << 20


LlmConfig = OptConfig | LlamaConfig | T5Config


def words_width(llm: LlmConfig) -> int:
    """Width of a word embedding, and so of what stands before the words."""
    return llm.embed if isinstance(llm, OptConfig) else llm.width
