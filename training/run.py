"""From files to a checkpoint and its log: what blip-train does once its options are read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from models import manifest
from models.errors import Misuse
from preprocess.text import CaptionTokenizer
from training import checkpoint
from training.data import CaptionedPictures, read_pictures
from training.loop import train
from training.options import Files, Options
from training.recall import chance
from training.step import LossesOf, Model


def run(model: Model, losses_of: LossesOf[Model], files: Files, workers: int, options: Options, command: str) -> None:
    """Read the pictures, train `model` on them, write the checkpoint (also at each measurement, what there is) and beside
    it the log.

    Args:
        workers: processes that decode pictures.
        command: what to type to train again; kept in the log and in the checkpoint.

    Raises UserError or Misuse when a file or an option cannot be used, or the training fails.
    """
    make_room(files.out)
    cfg = model.cfg
    tokenizer = CaptionTokenizer.load(files.tokenizer, cfg)
    data = read_pictures(files.annotations, "train", files.images, tokenizer, cfg, workers)
    held_out = read_pictures(files.held_out, "test", files.images, tokenizer, cfg, workers) if files.held_out else None
    log: list[dict[str, Any]] = [{"command": command, "options": asdict(options), **_about(data, held_out)}]
    click.echo(_text(log[0]))
    log[0] |= {"threads": torch.get_num_threads(), "versions": manifest.versions()}

    def note(record: dict[str, float]) -> None:
        log.append(record)
        click.echo(_text(record))
        if record["step"] % options.validate_every == 0 or record["step"] == options.steps:
            made_by = {"command": command, "seed": str(options.seed), "step": str(record["step"])}
            checkpoint.save(model, files.out, made_by)
            manifest.write_text(log_of(files.out), "".join(json.dumps(entry) + "\n" for entry in log))

    train(model, losses_of, tokenizer, data, held_out, options, note)
    click.echo(f"{files.out}: {files.out.stat().st_size / 1e6:.2f} MB, log in {log_of(files.out)}")


def log_of(out: Path) -> Path:
    """The log of the training that writes the checkpoint `out`."""
    return out.with_suffix(".log")


def make_room(out: Path) -> None:
    """Make the folder of `out` and try to write there: the first save comes after much work.

    What lies there from an earlier training stays as it is until then. Raises Misuse when `out` cannot be written.
    """
    try:
        if out.is_dir():
            raise Misuse(f"--out {out} is a folder; give the name of a file, such as {out / 'weights.safetensors'}.")
        if out == (log := log_of(out)):
            raise Misuse(f"--out {out} has the name of its own log. Give the weights another suffix, such as .safetensors.")
        if log.is_dir():
            raise Misuse(f"The log of --out {out} would be {log}, which is a folder. Give another --out.")
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in (out, log):
            beside = path.with_name(f".{path.name}.part")  # where checkpoint.save and manifest.write_text begin
            beside.touch()
            beside.unlink()
    except OSError as error:
        raise Misuse(f"--out {out} cannot be written ({error.strerror}). Give a file in a folder of yours.") from error


def _about(data: CaptionedPictures, held_out: CaptionedPictures | None) -> dict[str, Any]:
    about: dict[str, Any] = {"pictures": len(data), "captions": len(data.ids)}
    if held_out is not None:
        guess = chance(held_out)
        about |= {"held_out_pictures": len(held_out), "held_out_captions": len(held_out.ids)}
        about |= {"chance_txt_r1": guess.txt_r1, "chance_img_r1": guess.img_r1}
    return about


def _text(record: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in record.items() if key != "options")
