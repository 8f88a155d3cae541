"""What several machines check before they exchange anything. measure/two_hosts.py does it with two real ones."""

import json
import socket

import pytest
import torch.distributed as dist

from configurator import UserError, run
from measure.two_hosts import C10D, STATIC, launch_line
from runtime import ranks

KNOBS = {"learning_rate": 1e-4, "model": "toy/base"}


@pytest.fixture
def call(monkeypatch):
    """A function that calls the roll on rank 0, against a real store where rank 1 of machine "other" has left its values."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "ROLL_CALL", 0.1)

    def calling(other=None, reached=True, comes=True):
        if comes:
            packages = {k: v for k, v in ranks.provenance().items() if k not in ("git", "edited", "python")}
            values = {**KNOBS, **ranks.source(), **packages, **(other or {})}
            store.set("roll call 0/start/1", json.dumps(["other", reached, values]))
        ranks.roll_call(KNOBS)

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    return calling


def test_machines_that_are_alike_start(call):
    call()


@pytest.mark.parametrize("name,value", [("learning_rate", 2e-4), ("train.py", "sha256 0"), ("torch", "1.0"), ("extra", 1)])
def test_a_machine_that_is_unlike_is_named(call, name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value!r} on other, but .* on {socket.gethostname()}: several machines"):
        call({name: value})


def test_a_machine_that_does_not_come(call):
    with pytest.raises(UserError, match=r"rank 1 did not start within 0.1 s"):
        call(comes=False)


def test_a_machine_that_cannot_be_reached(call):
    with pytest.raises(UserError, match=r"the name other is the loopback .*GLOO_SOCKET_IFNAME"):
        call(reached=False)


def test_what_can_be_reached(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name in ("localhost", "127.0.1.1", "no.such.name.invalid", "192.0.2.1"):  # the last is no address of this machine
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert not ranks.can_be_reached()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert ranks.can_be_reached()


@pytest.mark.parametrize("page", [STATIC, C10D])
def test_the_launch_lines_are_on_their_pages(page):
    line = launch_line(page, node=1, n_processes=2)
    assert line[0] == "--nnodes=2" and "--nproc_per_node=2" in line and line[-1] == "train.py"
    assert "10.77.0.1" in " ".join(line)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_part_of_torchruns_environment(script, tmp_path, monkeypatch, name):
    """A cluster or a notebook may leave some of its variables: one line, and no folder."""
    for left, missing in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        for variable in ranks.TORCHRUN:
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(left, "0")
        with pytest.raises(UserError, match=f"^{left} is set in the environment, but {missing} is not: unset {left}, or start"):
            script(name, ["--sampler=torch", f"--out_dir={tmp_path / 'out'}"]).main()
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "abc", "RANK is 'abc' in the environment, which is no number"),
        ("WORLD_SIZE", "", "WORLD_SIZE is '' in the environment, which is no number"),
        ("MASTER_PORT", "-1", "MASTER_PORT is '-1' in the environment, which is no number"),
        ("RANK", "2", "RANK=2 in the environment must be below WORLD_SIZE=2"),
        ("WORLD_SIZE", "0", "RANK=0 in the environment must be below WORLD_SIZE=0"),
    ],
)
def test_torchruns_variables_with_other_values(script, tmp_path, monkeypatch, name, value, words):
    """No number, or a rank that is not there, for which the others would wait."""
    usual = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for variable, text in {**usual, name: value}.items():
        monkeypatch.setenv(variable, text)
    monkeypatch.setattr(ranks, "RANK", ranks.number("RANK", 0))  # as at the import
    with pytest.raises(UserError, match=f"^{words}: unset RANK WORLD_SIZE LOCAL_RANK, or start by torchrun$"):
        script("train", ["--sampler=torch", f"--out_dir={tmp_path / 'out'}"]).main()
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_no_number_is_one_line(monkeypatch, capsys):
    """An error names the rank that prints it, whatever that is."""

    def fail():
        raise UserError("no")

    monkeypatch.setenv("RANK", "abc")
    with pytest.raises(SystemExit) as e:
        run(fail)
    assert e.value.code == 2 and capsys.readouterr().err == "error: rank abc: no\n"
