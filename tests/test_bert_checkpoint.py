"""models/bert_checkpoint.py and models/vit_checkpoint.py: what starts from BERT, from a plain ViT and from BLIP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertModel

from models.bert_checkpoint import load_bert
from models.blip import BlipPretrain
from models.blip2 import Blip2Stage1
from models.captioner import BlipCaptioner
from models.errors import Misuse, UserError
from models.presets import BLIP2_DEMO, preset
from models.vit_checkpoint import load_plain_vit
from models.vqa import BlipVqa
from tests.tiny import TINY, TINY2, TINY_CAPTION, TINY_CLIP, TINY_VQA, fill
from training.initial import initialise
from training.settings_file import read_settings
from training.start import started

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo" / "weights.safetensors"
# Sums of at most 72 terms in float32, in two layers: 7e-7 was the largest difference seen.
EXACT = 5e-6
VOCAB = 58  # BERT's own, of tests.tiny's 60 and 59


def bert_config(**changed: Any) -> BertConfig:
    """As tests.tiny.TINY.text; eager, so that all is computed as it is written."""
    text = TINY.text
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "intermediate_size": text.ffn,
        "max_position_embeddings": text.positions,
        "layer_norm_eps": text.eps,
        "attn_implementation": "eager",
    }
    return BertConfig(**(sizes | changed))


def bert(folder: Path, config: BertConfig | None = None, old: bool = True, safe: bool = True) -> tuple[Path, BertForPreTraining]:
    """A random BERT as Hugging Face publishes it; `old`: with LayerNorm's first names, as bert-base-uncased has them."""
    torch.manual_seed(5)
    model = BertForPreTraining(config or bert_config()).eval()
    fill(model, 7, 0.2)
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.zero_()  # which BLIP leaves out
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if old:
        for new, name in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            state = {key.replace(new, name): tensor for key, tensor in state.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()), "utf-8")
    if safe:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder, model


def random(model: Any, seed: int = 1) -> Any:
    initialise(model, seed)
    return model.eval()


def ids() -> tuple[Tensor, Tensor]:
    found = torch.randint(0, VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 3 + [0] * 6])
    return found, mask


@pytest.mark.parametrize(("old", "safe"), [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_our_encoder_has_berts_states(tmp_path: Path, old: bool, safe: bool) -> None:
    folder, theirs = bert(tmp_path / "bert", old=old, safe=safe)
    words, mask = ids()
    model = random(BlipPretrain(TINY))
    report = load_bert(model, TINY, folder)
    wanted = theirs.bert(words, mask).last_hidden_state
    seen = mask.bool()
    torch.testing.assert_close(model.text_encoder(words, mask)[seen], wanted[seen], atol=EXACT, rtol=0)
    logits = theirs(words, mask).prediction_logits
    head = model.text_decoder.cls.predictions(wanted, model.text_decoder.bert.embeddings.word_embeddings.weight)
    torch.testing.assert_close(head[..., :VOCAB], logits, atol=EXACT, rtol=0)
    # The decoder has BERT's self-attention as well, of its own.
    for ours, other in zip(model.text_decoder.bert.encoder, theirs.bert.encoder.layer, strict=True):
        torch.testing.assert_close(ours.attention.self.query.weight, other.attention.self.query.weight, atol=0, rtol=0)
        assert ours.attention is not model.text_encoder.encoder.layer[0].attention
    assert "left random: cross-attention, 2 words" in report.lines()
    assert report.lines()[-1] == (
        "ignored: 2 tied copies, 1 embeddings of segments, 4 tensors that tell whether sentences follow one another"
    )
    # A segment that counts, or one other number, is seen.
    theirs.bert.embeddings.token_type_embeddings.weight[0] += 0.1 * torch.arange(40)
    assert float((theirs.bert(words, mask).last_hidden_state - wanted)[seen].abs().max()) > 1e4 * EXACT


def test_what_bert_lacks_stays(tmp_path: Path) -> None:
    """Cross-attention, [DEC] and [ENC] and their biases are as they were drawn; all else is BERT's."""
    folder, theirs = bert(tmp_path / "bert")
    before, model = random(BlipPretrain(TINY)).state_dict(), random(BlipPretrain(TINY))
    load_bert(model, TINY, folder)
    after, words = model.state_dict(), "text_encoder.embeddings.word_embeddings.weight"
    bias = "text_decoder.cls.predictions.bias"
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert same == {n for n in after if "crossattention" in n or not n.startswith(("text_encoder.", "text_decoder."))}
    assert torch.equal(after[words][VOCAB:], before[words][VOCAB:])
    assert torch.equal(after[bias][VOCAB:], before[bias][VOCAB:])
    assert torch.equal(after[bias][:VOCAB], theirs.state_dict()["cls.predictions.bias"])


@torch.no_grad()
def test_the_qformer(tmp_path: Path) -> None:
    """Queries begin with BERT's feed-forward layers; layers 0 and 2 have a cross-attention of their own."""
    folder, theirs = bert(tmp_path / "bert", bert_config(num_hidden_layers=TINY2.qformer.depth))
    model, before = random(Blip2Stage1(TINY2)), random(Blip2Stage1(TINY2)).state_dict()
    report = load_bert(model, TINY2, folder)
    words, mask = ids()
    seen = mask.bool()
    wanted = theirs.bert(words, mask).last_hidden_state
    torch.testing.assert_close(model.Qformer.bert.read_text(words, mask)[seen], wanted[seen], atol=EXACT, rtol=0)
    state = model.state_dict()
    for layer in range(TINY2.qformer.depth):
        name = f"Qformer.bert.encoder.layer.{layer}."
        for kind in ("intermediate", "output"):
            own = [n for n in state if n.startswith(f"{name}{kind}_query.")]
            assert own
            assert all(torch.equal(state[n], state[n.replace("_query.", ".")]) for n in own)
    stayed = {n for n in state if n.startswith("Qformer.") and torch.equal(state[n], before[n])}
    assert stayed == {n for n in state if "crossattention" in n}
    assert {n.split(".")[4] for n in stayed} == {"0", "2"}
    assert "left random: cross-attention, 1 words" in report.lines()
    assert torch.equal(state["Qformer.cls.predictions.bias"][:VOCAB], theirs.state_dict()["cls.predictions.bias"])


def test_captions_answers_and_bert_without_a_head(tmp_path: Path) -> None:
    captions = bert_config(vocab_size=59, max_position_embeddings=44)
    model = random(BlipCaptioner(TINY_CAPTION))
    load_bert(model, TINY_CAPTION, bert(tmp_path / "captions", captions)[0])
    folder = tmp_path / "alone"
    plain = BertModel(bert_config(vocab_size=59, max_position_embeddings=44))
    plain.save_pretrained(folder)
    before = model.text_decoder.cls.predictions.transform.dense.weight.clone()
    report = load_bert(model, TINY_CAPTION, folder)
    assert "left random: cross-attention, 2 words, the head over the vocabulary" in report.lines()
    assert torch.equal(model.text_decoder.bert.encoder.layer[1].output.dense.weight, plain.encoder.layer[1].output.dense.weight)
    assert torch.equal(model.text_decoder.cls.predictions.transform.dense.weight, before)
    # Of these two readers one has other sizes.
    with pytest.raises(UserError, match="positions: it has 36, the model has 41; ffn: it has 72, the model has 68"):
        load_bert(random(BlipVqa(TINY_VQA)), TINY_VQA, bert(tmp_path / "answers")[0])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": 80}, "width: it has 80, the model has 40"),
        ({"num_hidden_layers": 3}, "depth: it has 3, the model has 2"),
        ({"num_attention_heads": 2}, "heads: it has 2, the model has 4"),
        ({"intermediate_size": 60}, "ffn: it has 60, the model has 72"),
        ({"vocab_size": 50}, "words: it has 50, the model has 60, 2 of them its own"),
        ({"vocab_size": 61}, "words: it has 61, the model has 60, 2 of them its own"),
    ],
)
def test_other_sizes(tmp_path: Path, changed: dict[str, int], said: str) -> None:
    folder, _ = bert(tmp_path / "bert", bert_config(**changed))
    with pytest.raises(UserError) as error:
        load_bert(random(BlipPretrain(TINY)), TINY, folder)
    assert str(error.value.message) == f"{folder} is a BERT of other sizes: {said}. Give one of the model's sizes."


def test_files_that_are_no_bert(tmp_path: Path) -> None:
    model = random(BlipPretrain(TINY))
    with pytest.raises(UserError, match=r"There is no checkpoint .*none"):
        load_bert(model, TINY, tmp_path / "none")
    save_file({"roberta.embeddings.word_embeddings.weight": torch.ones(3, 4)}, tmp_path / "roberta.safetensors")
    with pytest.raises(
        UserError, match=r"holds no BERT: it has no bert.embeddings.word_embeddings.weight. It holds roberta\. Give"
    ):
        load_bert(model, TINY, tmp_path / "roberta.safetensors")
    save_file({"text_encoder.x": torch.ones(3)}, tmp_path / "blip.safetensors")
    with pytest.raises(UserError, match=r"holds no BERT: it has no text_encoder.embeddings.word_embeddings.weight. It holds"):
        load_bert(model, TINY, tmp_path / "blip.safetensors")
    folder, _ = bert(tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    key = "bert.encoder.layer.1.attention.self.key.weight"
    save_file({n: t for n, t in state.items() if n != key}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"does not fit the model: {key} is missing"):
        load_bert(model, TINY, folder)
    state[key][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"holds NaN or infinity in {key}"):
        load_bert(model, TINY, folder)


# From BLIP


def test_the_demo_starts_from_blip() -> None:
    """What makes the demo's BLIP-2: the demo's BLIP, told here tensor by tensor."""
    settings = read_settings("demo-stage1", [f"model.{part}_checkpoint={DEMO}" for part in ("vit", "bert")])
    model, said = started(settings, BLIP2_DEMO)
    blip = load_file(DEMO)
    wanted: dict[str, Tensor] = dict(random(Blip2Stage1(BLIP2_DEMO), settings.run.seed).state_dict())
    taken = 0
    for name, tensor in model.state_dict().items():
        theirs = name.replace("ln_vision", "visual_encoder.norm").replace("Qformer.bert.", "text_encoder.")
        theirs = theirs.replace("_query.", ".")
        if name.endswith(("q_bias", "v_bias")):
            packed = blip[theirs[: -len("q_bias")] + "qkv.bias"]
            wanted[name] = packed[:128] if name.endswith("q_bias") else packed[256:]
        elif theirs in blip and "crossattention" not in name and not name.startswith(("text_", "vision_", "itm_", "temp")):
            wanted[name] = blip[theirs][:84] if "word_embeddings" in name else blip[theirs]
        else:
            taken -= 1
        taken += 1
        assert torch.equal(tensor, wanted[name]), name
    # 4 layers of 14 tensors, class token, positions, patches, norm; 3 layers of 16 and 6 of the queries again, embeddings.
    assert taken == 4 * 13 + 2 + 2 + 2 + 3 * (16 + 6) + 4
    assert [line.split(" (")[0] for line in said if "sha256" in line] == [f"image encoder {DEMO}", f"BERT {DEMO}"]
    assert "left random: cross-attention, layers from 3 on, the head over the vocabulary" in said
    assert not any(p.requires_grad for p in model.visual_encoder.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in model.ln_vision.parameters())  # type: ignore[union-attr]


@torch.no_grad()
def test_a_plain_vit_as_evas(tmp_path: Path) -> None:
    """The keys' bias changes nothing: BLIP-2 sees what BLIP sees."""
    blip = random(BlipPretrain(TINY))
    fill(blip, 3, 0.2)
    save_file({n: t.clone() for n, t in blip.visual_encoder.state_dict().items()}, tmp_path / "deit.safetensors")
    model = random(Blip2Stage1(TINY2), 9)
    report = load_plain_vit(model, TINY2, tmp_path / "deit.safetensors")
    assert report is not None
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    # ln_vision's epsilon is 1e-5, BLIP's 1e-6.
    model.ln_vision.eps = TINY.vision.eps
    torch.testing.assert_close(model.image_feat(image), blip.image_feat(image), atol=2e-5, rtol=0)
    model.visual_encoder.blocks[1].attn.v_bias += 0.1
    assert float((model.image_feat(image) - blip.image_feat(image)).abs().max()) > 1e-2
    # BLIP's own takes it as it is, here at another picture size.
    larger = replace(TINY, vision=replace(TINY.vision, image_size=40))
    other = random(BlipPretrain(larger), 4)
    state = {**blip.visual_encoder.state_dict(), "head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
    torch.save({"model": state}, tmp_path / "deit.pth")  # as DeiT is published
    report = load_plain_vit(other, larger, tmp_path / "deit.pth")
    assert report is not None
    assert report.lines()[1:] == [
        "position embeddings interpolated from 32 to 40 pixels",
        "ignored: 2 other tensors of the image encoder",
    ]
    assert torch.equal(other.visual_encoder.blocks[2].attn.qkv.bias, blip.visual_encoder.blocks[2].attn.qkv.bias)


def test_no_plain_vit(tmp_path: Path) -> None:
    own = random(Blip2Stage1(TINY2))
    save_file({n: t.clone() for n, t in own.visual_encoder.state_dict().items()}, tmp_path / "eva.safetensors")
    assert load_plain_vit(own, TINY2, tmp_path / "eva.safetensors") is None
    with pytest.raises(UserError, match=r"holds no image encoder of BLIP: it has no blocks.0.attn.qkv.bias"):
        load_plain_vit(random(BlipPretrain(TINY)), TINY, tmp_path / "eva.safetensors")
    blip = random(BlipPretrain(TINY))
    save_file({n: t.clone() for n, t in blip.visual_encoder.state_dict().items()}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match=r"vision.kind: the checkpoint has eva"):
        load_plain_vit(random(Blip2Stage1(TINY_CLIP)), TINY_CLIP, tmp_path / "plain.safetensors")
    deeper = replace(TINY, vision=replace(TINY.vision, depth=4))
    with pytest.raises(UserError, match=r"vision.depth: the checkpoint has 3, the configuration has 4"):
        load_plain_vit(random(BlipPretrain(deeper)), deeper, tmp_path / "plain.safetensors")


def test_settings_that_contradict() -> None:
    with pytest.raises(Misuse, match=r"model.checkpoint is x; expected null, with model.bert_checkpoint: it holds BERT"):
        read_settings("lavis-stage1", ["model.checkpoint=x"])
    with pytest.raises(Misuse, match=r"task is stage2; expected one whose words BERT reads"):
        read_settings("lavis-stage2-opt-2.7b", ["model.bert_checkpoint=x"])
    sizes = read_settings("lavis-caption-coco", ["model.checkpoint=null", "model.vit_checkpoint=x"])
    with torch.device("meta"), pytest.raises(Misuse, match=r"model.vit_checkpoint is x, but model.checkpoint is null"):
        started(sizes, preset("blip2-opt-2.7b-coco"))
