"""From a rank table to the command lines that start torchrun on each of its servers. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.errors import Misuse, UserError
from training.rank_table import Table, read

PATIENCE = 600  # seconds until HCCL gives up waiting for the others; its own 120 is short when servers start by hand


@dataclass(frozen=True)
class Node:
    """What is typed on one server."""

    server: str
    line: str


def launch(file: Path, port: int, command: Sequence[str], server: str = "") -> list[Node]:
    """One command line for each server of the table `file`, in its order, or for `server` alone: torchrun with the ranks of the
    table, and the environment that torch_npu needs.

    Ranks of torchrun are counted by server, then by card; where those of the table are not, it is refused, for HCCL would believe
    the table. Cards whose numbers are not 0, 1, 2, ... are made visible in the order of the table: LOCAL_RANK counts these.

    Raises:
        UserError: for a garbled table, one whose ranks are counted otherwise or whose servers differ in their cards, and a link.
        Misuse: for no command, and a server that is not in the table.
    """
    if not command:
        raise Misuse("There is no command to launch. Write it after --: ... launch --rank-table F -- -m my.train --steps 9")
    table = read(file)
    if file.is_symlink():
        raise UserError(f"{file} is a link, which HCCL does not follow. Name the file itself, {file.resolve()}.")
    per_server = _checked(file, table)
    servers = [entry["server_id"] for entry in table["server_list"]]
    if server and server not in servers:
        raise Misuse(f"--node-ip {server} is no server of {file}; it has {', '.join(servers)}.")
    nodes = []
    for rank, entry in enumerate(table["server_list"]):
        cards = [device["device_id"] for device in entry["device"]]
        settings = {"RANK_TABLE_FILE": str(file.absolute()), "HCCL_CONNECT_TIMEOUT": str(PATIENCE)}
        if cards != [str(n) for n in range(len(cards))]:
            settings["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(cards)
        options = {
            "nnodes": len(servers),
            "nproc_per_node": per_server,
            "node_rank": rank,
            "master_addr": servers[0],
            "master_port": port,
        }
        words = ["torchrun", *(f"--{name}={value}" for name, value in options.items()), *command]
        set_first = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        nodes.append(Node(entry["server_id"], f"{set_first} {shlex.join(words)}"))
    return [node for node in nodes if server in ("", node.server)]


def _checked(file: Path, table: Table) -> int:
    """The number of cards of each server."""
    servers = table["server_list"]
    names = [server["server_id"] for server in servers]
    if len(set(names)) < len(names):
        raise UserError(
            f"{file} has two servers of one server_id: {', '.join(names)}. Generate each table with its own --server_ip."
        )
    counts = [len(server["device"]) for server in servers]
    if len(set(counts)) > 1:
        said = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        raise UserError(f"{file} has servers with different numbers of cards ({said}); torchrun takes one --nproc_per_node.")
    ranks = [int(device["rank_id"]) for server in servers for device in server["device"]]
    if ranks != list(range(len(ranks))):
        at = next(n for n, rank in enumerate(ranks) if n != rank)
        raise UserError(
            f"{file}: card {at} in its order has the rank {ranks[at]}, torchrun will give it {at}. "
            "blip-train rank-table merge counts them anew."
        )
    return counts[0]
