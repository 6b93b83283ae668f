"""training/dropout.py: what is left out while a model learns, beside transformers' BERT, and none of it when nothing learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertLMHeadModel

from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.errors import Misuse
from models.vit import VisionTransformer
from tests.generators import speaking
from tests.one_process import batch_of
from tests.test_bert_checkpoint import bert_config, ids, random
from tests.tiny import TINY, TINY2, fill, random_generator
from tests.trainings import SMALL, described, equal, sizes, small, trained, weights
from training.dropout import add_drop_path, add_dropout
from training.fit import ready_to_learn
from training.momentum import Momentum
from training.settings_file import presets, read_settings

# Sums of at most 72 terms in float32, in two layers: 1e-6 was the largest difference seen.
EXACT = 1e-5


def twins(share: float = 0.1) -> tuple[BlipPretrain, BertLMHeadModel]:
    """BLIP, and transformers' decoder that looks at pictures, with the weights of BLIP's."""
    model: BlipPretrain = random(BlipPretrain(TINY))
    fill(model, 3, 0.2)
    config = bert_config(
        vocab_size=TINY.text.vocab,
        is_decoder=True,
        add_cross_attention=True,
        use_cache=False,
        hidden_dropout_prob=share,
        attention_probs_dropout_prob=share,
    )
    theirs = BertLMHeadModel(config)
    cross = {  # as wide as pictures are, which transformers has no setting for
        (layer, name): nn.Linear(TINY.vision.width, TINY.text.width)
        for layer in range(TINY.text.depth)
        for name in ("key", "value")
    }
    for (layer, name), linear in cross.items():
        setattr(theirs.bert.encoder.layer[layer].crossattention.self, name, linear)
    state = {n.removeprefix("text_decoder."): t for n, t in model.state_dict().items() if n.startswith("text_decoder.")}
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        theirs.bert.embeddings.token_type_embeddings.weight.zero_()
    return model, theirs


def compared(model: BlipPretrain, theirs: BertLMHeadModel) -> float:
    """The largest difference of the logits, both from the same seed."""
    words, mask = ids()
    feat = torch.randn(3, 17, TINY.vision.width, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.manual_seed(11)
        ours = model.text_decoder(words, mask, model.text_decoder.bert.image_kv(feat))
        torch.manual_seed(11)
        wanted = theirs(words, attention_mask=mask, encoder_hidden_states=feat).logits
    return float((ours - wanted)[mask.bool()].abs().max())


def test_it_is_where_transformers_has_it() -> None:
    """Embeddings, attention, cross-attention and feed-forward, drawn in the same order from the same seed."""
    model, theirs = twins()
    assert compared(model, theirs.eval()) < EXACT
    assert compared(model, theirs.train()) > 1e3 * EXACT
    add_dropout(model, 0.1)
    assert compared(model.train(), theirs) < EXACT
    assert compared(model.eval(), theirs.eval()) < EXACT
    # One place less is seen.
    hooks = model.text_decoder.bert.encoder.layer[1].output.dense._forward_hooks
    hooks.clear()
    assert compared(model.train(), theirs.train()) > 1e3 * EXACT


def stage1(share: float) -> Blip2Stage1:
    model: Blip2Stage1 = random(Blip2Stage1(TINY2))
    add_dropout(model, share)
    return model


def answer(model: Blip2Stage1) -> Tensor:
    batch = batch_of(slice(0, 4), TINY2.qformer.vocab)
    with torch.no_grad():
        kv = model.keys_values(model.image_feat(batch.image))
        _, past = model.Qformer.bert.read_image(model.tokens(4), kv)
        said = model.Qformer.next_word_logits(batch.ids, batch.mask, past)
        return torch.cat([said.flatten(), model.itm_logits(batch.ids, batch.mask, kv).flatten()])


def test_the_qformer_only_while_it_learns() -> None:
    """Twice the same in eval mode, and the same as without; never while it learns."""
    plain, model = stage1(0.0), stage1(0.1)
    assert torch.equal(answer(plain), answer(plain.train()))
    wanted = answer(plain)
    assert torch.equal(answer(model.eval()), wanted)
    assert not torch.equal(answer(model.train()), wanted)
    assert not torch.equal(answer(model), answer(model))
    model.Qformer.requires_grad_(False)
    ready_to_learn(model)
    assert torch.equal(answer(model), wanted)  # what is frozen leaves out nothing, though the rest learns
    assert model.training


class Before(nn.Module):
    """What an attention gives to its last layer."""

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        return y


def test_the_share_is_that_asked() -> None:
    """Counted: zeros after the norm of the embeddings and after dense layers, and zeros of attention's weights."""
    model, share = random(BlipPretrain(TINY)).train(), 0.25
    fill(model, 3, 0.2)
    add_dropout(model, share)
    text = model.text_encoder
    torch.manual_seed(1)
    with torch.no_grad():
        words = torch.randint(0, 58, (200, 20))
        zeros = [(text.embeddings(words) == 0).float().mean()]
        layer = text.encoder.layer[0]
        zeros.append((layer.output.dense(torch.randn(4000, 72)) == 0).float().mean())
        # Of one value that is 1 there comes out what is left of the weight 1, in each of the 4 heads.
        layer.attention.output = Before()
        left = layer.attention(torch.randn(200, 20, 40), (torch.ones(200, 4, 1, 10), torch.ones(200, 4, 1, 10)))[..., ::10]
        zeros.append((left == 0).float().mean())
    for found in zeros:
        assert float(found) == pytest.approx(share, abs=0.015)
    assert left.unique().tolist() == pytest.approx([0, 1 / (1 - share)])


def test_stochastic_depth_rises_by_layer() -> None:
    """Of three layers none, half and all of the rate; a picture is left out of a sub-layer as a whole."""
    encoder = VisionTransformer(TINY.vision).train()
    fill(encoder, 3, 0.2)
    add_drop_path(encoder, 0.4)
    torch.manual_seed(2)
    x = torch.randn(4000, 2, TINY.vision.width)
    with torch.no_grad():
        for block, share in zip(encoder.blocks, (0.0, 0.2, 0.4), strict=True):
            for part in (block.attn, block.mlp):
                part.eval()
                whole = part(x)
                part.train()
                left = part(x)
                gone = (left == 0).all(dim=(1, 2))
                assert float(gone.float().mean()) == pytest.approx(share, abs=0.03)
                torch.testing.assert_close(left[~gone], whole[~gone] / (1 - share), atol=1e-5, rtol=1e-5)


def test_copies_have_none() -> None:
    model = random(BlipPretrain(TINY))
    add_dropout(model, 0.5)
    add_drop_path(model.visual_encoder, 0.5)
    model.train()
    momentum = Momentum(model, 0.9, 8)
    batch = batch_of(slice(0, 4), TINY.text.vocab)
    first, second = (momentum.embed(model, batch.image, batch.ids, batch.mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        assert not torch.equal(*(model.text_embed(batch.ids, batch.mask) for _ in range(2)))


def test_the_language_model_has_none() -> None:
    model = random_generator(speaking("t5"))
    model.requires_grad_(True)
    before = [len(m._forward_hooks) for m in model.llm_model.modules()]  # type: ignore[union-attr]
    add_dropout(model, 0.5)
    assert [len(m._forward_hooks) for m in model.llm_model.modules()] == before  # type: ignore[union-attr]
    assert sum(len(m._forward_hooks) for m in model.Qformer.modules()) > 0  # type: ignore[union-attr]


# In a training


def test_stopped_and_gone_on_is_undisturbed(tmp_path: Path, pictures: Path) -> None:
    """To the bit, with dropout and stochastic depth; recomputed activations leave out the same."""
    deeper = replace(SMALL["stage1"], vision=replace(SMALL["stage1"].vision, depth=3))  # the first layer leaves nothing out
    model = {**small(tmp_path, "stage1"), "config": sizes(tmp_path, deeper), "dropout": 0.1, "drop_path": 0.2}
    values = described(tmp_path, pictures, "retrieval", model)
    once = weights(trained(tmp_path, values, f"run.out={tmp_path / 'once'}"))
    for _ in range(2):
        last = trained(tmp_path, values, f"run.out={tmp_path / 'twice'}", resume=True, max_steps=3)
    assert equal(once, weights(last))
    again = weights(trained(tmp_path, values, "run.checkpointing=true", f"run.out={tmp_path / 'again'}"))
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, once[name], atol=1e-6, rtol=1e-5)
    without = trained(tmp_path, values, "model.dropout=0", "model.drop_path=0", f"run.out={tmp_path / 'without'}")
    assert not equal(once, weights(without))


def test_what_the_originals_have() -> None:
    """Dropout of 0.1 wherever BERT learns; stochastic depth where BLIP answers questions."""
    found = {name: read_settings(name).model for name in presets()}
    with_it = {name for name, model in found.items() if model.dropout}
    assert with_it == {n for n in found if not n.startswith("demo-") and not found[n].freeze_qformer}
    assert {found[name].dropout for name in with_it} == {0.1}
    assert {name: model.drop_path for name, model in found.items() if model.drop_path} == {"blip-vqa": 0.1}


def test_settings_out_of_range() -> None:
    for said, error in (("dropout=1", "model.dropout is 1"), ("drop_path=-1", "model.drop_path is -1")):
        with pytest.raises(Misuse, match=error):
            read_settings("blip-vqa", [f"model.{said}"])
    with pytest.raises(Misuse, match=r"model.drop_path is 0.1; expected 0, with model.freeze_vit"):
        read_settings("lavis-stage1", ["model.drop_path=0.1"])
