"""Compare our modules with recorded outputs of the released system, through the converter.

    python benchmarks/parity.py --vectors DIR --output benchmarks/results/parity.md

For every vector set in DIR the weights are written as released `.pth` files, converted, loaded with the pipeline's
own `from_pretrained`, and run in float32 on the CPU. Writes a table, and the same numbers as .json beside it.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from varedit import VAREditPipeline, quantizer, scale_schedule
from varedit.convert import convert
from varedit.sampling import guide
from varedit.scales import ScaleSchedule
from varedit.training.objective import bit_losses, objective

SIZES = {"0.06M": 256, "0.25M": 512}
"""Names of the recorded sizes -> size classes."""


@dataclass(frozen=True)
class Case:
    """One vector set at one size: the converted pipeline, and the recorded tensors and numbers."""

    pipeline: VAREditPipeline
    schedule: ScaleSchedule
    golden: dict[str, Tensor]
    info: dict

    @property
    def patch_size(self) -> int:
        return self.pipeline.image_tokenizer.config.patch_size


def names(vectors: Path) -> list[str]:
    """The vector sets in a folder."""
    return sorted(file.name.removesuffix(".weights.safetensors") for file in vectors.glob("*.weights.safetensors"))


def released_files(vectors: Path, name: str, folder: Path) -> tuple[Path, Path]:
    """Write a set's weights as the two `.pth` files that are released: transformer and image tokenizer."""
    weights = load_file(vectors / f"{name}.weights.safetensors")
    transformer, image_tokenizer = folder / "transformer.pth", folder / "vae.pth"
    parts = {
        prefix: {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for prefix in ("transformer.", "vae.")
    }
    torch.save({"trainer": {"gpt_fsdp": parts["transformer."]}}, transformer)
    torch.save({"vae": parts["vae."]}, image_tokenizer)
    return transformer, image_tokenizer


def load_converted(vectors: Path, name: str, folder: Path) -> VAREditPipeline:
    """Convert one vector set through `.pth` files in `folder` and load the result."""
    output = convert(*released_files(vectors, name, folder), folder / "converted", position_layout="released", size=512)
    pipeline = VAREditPipeline.from_pretrained(output)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_case(pipeline: VAREditPipeline, vectors: Path, name: str, recorded_size: str) -> Case:
    """The recorded side of one size."""
    golden = load_file(vectors / f"{name}.golden.safetensors")
    prefix = f"{recorded_size}."
    return Case(
        pipeline,
        scale_schedule(SIZES[recorded_size]),
        {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)},
        json.loads((vectors / f"{name}.json").read_text())["cases"][recorded_size],
    )


@torch.no_grad()
def tokenizer_errors(case: Case) -> dict[str, float]:
    """Encoder, quantizer, patchify, teacher forcing and decoder: largest absolute differences, and bits that differ."""
    golden, tokenizer = case.golden, case.pipeline.image_tokenizer
    source, target = (tokenizer.encode(_image(golden[f"{side}_image_u8"])) for side in ("source", "target"))
    recorded = golden["vae.target_features"]
    bits, canvas = quantizer.encode_bits(recorded, case.schedule, case.patch_size)
    forced = quantizer.teacher_forcing(recorded, case.schedule, case.patch_size)
    return {
        "features": max(_error(source, golden["vae.source_features"]), _error(target, recorded)),
        "source_tokens": _error(quantizer.patchify(source, case.patch_size), golden["source_prefix"]),
        "canvas": _error(canvas, golden["vae.target_quantized"]),
        "inputs": _error(forced.inputs_BLC, golden["train.target_inputs"]),
        "reconstruction": _error(tokenizer.decode(canvas), golden["vae.target_reconstruction"]),
        "quantizer_bits_differing": sum(
            int((scale_bits.permute(0, 2, 3, 1) != golden[f"vae.target_bits.{k}"][:, 0].bool()).sum())
            for k, scale_bits in enumerate(bits)
        ),
        "labels_differing": int((forced.bits_BLC != golden["train.gt_bits"].bool()).sum()),
    }


@torch.no_grad()
def teacher_forced_errors(case: Case) -> dict[str, float]:
    """All scales at once from the recorded source image and target features: logits and both losses."""
    golden = case.golden
    features = case.pipeline.image_tokenizer.encode(_image(golden["source_image_u8"]))
    forced = quantizer.teacher_forcing(golden["vae.target_features"], case.schedule, case.patch_size)
    logits = case.pipeline.transformer(
        case.schedule,
        forced.inputs_BLC,
        source_BChw=quantizer.patchify(features, case.patch_size).transpose(1, 2).unflatten(2, case.schedule.finest),
        text_BTF=golden["text_features"][None],
    )
    losses = {
        "loss_mean": bit_losses(logits, forced.bits_BLC).mean().item(),
        "loss_reweighted": objective(logits, forced.bits_BLC, case.schedule).item(),
    }
    return {"logits": _error(logits.flatten(2), golden["train.logits"])} | {
        name: abs(value - case.info["train"][name]) for name, value in losses.items()
    }


def greedy_errors(case: Case, run: str, forced_error: float) -> dict[str, float | int | None]:
    """One greedy edit by the pipeline's own call, scale by scale with the cache.

    Args:
        forced_error: logit error under teacher forcing; it stands in where the run has no recorded logits.

    Returns:
        logits: largest difference of guided logits divided by the temperature, over the recorded scales, or None.
        scales_to_compare: scales before the first whose recorded smallest margin is below that error.
        scales_equal: scales, counted from the first, whose bits are all equal; and num_scales.
        image_levels: largest difference of the 8-bit images.
    """
    golden, settings = case.golden, case.info[run]
    seen: list[Tensor] = []

    def keep(module, arguments, output) -> None:
        if isinstance(output, Tensor):  # the prefill returns a cache
            logits = guide(*output.chunk(2), settings["cfg"]) if settings["cfg"] != 1 else output
            seen.append(logits / settings["tau"])

    hook = case.pipeline.transformer.register_forward_hook(keep)
    try:
        output = case.pipeline(
            golden["source_image_u8"][0].permute(1, 2, 0).numpy(),
            prompt_embeds=golden["text_features"],
            guidance_scale=settings["cfg"],
            temperature=0,
            top_p=1.0,
            seed=0,
            size=case.schedule.size,
        )
    finally:
        hook.remove()
    recorded = [golden[key] for k in range(len(seen)) if (key := f"{run}.logits.{k}") in golden]
    error = max(map(_error, seen, recorded), default=None)
    near_tie = forced_error / settings["tau"] if error is None else error
    equal = [torch.equal(bits, golden[f"{run}.bits.{k}"][0, 0]) for k, bits in enumerate(output.bits[0])]
    image = torch.from_numpy(np.array(output.images[0])).permute(2, 0, 1).int()
    return {
        "logits": error,
        "scales_to_compare": _first(margin < near_tie for margin in settings["margins"]),
        "scales_equal": _first(not same for same in equal),
        "num_scales": len(equal),
        "image_levels": int((image - golden[f"{run}.image_u8"][0].int()).abs().max()),
    }


def _first(flags) -> int:
    """Index of the first true flag, or their number."""
    flags = list(flags)
    return flags.index(True) if True in flags else len(flags)


def _image(image_u8: Tensor) -> Tensor:
    return image_u8.float() / 127.5 - 1


def _error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return (ours - theirs).abs().max().item()


# -- report --------------------------------------------------------------------------------------------------------


def measure(vectors: Path) -> list[dict]:
    """All numbers of all vector sets and sizes."""
    rows = []
    for name in names(vectors):
        with tempfile.TemporaryDirectory() as folder:
            pipeline = load_converted(vectors, name, Path(folder))
        for recorded_size, size in SIZES.items():
            started = time.monotonic()
            case = load_case(pipeline, vectors, name, recorded_size)
            forced = teacher_forced_errors(case)
            runs = {run: greedy_errors(case, run, forced["logits"]) for run in ("greedy_cfg4", "greedy_nocfg")}
            rows.append({"name": name, "size": size} | tokenizer_errors(case) | {"teacher_forced": forced} | runs)
            print(f"{name} {size}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return rows


def table(rows: list[dict]) -> str:
    """The numbers as Markdown: one column a vector set and size."""
    lines = {"": [f"{row['name']}, {row['size']} px" for row in rows]}
    for label, key in (
        ("encoder features", "features"),
        ("source tokens", "source_tokens"),
        ("canvas of all scales", "canvas"),
        ("teacher-forcing inputs", "inputs"),
        ("decoded canvas, [-1, 1]", "reconstruction"),
    ):
        lines[label] = [f"{row[key]:.1e}" for row in rows]
    lines["quantizer bits that differ"] = [str(row["quantizer_bits_differing"]) for row in rows]
    lines["labels that differ"] = [str(row["labels_differing"]) for row in rows]
    for label, key in (
        ("**teacher-forced logits** (limit 1e-3)", "logits"),
        ("loss, plain mean (limit 1e-5)", "loss_mean"),
        ("loss, weighted (limit 1e-5)", "loss_reweighted"),
    ):
        lines[label] = [f"{row['teacher_forced'][key]:.1e}" for row in rows]
    for run, label in (("greedy_cfg4", "guidance 4"), ("greedy_nocfg", "no guidance")):
        lines[f"{label}: logits"] = [_cell(row[run]["logits"]) for row in rows]
        lines[f"{label}: scales with all bits equal"] = [
            f"{row[run]['scales_equal']} of {row[run]['num_scales']} (asked: {row[run]['scales_to_compare']})"
            for row in rows
        ]
        lines[f"{label}: image, 8-bit levels (limit 1)"] = [str(row[run]["image_levels"]) for row in rows]
    head, *body = [f"| {label} | {' | '.join(cells)} |" for label, cells in lines.items()]
    return "\n".join([head, "|---" * (len(rows) + 1) + "|", *body])


def _cell(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.1e}"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, help="folder of the recorded vectors")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "parity.md")
    options = parser.parse_args()
    if options.vectors is None:
        print("parity: nothing measured; pass --vectors DIR with the recorded vectors")
        return
    if not names(options.vectors):
        sys.exit(f"{options.vectors} holds no *.weights.safetensors; name the folder of the recorded vectors")
    rows = measure(options.vectors)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    options.output.write_text(
        "# Parity with the released system\n\n"
        "Largest absolute differences between our modules and recorded outputs of the released code (tiny random\n"
        "weights, float32, CPU). The weights go from `.pth` through `varedit convert` and `from_pretrained`. Greedy\n"
        "bits must be equal at every scale before the first near-tie (a recorded margin below the logit error; below\n"
        'the teacher-forced one where a run has no recorded logits): "asked".\n\n'
        f"{table(rows)}\n\n"
        f"Command: `python benchmarks/parity.py --vectors DIR`, torch {torch.__version__.split('+')[0]}.\n"
    )
    print(options.output.read_text())


if __name__ == "__main__":
    main()
