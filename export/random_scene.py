"""Random pictures and words, and what a model makes of the pictures.

Features are computed: drawn at random, they would have another distribution than the encoder's.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from models.blip2 import Retrieval
from models.blip2_llm import Blip2Llm
from models.fit import Generator

Model = Retrieval | Generator

# Many graphs read the same features, and of a large encoder they take long. By the seed and number of the picture.
_COMPUTED: WeakKeyDictionary[nn.Module, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()


class Scene:
    """What is drawn with one seed for one model. N pictures or texts, L tokens."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.draw = torch.Generator().manual_seed(seed)

    def pictures(self, count: int) -> Tensor:
        """(N, 3, S, S); the first ones are the same for any N."""
        return torch.cat([self._picture(n) for n in range(count)])

    def features(self, count: int) -> Tensor:
        """What the encoder makes of `pictures`: (N, T, D)."""
        computed = _COMPUTED.setdefault(self.model, {})
        for n in range(count):
            if (self.seed, n) not in computed:
                computed[self.seed, n] = self.model.image_feat(self._picture(n))
        return torch.cat([computed[self.seed, n] for n in range(count)])

    def llm_prompt(self, count: int) -> Tensor:
        """What the language model gets of `pictures`: (N, Q, E)."""
        model = cast(Blip2Llm, self.model)
        return model.llm_prompt(model.query_embed(self.features(count)))

    def words(self, count: int, length: int, vocab: int, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask (N, L) of texts of unequal length, the first of length L, padded with 0, on the `left` or right."""
        lengths = torch.randint(1, max(length, 1) + 1, (count, 1), generator=self.draw)  # (N, 1)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()  # (N, L)
        mask = mask.flip(1) if left else mask
        return torch.randint(1, vocab, (count, length), generator=self.draw) * mask, mask

    def _picture(self, number: int) -> Tensor:
        size = self.model.cfg.vision.image_size
        draw = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randn(1, 3, size, size, generator=draw)
