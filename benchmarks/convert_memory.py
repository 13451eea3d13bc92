"""Peak memory of the converter against the size of the file it reads. Linux.

    python benchmarks/convert_memory.py --output benchmarks/results/convert_memory.md

Writes random checkpoints of about --gigabytes, converts each in a fresh process, and reads the process's peak resident
memory (which counts the pages of the mapped input) from the kernel, less what it held after its imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varedit import VAREditImageTokenizer, VAREditTransformer
from varedit.convert import _released_shape, _tokenizer_key, _transformer_key, convert

LIMIT = 1.2
WIDTH, NUM_CHUNKS = 1024, 2
CASES = (
    ("bfloat16", "pth", None),
    ("bfloat16", "safetensors", None),
    ("bfloat16", "pth", "float32"),
    ("float32", "pth", "bfloat16"),
)
"""Stored dtype, kind of file, and what it is converted to (None: kept)."""


def resident_mib(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def released_state(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights under the released names and shapes of a model on the meta device."""
    chunk_length = len(getattr(model, "blocks", ())) // NUM_CHUNKS
    state = {}
    for name, value in model.state_dict().items():
        key = _transformer_key(name, chunk_length) if chunk_length else _tokenizer_key(name)
        state[key] = torch.randn(_released_shape(name, tuple(value.shape)), dtype=dtype)
    return state


def write_checkpoints(folder: Path, gigabytes: float, dtype: torch.dtype, kind: str) -> tuple[Path, Path]:
    """A random transformer of about so many bytes, and a small image tokenizer."""
    num_blocks = max(round(gigabytes * 1e9 / dtype.itemsize / (16 * WIDTH**2)) // NUM_CHUNKS * NUM_CHUNKS, NUM_CHUNKS)
    with torch.device("meta"):
        transformer = VAREditTransformer(num_bits=32, width=WIDTH, num_blocks=num_blocks, num_heads=8)
        tokenizer = VAREditImageTokenizer(base_width=32)
    paths = folder / f"transformer.{kind}", folder / "vae.pth"
    state = released_state(transformer, dtype)
    save_file(state, paths[0]) if kind == "safetensors" else torch.save(state, paths[0])
    torch.save({"vae": released_state(tokenizer, torch.float32)}, paths[1])
    return paths


def measure_here(transformer: Path, image_tokenizer: Path, output: Path, dtype: str | None) -> dict[str, float]:
    """Convert in this process and tell its memory."""
    before = resident_mib("VmRSS")
    convert(transformer, image_tokenizer, output, dtype=getattr(torch, dtype) if dtype else None)
    return {"before": before, "peak": resident_mib("VmHWM")}


def measure(gigabytes: float, stored: str, kind: str, dtype: str | None) -> dict:
    """Write a checkpoint and convert it in a fresh process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_checkpoints(folder, gigabytes, getattr(torch, stored), kind)
        command = [sys.executable, __file__, "--convert", *map(str, paths), str(folder / "out"), dtype or ""]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = paths[0].stat().st_size / 2**20
    used = told["peak"] - told["before"]
    return {
        "stored": stored,
        "kind": kind,
        "to": dtype or "kept",
        "file_mib": size,
        "used_mib": used,
        "ratio": used / size,
        **told,
    }


def main() -> None:
    """Measure all cases and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the random checkpoint")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "convert_memory.md")
    parser.add_argument("--convert", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        transformer, image_tokenizer, output, dtype = options.convert
        print(json.dumps(measure_here(Path(transformer), Path(image_tokenizer), Path(output), dtype or None)))
        return
    rows = [measure(options.gigabytes, *case) for case in CASES]
    lines = [
        "| stored | file | converted to | file MiB | peak above imports MiB | ratio |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['stored']} | .{row['kind']} | {row['to']} | {row['file_mib']:.0f} | {row['used_mib']:.0f} | "
            f"{row['ratio']:.2f} |"
            for row in rows
        ),
    ]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    options.output.write_text(
        "# Memory of the converter\n\n"
        "Peak resident memory of `varedit convert`, mapped input pages included, against the input file; at most\n"
        f"{LIMIT} times is the limit. Imports alone take {rows[0]['before']:.0f} MiB.\n\n" + "\n".join(lines) + "\n\n"
        f"Command: `python benchmarks/convert_memory.py`, torch {torch.__version__.split('+')[0]}.\n"
    )
    print(options.output.read_text())
    if max(row["ratio"] for row in rows) > LIMIT:
        sys.exit(f"a conversion took more than {LIMIT} times its file")


if __name__ == "__main__":
    main()
