"""Baichuan-7B a second time, plainly: NumPy in float64, one text, no cache, written from the published architecture.

Source: baichuan-inc/Baichuan-7B modeling_baichuan.py. Before each sublayer x is divided by the root of its mean square and
scaled; one matrix, W_pack, gives queries, keys and values, in this order; queries and keys are turned by their place, number n of
a head together with number n + K / 2; the feed-forward layer is down(silu(gate(x)) * up(x)). It shares no line with the product.

L places, D width, H heads, K head width, V words.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]


def next_word(weights: Weights, before: np.ndarray, ids: list[int], heads: int) -> np.ndarray:
    """Logits (V,) of the word after `ids`, before which stands `before` (Q, D)."""
    weights = {name: array.astype(np.float64) for name, array in weights.items()}
    x = np.concatenate([before.astype(np.float64), weights["model.embed_tokens.weight"][ids]])  # (L, D)
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    for n in range(depth):
        layer = {name.removeprefix(f"model.layers.{n}."): array for name, array in weights.items()}
        y = normed(x, layer["input_layernorm.weight"])
        x = x + attended(y @ layer["self_attn.W_pack.weight"].T, heads) @ layer["self_attn.o_proj.weight"].T
        y = normed(x, layer["post_attention_layernorm.weight"])
        gate, up = y @ layer["mlp.gate_proj.weight"].T, y @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    found: np.ndarray = weights["lm_head.weight"] @ normed(x[-1], weights["model.norm.weight"])
    return found


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    found: np.ndarray = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * weight
    return found


def attended(packed: np.ndarray, heads: int) -> np.ndarray:
    """(L, 3 * D) to (L, D): each place looks at itself and those before."""
    length, width = len(packed), packed.shape[1] // 3
    q, k, v = (packed[:, n * width : (n + 1) * width].reshape(length, heads, -1) for n in range(3))  # (L, H, K)
    q, k = turned(q), turned(k)
    found = np.zeros((length, heads, width // heads))
    for place in range(length):
        for head in range(heads):
            scores = k[: place + 1, head] @ q[place, head] / np.sqrt(width // heads)
            weight = np.exp(scores - scores.max())
            found[place, head] = weight / weight.sum() @ v[: place + 1, head]
    return found.reshape(length, width)


def turned(x: np.ndarray) -> np.ndarray:
    """Each pair of numbers of x (L, H, K) as a complex number, turned by its place over a wavelength."""
    half = x.shape[2] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angles = np.arange(len(x))[:, None, None] / 10000 ** (np.arange(half) / half)  # (L, 1, K / 2)
    pairs = pairs * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=2)
