"""Rank tables: the names and the JSON of mindformers' tools, their errors mended, and torchrun's command lines."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import Misuse, UserError
from tests import chain
from training.__main__ import main
from training.launch import launch
from training.rank_table import generate, merge, read

ALL = "0,1,2,3,4,5,6,7"
# The addresses of the samples in the model card of mindformers' BLIP-2; its servers are all called xx.xx.xx.xx.
ONE_SERVER = [*(f"192.{n}.27.6" for n in range(1, 5)), *(f"192.{n}.27.7" for n in range(1, 5))]
TWO_SERVERS = [[f"192.168.{n % 4}.{n // 4 + server}" for n in range(8)] for server in range(2)]


def table(*servers: tuple[str, list[str]], **others: Any) -> dict[str, Any]:
    """The sample's form: servers and the addresses of their cards."""
    rank = iter(range(1000))
    listed = [
        {
            "server_id": name,
            "device": [{"device_id": str(n), "device_ip": ip, "rank_id": str(next(rank))} for n, ip in enumerate(addresses)],
            "host_nic_ip": "reserve",
        }
        for name, addresses in servers
    ]
    return {"version": "1.0", "server_count": str(len(servers)), "server_list": listed, "status": "completed", **others}


SAMPLE_8 = table(("10.0.0.1", ONE_SERVER))
SAMPLE_16 = table(("10.0.0.1", TWO_SERVERS[0]), ("10.0.0.2", TWO_SERVERS[1]))


def write(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content), "utf-8")
    return file


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Put a hccn_tool on the path that knows the addresses of some cards."""

    def installed(addresses: dict[str, str]) -> None:
        folder = tmp_path / "driver"
        folder.mkdir(exist_ok=True)
        cases = "".join(f'{card}) echo "ipaddr:{ip}"; echo "netmask:255.255.255.0";;\n' for card, ip in addresses.items())
        tool = folder / "hccn_tool"
        tool.write_text(f'#!/bin/sh\n[ "$1 $3 $4" = "-i -ip -g" ] || exit 2\ncase $2 in\n{cases}*) exit 1;;\nesac\n', "utf-8")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return installed


Driver = Callable[[dict[str, str]], None]


def cards(path: Path) -> list[tuple[str, str, str]]:
    (server,) = json.loads(path.read_text("utf-8"))["server_list"]
    return [(device["device_id"], device["device_ip"], device["rank_id"]) for device in server["device"]]


# generate


def test_eight_cards(driver: Driver, tmp_path: Path) -> None:
    driver({str(n): ip for n, ip in enumerate(ONE_SERVER)})
    said = chain.done(chain.call(main, "rank-table", "generate", "--server_ip", "10.0.0.1", "--out", tmp_path))
    path = tmp_path / "hccl_8p_01234567_10.0.0.1.json"
    assert said.strip() == str(path)
    assert path.read_text("utf-8") == json.dumps(SAMPLE_8, indent=4)


def test_the_second_group(driver: Driver, tmp_path: Path) -> None:
    driver({str(n): ip for n, ip in enumerate(ONE_SERVER)})
    path = generate("[4,8)", ALL, "10.0.0.3", 8, tmp_path)
    assert path.name == "hccl_4p_4567_10.0.0.3.json"
    assert cards(path) == [(str(4 + n), ONE_SERVER[4 + n], str(n)) for n in range(4)]


def test_cards_that_are_not_numbered_from_0(driver: Driver, tmp_path: Path) -> None:
    """mindformers' tool ends in KeyError '4'."""
    driver({str(n): ONE_SERVER[n] for n in range(4, 8)})
    path = generate("[0,4)", "4,5,6,7", "10.0.0.3", 8, tmp_path)
    assert path.name == "hccl_4p_0123_10.0.0.3.json"
    assert cards(path) == [(str(4 + n), ONE_SERVER[4 + n], str(n)) for n in range(4)]


def test_numbers_of_two_digits(driver: Driver, tmp_path: Path) -> None:
    """Of which an older release of mindformers read the first digit."""
    driver({str(n): f"10.1.0.{n}" for n in range(16)})
    sixteen = ",".join(str(n) for n in range(16))
    path = generate("[12,16)", sixteen, "10.0.0.4", 16, tmp_path)
    assert path.name == "hccl_4p_12131415_10.0.0.4.json"
    assert [card for card, _, _ in cards(path)] == ["12", "13", "14", "15"]
    assert len(cards(generate("[0,16)", sixteen, "10.0.0.4", 16, tmp_path))) == 16
    with pytest.raises(Misuse, match=r"must be in the same group of \[8,12\] or \[12,16\]"):
        generate("[10,14)", sixteen, "10.0.0.4", 16, tmp_path)


def test_addresses_of_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    conf = tmp_path / "hccn.conf"
    conf.write_text("# cards\naddress_0=192.1.27.6\nnetmask_0=255.255.255.0\n address_1 = 192.2.27.6\n", "utf-8")
    assert cards(generate("[0,2)", ALL, "10.0.0.1", 8, tmp_path, conf)) == [("0", "192.1.27.6", "0"), ("1", "192.2.27.6", "1")]
    with pytest.raises(UserError, match=r"card 2 is not known: neither hccn_tool -i 2 -ip -g nor .*hccn\.conf"):
        generate("[0,3)", ALL, "10.0.0.1", 8, tmp_path, conf)
    with pytest.raises(UserError, match="card 0 is not known"):
        generate("[0,1)", ALL, "10.0.0.1", 8, tmp_path, tmp_path / "none")


def test_the_server_is_looked_up(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver({"0": "192.1.27.6"})
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.9.8.7")
    assert generate("[0,1)", ALL, "", 8, tmp_path).name == "hccl_1p_0_10.9.8.7.json"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(UserError, match=r"leads to 127\.0\.1\.1.*--server_ip"):
        generate("[0,1)", ALL, "", 8, tmp_path)

    def unknown(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    with pytest.raises(UserError, match="Give it with --server_ip"):
        generate("[0,1)", ALL, "", 8, tmp_path)


@pytest.mark.parametrize(
    ("device_num", "visible", "said"),
    [
        ("[3,6)", ALL, r"must be in the same group of \[0,4\] or \[4,8\]"),
        ("[0,5)", ALL, "same group"),
        ("[0,8]", ALL, "is no range"),
        ("0,8", ALL, "is no range"),
        ("[-1,8)", ALL, "is no range"),
        ("[4,4)", ALL, "holds no card"),
        ("[4,2)", ALL, "holds no card"),
        ("[8,12)", ALL, r"goes beyond \[0,8\)"),
        ("[4,8)", "4,5,6,7", "reaches place 7"),
        ("[0,2)", "0,0,1", "card 0 twice"),
        ("[0,2)", "0,one", "no list of cards"),
        ("[0,1)", "", "no list of cards"),
    ],
)
def test_ranges_that_are_none(driver: Driver, tmp_path: Path, device_num: str, visible: str, said: str) -> None:
    driver({str(n): ip for n, ip in enumerate(ONE_SERVER)})
    with pytest.raises(Misuse, match=said):
        generate(device_num, visible, "10.0.0.1", 8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# merge


def test_two_servers(tmp_path: Path) -> None:
    single = [write(tmp_path / f"{n}.json", table((f"10.0.0.{n + 1}", TWO_SERVERS[n]))) for n in range(2)]
    said = chain.done(chain.call(main, "rank-table", "merge", *single, "--out", tmp_path))
    path = tmp_path / "hccl_2s_16p.json"
    assert said.strip() == str(path)
    assert path.read_text("utf-8") == json.dumps(SAMPLE_16, indent=4)
    ranks = [[d["rank_id"] for d in server["device"]] for server in read(path)["server_list"]]
    assert ranks == [[str(n) for n in range(8)], [str(n) for n in range(8, 16)]]


def test_what_else_stands_in_a_table_stays(tmp_path: Path) -> None:
    one = table(("10.0.0.1", ["192.168.0.1"]))
    one["server_list"][0] |= {"host_nic_ip": "172.16.0.1", "container_ip": "10.2.0.1"}
    merged = read(merge([write(tmp_path / "a.json", one)], tmp_path))
    assert merged["server_list"] == one["server_list"]


def test_one_server_twice(tmp_path: Path) -> None:
    """As `hccl*.json` gives, once there is a merged table beside the others."""
    single = [write(tmp_path / f"hccl_{n}.json", table((f"10.0.0.{n + 1}", TWO_SERVERS[n]))) for n in range(2)]
    merged = merge(single, tmp_path)
    with pytest.raises(UserError, match=r"server 10\.0\.0\.1 is in .*hccl_0\.json and in .*hccl_2s_16p\.json"):
        merge([*single, merged], tmp_path)


def test_chips_that_differ(tmp_path: Path) -> None:
    soc = [
        write(tmp_path / f"{n}.json", table((f"10.0.0.{n}", TWO_SERVERS[n]), soc_version=f"Ascend910B{n + 1}")) for n in range(2)
    ]
    with pytest.raises(UserError, match=r"1\.json has soc_version Ascend910B2, .*0\.json has Ascend910B1"):
        merge(soc, tmp_path)
    silent = write(tmp_path / "silent.json", SAMPLE_8)
    with pytest.raises(UserError, match="nothing said"):
        merge([soc[0], silent], tmp_path)
    same = write(tmp_path / "same.json", table(("10.0.0.9", ONE_SERVER), soc_version="Ascend910B1"))
    assert read(merge([soc[0], same], tmp_path))["soc_version"] == "Ascend910B1"


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """SAMPLE_8 with something wrong in it."""
    content: dict[str, Any] = json.loads(json.dumps(SAMPLE_8))
    change(content)
    return content


def devices(content: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = content["server_list"][0]["device"]
    return found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no server_list"),
        (changed(lambda t: t.pop("server_list")), "no server_list"),
        (changed(lambda t: t.update(server_list=[])), "no server_list"),
        (changed(lambda t: t.update(server_list={"a": 1})), "no server_list"),
        (changed(lambda t: t.update(server_list=["a"])), "no server_id"),
        (changed(lambda t: t.update(version="1.2")), r"version '1\.2', expected '1\.0'"),
        (changed(lambda t: t.update(status="initializing")), "status 'initializing'"),
        (changed(lambda t: t.update(server_count="2")), "counts '2' servers and lists 1"),
        (changed(lambda t: t["server_list"][0].pop("server_id")), "no server_id"),
        (changed(lambda t: t["server_list"][0].pop("device")), "no list of cards"),
        (changed(lambda t: devices(t)[3].update(rank_id="2")), "the rank 2 is given to two cards"),
        (changed(lambda t: devices(t)[3].update(rank_id="02")), "the rank 2 is given to two cards"),
        (changed(lambda t: devices(t)[3].update(device_id="0")), r"server 10\.0\.0\.1 has the card 0 twice"),
        (changed(lambda t: devices(t)[3].update(rank_id="first")), "no rank_id that is a number"),
        (changed(lambda t: devices(t)[3].pop("device_id")), "no device_id that is a number"),
        (changed(lambda t: devices(t)[3].pop("device_ip")), "card 3 of the server 10.0.0.1 has no device_ip"),
        (changed(lambda t: devices(t).append("card")), "no device_id"),
    ],
)
def test_tables_that_are_garbled(tmp_path: Path, content: object, said: str) -> None:
    """Each is refused by both that read tables, with the file's name."""
    file = write(tmp_path / "wrong.json", content)
    for options in (("merge", file, "--out", tmp_path), ("launch", "--rank-table", file, "--", "train.py")):
        with pytest.raises(UserError, match=rf"wrong\.json.*{said}"):
            raise UserError(chain.refusal(chain.call(main, "rank-table", *options)))
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.json"]


@pytest.mark.parametrize("text", ["", "{", "[" * 100000, "\ufeff{}", '{"server_list": '])
def test_files_that_are_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.json").write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"wrong\.json is no JSON"):
        read(tmp_path / "wrong.json")
    (tmp_path / "wrong.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"wrong\.json is no JSON"):
        read(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="There is no rank table"):
        read(tmp_path / "none.json")


# launch


def settings_and_options(line: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    words = shlex.split(line)
    at = words.index("torchrun")
    options = [word for word in words[at + 1 :] if word.startswith("--")]
    return (
        dict(word.split("=", 1) for word in words[:at]),
        dict(word[2:].split("=", 1) for word in options),
        [word for word in words[at + 1 :] if not word.startswith("--")],
    )


def test_lines_of_two_servers(tmp_path: Path) -> None:
    file = write(tmp_path / "hccl_2s_16p.json", SAMPLE_16)
    said = chain.done(chain.call(main, "rank-table", "launch", "--rank-table", file, "--", "train.py", "a b"))
    lines = said.splitlines()
    assert lines[::2] == ["# on 10.0.0.1", "# on 10.0.0.2"]
    for rank, line in enumerate(lines[1::2]):
        settings, options, command = settings_and_options(line)
        assert settings == {"RANK_TABLE_FILE": str(file), "HCCL_CONNECT_TIMEOUT": "600"}
        assert options == {
            "nnodes": "2",
            "nproc_per_node": "8",
            "node_rank": str(rank),
            "master_addr": "10.0.0.1",
            "master_port": "29500",
        }
        assert command == ["train.py", "a b"]
    one = ("--node-ip", "10.0.0.2", "--master-port", 4000)
    said = chain.done(chain.call(main, "rank-table", "launch", "--rank-table", file, *one, "--", "train.py", "a b"))
    assert said.strip() == lines[3].replace("29500", "4000")


def test_a_line_of_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "table.json", SAMPLE_8)
    monkeypatch.chdir(tmp_path)
    (node,) = launch(Path("table.json"), 29500, ["-m", "ours", "--steps", "9"])
    assert node.line == (
        f"RANK_TABLE_FILE={tmp_path}/table.json HCCL_CONNECT_TIMEOUT=600 torchrun --nnodes=1 --nproc_per_node=8 --node_rank=0 "
        "--master_addr=10.0.0.1 --master_port=29500 -m ours --steps 9"
    )


def test_cards_in_the_order_of_the_table(tmp_path: Path) -> None:
    """LOCAL_RANK 0 is the first of the table, whatever its number."""
    content = table(("10.0.0.1", ONE_SERVER[4:]))
    for device, card in zip(devices(content), ("6", "7", "4", "5"), strict=True):
        device["device_id"] = card
    (node,) = launch(write(tmp_path / "table.json", content), 29500, ["train.py"])
    assert settings_and_options(node.line)[0]["ASCEND_RT_VISIBLE_DEVICES"] == "6,7,4,5"


def test_torchrun_takes_the_line(tmp_path: Path) -> None:
    """Two cards of one server, here two processes: rank and local rank are those of the table."""
    (tmp_path / "say.py").write_text(
        "import os; open(os.environ['LOCAL_RANK'], 'w').write(os.environ['RANK'] + ' ' + os.environ['RANK_TABLE_FILE'])\n",
        "utf-8",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = write(tmp_path / "table.json", table(("127.0.0.1", ONE_SERVER[:2])))
    (node,) = launch(file, port, ["say.py"])
    line = node.line.replace(" torchrun ", f" {shlex.quote(sys.executable)} -m torch.distributed.run ")
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert [(tmp_path / str(n)).read_text("utf-8") for n in range(2)] == [f"{n} {file}" for n in range(2)]


def test_what_cannot_be_launched(tmp_path: Path) -> None:
    file = write(tmp_path / "table.json", SAMPLE_16)
    with pytest.raises(Misuse, match="no command"):
        launch(file, 29500, [])
    with pytest.raises(Misuse, match=r"10\.0\.0\.9 is no server of .*; it has 10\.0\.0\.1, 10\.0\.0\.2"):
        launch(file, 29500, ["train.py"], "10.0.0.9")
    (tmp_path / "link.json").symlink_to(file)
    with pytest.raises(UserError, match=r"link\.json is a link"):
        launch(tmp_path / "link.json", 29500, ["train.py"])
    same = write(tmp_path / "same.json", table(("xx.xx.xx.xx", TWO_SERVERS[0]), ("xx.xx.xx.xx", TWO_SERVERS[1])))
    with pytest.raises(UserError, match="two servers of one server_id"):
        launch(same, 29500, ["train.py"])
    unequal = write(tmp_path / "unequal.json", table(("10.0.0.1", ONE_SERVER), ("10.0.0.2", ONE_SERVER[:4])))
    with pytest.raises(UserError, match=r"10\.0\.0\.1 8, 10\.0\.0\.2 4"):
        launch(unequal, 29500, ["train.py"])
    shifted = changed(lambda t: [device.update(rank_id=str(7 - n)) for n, device in enumerate(devices(t))])
    with pytest.raises(UserError, match="card 0 in its order has the rank 7, torchrun will give it 0"):
        launch(write(tmp_path / "shifted.json", shifted), 29500, ["train.py"])
    (node,) = launch(merge([tmp_path / "shifted.json"], tmp_path), 29500, ["train.py"])
    assert "--nproc_per_node=8" in node.line


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from training.__main__ import main; main(['rank-table', '--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert all(name in done.stdout for name in ("generate", "merge", "launch"))
