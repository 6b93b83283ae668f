"""Every layout becomes every other one and comes back with the same bits, or one sentence says why not and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import conversion, write_weights
from models.blip2 import Blip2Stage1
from models.checkpoint import load_model, load_stage1
from models.config import Blip2Config, Config
from models.config_file import from_dict, to_dict
from models.convert import main
from models.errors import Misuse
from models.huggingface import to_huggingface
from models.manifest import locked
from models.presets import preset
from models.targets import TARGETS
from tests.make_checkpoint import checkpoint, encoder_file, stage1_state, without_encoder, write_stage1
from tests.mindspore_file import mindspore_state, write_ckpt
from tests.tiny import TINY, TINY2, TINY_CLIP, random_model

ROOT = Path(__file__).parent.parent
State = dict[str, Tensor]
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"


def run(*options: object) -> Result:
    return CliRunner().invoke(main, [str(option) for option in options])


def convert(source: Path, to: str, out: Path, config: Config, *options: object) -> str:
    """Run the command; what it said."""
    sizes = out.parent / "sizes.json"
    sizes.write_text(json.dumps(to_dict(config)))
    result = run("--from", source, "--to", to, "--out", out, "--config", sizes, *options)
    assert result.exit_code == 0, result.output
    assert not list(out.parent.glob(".*"))
    return result.output


def refused(*options: object, code: int = 1) -> str:
    """What the user reads when the command fails; `--out`, the last option, is not there then, nor anything beside it."""
    out = Path(str(options[-1]))
    result = run(*options)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Error: " in result.output
    assert not list(out.parent.glob(".*"))
    return result.output


def read(path: Path) -> State:
    """Everything that LAVIS's file, the last of a way, holds."""
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"model"}
    state: State = content["model"]
    return state


def assert_same_bits(found: State, want: State) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


# Every ordered pair


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize("second", ["lavis", "hf", "ours"])
@pytest.mark.parametrize("first", ["lavis", "hf", "ours", "mindspore", "mindspore, crossed", "hf of transformers"])
def test_eva(tmp_path: Path, first: str, second: str, half: bool) -> None:
    """LAVIS's state in one layout, converted to another and back."""
    state, path = stage1_state(TINY2, std=0.2, half=half), tmp_path / "first"
    want = dict(state)
    if first.startswith("mindspore"):
        write_ckpt(path, mindspore_state(state, crossed="crossed" in first))
    elif first == "hf of transformers":
        path.mkdir()
        save_file(to_huggingface(state, TINY2), path / "model.safetensors")
        want = {name: tensor for name, tensor in state.items() if name != "temp" and not name.startswith("Qformer.cls.")}
    else:
        write_stage1(TINY2, path, state, first)
    convert(path, second, tmp_path / "second", TINY2)
    convert(tmp_path / "second", "lavis", tmp_path / "last.pth", TINY2)
    assert_same_bits(read(tmp_path / "last.pth"), want)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
@pytest.mark.parametrize(("first", "second"), [("lavis", "lavis"), ("lavis", "ours"), ("ours", "ours")])
def test_clip(tmp_path: Path, first: str, second: str, half: bool) -> None:
    state = stage1_state(TINY_CLIP, std=0.2, half=half)
    write_stage1(TINY_CLIP, tmp_path / "first", state, first)
    convert(tmp_path / "first", second, tmp_path / "second", TINY_CLIP)
    convert(tmp_path / "second", "lavis", tmp_path / "last.pth", TINY_CLIP)
    assert_same_bits(read(tmp_path / "last.pth"), state)


@pytest.mark.parametrize("config", [TINY2, TINY_CLIP], ids=["EVA", "CLIP"])
@pytest.mark.parametrize("first", ["lavis", "mindspore"])
def test_without_an_image_encoder(tmp_path: Path, config: Blip2Config, first: str) -> None:
    """As LAVIS publishes it: converted as it is, or with the encoder's file, which makes one checkpoint of two."""
    state = stage1_state(config, std=0.2)
    source, vit = tmp_path / "m", tmp_path / "vit.pth"
    write_stage1(config, source, without_encoder(state), first)
    torch.save(encoder_file(state, config), vit)
    said = convert(source, "ours", tmp_path / "ours", config)
    assert "the checkpoint has no image encoder: neither will the new one" in said
    convert(tmp_path / "ours", "lavis", tmp_path / "last.pth", config)
    assert_same_bits(read(tmp_path / "last.pth"), without_encoder(state))
    for to in ("ours", "lavis") if config is TINY_CLIP else ("ours", "lavis", "hf"):
        convert(source, to, tmp_path / f"whole_{to}", config, "--vit-checkpoint", vit)
        convert(tmp_path / f"whole_{to}", "lavis", tmp_path / f"last_{to}.pth", config)
        assert_same_bits(read(tmp_path / f"last_{to}.pth"), state)


@pytest.mark.parametrize("second", ["lavis", "hf", "ours"])
@pytest.mark.parametrize("first", ["lavis", "hf", "ours"])
def test_blip(tmp_path: Path, first: str, second: str) -> None:
    """BLIP's, with the momentum copies and queues of its training."""
    state = checkpoint(random_model(), queue=8)["model"]
    state["text_encoder_m.embeddings.position_ids"] = torch.arange(TINY.text.positions).unsqueeze(0)
    torch.save({"model": state, "epoch": 5}, tmp_path / "m.pth")
    convert(tmp_path / "m.pth", first, tmp_path / "first", TINY)
    convert(tmp_path / "first", second, tmp_path / "second", TINY)
    convert(tmp_path / "second", "lavis", tmp_path / "last.pth", TINY)
    assert_same_bits(read(tmp_path / "last.pth"), state)
    found, want = (load_model(TINY, path)[0].state_dict() for path in (tmp_path / "second", tmp_path / "m.pth"))
    assert all(torch.equal(found[name], want[name]) for name in want)


# What is written


def from_pretrained(path: Path, kind: str) -> Any:
    import transformers

    model, report = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("limit", [10**9, 100_000], ids=["one file", "shards"])
def test_transformers_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(write_weights.write_shards, "__defaults__", (limit,))
    state = stage1_state(TINY2, std=0.2, half=True)
    write_stage1(TINY2, tmp_path / "m.pth", state)
    said = convert(tmp_path / "m.pth", "hf", tmp_path / "hf", TINY2)
    assert "what transformers has no place for: 6 tensors" in said
    files = sorted(path.name for path in (tmp_path / "hf").glob("model*"))
    assert (files == ["model.safetensors"]) == (limit == 10**9)
    if limit < 10**9:
        assert "model.safetensors.index.json" in files
        assert all(path.stat().st_size < limit + 20_000 for path in (tmp_path / "hf").glob("model-*"))
    model = from_pretrained(tmp_path / "hf", "Blip2ForImageTextRetrieval")
    want = to_huggingface(state, TINY2)
    assert all(torch.equal(tensor, want[name].float()) for name, tensor in model.state_dict().items())
    assert (model.config.qformer_config.num_attention_heads, model.config.vision_config.layer_norm_eps) == (4, 1e-6)
    assert load_file(tmp_path / "hf" / "lavis_extras.safetensors").keys() == {
        name for name in state if name == "temp" or (name.startswith("Qformer.cls") and "decoder" not in name)
    }


def test_transformers_reads_the_folder_of_blip(tmp_path: Path) -> None:
    model = random_model()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    convert(tmp_path / "m.pth", "hf", tmp_path / "hf", TINY)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]
    theirs = from_pretrained(tmp_path / "hf", "BlipForImageTextRetrieval")
    assert theirs.config.text_config.num_attention_heads == 4
    want = to_huggingface(model.state_dict(), TINY)
    assert all(torch.equal(tensor, want[name]) for name, tensor in theirs.state_dict().items())


def test_our_file_is_what_training_reads(tmp_path: Path) -> None:
    state = stage1_state(TINY2, std=0.2, half=True)
    write_stage1(TINY2, tmp_path / "m.pth", state)
    convert(tmp_path / "m.pth", "ours", tmp_path / "m.safetensors", TINY2)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert from_dict(json.loads(file.metadata()["config"]), "") == TINY2
        with torch.device("meta"):
            assert set(file.keys()) == Blip2Stage1(TINY2).state_dict().keys()
    model, report = load_stage1(TINY2, tmp_path / "m.safetensors")
    assert (report.ignored, report.unexpected) == ({}, ())
    assert torch.equal(model.Qformer.bert.embeddings.word_embeddings.weight, state[WORDS])


def test_the_torch_file_holds_each_tensor_once(tmp_path: Path) -> None:
    """And none of what else a mapped file or a split matrix holds."""
    state = stage1_state(TINY2, std=0.2)
    write_stage1(TINY2, tmp_path / "hf", state, "hf")
    convert(tmp_path / "hf", "lavis", tmp_path / "m.pth", TINY2)
    once = sum(tensor.nbytes for name, tensor in state.items() if "decoder" not in name)
    entries = len(state) * 600  # a name, a header, padding
    assert once < (tmp_path / "m.pth").stat().st_size < once + entries
    held = read(tmp_path / "m.pth")
    assert held["Qformer.cls.predictions.decoder.weight"].data_ptr() == held[WORDS].data_ptr()


def test_picture_size_is_the_checkpoints(tmp_path: Path) -> None:
    """Positions are not interpolated here, so the sizes that are written follow them."""
    state = stage1_state(TINY2, std=0.2)
    write_stage1(TINY2, tmp_path / "m.pth", state)
    other = dataclasses.replace(TINY2, vision=dataclasses.replace(TINY2.vision, image_size=48))
    convert(tmp_path / "m.pth", "hf", tmp_path / "hf", other)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vision_config"]["image_size"] == 32
    assert "position_embedding" in str(from_pretrained(tmp_path / "hf", "Blip2ForImageTextRetrieval").state_dict().keys())


def test_what_is_unknown_is_kept(tmp_path: Path) -> None:
    state = stage1_state(TINY2, std=0.2) | {"extra.whole": torch.arange(3), "extra.bf16": torch.ones(2, dtype=torch.bfloat16)}
    state |= {"extra.none": torch.empty(0, 4), "extra.truth": torch.tensor([True, False])}
    write_stage1(TINY2, tmp_path / "m.pth", state)
    for n, to in enumerate(("ours", "hf", "lavis")):
        convert(tmp_path / (f"{n - 1}" if n else "m.pth"), to, tmp_path / f"{n}", TINY2)
    assert_same_bits(read(tmp_path / "2"), state)


@pytest.mark.parametrize("model", ["blip2-demo", "blip-demo"])
def test_the_preset_is_told_by_the_sizes(tmp_path: Path, model: str) -> None:
    config = preset(model)
    if isinstance(config, Blip2Config):
        write_stage1(config, tmp_path / "m.pth", stage1_state(config))
    else:
        torch.save(checkpoint(random_model(config), momentum=False), tmp_path / "m.pth")
    for options in ((), ("--model", model)):
        out = tmp_path / f"hf{len(options)}"
        assert run("--from", tmp_path / "m.pth", "--to", "hf", "--out", out, *options).exit_code == 0
        assert json.loads((out / "config.json").read_text())["vision_config"]["num_attention_heads"] == config.vision.heads


def test_what_the_user_reads(tmp_path: Path) -> None:
    write_stage1(TINY2, tmp_path / "m.pth", stage1_state(TINY2))
    lines = convert(tmp_path / "m.pth", "hf", tmp_path / "hf", TINY2).splitlines()
    with torch.device("meta"):
        held = Blip2Stage1(TINY2).state_dict()
    assert lines == [
        f"{tmp_path / 'm.pth'} (lavis layout)",
        "left out: 2 tied copies, 4 records of the training run, 1 position ids",
        "beside it, in lavis_extras.safetensors, what transformers has no place for: 6 tensors",
        f"{tmp_path / 'hf'} (hf layout): {len(held)} tensors, 0.00 GB",
    ]
    (tmp_path / "hf" / "lavis_extras.safetensors").unlink()
    said = convert(tmp_path / "hf", "lavis", tmp_path / "n.pth", TINY2)
    assert "the checkpoint has no head over the vocabulary, no temperature: neither will the new one" in said


# What is refused


def test_no_clip(tmp_path: Path) -> None:
    config = preset("blip2-stage1-vit-l")
    with torch.device("meta"):
        state = Blip2Stage1(config).state_dict()
    torch.save({name: torch.zeros(()).expand(tensor.shape) for name, tensor in state.items()}, tmp_path / "m.pth")
    found = refused("--from", tmp_path / "m.pth", "--to", "hf", "--out", tmp_path / "hf")
    assert "transformers has no BLIP-2 with CLIP's image encoder" in found


def test_no_image_encoder(tmp_path: Path) -> None:
    demo = preset("blip2-demo")
    assert isinstance(demo, Blip2Config)
    write_stage1(demo, tmp_path / "m.pth", without_encoder(stage1_state(demo)))
    options = ("--from", tmp_path / "m.pth", "--to", "hf")
    assert "Add --vit-checkpoint eva_vit_g.pth." in refused(*options, "--out", tmp_path / "hf")
    vit = ("--vit-checkpoint", tmp_path / "nowhere.pth")
    assert "There is no checkpoint" in refused(*options, *vit, "--out", tmp_path / "hf")


def test_no_preset_has_the_sizes(tmp_path: Path) -> None:
    write_stage1(TINY2, tmp_path / "m.pth", stage1_state(TINY2))
    found = refused("--from", tmp_path / "m.pth", "--to", "ours", "--out", tmp_path / "o")
    assert "no preset has its sizes (vision.width 48, vision.patch 8" in found
    found = refused("--from", tmp_path / "m.pth", "--to", "ours", "--model", "blip2-demo", "--out", tmp_path / "o")
    assert "vision.width: the checkpoint has 48, blip2-demo has 128" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("itm_head.bias"), "itm_head.bias is missing"),
        (lambda state: state.update({"itm_head.bias": torch.zeros(3)}), "itm_head.bias is (3,), expected (2,)"),
        (lambda state: state.update({"itm_head.bias": torch.zeros(2).to_sparse()}), "itm_head.bias holds float32 sparse_coo"),
        (lambda state: state["itm_head.bias"].fill_(float("nan")), "holds NaN or infinity in itm_head.bias"),
        (
            lambda state: state.update({"visual_encoder.pos_embed": torch.zeros(1, 15, 128)}),
            "pos_embed is (1, 15, 128), expected",
        ),
        (
            lambda state: state.update({"extra": torch.zeros(2).to_sparse()}),
            "extra holds float32 sparse_coo on cpu, which safete",
        ),
        (lambda state: [state.pop(name) for name in list(state) if name.startswith("itm_head")], "it has no itm_head"),
        (lambda state: state.clear(), "is not a checkpoint of BLIP for retrieval"),
    ],
    ids=["missing", "shape", "sparse", "NaN", "positions", "unknown sparse", "part", "empty"],
)
@pytest.mark.parametrize("to", ["hf", "ours"])
def test_incomplete_checkpoints(tmp_path: Path, to: str, change: Callable[[State], object], said: str) -> None:
    demo = preset("blip2-demo")
    assert isinstance(demo, Blip2Config)
    state = stage1_state(demo)
    change(state)
    torch.save(state, tmp_path / "m.pth")
    assert said in refused("--from", tmp_path / "m.pth", "--to", to, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", ["file", "folder", "dangling link"])
def test_nothing_is_written_over(tmp_path: Path, there: str) -> None:
    out = tmp_path / "out"
    if there == "file":
        out.write_text("mine")
    elif there == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    found = refused("--from", tmp_path / "m.pth", "--to", "ours", "--out", out, code=2)
    assert f"{out} is there already. Choose another --out, or remove it." in found
    assert there != "file" or out.read_text() == "mine"


@pytest.mark.parametrize("to", ["lavis", "hf", "ours"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    write_stage1(preset("blip2-demo"), tmp_path / "m.pth", stage1_state(preset("blip2-demo")))
    opened = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return opened(Path("/dev/full") if mode == "wb" else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    found = refused("--from", tmp_path / "m.pth", "--to", to, "--out", tmp_path / "out")
    assert "The disk is full" in found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth"]


def test_two_runs_and_one_that_was_killed(tmp_path: Path) -> None:
    write_stage1(preset("blip2-demo"), tmp_path / "m.pth", stage1_state(preset("blip2-demo")))
    part = tmp_path / ".out.part"
    part.mkdir()
    (part / "out").mkdir()  # what a killed run left
    with locked(part, "busy"):
        result = run("--from", tmp_path / "m.pth", "--to", "ours", "--out", tmp_path / "out")
    assert (result.exit_code, "Another run is writing" in result.output) == (1, True)
    assert run("--from", tmp_path / "m.pth", "--to", "ours", "--out", tmp_path / "out").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth", "out"]


def test_made_meanwhile(tmp_path: Path) -> None:
    def work() -> None:
        with conversion.new_path(tmp_path / "out") as path:
            path.write_text("x")
            (tmp_path / "out").write_text("mine")

    with pytest.raises(Misuse, match="was made by something else"):
        work()
    assert (tmp_path / "out").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_misuse(tmp_path: Path) -> None:
    options = ("--from", tmp_path / "m.pth", "--to", "ours")
    (tmp_path / "c.json").write_text("{}")
    both = ("--model", "blip2-demo", "--config", tmp_path / "c.json")
    assert "--model and --config both name sizes" in refused(*options, *both, "--out", tmp_path / "o", code=2)
    assert "Did you mean 'blip2-demo'?" in refused(*options, "--model", "blip2-dem", "--out", tmp_path / "o", code=2)
    assert "mindspore" in refused("--from", "x", "--to", "mindspore", "--out", tmp_path / "o", code=2)
    assert "There is no checkpoint" in refused(*options, "--out", tmp_path / "o")


def test_targets_are_typed_once() -> None:
    kind = next(option.type for option in main.params if option.name == "to")
    assert isinstance(kind, click.Choice)
    assert tuple(kind.choices) == TARGETS


def test_missing_torch_is_one_sentence() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from models.convert import main; main(['--from','a','--to','hf','--out','b'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().startswith("Error: This needs torch, which is not installed.")


def test_python_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "models.convert", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, "Convert a checkpoint." in done.stdout) == (0, True)
