"""One process or several, sharded or not: the same losses."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import rows, weights

pytest_plugins = ["training_runs"]

SPREAD = """
import os, sys, torch, torch.multiprocessing as mp
from pathlib import Path
torch.set_num_threads(1)
from varedit.training.config import EditorConfig, load_config
from varedit.training.run import train

def work(rank, count, port, config, folder, resume):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train(config, folder, resume)

folder, ports = Path(sys.argv[1]), sys.argv[2:]
def launch(name, count, *overrides, resume=False):
    config = load_config(EditorConfig, folder / "config.yaml", ["validate_every=3", *overrides])
    mp.start_processes(work, (count, ports.pop(), config, folder / name, resume), count, start_method="fork")

for optimizer in ("adamw", "muon"):
    for name, count, sharding in (("one", 1, "none"), ("two", 2, "none"), ("fsdp", 2, "fsdp")):
        launch(f"{name}-{optimizer}", count, f"sharding={sharding}", f"optimizer.name={optimizer}", "ema_decay=0.9")
launch("resumed", 2, "sharding=fsdp", "steps=4", "ema_decay=0.9")
launch("resumed", 2, "sharding=fsdp", "ema_decay=0.9", resume=True)
launch("gathered", 2, "sharding=fsdp", "steps=4", "ema_decay=0.9", "async_checkpoints=true")
launch("gathered", 1, "sharding=none", "ema_decay=0.9", resume=True)
launch("clock", 2, "steps=1000", "max_minutes=0.0001")
launch("lora", 2, "sharding=fsdp", "lora.rank=4", "frozen_dtype=float32", "gradient_checkpointing=true", "steps=3")
launch("lora-one", 1, "lora.rank=4", "frozen_dtype=float32", "steps=3")
launch("bf16", 2, "sharding=fsdp", "precision=bfloat16", "steps=3", "sample_every=2", "sample_count=1")
launch("bf16-one", 1, "precision=bfloat16", "steps=3")
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [str(item.getsockname()[1]) for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.mark.slow
def test_processes_and_sharding_change_nothing(editor_config, tmp_path):
    """One process, two replicas, two processes with FSDP2; AdamW and Muon; resumed, also by one process; adapters;
    bfloat16; a clock.
    """
    editor_config()
    text = (tmp_path / "config.yaml").read_text().replace("validation_count: 0", "validation_count: 3")
    (tmp_path / "config.yaml").write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SPREAD, str(tmp_path), *free_ports(15)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for optimizer in ("adamw", "muon"):
        one = rows(tmp_path / f"one-{optimizer}")
        assert len(one) == 6
        for other in ("two", "fsdp"):
            np.testing.assert_allclose(rows(tmp_path / f"{other}-{optimizer}"), one, rtol=1e-6)
            validation = [rows(tmp_path / f"{n}-{optimizer}", "validation_loss") for n in (other, "one")]
            np.testing.assert_allclose(*validation, rtol=1e-6)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "fsdp-adamw")
    np.testing.assert_allclose(rows(tmp_path / "gathered"), rows(tmp_path / "one-adamw"), rtol=1e-6)
    assert 1 <= len(rows(tmp_path / "clock")) < 100
    np.testing.assert_allclose(rows(tmp_path / "lora"), rows(tmp_path / "lora-one"), rtol=1e-6)
    np.testing.assert_allclose(rows(tmp_path / "bf16"), rows(tmp_path / "bf16-one"), rtol=2e-3)
    assert (tmp_path / "bf16/samples/step_00000002.png").is_file() and (tmp_path / "lora/lora").is_dir()
    for other in ("fsdp-adamw", "gathered"):
        for key, value in weights(tmp_path / "one-adamw").items():
            torch.testing.assert_close(weights(tmp_path / other)[key], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_command_runs_under_torchrun(editor_config, tmp_path):
    editor_config()
    script = Path(sys.executable).with_name("varedit")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [str(script), "train", "editor", "--config", str(tmp_path / "config.yaml"), "--set", "steps=3"]
    command += ["--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done, 3 steps" in done.stdout and len(rows(tmp_path / "run")) == 3
