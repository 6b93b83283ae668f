"""BERT's WordPiece as BLIP's decoder reads and writes it: [DEC] begins, [SEP] ends. N texts, L tokens.

Source: salesforce/BLIP models/blip.py (`BLIP_Decoder.generate`) and models/blip_vqa.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from models.config import Config, Protocol
from preprocess.padding import left_padded, right_padded
from preprocess.spaces import clean_up
from preprocess.text import REQUIRED, CaptionTokenizer
from preprocess.vocabulary_files import require_characters


class WordpieceWords(CaptionTokenizer):
    """The captions' tokenizer, with what the decoder and the encoder of questions need."""

    family = "wordpiece"

    def __init__(self, tokenizer: Tokenizer, file: Path, sha256: str, protocol: Protocol) -> None:
        super().__init__(tokenizer, file, sha256, protocol)
        self.files: tuple[Path, ...] = (file,)
        special = (*REQUIRED, "[MASK]", protocol.pad_token, protocol.decode_token, protocol.encode_token)
        self._special = {tokenizer.token_to_id(token) for token in special}
        separator_id = tokenizer.token_to_id("[SEP]")
        assert separator_id is not None  # `load` requires it
        self.separator_id: int = separator_id
        self.start_ids: tuple[int, ...] = (self.decode_id,)
        self.stop_ids: tuple[int, ...] = (separator_id,)

    @classmethod
    def load(cls, path: Path, config: Config | None = None) -> WordpieceWords:
        """As CaptionTokenizer.load reads it, with its errors."""
        found = super().load(path, config)
        assert isinstance(found, cls)
        return found

    def prompts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What the decoder begins with, (N, L) int64 ids and mask, left padded: [DEC] and the text, without [SEP]. The empty
        text is [DEC] alone, which is also what an answer begins with."""
        return left_padded([[self.decode_id, *row] for row in self._rows(texts)], self.pad_id)

    def questions(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """What the question encoder reads, (N, L) int64 ids and mask, right padded: [ENC], the text, [SEP], the text cut so
        that L is at most `max_length` (35 in the original; ValueError below 2)."""
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}; [ENC] and [SEP] need 2")
        rows = [[self.encode_id, *row[: max_length - 2], self.separator_id] for row in self._rows(texts)]
        return right_padded(rows, self.pad_id)

    def answers(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Answers to be ranked, as the decoder scores them, (N, L) int64 ids and mask, right padded: [DEC], the text, [SEP].
        None is cut."""
        return right_padded([[self.decode_id, *row, self.separator_id] for row in self._rows(texts)], self.pad_id)

    def text(self, ids: Sequence[int]) -> str:
        """The words of `ids`: special tokens and ids without a token left out, `##` joined, blanks before punctuation removed
        (BertTokenizer.decode of transformers 4.15 with skip_special_tokens)."""
        tokens = [self._tokenizer.id_to_token(int(i)) for i in ids if int(i) not in self._special]
        return clean_up(" ".join(token for token in tokens if token is not None).replace(" ##", "").strip())

    def after(self, prompt: str, ids: Sequence[int]) -> str:
        """What `ids` add to `prompt`: the original decodes both together and cuts off as many characters as the prompt has,
        so a `##s` at the beginning is not lost to the prompt's last word but cut, and a prompt that does not survive
        tokenising (two blanks, an accent) takes characters of the caption with it. The blanks around it are removed."""
        (row,) = self._rows([prompt])
        return self.text([*row, *ids])[len(prompt) :].strip()

    def _rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, without special ones."""
        require_characters(texts)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
