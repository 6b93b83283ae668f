"""BLIP-2's first stage against transformers, and what transformers lacks against plain re-computations, on random weights."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bert import bias_of
from models.blip2 import Blip2Retrieval, Blip2Stage1
from models.config import Blip2Config, VisionConfig
from models.presets import QFORMER, preset
from models.spec import graph_specs
from tests.independent_blip2 import Transformers
from tests.test_models import ASSETS, batch, originals
from tests.tiny import TINY2, TINY_CLIP, random_blip2, random_stage1

LAST_LOOKS = dataclasses.replace(TINY2, qformer=dataclasses.replace(TINY2.qformer, depth=3))  # layers 0 and 2 of three
ALL_LOOK = dataclasses.replace(TINY2, qformer=dataclasses.replace(TINY2.qformer, cross_every=1))
# Measured on 60 models with 180 batches as below: at most 5.6e-6 on features, 7.2e-7 on embeddings, 2.0e-6 on ITM logits
# (std 0.9), 8.0e-6 on the logits of words (std 1.1), 1.2e-6 on CLIP's features.
TOLERANCE = 3e-5


def ours(model: Blip2Retrieval, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Everything the model says of N pictures and M captions; what is said of pairs (N, M, ...) both ways of looking."""
    feat = model.image_feat(image)  # (N, T, D)
    query_embed, text_feat = model.query_embed(feat), model.text_feat(ids, mask)
    shared = [model.keys_values(one[None]) for one in feat]
    repeated = [model.keys_values(one.expand(len(ids), -1, -1)) for one in feat]
    return {
        "image_feat": feat,
        "query_embed": query_embed,
        "image_embed": model.image_embed(query_embed),
        "text_feat": text_feat,
        "text_feat_proj": model.text_feat_proj(text_feat),
        "text_embed": model.text_embed(ids, mask),
        "multimodal_embed": torch.stack([model.multimodal_embed(ids, mask, kv) for kv in repeated]),
        "multimodal_shared": torch.stack([model.multimodal_embed(ids, mask, kv, shared=True) for kv in shared]),
        "itm": torch.stack([model.itm_logits(ids, mask, kv) for kv in repeated]),
        "itm_shared": torch.stack([model.itm_logits(ids, mask, kv, shared=True) for kv in shared]),
    }


def theirs(model: Any, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The same by Blip2ForImageTextRetrieval's own `forward`, picture by picture."""
    itc = model(image, ids, mask)
    feat, text_feat = itc.vision_model_output.last_hidden_state, itc.text_model_output.last_hidden_state
    tokens = model.query_tokens.expand(len(image), -1, -1)
    rows = [model(one.expand(len(ids), -1, -1, -1), ids, mask, use_image_text_matching_head=True) for one in image]
    multimodal = torch.stack([row.text_model_output.last_hidden_state[:, : tokens.shape[1]] for row in rows])
    logits = torch.stack([row.logits_per_image for row in rows])
    return {
        "image_feat": feat,
        "query_embed": model.qformer(query_embeds=tokens, encoder_hidden_states=feat).last_hidden_state,
        "image_embed": itc.image_embeds,
        "text_feat": text_feat,
        "text_feat_proj": F.normalize(model.text_projection(text_feat), dim=-1),
        "text_embed": itc.text_embeds,
        "multimodal_embed": multimodal,
        "multimodal_shared": multimodal,
        "itm": logits,
        "itm_shared": logits,
    }


def differences(model: Blip2Retrieval, image: Tensor, ids: Tensor, mask: Tensor) -> dict[str, float]:
    with torch.inference_mode():
        got, want = ours(model, image, ids, mask), theirs(Transformers(model).model, image, ids, mask)
    return {name: float((got[name] - want[name]).abs().max()) for name in want}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cfg", [TINY2, LAST_LOOKS, ALL_LOOK], ids=["even layers look", "the last looks", "all look"])
@pytest.mark.parametrize(("pictures", "lengths"), [(3, [9, 4, 1, 12]), (1, [7]), (2, [35, 35])], ids=["many", "one", "longest"])
def test_equals_transformers(cfg: Blip2Config, seed: int, pictures: int, lengths: list[int]) -> None:
    found = differences(random_blip2(cfg, seed), *batch(cfg, pictures, lengths, seed))
    assert max(found.values()) < TOLERANCE, found


def test_comparison_sees_every_parameter() -> None:
    """Each parameter, changed by 0.02, moves an output by more than the tolerance: none is unused or compared to itself."""
    model = random_blip2()
    inputs = batch(TINY2, 2, [6, 3])
    with torch.inference_mode():
        want = theirs(Transformers(model).model, *inputs)
    unseen = []
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data += 0.02 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            got = ours(model, *inputs)
        parameter.data = kept
        if max(float((got[output] - want[output]).abs().max()) for output in want) < 10 * TOLERANCE:
            unseen.append(name)
    # A key's bias adds the same to all scores of a query, which softmax takes away again. EVA's keys have none.
    assert unseen == [name for name, _ in model.named_parameters() if name.endswith("self.key.bias")]


@pytest.mark.slow
def test_equals_transformers_at_full_width() -> None:
    """The whole Q-Former, upon two blocks of ViT-g at 224 pixels."""
    g = preset("blip2-stage1-vit-g")
    model = random_blip2(dataclasses.replace(g, vision=dataclasses.replace(g.vision, depth=2)), std=0.02)
    assert model.cfg.qformer == QFORMER
    found = differences(model, *batch(model.cfg, 2, [32, 9, 14]))
    assert max(found.values()) < TOLERANCE, found


def test_shapes_are_the_specs() -> None:
    model, (image, ids, mask) = random_blip2(), batch(TINY2, 2, [6, 3])
    got = ours(model, image, ids, mask) | {"cross_kv": model.image_kv(model.image_feat(image))}
    got |= {"itm_logits": got["itm"][0], "multimodal_embed": got["multimodal_embed"][0]}
    specs = {tensor.name: tensor for spec in graph_specs(TINY2).values() for tensor in spec.bind(2, 6).outputs}
    assert {name: tuple(got[name].shape) for name in specs} == {name: spec.shape for name, spec in specs.items()}


def test_image_kv_is_what_each_layer_looks_up() -> None:
    model, (image, _, _) = random_blip2(), batch(TINY2, 2, [3])
    stacked, pairs = (f(model.image_feat(image)) for f in (model.image_kv, model.keys_values))
    assert len(pairs) == len(TINY2.qformer.cross_layers) == 2
    for n, (keys, values) in enumerate(pairs):
        assert torch.equal(stacked[:, 2 * n], keys)
        assert torch.equal(stacked[:, 2 * n + 1], values)


def test_padding_changes_nothing() -> None:
    model, (image, ids, mask) = random_blip2(), batch(TINY2, 3, [9, 4, 12])
    kv = model.keys_values(model.image_feat(image))
    other = torch.where(mask == 1, ids, 7)
    longer = [torch.cat([t, torch.zeros(3, 20, dtype=torch.long)], dim=1) for t in (other, mask)]
    for say in (model.text_embed, lambda ids, mask: model.itm_logits(ids, mask, kv)):
        want = say(ids, mask)
        assert torch.equal(say(other, mask), want)  # exp(-1e4) is 0 in float32
        assert float((say(*longer) - want).abs().max()) < TOLERANCE
        assert float((say(ids, torch.ones_like(mask)) - want).abs().max()) > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_masks_survive_half_precision(causal: bool) -> None:
    """-1e4 is a number in fp16, also when padding and order both forbid a position, and nothing of the score is left."""
    _, _, mask = batch(TINY2, 1, [9, 4, 12])
    bias = bias_of(mask, causal).to(torch.float16)  # (B, 1, 1 or L, L)
    assert bias.isfinite().all()
    assert set(bias.unique().tolist()) <= {-20000.0, -10000.0, 0.0}
    weights = (30 * torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0)).half() + bias).softmax(dim=3)
    assert float(weights.masked_fill(bias == 0, 0).max()) == 0
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(3, 1, 12, dtype=torch.float16), atol=2e-3, rtol=0)


# --- CLIP's image encoder -------------------------------------------------------------------------------------------


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + (-1.702 * x).exp())


class PlainClip(nn.Module):
    """The same with torch's own attention. T tokens, D width."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, cfg.width, cfg.patch, cfg.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(cfg.width))
        self.positional_embedding = nn.Parameter(torch.empty(cfg.tokens, cfg.width))
        self.ln_pre = nn.LayerNorm(cfg.width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(self.block(cfg) for _ in range(cfg.depth))})

    def block(self, cfg: VisionConfig) -> nn.ModuleDict:
        mlp = OrderedDict(c_fc=nn.Linear(cfg.width, cfg.mlp), gelu=QuickGelu(), c_proj=nn.Linear(cfg.mlp, cfg.width))
        attn = nn.MultiheadAttention(cfg.width, cfg.heads, batch_first=True)
        norms = {name: nn.LayerNorm(cfg.width) for name in ("ln_1", "ln_2")}
        return nn.ModuleDict({"attn": attn, "mlp": nn.Sequential(mlp), **norms})

    def forward(self, image: Tensor) -> Tensor:
        patches = self.conv1(image)  # (B, D, rows, columns)
        rows = [patches[:, :, y, x] for y in range(patches.shape[2]) for x in range(patches.shape[3])]
        x = torch.stack([self.class_embedding.expand(len(image), -1), *rows], dim=1)  # (B, T, D)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            y = block["ln_1"](x)
            x = x + block["attn"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"](block["ln_2"](x))
        return x


@pytest.mark.parametrize("seed", range(3))
def test_clip_is_torchs_attention(seed: int) -> None:
    model = random_blip2(TINY_CLIP, seed)
    plain = PlainClip(TINY_CLIP.vision).eval()
    plain.load_state_dict(model.visual_encoder.state_dict())
    image, ids, mask = batch(TINY_CLIP, 3, [5, 8, 2], seed)
    with torch.inference_mode():
        want = plain(image)
        assert float((model.visual_encoder(image) - want).abs().max()) < TOLERANCE
        norm = model.ln_vision
        feat = F.layer_norm(want, (48,), norm.weight, norm.bias, eps=1e-5)
        assert float((model.image_feat(image) - feat).abs().max()) < TOLERANCE
        assert model.itm_logits(ids, mask, model.keys_values(feat)).shape == (3, 2)


def test_the_clip_comparison_sees_every_parameter() -> None:
    model = random_blip2(TINY_CLIP)
    image, _, _ = batch(TINY_CLIP, 2, [3])
    want = model.visual_encoder(image)
    unseen = []
    for name, parameter in model.visual_encoder.named_parameters():
        changed = PlainClip(TINY_CLIP.vision).eval().requires_grad_(False)
        noise = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        changed.load_state_dict(model.visual_encoder.state_dict() | {name: parameter + noise})
        if float((changed(image) - want).abs().max()) < 10 * TOLERANCE:
            unseen.append(name)
    assert unseen == []


# --- the words that come next ---------------------------------------------------------------------------------------


def plainly(model: Blip2Stage1, feat: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The queries' states (B, Q, D) and the logits of each next word (B, L, vocab), in one pass over queries and text.

    From salesforce/LAVIS models/blip2_models/Qformer.py: a query sees the queries, a word sees them and what stands before it.
    """
    cfg, weights = model.cfg.qformer, model.state_dict()
    words = weights["Qformer.bert.embeddings.word_embeddings.weight"]
    places = weights["Qformer.bert.embeddings.position_embeddings.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], cfg.eps)

    def attend(x: Tensor, source: Tensor, name: str, seen: Tensor) -> Tensor:
        q, k, v = (linear(y, f"{name}.self.{part}") for y, part in ((x, "query"), (source, "key"), (source, "value")))
        heads = []
        for columns in torch.arange(cfg.width).chunk(cfg.heads):
            scores = q[..., columns] @ k[..., columns].transpose(1, 2) / len(columns) ** 0.5
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=2) @ v[..., columns])
        return norm(linear(torch.cat(heads, dim=2), f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    def feed_forward(x: Tensor, layer: str, kind: str) -> Tensor:
        hidden = F.gelu(linear(x, f"{layer}.intermediate{kind}.dense"))
        return norm(linear(hidden, f"{layer}.output{kind}.dense") + x, f"{layer}.output{kind}.LayerNorm")

    count, length = cfg.queries, ids.shape[1]
    tokens = weights["query_tokens"].expand(len(ids), -1, -1)
    x = torch.cat([tokens, words[ids] + places[:length]], dim=1)  # (B, Q + L, D)
    x = norm(x, "Qformer.bert.embeddings.LayerNorm")
    seen = torch.zeros(len(ids), count + length, count + length, dtype=torch.bool)
    seen[:, :, :count] = True
    seen[:, count:, count:] = torch.ones(length, length, dtype=torch.bool).tril() & (mask[:, None, :] == 1)
    for n in range(cfg.depth):
        layer = f"Qformer.bert.encoder.layer.{n}"
        x = attend(x, x, f"{layer}.attention", seen)
        queries, text = x[:, :count], x[:, count:]
        if n % cfg.cross_every == 0:
            queries = attend(queries, feat, f"{layer}.crossattention", torch.ones(1, 1, dtype=torch.bool))
        x = torch.cat([feed_forward(queries, layer, "_query"), feed_forward(text, layer, "")], dim=1)
    head = "Qformer.cls.predictions"
    y = norm(F.gelu(linear(x[:, count:], f"{head}.transform.dense")), f"{head}.transform.LayerNorm")
    return x[:, :count], y @ words.T + weights[f"{head}.bias"]


def next_words(model: Blip2Stage1, feat: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What `plainly` says, by the model."""
    queries, past = model.Qformer.bert.read_image(model.tokens(len(ids)), model.keys_values(feat))
    return queries, model.Qformer.next_word_logits(ids, mask, past)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cfg", [TINY2, LAST_LOOKS, TINY_CLIP], ids=["EVA", "the last looks", "CLIP"])
@pytest.mark.parametrize("lengths", [[9, 4, 12], [7]], ids=["many", "one"])
def test_next_words_are_those_of_one_pass(cfg: Blip2Config, seed: int, lengths: list[int]) -> None:
    model, (image, ids, mask) = random_stage1(cfg, seed), batch(cfg, len(lengths), lengths, seed)
    feat = model.image_feat(image)
    for got, want in zip(next_words(model, feat, ids, mask), plainly(model, feat, ids, mask), strict=True):
        assert float((got - want).abs().max()) < TOLERANCE


def test_queries_do_not_see_the_text_and_words_do_not_look_ahead() -> None:
    model, (image, ids, mask) = random_stage1(), batch(TINY2, 1, [12])
    feat = model.image_feat(image)
    queries, logits = next_words(model, feat, ids, mask)
    assert float((queries - model.query_embed(feat)).abs().max()) == 0  # as if there were no text
    later = ids.clone()
    later[0, 5] += 1
    moved = (next_words(model, feat, later, mask)[1] - logits).abs().amax(dim=(0, 2))  # (L,)
    assert float(moved[:5].max()) == 0
    assert float(moved[5:].min()) > 1e-2
    elsewhere = (next_words(model, feat.flip(1) + 1, ids, mask)[1] - logits).abs().amax(dim=(0, 2))
    assert float(elsewhere.min()) > 1e-2  # every word sees the picture, by the queries


def test_the_comparison_of_words_sees_every_parameter() -> None:
    """All that the language head reads; the text alone never uses cross-attention, the rest belongs to other heads."""
    model, (image, ids, mask) = random_stage1(), batch(TINY2, 2, [6, 3])
    feat = model.image_feat(image)
    want = plainly(model, feat, ids, mask)[1]
    unseen = []
    for name, parameter in model.named_parameters():
        if not name.startswith(("Qformer.", "query_tokens")):
            continue
        kept = parameter.data.clone()
        parameter.data = kept + 0.02 * torch.randn(kept.shape, generator=torch.Generator().manual_seed(5))
        got = next_words(model, feat, ids, mask)[1]
        parameter.data = kept
        if float((got - want).abs().max()) < 10 * TOLERANCE:
            unseen.append(name)
    last = TINY2.qformer.depth - 1  # after it the queries are read by nobody
    idle = re.compile(rf".*self\.key\.bias|.*layer\.{last}\.(intermediate|output)_query\..*")
    assert unseen == [name for name, _ in model.named_parameters() if idle.fullmatch(name)]


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("blip2-stage1-vit-g", "blip2_stage1_vitg_224_full.txt"),
        ("blip2-stage1-vit-l", "blip2_stage1_vitL_224_full.txt"),
        ("blip2-retrieval-coco", "blip2_stage1_coco_vitg_364_full.txt"),
    ],
)
def test_names_and_shapes_are_the_originals(name: str, file: str) -> None:
    """Less the copies that the original's checkpoints hold of the word embeddings and of their bias."""
    cfg = preset(name)
    assert isinstance(cfg, Blip2Config)
    with torch.device("meta"):
        model = Blip2Stage1(cfg)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == {n: shape for n, shape in originals(ASSETS / file).items() if ".predictions.decoder." not in n}


def test_a_published_checkpoint_lacks_the_image_encoder() -> None:
    full, published = (originals(ASSETS / f"blip2_stage1_vitg_224_{kind}.txt") for kind in ("full", "ckpt"))
    assert published == {name: shape for name, shape in full.items() if not name.startswith("visual_encoder.")}


def test_stage1_is_retrieval_and_a_head() -> None:
    with torch.device("meta"):
        stage1, retrieval = (set(kind(TINY2).state_dict()) for kind in (Blip2Stage1, Blip2Retrieval))
    assert retrieval < stage1
    assert {name.split(".")[0] for name in stage1 - retrieval} == {"Qformer", "temp"}
    assert all(name == "temp" or name.startswith("Qformer.cls.") for name in stage1 - retrieval)
