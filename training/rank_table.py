"""RANK_TABLE_FILE: which card of which server has which rank. The JSON that Huawei's HCCL reads, and torch_npu with it.

The files and their names are those of mindformers' hccl_tools.py (`generate`) and merge_hccl.py (`merge`). Mended here: cards
whose number is not their place among the visible ones, numbers of several digits, ranges of no card, groups beyond the second,
a host whose name leads to itself alone, and the same server merged twice. Imports no torch.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import manifest
from models.errors import Misuse, UserError

Table = dict[str, Any]  # as in the file; every value in it is a text

VERSION, COMPLETED = "1.0", "completed"
GROUP, SERVER = 4, 8  # cards that are linked with each other: two groups make a server
CONF = Path("/etc/hccn.conf")  # address_0=192.168.1.6
SAME = ("soc_version", "chip_info")  # what some tables say of the chips; one cluster has one kind


def generate(
    device_num: str, visible_devices: str, server_ip: str, device_num_per_node: int, out: Path, conf: Path = CONF
) -> Path:
    """Write the table of this server to the folder `out`, as hccl_<cards>p_<their places>_<server>.json; returns its path.

    Args:
        device_num: places of cards among the visible ones, "[0,8)" for 0 to 7.
        visible_devices: numbers of the cards that this system sees, "4,5,6,7".
        server_ip: the address that the other servers know this one by; "" to look it up.
        device_num_per_node: how many places there are.
        conf: where the addresses of the cards stand if the driver's hccn_tool is not there.

    Raises:
        Misuse: for a range that there are no cards for, or that takes cards of two groups.
        UserError: when an address cannot be found.
    """
    places = _places(device_num, device_num_per_node)
    cards = _cards(visible_devices)
    if places[-1] >= len(cards):
        raise Misuse(
            f"--device_num {device_num} reaches place {places[-1]}, --visible_devices {visible_devices} has {len(cards)}."
        )
    server = server_ip or _own_address()
    if not _is_address(server):
        raise Misuse(f"--server_ip {server!r:.60} is no address, such as 10.0.0.1.")
    addresses = _addresses([cards[place] for place in places], conf)
    devices = [
        {"device_id": cards[place], "device_ip": address, "rank_id": str(rank)}
        for rank, (place, address) in enumerate(zip(places, addresses, strict=True))
    ]
    name = f"hccl_{len(places)}p_{''.join(map(str, places))}_{server}.json"
    return _write([{"server_id": server, "device": devices, "host_nic_ip": "reserve"}], out / name)


def merge(files: Sequence[Path], out: Path) -> Path:
    """Write one table of all servers to the folder `out`, as hccl_<servers>s_<cards>p.json, ranks counted anew in the order of
    the files; returns its path. Raises UserError for a file that is no table, a server that is in two, and chips that differ."""
    if not files:
        raise Misuse(
            "There is no table to merge. Give those that blip-train rank-table generate wrote, in the order of the servers."
        )
    tables = [(file, read(file)) for file in files]
    first, head = tables[0]
    at: dict[str, Path] = {}
    servers: list[dict[str, Any]] = []
    for file, table in tables:
        for key in SAME:
            if (found := _chips(table, key)) != (wanted := _chips(head, key)):
                raise UserError(
                    f"{file} has {key} {_said(found)}, {first} has {_said(wanted)}. One cluster has chips of one kind."
                )
        for server in table["server_list"]:
            name = server["server_id"]
            if name in at:
                raise UserError(f"The server {name} is in {at[name]} and in {file}. Give each server once, and no merged table.")
            at[name] = file
            servers.append(server)
    ranks = iter(range(sum(len(server["device"]) for server in servers)))
    counted = [
        {**server, "device": [{**device, "rank_id": str(next(ranks))} for device in server["device"]]} for server in servers
    ]
    total = sum(len(server["device"]) for server in counted)
    chips = {key: head[key] for key in SAME if key in head}
    return _write(counted, out / f"hccl_{len(counted)}s_{total}p.json", chips)


def read(file: Path) -> Table:
    """A table that was checked: its form, its count of servers, and that no card and no rank stands in it twice.

    Raises UserError with the file's name, what was found and what to do."""
    mend = "Write it again with blip-train rank-table generate, or merge."
    try:
        table = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"There is no rank table {file}. blip-train rank-table generate writes one.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}). {mend}") from error
    if not isinstance(table, dict) or not isinstance(table.get("server_list"), list) or not table["server_list"]:
        raise UserError(f"{file} has no server_list, the list of its servers and their cards. {mend}")
    if table.get("version") != VERSION:
        raise UserError(f"{file} is a rank table of version {table.get('version')!r}, expected {VERSION!r}. {mend}")
    if table.get("status") != COMPLETED:
        raise UserError(f"{file} has the status {table.get('status')!r}, expected {COMPLETED!r}: it is not complete. {mend}")
    servers = table["server_list"]
    for server in servers:
        if wrong := _wrong_server(server):
            raise UserError(f"{file}: {wrong}. {mend}")
    if table.get("server_count") != str(len(servers)):
        raise UserError(f"{file} counts {table.get('server_count')!r} servers and lists {len(servers)}. {mend}")
    if twice := _twice(device["rank_id"] for server in servers for device in server["device"]):
        raise UserError(f"{file}: the rank {twice} is given to two cards. {mend}")
    return table


def _places(device_num: str, per_node: int) -> list[int]:
    found = re.fullmatch(r"\[\s*(\d+)\s*,\s*(\d+)\s*\)", device_num.strip())
    if not found:
        raise Misuse(f"--device_num {device_num} is no range of cards. Write [0,8) for the cards 0 to 7, or [2,3) for card 2.")
    begin, end = int(found[1]), int(found[2])
    if begin >= end:
        raise Misuse(f"--device_num {device_num} holds no card: its first number has to be less than its second.")
    if end > per_node:
        raise Misuse(
            f"--device_num {device_num} goes beyond [0,{per_node}), the cards that --device_num_per_node says there are."
        )
    whole = begin % SERVER == 0 and end % SERVER == 0
    if begin // GROUP != (end - 1) // GROUP and not whole:
        low = begin // SERVER * SERVER
        raise Misuse(
            f"--device_num {device_num} takes cards of two groups: they must be in the same group of [{low},{low + GROUP}] or "
            f"[{low + GROUP},{low + SERVER}], or be all of [{low},{low + SERVER})."
        )
    return list(range(begin, end))


def _cards(visible: str) -> list[str]:
    cards = [card.strip() for card in visible.split(",")]
    if not all(re.fullmatch(r"[0-9]+", card) for card in cards):
        raise Misuse(f"--visible_devices {visible!r} is no list of cards. Write their numbers with commas between: 4,5,6,7.")
    cards = [str(int(card)) for card in cards]
    if twice := _twice(cards):
        raise Misuse(f"--visible_devices {visible} has card {twice} twice.")
    return cards


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _own_address() -> str:
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise UserError(f"The address of this server is not known ({error}). Give it with --server_ip.") from error
    if ipaddress.ip_address(address).is_loopback:
        raise UserError(
            f"This server's name leads to {address}, which no other server reaches. Give its address with --server_ip."
        )
    return address


def _addresses(cards: Sequence[str], conf: Path) -> list[str]:
    """The network address of each card: the driver's hccn_tool says it, or else its settings do."""
    asked = [_asked(card) for card in cards]
    if all(asked):
        return [str(address) for address in asked]
    settings = _settings(conf)
    if missing := [card for card in cards if card not in settings]:
        raise UserError(
            f"The address of card {missing[0]} is not known: neither hccn_tool -i {missing[0]} -ip -g nor {conf} says it. "
            "Run this on the server with its driver installed."
        )
    return [settings[card] for card in cards]


def _asked(card: str) -> str | None:
    """What hccn_tool says, "ipaddr:192.168.1.6" and more lines."""
    try:
        said = subprocess.run(["hccn_tool", "-i", card, "-ip", "-g"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^\s*ipaddr\s*:\s*(\S+)\s*$", said.stdout, re.MULTILINE)
    return found[1] if found and said.returncode == 0 else None


def _settings(conf: Path) -> dict[str, str]:
    try:
        text = conf.read_text("utf-8", errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^\s*address_(\d+)\s*=\s*(\S+)", text, re.MULTILINE))


def _wrong_server(server: object) -> str:
    """What is wrong with an entry of server_list; empty when nothing is."""
    if not isinstance(server, dict) or not isinstance(name := server.get("server_id"), str) or not name:
        return "a server has no server_id"
    devices = server.get("device")
    if not isinstance(devices, list) or not devices:
        return f"the server {name} has no list of cards, device"
    for device in devices:
        for key in ("device_id", "rank_id"):
            if not isinstance(device, dict) or not re.fullmatch(r"[0-9]+", str(device.get(key))):
                return f"a card of the server {name} has no {key} that is a number, but {device!r}"
        if not isinstance(device.get("device_ip"), str):
            return f"the card {device['device_id']} of the server {name} has no device_ip"
    twice = _twice(device["device_id"] for device in devices)
    return f"the server {name} has the card {twice} twice" if twice else ""


def _twice(names: Any) -> str | None:
    """The first that stands there more than once."""
    return next((str(name) for name, count in Counter(str(int(name)) for name in names).items() if count > 1), None)


def _chips(table: Table, key: str) -> set[str]:
    """What a table, or a server in it, says of its chips."""
    return {str(at[key]) for at in (table, *table["server_list"]) if key in at}


def _said(chips: set[str]) -> str:
    return ", ".join(sorted(chips)) or "nothing said"


def _write(servers: list[dict[str, Any]], path: Path, chips: dict[str, Any] | None = None) -> Path:
    table = {"version": VERSION, "server_count": str(len(servers)), "server_list": servers, "status": COMPLETED, **(chips or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(path, json.dumps(table, indent=4))
    return path
