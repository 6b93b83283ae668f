"""The sizes of a model and the protocol its data follow. Imports no torch: the NPU host reads it too.

Three of BLIP (retrieval, captions, answers), two of BLIP-2 (its first stage, and its second with a language model). The
published ones are in models/presets.py, JSON is read in models/config_file.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.llm_config import LlmConfig

INTERPOLATIONS = ("bicubic", "bilinear")  # the resizes that a protocol may name
VIT, EVA, CLIP = "vit", "eva", "clip"  # the image encoders: BLIP's, and the two of BLIP-2


@dataclass(frozen=True)
class VisionConfig:
    """A pre-norm ViT. EVA's and CLIP's end before their last block, which BLIP-2 leaves out."""

    image_size: int  # pixels, the pictures are square
    patch: int  # pixels
    width: int
    depth: int
    heads: int
    mlp: int  # width of the feed-forward layer
    eps: float = 1e-6  # of every LayerNorm
    kind: str = VIT  # VIT, EVA or CLIP

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class TextConfig:
    """BERT with cross-attention in every layer (salesforce/BLIP models/med.py)."""

    vocab: int  # with the special tokens that the model adds: [DEC], and BLIP's [ENC]
    width: int
    depth: int
    heads: int
    ffn: int
    positions: int
    eps: float = 1e-12


@dataclass(frozen=True)
class QformerConfig(TextConfig):
    """BERT that reads captions, and pictures by learnt queries (salesforce/LAVIS models/blip2_models/Qformer.py)."""

    queries: int = 32
    cross_every: int = 2  # layers 0, 2, ... of the queries look at the picture

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with cross-attention."""
        return tuple(range(0, self.depth, self.cross_every))


@dataclass(frozen=True)
class Protocol:
    """How pictures and captions become tensors. Part of the model: another protocol gives other numbers."""

    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_words: int = 30  # captions are cut to so many words before tokenising
    max_length: int = 35  # tokens, with [CLS] and [SEP]
    pad_token: str = "[PAD]"
    decode_token: str = "[DEC]"  # begins a caption in the decoder
    encode_token: str = "[ENC]"  # takes the place of [CLS] when a caption is matched with a picture; BLIP-2 keeps [CLS]
    k_test: int = 256  # candidates re-ranked per query


STAGE1 = Protocol(max_words=50, encode_token="[CLS]", k_test=128)  # BLIP-2's
CAPTIONS = Protocol(max_words=50, max_length=40)  # max_length: of the prompt
ANSWERS = Protocol(max_words=50, k_test=128)  # max_length: of the question; k_test: answers that are ranked
STAGE2 = Protocol(max_words=50, max_length=32, encode_token="[CLS]")  # max_length: of the prompt


@dataclass(frozen=True)
class BlipConfig:
    """BLIP for retrieval: two encoders, their projections, the matching head."""

    vision: VisionConfig
    text: TextConfig
    embed: int = 256  # width of the space that pictures and captions share
    protocol: Protocol = Protocol()


@dataclass(frozen=True)
class Blip2Config:
    """BLIP-2's first stage: an image encoder, and a Q-Former that reads it and captions."""

    vision: VisionConfig
    qformer: QformerConfig
    embed: int = 256  # width of the space that queries and captions share
    protocol: Protocol = STAGE1

    @property
    def text(self) -> QformerConfig:
        """What reads the captions: the Q-Former."""
        return self.qformer


@dataclass(frozen=True)
class BlipCaptionConfig:
    """BLIP that describes pictures: an image encoder and a decoder."""

    vision: VisionConfig
    decoder: TextConfig
    protocol: Protocol = CAPTIONS

    @property
    def text(self) -> TextConfig:
        """What reads and writes the words."""
        return self.decoder


@dataclass(frozen=True)
class BlipVqaConfig:
    """BLIP that answers questions: the question is read beside the picture, the answer is said from what was read."""

    vision: VisionConfig
    text: TextConfig  # reads the question
    decoder: TextConfig  # says the answer; its cross-attention looks at the states of the question
    protocol: Protocol = ANSWERS


@dataclass(frozen=True)
class Blip2LlmConfig:
    """BLIP-2's second stage: a Q-Former without words, projected into a language model that has them."""

    vision: VisionConfig
    qformer: QformerConfig  # its words and positions are not used
    llm: LlmConfig
    protocol: Protocol = STAGE2

    @property
    def text(self) -> LlmConfig:
        """What reads and writes the words."""
        return self.llm


RetrievalConfig = BlipConfig | Blip2Config
GenerationConfig = BlipCaptionConfig | BlipVqaConfig | Blip2LlmConfig
Config = RetrievalConfig | GenerationConfig
