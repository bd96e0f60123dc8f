"""Which interface leads to the other machines, and whether machines were given the same."""

from __future__ import annotations

import socket

import pytest

from bert_pretraining.launch import network
from bert_pretraining.launch.plan import rank_environment
from bert_pretraining.runtime import consistency, process_group


def test_loopback_is_taken_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.interface_to("127.0.0.1") == "lo"
    assert network.interface_to("localhost") == "lo"
    assert network.interface_to("no-such-host.invalid") is None
    routes = {"gpu07": "127.0.1.1", network.TEST_NET_ADDRESS: "10.0.0.7", "10.0.0.8": "10.0.0.7"}
    monkeypatch.setattr(network, "address_towards", routes.get)
    monkeypatch.setattr(network, "interfaces", lambda: {"127.0.0.1": "lo", "10.0.0.7": "eno1"})
    assert network.interface_to("10.0.0.8") == "eno1"
    assert network.interface_to("gpu07") == "eno1", "/etc/hosts has the own name at 127.0.1.1"


def test_gloo_gets_it_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(network, "interface_to", {"10.0.0.8": "eno1"}.get)
    assert rank_environment(1, "10.0.0.8")["GLOO_SOCKET_IFNAME"] == "lo"
    assert rank_environment(2, "10.0.0.8")["GLOO_SOCKET_IFNAME"] == "eno1"
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(2, "elsewhere")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(2, "10.0.0.8")


def test_addresses() -> None:
    assert network.is_here("127.0.0.1")
    assert not network.is_here("192.0.2.1")
    assert not network.is_known("no-such-host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert network.connection_fault("127.0.0.1", port) == ""
    assert network.connection_fault("127.0.0.1", port) == "Connection refused"


def test_the_consistency_check_names_what_differs_and_where() -> None:
    same = consistency.describe({"nnodes": 2, "seed": None})
    assert consistency.difference([("machine 0", same), ("machine 1", dict(same))]) is None
    other = {**same, "--seed": "7", consistency.CODE: "0" * 12}
    places = [("machine 0 (a)", same), ("machine 1 (b)", same), ("machine 2 (c)", other)]
    assert consistency.difference(places) == (
        "--seed is None on machine 0 (a) and 7 on machine 2 (c); "
        f"the code's sha256 is {same[consistency.CODE]} on machine 0 (a) and 000000000000 on "
        "machine 2 (c)"
    )


def test_what_gloo_says_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "docker0")
    monkeypatch.setenv("MASTER_ADDR", "gpu07")
    monkeypatch.setenv("MASTER_PORT", "29500")
    said = RuntimeError(
        "Gloo connectFullMesh failed with [/a/gloo/transport/tcp/pair.cc:152] timed out "
        "connecting: SO_ERROR: Connection refused, remote=[172.17.0.1]:17326$1"
    )
    text = process_group.unreachable("gloo", said)
    for part in ("Connection refused, remote=[172.17.0.1]:17326)", "GLOO_SOCKET_IFNAME=docker0",
                 "gpu07 port 29500", socket.gethostname()):  # fmt: skip
        assert part in text
    assert "\n" not in text
    assert "NCCL_SOCKET_IFNAME" in process_group.unreachable("nccl", said)
