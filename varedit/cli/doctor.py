"""`varedit doctor`: what runs on this machine."""

import importlib.metadata
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from varedit import __version__
from varedit.machine import num_cores

GIB = 2**30

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy", "pillow")
OPTIONAL = {
    "sentencepiece": "text encoders stored without a tokenizer.json",
    "peft": "LoRA adapters",
    "scikit-image": "the sample photograph",
}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """What runs here: devices, precisions, memory, versions, which models fit."""
    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        _show(findings)


def examine() -> dict[str, Any]:
    """All findings as plain JSON values; sizes in GiB."""
    memory = memory_gib()
    devices = _devices(memory["available"])
    return {
        "varedit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": num_cores(),
        "memory_gib": memory,
        "disk_free_gib": round(shutil.disk_usage(Path.cwd()).free / GIB, 1),
        "devices": devices,
        "packages": {name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
        "text_encoders": _text_encoders(),
        "models": _models({device["device"]: device["memory_gib"] for device in devices}),
    }


def memory_gib() -> dict[str, float]:
    """Memory of this process's machine or, where that is less, of its container: total and available."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        freed = int(counts["inactive_file"])  # files read once, which the kernel drops when memory is wanted
        available = min(available, total - int(used.read_text()) + freed)
    return {"total": round(total / GIB, 1), "available": round(available / GIB, 1)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(cpu_memory: float) -> list[dict[str, Any]]:
    """Devices, best first, with the memory left on each and the speed of both precisions."""
    import torch

    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free = torch.cuda.mem_get_info(index)[0]
        devices.append(
            {"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index), "memory_gib": round(free / GIB, 1)}
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.processor(), "memory_gib": cpu_memory})
    name = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    devices.append({"device": "cpu", "name": name, "memory_gib": cpu_memory})
    for device in devices:
        device["gflops"] = {name: matmul_gflops(device["device"], name) for name in ("float32", "bfloat16")}
    return devices


def matmul_gflops(device: str, dtype: str) -> float | None:
    """Speed of a matrix product in 10^9 operations a second, best of three; None where the device refuses the dtype."""
    import torch

    side = 1024 if device == "cpu" else 8192  # a GPU spends longer on being asked than on a small product
    try:
        matrix = torch.randn(side, side, device=device, dtype=getattr(torch, dtype))
        (matrix[:64, :64] @ matrix[:64, :64])[0, 0].item()  # warms up
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - started)
            if best > 0.5:  # bfloat16 on an older CPU, say: two more would tell nothing new
                break
    except (RuntimeError, TypeError):
        return None
    return round(2 * side**3 / best / 1e9, 1)


def _models(memory: dict[str, float]) -> list[dict[str, Any]]:
    """The known models: weights with the text encoder in bfloat16, and the devices on which an edit fits.

    An edit takes a fifth more than the weights, and those are float32 on a CPU unless told otherwise.
    """
    from varedit.pipeline import DEFAULT_MODEL
    from varedit.presets import PRESETS

    sizes = {name: preset.num_parameters * 2 / GIB for name, preset in PRESETS.items()}
    if (DEFAULT_MODEL / "model_index.json").exists():
        sizes = {"default": sum(path.stat().st_size for path in DEFAULT_MODEL.rglob("*.safetensors")) / GIB} | sizes
    return [
        {
            "model": name,
            "weights_gib": round(weights, 2),
            "fits": [device for device, free in memory.items() if 1.2 * weights * (1 + (device == "cpu")) < free],
            "fits_in_bfloat16": [device for device, free in memory.items() if 1.2 * weights < free],
        }
        for name, weights in sizes.items()
    ]


def _text_encoders() -> dict[str, bool]:
    """The text encoders of the known models: whether the weights of each are already on this disk."""
    from huggingface_hub import try_to_load_from_cache

    from varedit.presets import PRESETS

    def cached(name: str, file: str) -> Path | None:
        found = try_to_load_from_cache(name, file)
        return Path(found) if isinstance(found, str) else None

    def complete(name: str) -> bool:
        if cached(name, "model.safetensors") or cached(name, "pytorch_model.bin"):
            return True
        index = cached(name, "model.safetensors.index.json")
        return index is not None and all(
            cached(name, shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        )

    return {name: complete(name) for name in sorted({preset.text_encoder for preset in PRESETS.values()})}


def _show(findings: dict[str, Any]) -> None:
    memory = findings["memory_gib"]
    typer.echo(f"varedit {findings['varedit']}, Python {findings['python']}, {findings['platform']}")
    typer.echo(
        f"{findings['cores']} cores, {memory['available']} of {memory['total']} GiB memory available, "
        f"{findings['disk_free_gib']} GiB disk free here"
    )
    typer.echo("\ndevices (matrix product, 10^9 operations a second)")
    for device in findings["devices"]:
        speeds = ", ".join(f"{name} {speed or 'refused'}" for name, speed in device["gflops"].items())
        typer.echo(f"  {device['device']:8} {device['name']}, {device['memory_gib']} GiB available: {speeds}")
    typer.echo("\npackages")
    for name, version in findings["packages"].items():
        missing = f"missing (only for: {OPTIONAL[name]})" if name in OPTIONAL else "missing"
        typer.echo(f"  {name:16} {version or missing}")
    for name, present in findings["text_encoders"].items():
        typer.echo(f"  {name:16} {'on this disk' if present else 'not downloaded yet (only for released models)'}")
    typer.echo("\nmodels (weights with text encoder in bfloat16; twice that on a CPU, without --dtype bfloat16)")
    for model in findings["models"]:
        fits = ", ".join(model["fits"])
        verdict = f"fits on {fits}" if fits else "does not fit"
        if not fits and model["fits_in_bfloat16"]:
            verdict = "fits with --dtype bfloat16"
        typer.echo(f"  {model['model']:16} {model['weights_gib']:5} GiB  {verdict}")
