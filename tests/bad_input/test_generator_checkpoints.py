"""Checkpoints of models that write words, and folders of language models, that are damaged, hostile, incomplete or of
something else: one sentence each."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import load_generator
from models.config import GenerationConfig
from models.errors import Misuse, UserError
from tests.bad_input.damage import Hostile, cut
from tests.make_generator import TRAINING, blip_state, llm_state, stage2_state, whole, without_encoder, write_llm
from tests.tiny import TINY_CAPTION, TINY_LLAMA, TINY_OPT, TINY_T5, TINY_VQA, tiny_llm

OPT = tiny_llm(TINY_OPT)
INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
LAYER = "model.decoder.layers.1.fc1.weight"


@dataclass(frozen=True)
class Given:
    """A folder with good files of everything, and what is given to load from it."""

    root: Path
    config: GenerationConfig = OPT
    main: str = "m.pth"
    vit: str | None = "vit.pth"
    llm: str | None = "llm"

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def load(self) -> None:
        vit, llm = (self[name] if name else None for name in (self.vit, self.llm))
        load_generator(self.config, self[self.main], vit, llm)


Spoil = Callable[[Given], Given | None]
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Given:
    root = tmp_path_factory.mktemp("generators")
    state = stage2_state(OPT)
    torch.save({"model": without_encoder(state), **TRAINING}, root / "m.pth")
    torch.save({"model": whole(OPT, state, llm_state(TINY_OPT))}, root / "whole.pth")
    encoder = {name.removeprefix("visual_encoder."): t for name, t in state.items() if name.startswith("visual_encoder.")}
    torch.save(encoder, root / "vit.pth")
    write_llm(root / "llm", TINY_OPT, llm_state(TINY_OPT), limit=120_000)
    write_llm(root / "one", TINY_OPT, llm_state(TINY_OPT))
    write_llm(root / "llama", TINY_LLAMA, llm_state(TINY_LLAMA))
    write_llm(root / "t5", TINY_T5, llm_state(TINY_T5))
    torch.save({"model": blip_state(TINY_CAPTION)}, root / "captions.pth")
    torch.save({"model": blip_state(TINY_VQA)}, root / "answers.pth")
    return Given(root)


@pytest.fixture
def given(good: Given, tmp_path: Path) -> Iterator[Given]:
    root = tmp_path / "given"
    shutil.copytree(good.root, root)
    yield dataclasses.replace(good, root=root)
    shutil.rmtree(root)


def test_the_good_ones(given: Given) -> None:
    """The control: what is spoilt below can be loaded."""
    given.load()
    dataclasses.replace(given, main="whole.pth", vit=None, llm=None).load()
    dataclasses.replace(given, llm="one").load()
    dataclasses.replace(given, config=TINY_CAPTION, main="captions.pth", vit=None, llm=None).load()
    dataclasses.replace(given, config=TINY_VQA, main="answers.pth", vit=None, llm=None).load()


def _with(**others: str | GenerationConfig | None) -> Spoil:
    return lambda given: dataclasses.replace(given, **others)  # type: ignore[arg-type]


def _bytes(name: str, change: Callable[[bytes], bytes], **others: str) -> Spoil:
    """The bytes of a file, changed."""

    def spoil(given: Given) -> Given:
        given[name].write_bytes(change(given[name].read_bytes()))
        return dataclasses.replace(given, **others)  # type: ignore[arg-type]

    return spoil


def _holding(name: str, text: str) -> Spoil:
    return _bytes(name, lambda data: text.encode())


def _tensors(change: Callable[[State], object]) -> Spoil:
    """The language model in one file, its tensors changed."""

    def spoil(given: Given) -> Given:
        state = load_file(given["one/model.safetensors"])
        change(state)
        save_file(state, given["one/model.safetensors"])
        return dataclasses.replace(given, llm="one")

    return spoil


def _pickled(content: Callable[[Path], object]) -> Spoil:
    """The language model as a .bin file that holds something else."""

    def spoil(given: Given) -> Given:
        given["one/model.safetensors"].unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of prototypes
            torch.save(content(given.root), given["one/pytorch_model.bin"])
        return dataclasses.replace(given, llm="one")

    return spoil


def _settings(change: Callable[[dict[str, object]], object]) -> Spoil:
    def spoil(given: Given) -> None:
        said = json.loads(given["llm/config.json"].read_text())
        change(said)
        given["llm/config.json"].write_text(json.dumps(said))

    return spoil


def _gone(name: str) -> Spoil:
    return lambda given: given[name].unlink()


BLIP: dict[str, str | None] = {"main": "captions.pth", "vit": None, "llm": None}
CASES: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no checkpoint": (_with(main="nowhere.pth"), ("There is no checkpoint", "nowhere.pth")),
    "no folder": (_with(llm="nowhere"), ("There is no checkpoint", "nowhere")),
    "no language model given": (_with(llm=None), ("m.pth holds no language model", "Add --llm-checkpoint")),
    "no image encoder given": (_with(vit=None), ("m.pth holds no image encoder", "Add --vit-checkpoint")),
    "the checkpoint as language model": (_with(llm="m.pth"), ("m.pth holds no language model of a known kind", "query_tokens")),
    "the image encoder as language model": (_with(llm="vit.pth"), ("vit.pth holds no language model of a known kind",)),
    "the language model as image encoder": (_with(vit="one"), ("one holds no image encoder of BLIP-2",)),
    "the language model as checkpoint": (_with(main="llm"), ("is not a checkpoint of BLIP-2's second stage",)),
    "T5 for OPT": (_with(llm="t5"), ("llm: the checkpoint has T5", "has OPT")),
    "LLaMA for OPT": (_with(llm="llama"), ("llm: the checkpoint has LLaMA", "has OPT")),
    "OPT for T5": (_with(config=tiny_llm(TINY_T5)), ("llm: the checkpoint has OPT", "has T5")),
    "truncated shard": (_bytes(f"llm/{FIRST}", cut), (FIRST, "damaged or incomplete safetensors")),
    "empty shard": (_holding(f"llm/{FIRST}", ""), (FIRST, "is empty (0 bytes)")),
    "a page for a shard": (_holding(f"llm/{FIRST}", "<html>404</html>"), (FIRST, "damaged or incomplete safetensors")),
    "lost shard": (_gone(f"llm/{FIRST}"), (FIRST, "is missing", INDEX)),
    "broken index": (_holding(f"llm/{INDEX}", "{"), (INDEX, "is damaged (JSONDecodeError")),
    "index of nothing": (_holding(f"llm/{INDEX}", '{"weight_map": {}}'), (INDEX, "lists no files")),
    "index that leads away": (
        _holding(f"llm/{INDEX}", '{"weight_map": {"a": "../m.pth"}}'),
        ("expected files of its own folder",),
    ),
    "broken config.json": (_holding("llm/config.json", "{"), ("config.json is damaged (JSONDecodeError",)),
    "deep config.json": (_holding("llm/config.json", "[" * 100_000), ("config.json is damaged (RecursionError",)),
    "a list as config.json": (_holding("llm/config.json", "[]"), ("config.json is damaged: expected an object",)),
    "config.json in another code": (_bytes("llm/config.json", lambda data: b"\xff\xfe"), ("is damaged (UnicodeDecodeError",)),
    "other heads": (_settings(lambda said: said.update(num_attention_heads=8)), ("num_attention_heads is 8, expected 7",)),
    "heads that are a text": (_settings(lambda said: said.update(num_attention_heads="7")), ("is '7', expected 7",)),
    "norms after": (_settings(lambda said: said.update(do_layer_norm_before=False)), ("do_layer_norm_before is False",)),
    "quantised": (_settings(lambda said: said.update(quantization_config={})), ("is of a quantised model",)),
    "a layer too few": (
        _tensors(lambda s: [s.pop(n) for n in list(s) if "layers.1." in n]),
        ("llm.depth: the checkpoint has 1",),
    ),
    "a tensor lost": (_tensors(lambda s: s.pop(LAYER)), (f"{LAYER} is missing",)),
    "a tensor of another shape": (
        _tensors(lambda s: s.update({LAYER: torch.zeros(76, 55)})),
        (f"{LAYER} is (76, 55), ",),
    ),
    "whole numbers": (_tensors(lambda s: s.update({LAYER: torch.zeros(76, 56, dtype=torch.int8)})), ("holds int8",)),
    "eight bits": (_tensors(lambda s: s.update({LAYER: s[LAYER].to(torch.float8_e4m3fn)})), ("holds float8_e4m3fn",)),
    "NaN": (_tensors(lambda s: s[LAYER].fill_(float("nan"))), (f"NaN or infinity in {LAYER}",)),
    "infinity in half precision": (_tensors(lambda s: s.update({LAYER: s[LAYER].half() * 7e7})), (f"infinity in {LAYER}",)),
    "words without rows": (
        _tensors(lambda s: s.update({"model.decoder.embed_tokens.weight": torch.zeros(0, 56)})),
        ("llm.vocab: the checkpoint has 0",),
    ),
    "words that are one number": (
        _tensors(lambda s: s.update({"model.decoder.embed_tokens.weight": torch.zeros(())})),
        ("model.decoder.embed_tokens.weight is (), expected (70, 56)",),
    ),
    "code in a .bin": (_pickled(lambda root: {LAYER: Hostile(root / "ran")}), ("holds Python objects and was not opened",)),
    "a list in a .bin": (_pickled(lambda root: [1]), ("holds a list",)),
    "nothing in a .bin": (_pickled(lambda root: {}), ("holds no language model of a known kind", "It holds nothing")),
    "sparse words": (
        _pickled(lambda root: llm_state(TINY_OPT) | {"model.decoder.embed_tokens.weight": torch.zeros(70, 56).to_sparse()}),
        ("embed_tokens.weight holds float32 sparse_coo",),
    ),
    "tensors without content": (
        _pickled(lambda root: {n: t.to("meta") for n, t in llm_state(TINY_OPT).items()}),
        ("holds float32 strided on meta",),
    ),
    "one language model too many": (_with(main="whole.pth", vit=None), ("already holds a language model",)),
    "one image encoder too many": (_with(main="whole.pth", llm=None), ("already holds an image encoder",)),
    "a language model for BLIP": (_with(config=TINY_CAPTION, main="captions.pth", vit=None), ("--llm-checkpoint is for BLIP-2",)),
    "captions for answers": (_with(config=TINY_VQA, **BLIP), ("captions.pth is not a checkpoint of BLIP for answers",)),
    "answers for captions": (
        _with(config=TINY_CAPTION, **{**BLIP, "main": "answers.pth"}),
        ("answers.pth is a checkpoint of BLIP for answers", "Try --model blip-vqa-base"),
    ),
    "BLIP for BLIP-2": (_with(**BLIP), ("captions.pth is not a checkpoint of BLIP-2's second stage",)),
    "truncated captions": (
        lambda given: _bytes("captions.pth", cut)(_with(config=TINY_CAPTION, **BLIP)(given) or given),
        ("captions.pth", "damaged or incomplete"),
    ),
}
MISUSED = ("one language model too many", "one image encoder too many", "a language model for BLIP")


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(given: Given, name: str) -> None:
    spoil, said = CASES[name]
    spoilt = spoil(given) or given
    with pytest.raises(UserError) as caught:
        spoilt.load()
    message = caught.value.message
    assert isinstance(caught.value, Misuse) == (name in MISUSED)
    assert message.endswith(".")
    assert "\n" not in message
    for part in said:
        assert part in message
    assert not given["ran"].exists()
