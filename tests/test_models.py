"""The PyTorch models against transformers, an independent implementation of the same model, on equal random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blip import BlipPretrain, BlipRetrieval, unit_length
from models.config import Config
from models.huggingface import huggingface_config, to_huggingface
from models.presets import preset
from models.spec import graph_specs
from tests.tiny import TINY, fill, random_model

ASSETS = Path(__file__).parent / "assets"
ENC = 3  # any id will do for a random model; the same one goes into both


def rival(model: BlipRetrieval) -> Any:
    """transformers' model with the weights of `model`."""
    import transformers

    config = transformers.BlipConfig(**huggingface_config(model.cfg), attn_implementation="eager")
    theirs = transformers.BlipForImageTextRetrieval(config).eval()
    theirs.load_state_dict(to_huggingface(model.state_dict(), model.cfg))
    return theirs


def batch(cfg: Config, pictures: int, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (N, 3, S, S) and captions ids, mask (M, L), padded to the longest."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(pictures, 3, cfg.vision.image_size, cfg.vision.image_size, generator=random)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()  # (M, L)
    ids = torch.randint(4, cfg.text.vocab, mask.shape, generator=random) * mask
    ids[:, 0] = 2
    return image, ids, mask


def ours(model: BlipRetrieval, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Everything the model says of N pictures and M captions; logits (N, M, 2) both ways of scoring."""
    feat = model.image_feat(image)  # (N, T, D)
    enc = with_enc(ids)
    repeated = [feat[n : n + 1].expand(len(ids), -1, -1) for n in range(len(image))]
    per_pair = [model.itm_logits(enc, mask, model.text_encoder.image_kv(f)) for f in repeated]
    shared = [model.itm_logits(enc, mask, model.text_encoder.image_kv(f[:1]), shared=True) for f in repeated]
    return {
        "image_feat": feat,
        "image_embed": model.image_embed(feat),
        "text_embed": model.text_embed(ids, mask),
        "itm": torch.stack(per_pair),
        "itm_shared": torch.stack(shared),
    }


def theirs(model: Any, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The same by transformers, picture by picture."""
    normalize = torch.nn.functional.normalize
    feat = model.vision_model(image).last_hidden_state
    text = model.text_encoder(ids, attention_mask=mask).last_hidden_state
    rows = [
        model(with_enc(ids), picture.expand(len(ids), -1, -1, -1), use_itm_head=True, attention_mask=mask).itm_score
        for picture in image
    ]
    return {
        "image_feat": feat,
        "image_embed": normalize(model.vision_proj(feat[:, 0]), dim=-1),
        "text_embed": normalize(model.text_proj(text[:, 0]), dim=-1),
        "itm": torch.stack(rows),
        "itm_shared": torch.stack(rows),
    }


def with_enc(ids: Tensor) -> Tensor:
    enc = ids.clone()
    enc[:, 0] = ENC
    return enc


def differences(model: BlipRetrieval, other: Any, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, float]:
    with torch.inference_mode():
        got, want = ours(model, image, ids, mask), theirs(other, image, ids, mask)
    return {name: float((got[name] - want[name]).abs().max()) for name in got}


# Measured on 50 models and batches as below: at most 2.3e-6 on features, 5.7e-7 on embeddings, 3.4e-6 on logits (std 0.9).
TOLERANCE = 1e-5


@pytest.mark.parametrize("lengths", [[9, 4, 1, 12], [35], [7, 7]], ids=["padded", "longest", "equal"])
def test_equals_transformers(tiny_model: BlipRetrieval, lengths: list[int]) -> None:
    found = differences(tiny_model, rival(tiny_model), *batch(TINY, 3, lengths))
    assert max(found.values()) < TOLERANCE, found


def test_comparison_sees_every_parameter(tiny_model: BlipRetrieval) -> None:
    """Each parameter, changed by 0.02, moves an output by more than the tolerance: none is unused or compared to itself."""
    inputs = batch(TINY, 2, [6, 3])
    with torch.inference_mode():
        want = theirs(rival(tiny_model), *inputs)
    unseen = []
    for name, parameter in tiny_model.named_parameters():
        kept = parameter.data.clone()
        parameter.data += 0.02 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            got = ours(tiny_model, *inputs)
        parameter.data = kept
        if max(float((got[output] - want[output]).abs().max()) for output in got) < 10 * TOLERANCE:
            unseen.append(name)
    # A key's bias adds the same to all scores of a query, which softmax takes away again.
    assert unseen == [name for name, _ in tiny_model.named_parameters() if name.endswith("self.key.bias")]


@pytest.mark.slow
def test_equals_transformers_at_base_size() -> None:
    """ViT-B/16 at 384 pixels."""
    model = random_model(preset("blip-retrieval-base-coco"), std=0.02)
    found = differences(model, rival(model), *batch(model.cfg, 2, [35, 9, 14]))
    # 1.0e-6 measured, on logits of standard deviation 0.56; features differ by nothing.
    assert max(found.values()) < TOLERANCE, found


def test_decoder_equals_transformers() -> None:
    import transformers

    model = BlipPretrain(TINY).eval().requires_grad_(False)
    fill(model, 0, 0.2)
    decoder = model.text_decoder
    words, bias = decoder.bert.embeddings.word_embeddings.weight, decoder.cls.predictions.bias
    config = transformers.BlipTextConfig(**huggingface_config(TINY)["text_config"], attn_implementation="eager")
    other = transformers.BlipTextLMHeadModel(config).eval()
    other.load_state_dict(decoder.state_dict() | {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": bias})

    image, ids, mask = batch(TINY, 3, [9, 4, 12])
    with torch.inference_mode():
        feat = model.image_feat(image)
        kv = decoder.bert.image_kv(feat)
        got = decoder(ids, mask, kv)
        want = other(ids, attention_mask=mask, encoder_hidden_states=feat).logits
        later = ids.clone()
        later[:, 5] += 1
        moved = (decoder(later, mask, kv) - got).abs().amax(dim=(0, 2))  # (L,)
    # 6.0e-6 measured on 20 models, on logits of standard deviation 1.4.
    assert float((got - want).abs().max()) < 3e-5
    assert float(moved[:5].max()) == 0.0  # what comes later is not seen
    assert float(moved[5:].min()) > 1e-2


def test_decoder_shares_all_but_self_attention() -> None:
    """BLIP models/blip_pretrain.py ties text_encoder and text_decoder except where a name holds '/attention'."""
    model = BlipPretrain(TINY)
    own = {name for name, _ in model.named_parameters() if name.startswith("text_decoder.")}
    attention = re.compile(r"text_decoder\.bert\.encoder\.layer\.\d+\.attention\.")
    assert all(attention.match(name) or name.startswith("text_decoder.cls.") for name in own)
    assert sum(bool(attention.match(name)) for name in own) == 10 * TINY.text.depth


def test_first_only_is_the_first_position(tiny_model: BlipRetrieval) -> None:
    image, ids, mask = batch(TINY, 3, [9, 4, 12])
    with torch.inference_mode():
        kv = tiny_model.text_encoder.image_kv(tiny_model.image_feat(image))
        for pictures in (None, kv):
            one = tiny_model.text_encoder(ids, mask, pictures, first_only=True)
            full = tiny_model.text_encoder(ids, mask, pictures)
            assert one.shape == (3, 1, TINY.text.width)
            assert full.shape == (3, 12, TINY.text.width)
            assert float((one - full[:, :1]).abs().max()) < TOLERANCE


def test_padding_changes_nothing(tiny_model: BlipRetrieval) -> None:
    _, ids, mask = batch(TINY, 1, [9, 4, 12])
    other = torch.where(mask == 1, ids, 7)
    longer = [torch.cat([t, torch.zeros(3, 20, dtype=torch.long)], dim=1) for t in (other, mask)]
    with torch.inference_mode():
        want = tiny_model.text_embed(ids, mask)
        assert torch.equal(tiny_model.text_embed(other, mask), want)  # exp(-1e4) is 0 in float32
        assert float((tiny_model.text_embed(*longer) - want).abs().max()) < TOLERANCE
        assert float((tiny_model.text_embed(ids, torch.ones_like(mask)) - want).abs().max()) > 1e-2


def test_image_kv_is_what_each_layer_looks_up(tiny_model: BlipRetrieval) -> None:
    image, _, _ = batch(TINY, 2, [3])
    with torch.inference_mode():
        feat = tiny_model.image_feat(image)
        stacked = tiny_model.image_kv(feat)
        pairs = tiny_model.text_encoder.image_kv(feat)
    assert tuple(stacked.shape) == (2, *graph_specs(TINY)["image_kv"].outputs[0].sample_shape)
    for layer, (keys, values) in enumerate(pairs):
        assert torch.equal(stacked[:, 2 * layer], keys)
        assert torch.equal(stacked[:, 2 * layer + 1], values)


def test_unit_length() -> None:
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    # rsqrt and sqrt round differently: 1.2e-7 measured.
    assert float((unit_length(x) - torch.nn.functional.normalize(x, dim=-1)).abs().max()) < 5e-7
    short = unit_length(x * 1e-6).norm(dim=-1)
    assert float(short.max()) < 0.1
    assert unit_length(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("size", ["base", "large"])
def test_names_and_shapes_are_the_originals(size: str) -> None:
    with torch.device("meta"):
        model = BlipRetrieval(preset(f"blip-retrieval-{size}-coco"))
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == originals(ASSETS / f"blip_{size}_itm_384.txt")


def originals(path: Path) -> dict[str, list[int]]:
    """Names and shapes of an original's state, less the one buffer that is no weight. `{0..10:2}` are layers 0, 2, ... 10."""
    listed = {}
    for line in path.read_text().splitlines()[1:]:
        name, shape, _ = re.split(r"\s{2,}", line)
        layers = re.search(r"\{0\.\.(\d+)(?::(\d+))?\}", name)
        for layer in range(0, int(layers[1]) + 1, int(layers[2] or 1)) if layers else (0,):
            listed[re.sub(r"\{.*\}", str(layer), name)] = json.loads(shape)
    return {name: shape for name, shape in listed.items() if not name.endswith("position_ids")}
