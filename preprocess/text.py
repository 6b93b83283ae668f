"""Captions to token ids: the original's cleaning, then BERT's WordPiece with [DEC] and [ENC] added.

M captions, L tokens. Source: salesforce/BLIP data/utils.py (`pre_caption`) and models/blip.py (`init_tokenizer`).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from models.config import Config, Protocol
from models.errors import UserError

REQUIRED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
FILES = ("tokenizer.json", "vocab.txt")  # looked for in this order


def pre_caption(caption: str, max_words: int) -> str:
    """The caption as the model was trained on it: lower case, `.!"()*#:;~` blanked, runs of white space made one blank,
    the first `max_words` words. Commas, apostrophes and hyphens stay (salesforce/BLIP data/utils.py, pre_caption)."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


class CaptionTokenizer:
    """BERT's WordPiece, uncased, with [DEC] and [ENC].

    Equal to transformers' BertTokenizer. The pure Python one that the original ran differs in one thing: characters that
    Unicode assigned after the tables of the tokenizers library, or not at all, which it drops or splits off by Python's own.

    A special token written out in a text ("[SEP]") is that token, as in transformers' BertTokenizer. A caption never
    holds one: `pre_caption` makes it "[sep]", three ordinary tokens.
    """

    def __init__(self, tokenizer: Tokenizer, file: Path, sha256: str, protocol: Protocol) -> None:
        self._tokenizer, self.file, self.sha256 = tokenizer, file, sha256
        # The order is the original's: in bert-base-uncased [DEC] becomes 30522 and [ENC] 30523.
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in (protocol.decode_token, protocol.encode_token)]
        )
        self.pad_token = protocol.pad_token
        self.pad_id = _id(tokenizer, protocol.pad_token)
        self.unknown_id = _id(tokenizer, "[UNK]")
        self.decode_id = _id(tokenizer, protocol.decode_token)
        self.encode_id = _id(tokenizer, protocol.encode_token)
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: Path, config: Config | None = None) -> CaptionTokenizer:
        """Read a `tokenizer.json` or a `vocab.txt`, or a folder that holds one (tokenizer.json first).

        Args:
            config: the model whose tokenizer it is to be; None takes the usual protocol and a vocabulary of any size.

        Raises UserError when there is none, when it is not a BERT vocabulary (not UTF-8, empty, a token twice, without one
        of [PAD] [UNK] [CLS] [SEP]), or when the model has another number of tokens.
        """
        protocol = config.protocol if config else Protocol()
        file = _find(path)
        data = file.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not a vocabulary: byte {error.start} is not UTF-8. Expected {' or '.join(FILES)} of BERT."
            ) from error
        if not text.strip():
            raise UserError(f"{file} is empty. Expected the {file.name} of BERT (bert-base-uncased for the published models).")
        tokenizer = _from_json(text, file) if file.suffix == ".json" else _from_vocabulary(text, file)
        needed = dict.fromkeys((*REQUIRED, protocol.pad_token))
        if missing := [token for token in needed if tokenizer.token_to_id(token) is None]:
            raise UserError(
                f"{file} is not a BERT vocabulary: it has no {', '.join(missing)}. Give the {file.name} of bert-base-uncased."
            )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if tokenizer.encode("").tokens != ["[CLS]", "[SEP]"]:
            raise UserError(
                f"{file} does not put [CLS] before and [SEP] after a text, as BERT does. Give the vocab.txt of bert-base-uncased."
            )
        found = cls(tokenizer, file, hashlib.sha256(data).hexdigest(), protocol)
        if config and found.size != config.text.vocab:
            raise UserError(
                f"{file} has {found.size:,} tokens, counting those BLIP adds, but the model has {config.text.vocab:,}. "
                "Give blip-export and blip-train the vocabulary that belongs to the model (--tokenizer)."
            )
        return found

    def encode(self, captions: list[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, both (M, max_length) int64: [CLS] first, then the text, [SEP] last even when the text was
        cut, then padding, where the mask is 0. Raises ValueError when max_length is below 2."""
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; [CLS] and [SEP] need 2")
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(length=max_length, pad_id=self.pad_id, pad_token=self.pad_token)
        encodings = self._tokenizer.encode_batch(captions)
        shape = (len(captions), max_length)
        ids = np.array([e.ids for e in encodings], np.int64).reshape(shape)  # (M, L)
        mask = np.array([e.attention_mask for e in encodings], np.int64).reshape(shape)  # (M, L)
        return ids, mask


def with_first(ids: np.ndarray, token_id: int) -> np.ndarray:
    """A copy of `ids` (M, L) with `token_id` in place of [CLS]: [ENC] when a caption is matched with a picture, as
    salesforce/BLIP train_retrieval.py sets it."""
    changed = np.array(ids)
    changed[:, 0] = token_id
    return changed


def _id(tokenizer: Tokenizer, token: str) -> int:
    number: int | None = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds neither {' nor '.join(FILES)}. Give the folder of a BERT tokenizer.")
    raise UserError(f"There is no tokenizer at {path}. Give a {' or '.join(FILES)} of BERT, or a folder that holds one.")


def _from_json(text: str, file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"{file} is not a tokenizer.json: {error}.") from error


def _from_vocabulary(text: str, file: Path) -> Tokenizer:
    """BertTokenizer over a `vocab.txt`: one token a line, its id the number of the line, from 0."""
    tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")  # not splitlines: U+2028 may be a token
    ids: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if ids.setdefault(token, number) != number:
            raise UserError(
                f"{file} lists the token {token!r} twice, in lines {ids[token] + 1} and {number + 1}; give the original file."
            )
    if missing := [token for token in REQUIRED if token not in ids]:
        raise UserError(
            f"{file} is not a BERT vocabulary: it has no {', '.join(missing)}. Give the vocab.txt of bert-base-uncased."
        )
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    special = [token for token in (*REQUIRED, "[MASK]") if token in ids]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
