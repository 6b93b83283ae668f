"""python -m bench.training: three ways to the same losses, and what it prints and records. No test looks at a speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bench import stage1_race
from bench.plain_stage1 import plain_losses
from bench.stage1_race import FROZEN, KEPT, PLAIN
from bench.training import main
from demo import shapes
from models.blip2 import Blip2Stage1
from models.config_file import to_dict
from tests import chain
from tests.tiny import TINY2, TINY_CLIP, random_stage1
from training import stage1
from training.step import Batch

TOKENIZER = Path(__file__).parent.parent / "demo" / "tokenizer"


class Words:
    """The two tokens that losses put first."""

    encode_id, decode_id = 3, 4


def called(*arguments: object) -> Result:
    common = ("--batchsize", 4, "--rounds", 2, "--threads", 1)
    return CliRunner().invoke(main, [str(argument) for argument in (*common, *arguments)])


def sized(folder: Path) -> Path:
    """The file of a tiny model with the words of the demo's."""
    file = folder / "sizes.json"
    file.write_text(json.dumps(to_dict(replace(TINY2, qformer=replace(TINY2.qformer, vocab=84, positions=40)))), "utf-8")
    return file


@pytest.mark.parametrize("config", [TINY2, TINY_CLIP], ids=["eva", "clip"])
def test_the_plain_way_has_the_same_losses_and_gradients(config: object) -> None:
    """Padded captions, other passes, the same sums."""
    model = random_stage1(config, std=0.1).requires_grad_(True)  # type: ignore[arg-type]
    mask = (torch.arange(12) < torch.tensor([[9], [5], [7], [3], [4]])).long()
    ids = torch.randint(5, 58, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    batch = Batch(torch.arange(5), torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2)), ids, mask)
    cut = replace(batch, ids=ids[:, :9], mask=mask[:, :9])
    found = []
    for losses in (
        plain_losses(model, Words, batch, torch.Generator().manual_seed(3)),  # type: ignore[arg-type]
        stage1.losses_of(model, Words, cut, torch.Generator().manual_seed(3), True),  # type: ignore[arg-type]
    ):
        losses.total.backward()  # type: ignore[no-untyped-call]
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
        model.zero_grad()
    (plain, plain_grads), (ours, our_grads) = found
    for a, b in ((plain.itc, ours.itc), (plain.itm, ours.itm), (plain.lm, ours.lm)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for name, gradient in our_grads.items():
        assert gradient is not None, name
        torch.testing.assert_close(plain_grads[name], gradient, atol=1e-5, rtol=1e-4)
    other = stage1.losses_of(model, Words, cut, torch.Generator().manual_seed(4), True)  # type: ignore[arg-type]
    assert abs(other.itm.item() - plain.itm.item()) > 1e-3  # of other wrong pairs


def test_what_it_says_and_records(tmp_path: Path) -> None:
    said = chain.done(called("--config", sized(tmp_path), "--depth", 2, "--record", tmp_path / "records"))
    assert "2 of 3 blocks of its image encoder, 4 pictures, float32, 2 rounds, one thread." in said
    assert "Times the samples per second of the plain way: frozen " in said
    table = said.splitlines()[4:9]
    assert table[0].startswith("work ")
    assert max(map(len, table)) <= 120
    (file,) = (tmp_path / "records").iterdir()
    assert file.name.startswith("training-stage1-sizes-bs4-t1-cpu-")
    found = json.loads(file.read_text("utf-8"))
    assert {"commit", "command", "versions", "load_average", "cpu", "threads", "config"} <= found.keys()
    assert found["config"]["vision"]["depth"] == 2
    frozen, kept = found["compare"]["works"]
    for work, ours in ((frozen, FROZEN), (kept, KEPT)):
        (first, second) = work["ways"]
        assert (first["way"], second["way"]) == (ours, PLAIN)
        assert (first["items"], second["items"]) == (4, 4)
        assert len(first["seconds"]) == len(second["seconds"]) == 2
        assert second["max_abs_difference"] < 1e-4
        low, high = second["lowest_and_highest_round"]
        assert low <= second["ours_is_times"] <= high
    assert frozen["ways"][1]["seconds"] == kept["ways"][1]["seconds"]  # both against the same steps


def test_only_the_plain_way_tracks_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked: dict[str, set[bool]] = {"plain": set(), "ours": set()}

    def watched(name: str, losses_of: Any) -> Any:
        def inner(model: Blip2Stage1, *given: Any, **named: Any) -> Any:
            tracked[name] |= {parameter.requires_grad for parameter in model.visual_encoder.parameters()}
            return losses_of(model, *given, **named)

        return inner

    monkeypatch.setattr(stage1_race, "plain_losses", watched("plain", plain_losses))
    monkeypatch.setattr(stage1, "losses_of", watched("ours", stage1.losses_of))
    chain.done(called("--config", sized(tmp_path), "--no-record"))
    assert tracked == {"plain": {True}, "ours": {False}}


def test_real_captions(tmp_path: Path) -> None:
    shapes.write(tmp_path, "train", 3, 1)
    options = ("--config", sized(tmp_path), "--captions", tmp_path / "train.json", "--tokenizer", TOKENIZER, "--no-record")
    assert "captions of train.json" in chain.done(called(*options))


def test_other_losses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain way that leaves out a thousandth of one loss."""

    def wrong(*given: object) -> object:
        found = plain_losses(*given)  # type: ignore[arg-type]
        return replace(found, itm=found.itm * 0.999)

    monkeypatch.setattr(stage1_race, "plain_losses", wrong)
    said = chain.refusal(called("--config", sized(tmp_path), "--no-record"), 1)
    assert "The losses come out differently: ours: encoder frozen differs from the plain way by" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "blip-demo", "--no-record"), "is a BlipConfig; expected a Blip2Config"),
        (("--model", "blip2-dem", "--no-record"), "Did you mean 'blip2-demo'?"),
        (("--model", "blip2-demo", "--config", "x.json"), "--model and --config contradict each other"),
        (("--captions", "a.json"), "--captions and --tokenizer go together"),
        (("--record", "x", "--no-record"), "--record and --no-record contradict each other"),
    ],
)
def test_misuse(arguments: tuple[str, ...], said: str) -> None:
    assert said in chain.refusal(called(*arguments), 2)
