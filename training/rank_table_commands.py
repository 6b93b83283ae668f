"""blip-train rank-table: tables for HCCL, and torchrun's command lines from them. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import click

from models.errors import Group
from training import rank_table as tables
from training.launch import launch

FOLDER = click.Path(path_type=Path, file_okay=False)
OUT = click.option("--out", type=FOLDER, default=Path(), show_default="here", help="Folder to write to; the file's name follows.")


@click.group("rank-table", cls=Group)
def rank_table() -> None:
    """Tables of the Ascend cards that train together: RANK_TABLE_FILE."""


@rank_table.command("generate", context_settings={"show_default": True})
@click.option("--device_num", "--device-num", default="[0,8)", help="The cards to use, by their places: [0,8) for 0 to 7.")
@click.option(
    "--visible_devices", "--visible-devices", default="0,1,2,3,4,5,6,7", help="Numbers of the cards that this system sees."
)
@click.option("--server_ip", "--server-ip", default="", show_default="looked up", help="Address that the other servers reach.")
@click.option("--device_num_per_node", "--device-num-per-node", type=click.IntRange(min=1), default=8, help="Places of cards.")
@OUT
def generate_command(device_num: str, visible_devices: str, server_ip: str, device_num_per_node: int, out: Path) -> None:
    """Write the table of this server, as mindformers' hccl_tools.py does: hccl_8p_01234567_<address>.json."""
    click.echo(tables.generate(device_num, visible_devices, server_ip, device_num_per_node, out))


@rank_table.command("merge", context_settings={"show_default": True})
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
@OUT
def merge_command(files: tuple[Path, ...], out: Path) -> None:
    """Write one table of several servers, as mindformers' merge_hccl.py does: hccl_2s_16p.json. The first has rank 0."""
    click.echo(tables.merge(files, out))


@rank_table.command("launch", context_settings={"show_default": True})
@click.option("--rank-table", "file", type=click.Path(path_type=Path), required=True, help="The table, the same on all servers.")
@click.option("--node-ip", default="", show_default="all", help="Only the line of this server, to be run as it is.")
@click.option("--master-port", type=click.IntRange(1, 65535), default=29500, help="Where the first server is waited for.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def launch_command(file: Path, node_ip: str, master_port: int, command: tuple[str, ...]) -> None:
    """Print the command line of torchrun for each server; COMMAND, after --, is what torchrun is to run."""
    nodes = launch(file, master_port, command, node_ip)
    for node in nodes:
        if not node_ip:
            click.echo(f"# on {node.server}")
        click.echo(node.line)
