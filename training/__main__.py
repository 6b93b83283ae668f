"""blip-train: pictures and captions to a checkpoint, and a checkpoint to its losses."""

from __future__ import annotations

import click

from models.errors import Group
from training.commands import COMMANDS
from training.probe_command import probe
from training.rank_table_commands import rank_table


@click.group(cls=Group)
def main() -> None:
    """Train BLIP and BLIP-2, from nothing or from a checkpoint."""


for command in (*COMMANDS, probe, rank_table):
    main.add_command(command)


if __name__ == "__main__":
    main()
