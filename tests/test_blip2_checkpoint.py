"""BLIP-2's first stage comes in four layouts and in one file or two; all give the same model, or one sentence says why not."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from models.blip2 import Blip2Retrieval, Blip2Stage1
from models.checkpoint import load_model, load_stage1
from models.config import Blip2Config
from models.errors import Misuse, UserError
from models.huggingface import huggingface_config, to_huggingface, to_our_name, to_their_name
from models.manifest import file_record
from models.presets import preset
from tests.make_checkpoint import LAYOUTS, checkpoint, encoder_file, main, stage1_state, without_encoder, write_stage1
from tests.mindspore_file import mindspore_state, write_ckpt
from tests.test_checkpoint import Code
from tests.tiny import TINY, TINY2, TINY_CLIP, random_blip2, random_model, random_stage1

WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
FIRST_BLOCK = "visual_encoder.blocks.0."
State = dict[str, Tensor]
Change = Callable[[State], object]


@pytest.fixture(params=[TINY2, TINY_CLIP], ids=["EVA", "CLIP"])
def config(request: pytest.FixtureRequest) -> Blip2Config:
    found: Blip2Config = request.param
    return found


@pytest.fixture
def state() -> State:
    """LAVIS's of TINY2; a test may change it."""
    return stage1_state(TINY2, std=0.2)


def lavis(path: Path, state: State) -> Path:
    write_stage1(TINY2, path, state)
    return path


def transformers_model(config: Blip2Config, state: State) -> Any:
    import transformers

    theirs = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(**huggingface_config(config))).eval()
    theirs.load_state_dict(to_huggingface(state, config))  # every name is there, and no other
    return theirs


def refusal(path: Path, config: Blip2Config = TINY2, vit: Path | None = None, kind: type[UserError] = UserError) -> str:
    """What the user reads when the checkpoint is refused."""
    with pytest.raises(kind) as caught:
        load_model(config, path, vit)
    assert str(path) in caught.value.message or (vit and str(vit) in caught.value.message)
    assert caught.value.message.endswith(".")
    assert "\n" not in caught.value.message
    return caught.value.message


def assert_equal(found: torch.nn.Module, want: State) -> None:
    held = found.state_dict()
    assert not found.training
    assert all(p.dtype == torch.float32 and not p.requires_grad and p.data_ptr() % 4 == 0 for p in found.parameters())
    assert all(torch.equal(tensor, want[name].to(torch.float32)) for name, tensor in held.items())


# Layouts


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize(
    ("config", "layout"),
    [*((TINY2, layout) for layout in LAYOUTS), (TINY_CLIP, "lavis"), (TINY_CLIP, "ours")],  # there are no others of CLIP
    ids=lambda value: value if isinstance(value, str) else value.vision.kind,
)
def test_layouts(tmp_path: Path, config: Blip2Config, layout: str, half: bool) -> None:
    state = stage1_state(config, std=0.2, half=half)
    path = tmp_path / "model"
    write_stage1(config, path, state, layout)
    for model, report in (load_model(config, path), load_stage1(config, path)):
        assert_equal(model, state)
        assert report.layout == {"hf": "huggingface"}.get(layout, layout)
        assert (report.unexpected, report.interpolated, report.vit) == ((), None, None)
        assert report.temperature == pytest.approx(0.07)
        held = layout in ("lavis", "mindspore")
        assert report.ignored == {
            **({} if isinstance(model, Blip2Stage1) else {"head over the vocabulary": 5}),
            **({"position ids": 1, "tied copies": 2} if held else {}),
            **({"records of the training run": 4} if layout == "lavis" else {}),
        }
        assert any("under each other's names" in note for note in report.notes) == (layout == "mindspore")


def test_generator_fills_as_the_tests_do(config: Blip2Config) -> None:
    state = stage1_state(config, seed=3, std=0.2)
    assert_equal(random_stage1(config, seed=3), state)
    halved = {name for name, tensor in stage1_state(config, half=True).items() if tensor.dtype == torch.float16}
    if config is TINY2:  # facts of LAVIS: biases of queries and values, positions and norms stay
        assert {f"{FIRST_BLOCK}attn.qkv.weight", f"{FIRST_BLOCK}mlp.fc1.bias", "visual_encoder.patch_embed.proj.bias"} < halved
        assert not {f"{FIRST_BLOCK}attn.q_bias", f"{FIRST_BLOCK}norm1.weight", "visual_encoder.pos_embed", WORDS} & halved
        assert len(halved) == 2 + TINY2.vision.depth * 7
    else:
        assert len(halved) == 1 + TINY2.vision.depth * 6
        assert not any("in_proj" in name for name in halved)


@pytest.mark.parametrize("form", ["folder", "shards", "file", "bin"])
def test_huggingface(tmp_path: Path, form: str) -> None:
    model = random_blip2()
    theirs = transformers_model(TINY2, model.state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if form == "shards" else "1GB")
    path = tmp_path / "model.safetensors" if form == "file" else tmp_path
    if form == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict() | {"embeddings.position_ids": torch.arange(3)}, tmp_path / "pytorch_model.bin")
    loaded, report = load_model(TINY2, path)
    assert_equal(loaded, model.state_dict())
    assert (report.layout, report.unexpected, report.temperature) == ("huggingface", (), None)
    assert report.ignored == ({"position ids": 1} if form == "bin" else {})
    with pytest.raises(UserError, match="has neither a head over the vocabulary nor a temperature"):
        load_stage1(TINY2, path)


def test_transformers_computes_the_same() -> None:
    """The heads, the epsilons and the text branch of the configuration: none of them shows in a name or a shape."""
    model = random_blip2()
    theirs = transformers_model(TINY2, model.state_dict())
    theirs.vision_model.post_layernorm.eps = 1e-5  # the original's, which no configuration can name
    mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    ids, image = torch.randint(1, 59, (2, 9), generator=torch.Generator().manual_seed(0)) * mask, torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        found = theirs(image, ids, mask, use_image_text_matching_head=True).logits_per_image
        want = model.itm_logits(ids, mask, model.keys_values(model.image_feat(image)))
    # 1.9e-6 measured on 10 models; with 8 heads instead of 4 it is at least 0.5.
    assert float((found - want).abs().max()) < 1e-5


def test_huggingface_names_go_both_ways() -> None:
    names = [name for name in random_blip2().state_dict() if not name.endswith(("q_bias", "v_bias"))]
    assert [to_our_name(to_their_name(name, True), True) for name in names] == names


def test_huggingface_config_overrides_the_defaults_that_are_not_blip2s() -> None:
    found = huggingface_config(preset("blip2-retrieval-coco"))
    assert (found["qformer_config"]["vocab_size"], found["qformer_config"]["use_qformer_text_input"]) == (30523, True)
    assert (found["vision_config"]["image_size"], found["vision_config"]["layer_norm_eps"]) == (364, 1e-6)
    with pytest.raises(UserError, match="transformers has no BLIP-2 with CLIP's image encoder"):
        huggingface_config(TINY_CLIP)


# The image encoder in a file of its own


@pytest.mark.parametrize(
    ("config", "form"),
    [
        *((TINY2, form) for form in ("bare", "prefixed", "model", "mindspore", "vit.")),
        *((TINY_CLIP, form) for form in ("bare", "prefixed", "model")),  # mindformers has none
    ],
    ids=lambda value: value if isinstance(value, str) else value.vision.kind,
)
def test_image_encoder_in_a_file_of_its_own(tmp_path: Path, config: Blip2Config, form: str) -> None:
    state = stage1_state(config, std=0.2)
    main, vit = tmp_path / "blip2_pretrained.pth", tmp_path / "vit.pth"
    write_stage1(config, main, without_encoder(state))
    bare = encoder_file(state, config)
    dropped = len(bare) - sum(name.startswith("visual_encoder.") for name in state)
    if form in ("mindspore", "vit."):
        theirs = mindspore_state({f"visual_encoder.{name}": tensor for name, tensor in bare.items()}, crossed=True)
        prefix = "" if form == "mindspore" else form
        write_ckpt(vit, {prefix + name.removeprefix("visual_encoder."): tensor for name, tensor in theirs.items()})
    else:
        prefix = "visual_encoder." if form == "prefixed" else ""
        named = {prefix + name: tensor for name, tensor in bare.items()}
        torch.save({"model": named, "epoch": 1} if form == "model" else named, vit)
    model, report = load_model(config, main, vit)
    assert_equal(model, state)
    assert report.vit == (vit, file_record(vit)["sha256"])
    assert report.unexpected == ()
    assert report.ignored["tensors of the image encoder's end, which BLIP-2 leaves out"] == dropped
    assert report.lines()[1] == f"image encoder {vit} (sha256 {report.vit[1][:12]})"


def test_a_checkpoint_without_an_image_encoder_says_what_to_add(tmp_path: Path, config: Blip2Config) -> None:
    write_stage1(config, tmp_path / "m.pth", without_encoder(stage1_state(config)))
    file = "eva_vit_g.pth" if config is TINY2 else "clip_vit_L.pth"
    assert refusal(tmp_path / "m.pth", config).endswith(f"Add --vit-checkpoint {file}.")


def test_two_image_encoders_are_refused(tmp_path: Path, state: State) -> None:
    torch.save(encoder_file(state, TINY2), tmp_path / "vit.pth")
    path = lavis(tmp_path / "m.pth", state)
    assert "already holds an image encoder" in refusal(path, vit=tmp_path / "vit.pth", kind=Misuse)
    torch.save(checkpoint(random_model(), queue=4), tmp_path / "blip.pth")
    with pytest.raises(Misuse, match="--vit-checkpoint is for BLIP-2"):
        load_model(TINY, tmp_path / "blip.pth", tmp_path / "vit.pth")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda bare: bare.clear(),
            "holds no image encoder of BLIP-2: it has neither cls_token nor class_embedding. It holds noth",
        ),
        (
            lambda bare: bare.pop("cls_token"),
            "It holds pos_embed, patch_embed, blocks, fc_norm, head. Give --vit-checkpoint eva_",
        ),
        (
            lambda bare: bare.pop("blocks.1.norm1.bias"),
            "blocks.1.norm1.bias is missing. Give a complete checkpoint of BLIP-2's im",
        ),
        (lambda bare: bare["blocks.1.norm1.bias"].fill_(float("nan")), "holds NaN or infinity in blocks.1.norm1.bias."),
        (
            lambda bare: [bare.pop(n) for n in list(bare) if n[:8] in ("blocks.2", "blocks.3")],
            "vision.depth: the checkpoint has 2",
        ),
        (
            lambda bare: bare.update(cls_token=torch.zeros(1, 1, 40)),
            "vision.width: the checkpoint has 40, the configuration has 48",
        ),
        (lambda bare: bare.update(pos_embed=torch.zeros(1, 15, 48)), "are for 15 tokens, expected a square"),
        (lambda bare: (bare.clear(), bare.update(encoder_file(stage1_state(TINY_CLIP), TINY_CLIP))), "has clip, the conf"),
    ],
    ids=["nothing", "another file", "missing", "NaN", "shallow", "narrow", "positions", "CLIP"],
)
def test_image_encoders_that_do_not_fit(tmp_path: Path, state: State, change: Change, said: str) -> None:
    main, vit = lavis(tmp_path / "m.pth", without_encoder(state)), tmp_path / "vit.pth"
    bare = {name: tensor.clone() for name, tensor in encoder_file(state, TINY2).items()}
    change(bare)
    torch.save(bare, vit)
    found = refusal(main, vit=vit)
    assert said in found
    assert str(vit) in found


# What is done to the tensors


@pytest.mark.parametrize("pixels", [48, 24])
def test_positions_are_interpolated(tmp_path: Path, pixels: int) -> None:
    """transformers interpolates too, when it is asked to, as its picture comes in."""
    config = dataclasses.replace(TINY2, vision=dataclasses.replace(TINY2.vision, image_size=pixels))
    state = stage1_state(TINY2, std=0.2)
    model, report = load_model(config, lavis(tmp_path / "m.pth", state))
    assert report.interpolated == (32, pixels)
    theirs = transformers_model(TINY2, state)
    theirs.vision_model.post_layernorm.eps = 1e-5
    image = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = theirs.vision_model(image, interpolate_pos_encoding=True).last_hidden_state
    # 1.0e-6 measured on 10 models at both sizes; with align_corners=True it is at least 0.016.
    assert float((model.image_feat(image) - want).abs().max()) < 1e-5


def test_positions_of_clip_keep_their_corners(tmp_path: Path) -> None:
    """align_corners=True, as LAVIS resizes CLIP's: the corner patches, and the class token, stay what they were."""
    config = dataclasses.replace(TINY_CLIP, vision=dataclasses.replace(TINY_CLIP.vision, image_size=56))
    state = stage1_state(TINY_CLIP, std=0.2)
    write_stage1(TINY_CLIP, tmp_path / "m.pth", state)
    model, report = load_model(config, tmp_path / "m.pth")
    assert report.interpolated == (32, 56)
    found, held = model.state_dict()["visual_encoder.positional_embedding"], state["visual_encoder.positional_embedding"]
    assert found.shape == (50, 48)
    corners = [0, 1, 7, 43, 49], [0, 1, 4, 13, 16]  # of 7 by 7 and of 4 by 4 patches, after the class token
    assert torch.allclose(found[corners[0]], held[corners[1]], atol=1e-6)
    # With align_corners=False a corner moves by 0.1 to 0.15, measured on three.
    resized = torch.nn.functional.interpolate(held[1:].T.reshape(1, 48, 4, 4), size=(7, 7), mode="bicubic")
    assert float((resized[0, :, 0, 0] - held[1]).abs().max()) > 0.05


# What is refused


def test_tied_tensors_that_differ(tmp_path: Path, state: State) -> None:
    copy = "Qformer.cls.predictions.decoder.weight"
    state[copy] = state[WORDS].clone()
    load_model(TINY2, lavis(tmp_path / "m.pth", state))
    state[copy][3, 4] += 1e-6
    assert f"{copy} differs from {WORDS}" in refusal(lavis(tmp_path / "m.pth", state))


@pytest.mark.parametrize("part", ["opt_proj", "t5_proj", "llm_proj", "opt_model.lm_head", "language_projection"])
def test_stage_2(tmp_path: Path, state: State, part: str) -> None:
    kept = {name: tensor for name, tensor in state.items() if name.startswith(("query_tokens", "ln_vision", "Qformer.bert.enc"))}
    torch.save({"model": kept | {f"{part}.weight": torch.zeros(8, 40)}}, tmp_path / "m.pth")
    torch.save(encoder_file(state, TINY2), tmp_path / "vit.pth")
    for vit in (None, tmp_path / "vit.pth"):
        found = refusal(tmp_path / "m.pth", vit=vit)
        assert "is a stage-2 checkpoint, which has no text branch; retrieval needs a stage-1 checkpoint" in found


# Three names by layout: a tensor to leave out, one to spoil, one to misshape.
SPELT = {
    "hf": ("qformer.layernorm.bias", "embeddings.word_embeddings.weight", "text_projection.bias"),
    "mindspore": (
        "qformer.bert.embeddings.layernorm.beta",
        "qformer.bert.embeddings.word_embeddings.embedding_table",
        "text_proj.bias",
    ),
    "lavis": ("Qformer.bert.embeddings.LayerNorm.bias", WORDS, "text_proj.bias"),
}


@pytest.mark.parametrize("layout", SPELT)
def test_damaged_tensors_are_spelt_as_in_the_file(tmp_path: Path, state: State, layout: str) -> None:
    once = {name: tensor for name, tensor in state.items() if "decoder" not in name}
    theirs = {"hf": lambda: to_huggingface(once, TINY2), "mindspore": lambda: mindspore_state(once)}.get(layout, lambda: once)()
    missing, spoilt, misshaped = SPELT[layout]
    path = tmp_path / "model"
    save = write_ckpt if layout == "mindspore" else lambda path, tensors: torch.save(tensors, path)
    theirs[spoilt].view(-1)[5] = float("inf")
    save(path, theirs)
    assert f"holds NaN or infinity in {spoilt}." in refusal(path)
    del theirs[missing]
    theirs[misshaped] = torch.zeros(7)
    save(path, theirs)
    found = refusal(path)
    assert f"{missing} is missing" in found
    assert f"{misshaped} is (7,), expected (20,)" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda bias: bias.resize_(140), "qkv.bias is (140,), expected three equal parts"),
        (lambda bias: bias[:1].fill_(float("nan")), "holds NaN or infinity in vision_model.encoder.layers.0.self_attn.qkv.bias"),
    ],
    ids=["length", "NaN"],
)
def test_packed_bias(tmp_path: Path, state: State, change: Callable[[Tensor], object], said: str) -> None:
    theirs = to_huggingface(state, TINY2)
    change(theirs["vision_model.encoder.layers.0.self_attn.qkv.bias"])
    save_file(theirs, tmp_path / "model.safetensors")
    assert said in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("value", "said"),
    [(torch.tensor(0.0), "is 0"), (torch.tensor(float("nan")), "is nan"), (torch.tensor([0.1, 0.2]), "is (2,)")],
    ids=["zero", "NaN", "two"],
)
def test_temperatures_that_are_none(tmp_path: Path, state: State, value: Tensor, said: str) -> None:
    path = lavis(tmp_path / "m.pth", state | {"temp": value})
    assert f"temp, the temperature, {said}, expected one number above 0" in refusal(path)


@pytest.mark.parametrize(
    ("size", "other"),
    [
        ("vision.width", 96),
        ("vision.patch", 16),
        ("vision.mlp", 64),
        ("vision.depth", 4),
        ("qformer.vocab", 61),
        ("qformer.positions", 50),
        ("qformer.ffn", 64),
        ("qformer.depth", 1),
        ("qformer.queries", 8),
        ("embed", 8),
    ],
)
def test_sizes_that_contradict_the_configuration(tmp_path: Path, config: Blip2Config, size: str, other: int) -> None:
    part, _, field = size.rpartition(".")
    changed = {part: dataclasses.replace(getattr(config, part), **{field: other})} if part else {field: other}
    path = tmp_path / "m.pth"
    write_stage1(config, path, stage1_state(config))
    assert refusal(path, dataclasses.replace(config, **changed)) == (
        f"{path}: {size}: the checkpoint has {operator.attrgetter(size)(config)}, the configuration has {other}. "
        "Give its sizes with --config, or a checkpoint of this model."
    )


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("blip2-stage1-vit-l", "blip2-stage1-vit-g"),
        ("blip2-retrieval-coco", "blip2-stage1-vit-l"),
        ("blip2-demo", "blip2-stage1-vit-g"),
    ],
)
def test_a_checkpoint_of_another_preset_names_it(tmp_path: Path, model: str, asked: str) -> None:
    with torch.device("meta"):
        state = Blip2Retrieval(preset(model)).state_dict()
    # One zero stretched to each shape: the file has the sizes of the large model and only some kilobytes.
    torch.save({name: torch.zeros(()).expand(t.shape) for name, t in state.items()}, tmp_path / "m.pth")
    assert refusal(tmp_path / "m.pth", preset(asked)).endswith(f"Try --model {model}.")


def test_checkpoints_of_the_other_model(tmp_path: Path, state: State) -> None:
    torch.save(checkpoint(random_model(), queue=4), tmp_path / "blip.pth")
    said = "is not a checkpoint of BLIP-2's first stage: it has no query_tokens, ln_vision, Qformer. It holds visual_enc"
    assert said in refusal(tmp_path / "blip.pth")
    with pytest.raises(UserError, match="is not a checkpoint of BLIP for retrieval: it has no text_encoder"):
        load_model(TINY, lavis(tmp_path / "blip2.pth", state))


def test_one_tensor_under_two_names(tmp_path: Path, state: State) -> None:
    theirs = to_huggingface(state, TINY2) | {"text_proj.bias": torch.zeros(20)}
    save_file(theirs, tmp_path / "model.safetensors")
    assert "holds text_proj.bias twice" in refusal(tmp_path / "model.safetensors")
    theirs.pop("text_proj.bias")
    save_file(theirs, tmp_path / "model.safetensors")
    save_file({"itm_head.bias": torch.zeros(2)}, tmp_path / "lavis_extras.safetensors")
    assert "holds itm_head.bias in two of its files" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["checkpoint", "image encoder"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, state: State, where: str) -> None:
    main, vit = lavis(tmp_path / "m.pth", without_encoder(state)), tmp_path / "vit.pth"
    torch.save(encoder_file(state, TINY2), vit)
    hostile = main if where == "checkpoint" else vit
    torch.save({"model": torch.load(hostile, weights_only=True), "config": Code(tmp_path / "ran")}, hostile)
    assert f"{hostile} holds Python objects and was not opened: restoring io.open would run" in refusal(main, vit=vit)
    assert not (tmp_path / "ran").exists()


# The generator of checkpoints


def test_make_checkpoint(tmp_path: Path) -> None:
    out, demo = tmp_path / "model.pth", preset("blip2-demo")
    assert isinstance(demo, Blip2Config)
    for options in ((), ("--without-vit",), ("--layout", "hf"), ("--layout", "mindspore"), ("--half",)):
        file = out.with_name("_".join(["model", *options]))
        result = CliRunner().invoke(main, ["--model", "blip2-demo", "--out", str(file), "--seed", "3", *options])
        assert result.exit_code == 0, result.output
        vit = file.with_name(f"{file.stem}_vit.pth") if "--without-vit" in options else None
        model, _ = load_stage1(demo, file, vit)
        assert_equal(model, stage1_state(demo, seed=3, half="--half" in options))
    result = CliRunner().invoke(main, ["--model", "blip-demo", "--out", str(out), "--half"])
    assert (result.exit_code, "are for BLIP-2" in result.output) == (2, True)
