"""Stores trained weights in half precision: what makes demo/blip2_opt.safetensors of what blip-train wrote.

python -m demo.half --weights build/demo/training-stage2/weights.safetensors --out demo/blip2_opt.safetensors
"""

from __future__ import annotations

from pathlib import Path

import click
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import Command, UserError
from models.write_weights import write_safetensors


@click.command(cls=Command, context_settings={"show_default": True})
@click.option("--weights", type=click.Path(path_type=Path), required=True, help="weights.safetensors of blip-train.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
def main(weights: Path, out: Path) -> None:
    """Store weights in half precision, with what their file says of them. They compute in single precision all the same."""
    try:
        with safe_open(weights, "pt") as file:
            tensors = {name: halved(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read ({error}). Give weights.safetensors of blip-train.") from error
    if beyond := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise UserError(f"{weights}: {beyond[0]} holds numbers that half precision has no place for. Keep the file as it is.")
    beside = out.with_name(f".{out.name}.part")
    try:
        write_safetensors(beside, tensors, about)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.2f} MB")


def halved(tensor: Tensor) -> Tensor:
    """In half precision; whole numbers stay as they are."""
    return tensor.half() if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    main()
