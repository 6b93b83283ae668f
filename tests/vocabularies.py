"""Small vocabularies of every family, in the files that the published ones come in. Made in a moment, the same each time.

write_wordpiece   vocab.txt                  30 tokens; 32 with [DEC] and [ENC]
write_bpe         vocab.json, merges.txt     300 tokens: <s> <pad> </s> <unk> (0 to 3), 256 bytes, 40 merges
write_sentencepiece(kind)
  "llama"         tokenizer.model            320 tokens: <unk> <s> </s> (0 to 2), 256 bytes, no normalisation; Vicuna adds
                                             one more
  "baichuan"      tokenizer.model            360 tokens: as LLaMA's, with "\\n" and "\\t" of their own, and Chinese
  "t5"            spiece.model               60 tokens: <pad> </s> <unk> (0 to 2), no bytes; T5 adds 100 more
"""

from __future__ import annotations

import io
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from preprocess.sentencepiece_words import SentenceRules

WORDPIECE, WORDPIECE_BLIP = 30, 32
BPE_SIZE = 300
SENTENCEPIECE = {"llama": 320, "baichuan": 360, "t5": 60}
# What transformers' LlamaTokenizer does of itself, and so its BLIP-2 with a LLaMA.
LLAMA_WITH_BOS = SentenceRules(("<unk>", "<s>", "</s>"), first=(1,), last=(), pad_id=0, start_ids=(1,), stop_ids=(2,))
VICUNA, T5 = SENTENCEPIECE["llama"] + 1, SENTENCEPIECE["t5"] + 100

SENTENCES = [
    "a picture of a dog",
    "a photo of two cats on a red chair",
    "Question: what color is the car? Short answer: blue",
    "Question: how many dogs are there? Answer: 2",
    "a man rides a wave on top of a surfboard.",
    "the cat isn't on the table, it is under it!",
    "a woman wearing a net on her head cutting a cake",
]
CHINESE = ["问题: 详细描述图片内容。 答案: 一只狗", "这是一张照片。", "图片里有什么?"]

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = "a picture of dog cat ##s on the red two is isn t n ' , . ? ! what color ##fish ball - 1"


def write_wordpiece(folder: Path) -> Path:
    """`vocab.txt`. Returns the folder."""
    words = [*_SPECIAL, *_WORDS.split()]
    assert len(words) == WORDPIECE
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return folder


def write_bpe(folder: Path) -> Path:
    """`vocab.json` and `merges.txt` of a byte-level BPE with OPT's special tokens. Returns the folder."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=BPE_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == BPE_SIZE
    tokenizer.model.save(str(folder))
    return folder


def write_sentencepiece(folder: Path, kind: str) -> Path:
    """`tokenizer.model`, or `spiece.model` of T5. Returns the folder."""
    model = io.BytesIO()
    common = {"model_writer": model, "vocab_size": SENTENCEPIECE[kind], "minloglevel": 2, "num_threads": 1}
    if kind == "t5":
        SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES), model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **common
        )
        (folder / "spiece.model").write_bytes(model.getvalue())
        return folder
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES + CHINESE * (kind == "baichuan")),
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity" if kind == "llama" else "nmt_nfkc",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "\t"] if kind == "baichuan" else [],
        **common,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder
