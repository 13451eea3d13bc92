"""The recipes that are scripts: exact resume, the same data for every variant, a report that says what was found."""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.pipeline import DEFAULT_MODEL, VAREditPipeline
from varedit.scales import scale_schedule
from varedit.testing import tiny_pipeline, tiny_transformer
from varedit.training.updates import Average
from varedit.transformer import VAREditTransformer

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.append(str(RECIPES))
import ablation_report  # noqa: E402
import ablation_tiny  # noqa: E402
import small_gpu  # noqa: E402
import tiny_two_core_cpu  # noqa: E402
import wall_clock  # noqa: E402

needs_model = pytest.mark.skipif(not (DEFAULT_MODEL / "model_index.json").exists(), reason="needs the default model")


# -- the GPU recipe


def test_a_resume_repeats_no_pair_and_skips_none(monkeypatch):
    monkeypatch.setattr(tiny_two_core_cpu, "ASPECTS", {1.0: 1})

    def seen(first: int, batch_size: int, batches: int) -> list[str]:
        stream = iter(tiny_two_core_cpu.Stream(None, None, batch_size, 3, first, None))
        return [pair.instruction for _ in range(batches) for pair in next(stream).pairs]

    whole = seen(0, 4, 4)
    assert len(set(whole)) > 12
    assert seen(8, 4, 2) == whole[8:]
    assert seen(8, 2, 4) == whole[8:] and seen(8, 8, 1) == whole[8:]


def test_the_round_of_templates_has_their_shares():
    round_of = small_gpu.slots(60)
    assert len(round_of) == 60 and set(round_of) == set(small_gpu.ASPECTS)
    shares = {ratio: 60 * share / sum(small_gpu.ASPECTS.values()) for ratio, share in small_gpu.ASPECTS.items()}
    assert all(abs(round_of.count(ratio) - share) < 2 for ratio, share in shares.items())
    assert round_of == small_gpu.slots(60)


def some_batches(first: int, num_workers: int, count: int) -> list[small_gpu.PairBatch]:
    return list(islice(small_gpu.loader(small_gpu.Pairs(None, None, 128, 2, 5, first), num_workers), count))


def assert_same(one: small_gpu.PairBatch, other: small_gpu.PairBatch) -> None:
    assert one.schedule == other.schedule and one.prompts == other.prompts
    assert np.array_equal(one.source, other.source) and np.array_equal(one.mask, other.mask)


def test_batches_do_not_depend_on_workers_or_where_one_begins():
    alone = some_batches(0, 0, 5)
    assert len({batch.schedule for batch in alone}) > 1
    for one, other in zip(alone, some_batches(0, 2, 5)):
        assert_same(one, other)
    for one, other in zip(alone[3:], some_batches(3, 2, 2)):
        assert_same(one, other)


def test_images_are_in_range():
    (batch,) = some_batches(0, 0, 1)
    images = small_gpu.to_images(batch, torch.device("cpu"))
    assert images.shape == (4, 3, *batch.schedule.image_hw)
    assert np.array_equal(((images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), batch.source[0])
    assert np.array_equal(((images[2] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), batch.target[0])


def state_of(run: Path, name: str) -> dict:
    return torch.load(run / f"{name}.pt", weights_only=True)


def flat(value, path="") -> dict:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for key, item in enumerate(value) for k, v in flat(item, f"{path}/{key}").items()}
    return {path: value}


def assert_same_training(one: Path, other: Path, name: str) -> None:
    first, second = (flat(state_of(run, name)) for run in (one, other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if key != "/elapsed":
            assert torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key], key


@needs_model
@pytest.mark.slow
def test_calls_that_are_cut_short_go_on_exactly_and_the_model_edits(tmp_path, monkeypatch):
    monkeypatch.setattr(small_gpu, "device_of", lambda: torch.device("cpu"))
    common = {"preset": "check", "num_workers": 0, "minutes": 60.0}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainings = {"tokenizer": small_gpu.tokenizer, "editor": small_gpu.editor}
    for name, training in trainings.items():
        training(whole, **common)
        assert state_of(whole, name)["step"] == 6
        for stop in (2, 5, 6):  # as if the minutes of each call were over then
            monkeypatch.setattr(small_gpu.Chunk, "done", property(lambda self, stop=stop: self.step >= stop))
            training(parts, **common)
            assert state_of(parts, name)["step"] == stop
        monkeypatch.undo()
        monkeypatch.setattr(small_gpu, "device_of", lambda: torch.device("cpu"))
        assert_same_training(whole, parts, name)
    small_gpu.export(parts, tmp_path / "small", "check", "200KB", text_encoder=False)
    files = list((tmp_path / "small").rglob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 250_000
    small_gpu.assemble(tmp_path / "small", tmp_path / "model")
    small_gpu.export(parts, tmp_path / "direct", "check", "5GB", text_encoder=True)
    picture = np.random.default_rng(0).integers(0, 256, (100, 80, 3), np.uint8)
    edits = [
        VAREditPipeline.from_pretrained(folder, dtype=torch.float32)(picture, "make it red", seed=1).images[0]
        for folder in (tmp_path / "model", tmp_path / "direct")
    ]
    assert np.array_equal(*edits) and edits[0].size == (80, 100)
    rounded = small_gpu.rounded_text_encoder(torch.float32)[1].state_dict()
    stored = VAREditPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32).text_encoder.state_dict()
    assert all(torch.equal(weight, stored[name]) for name, weight in rounded.items())


def test_rates_stay_and_then_fall_and_a_run_that_is_over_goes_on(tmp_path):
    def at(minutes: float, elapsed: float, decay: float, step: int = 100) -> float:
        model = torch.nn.Linear(2, 2)
        optimizers = [torch.optim.SGD(model.parameters(), 1.0)]
        progress = wall_clock.Progress(tmp_path, "any", minutes, model, optimizers)
        progress.elapsed, progress.step = elapsed * 60, step
        progress.rates(warm_up=10, decay=decay)
        return progress.optimizers[0].param_groups[0]["lr"]

    assert at(10, 5, 0.5) == 1.0 and at(10, 0, 1, step=4) == pytest.approx(0.5)
    assert at(10, 7.5, 0.5) == pytest.approx(0.51) and at(10, 10, 0.5) == pytest.approx(0.02)
    assert at(20, 10, 0.5) == 1.0  # the same moment of a longer run


def test_the_moving_average_follows_the_weights_and_goes_on(tmp_path):
    def training(run: Path, steps: int) -> float:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        average = Average(dict(model.named_parameters()), 0.3)
        optimizers = [torch.optim.SGD(model.parameters(), 1.0)]
        progress = wall_clock.Progress(run, "any", 10, model, optimizers, average)
        for _ in range(steps):
            model.weight.data += 1
            progress.advance(1, {})
        progress.save()
        return state_of(run, "any")["average"]["weight"].item()

    expected = 0.0
    for weight, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3), 1):
        expected += (1 - decay) * (weight - expected)
    assert training(tmp_path / "whole", 4) == pytest.approx(expected)
    training(tmp_path / "parts", 1)
    assert training(tmp_path / "parts", 3) == pytest.approx(expected)


def test_a_run_of_another_model_or_recipe_is_not_gone_on_with(tmp_path):
    def progress(size: int = 2, averaged: bool = True, faster: str = "0.") -> wall_clock.Progress:
        model = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.Linear(size, size))
        average = Average(dict(model.named_parameters()), 0.9) if averaged else None
        optimizer = torch.optim.SGD(
            [
                {"params": [(n, p) for n, p in model.named_parameters() if n.startswith(faster) == fast]}
                for fast in (0, 1)
            ]
        )
        return wall_clock.Progress(tmp_path, "any", 10, model, [optimizer], average)

    progress().save()
    kept = (tmp_path / "any.pt").read_bytes()
    for other in ({"size": 3}, {"averaged": False}, {"faster": "1."}):
        with pytest.raises(wall_clock.typer.BadParameter, match="any.pt is of another model or recipe; take"):
            progress(**other)
    assert (tmp_path / "any.pt").read_bytes() == kept
    progress()


def test_the_moving_average_is_what_is_exported(tmp_path):
    own, averaged, empty = tiny_transformer(0), tiny_transformer(1), tiny_transformer(2)
    torch.save({"model": own.state_dict(), "average": averaged.state_dict()}, tmp_path / "editor.pt")
    loaded = small_gpu.load_part(tmp_path, "editor", empty).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in averaged.state_dict().items())
    assert not torch.equal(loaded["head.weight"], own.state_dict()["head.weight"])


def test_an_editor_goes_on_from_a_shallower_one_of_its_kind_only():
    editor = tiny_two_core_cpu.EDITOR
    shallower = VAREditTransformer(**editor | {"num_blocks": 2}).eval()
    deeper = tiny_two_core_cpu.grown(shallower, "any")
    assert deeper.config.num_blocks == editor["num_blocks"] and all(p.requires_grad for p in deeper.parameters())
    for key, value in (("num_levels", 4), ("num_blocks", editor["num_blocks"] + 1)):
        other = VAREditTransformer(**editor | {"num_blocks": 1, key: value})
        with pytest.raises(tiny_two_core_cpu.typer.BadParameter, match=f"--start any: {key} is {value}, this recipe's"):
            tiny_two_core_cpu.grown(other, "any")


def test_a_new_block_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(tiny_two_core_cpu.typer.BadParameter, match="--new-block 9: the editor has the blocks 0 to 8"):
        tiny_two_core_cpu.editor(tmp_path / "run", new_block=[2, 9])
    assert not (tmp_path / "run").exists()


@needs_model
@pytest.mark.parametrize("own", [0.0, 0.5, 1.0])
def test_an_editor_goes_on_with_a_share_of_its_own_bits(tmp_path, monkeypatch, own):
    shares, teacher_forcing = [], tiny_two_core_cpu.teacher_forcing

    def watched(target_BChw, *arguments, own_bits=None, **options):
        shares.append((len(target_BChw), own_bits is not None))
        return teacher_forcing(target_BChw, *arguments, own_bits=own_bits, **options)

    monkeypatch.setattr(tiny_two_core_cpu, "teacher_forcing", watched)
    tiny_two_core_cpu.editor(tmp_path, minutes=1e-6, start=DEFAULT_MODEL, batch_size=2, own=own)
    assert shares == {0.0: [(2, False)], 0.5: [(1, True), (1, False)], 1.0: [(2, True)]}[own]
    state = state_of(tmp_path, "editor")
    assert (state["step"], state["samples"]) == (1, 2)
    before = VAREditPipeline.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).transformer.state_dict()
    after = {name.removeprefix("transformer."): weight for name, weight in state["model"].items()}
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items() if name.endswith("fc1.weight"))


@needs_model
def test_a_run_is_exported_and_edits(tmp_path):
    torch.manual_seed(0)
    tokenizer, editor = tiny_two_core_cpu.TOKENIZER, tiny_two_core_cpu.EDITOR
    image_tokenizer, own, averaged = (
        VAREditImageTokenizer(**tokenizer), VAREditTransformer(**editor), VAREditTransformer(**editor)
    )  # fmt: skip
    torch.save({"model": image_tokenizer.state_dict()}, tmp_path / "tokenizer.pt")
    torch.save({"model": own.state_dict(), "average": averaged.state_dict()}, tmp_path / "editor.pt")
    tiny_two_core_cpu.export(tmp_path, tmp_path / "model")
    files = [path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors")]
    assert sum(files) < 100e6
    exported = VAREditPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for module, origin in ((exported.transformer, averaged), (exported.image_tokenizer, image_tokenizer)):
        weights = origin.state_dict()
        for name, weight in module.state_dict().items():
            kept = any(part in name for part in module._keep_in_fp32_modules or ())
            assert torch.equal(weight, weights[name] if kept else weights[name].bfloat16().float()), name
    in_the_run = tiny_two_core_cpu.build_pipeline(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    edits = [pipeline(picture, "make it red", seed=1).images[0] for pipeline in (exported, in_the_run)]
    assert np.array_equal(*edits)


def test_the_mean_of_editors_has_the_rest_of_the_first(tmp_path):
    one, other = tiny_pipeline(), tiny_pipeline()
    with torch.no_grad():
        for parameter in (*other.transformer.parameters(), *other.image_tokenizer.parameters()):
            parameter.add_(0.5)
    for name, pipeline in (("one", one), ("other", other)):
        pipeline.save_pretrained(tmp_path / name)
    tiny_two_core_cpu.mean([tmp_path / "one", tmp_path / "other"], tmp_path / "mean")
    mean = VAREditPipeline.from_pretrained(tmp_path / "mean", dtype=torch.float32)
    for name, weight in mean.transformer.state_dict().items():
        expected = (one.transformer.state_dict()[name] + other.transformer.state_dict()[name]) / 2
        torch.testing.assert_close(weight, expected, atol=1e-3, rtol=2**-8)  # stored in bfloat16
    first = one.image_tokenizer.state_dict()
    for name, weight in mean.image_tokenizer.state_dict().items():
        assert torch.equal(weight, first[name].bfloat16().float()), name


def test_models_of_two_sizes_have_no_mean(tmp_path):
    for name, num_blocks in (("one", 2), ("other", 3)):
        tiny_pipeline(num_blocks=num_blocks).save_pretrained(tmp_path / name)
    with pytest.raises(tiny_two_core_cpu.typer.BadParameter, match="other has another size than .*one"):
        tiny_two_core_cpu.mean([tmp_path / "one", tmp_path / "other"], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_preset_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(small_gpu.typer.BadParameter, match="use one of gpu, cpu, check"):
        small_gpu.tokenizer(tmp_path, preset="tpu")


def test_presets_are_one_family():
    for preset in small_gpu.PRESETS.values():
        assert preset.tokenizer.keys() == small_gpu.TOKENIZER.keys() and preset.editor.keys() == small_gpu.EDITOR.keys()
        levels = preset.editor["num_levels"]
        assert scale_schedule(preset.size).num_scales == levels
        with torch.device("meta"):
            tokenizer = small_gpu.VAREditImageTokenizer(**preset.tokenizer)
            assert VAREditTransformer(**preset.editor).config.num_bits == tokenizer.num_token_bits


# -- the ablation

SETTINGS = ablation_tiny.Settings(
    steps=2, pairs=36, cases=6, width=64, depth=2, batch_size=4, guidance_scale=2.0
)  # fmt: skip


def test_every_variant_begins_with_the_same_weights():
    first, *others = (
        ablation_tiny.new_transformer(arguments, SETTINGS, seed=1).state_dict()
        for _, arguments in ablation_tiny.VARIANTS.values()
    )
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[key], other[key]) for key in first)


def logits_of(arguments: dict, schedule) -> torch.Tensor:
    model = ablation_tiny.new_transformer(arguments, SETTINGS, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # gates and head of a fresh model would hide most differences
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    inputs = torch.randn(1, schedule.offsets[-1] - 1, 56, generator=generator)
    source = torch.randn(1, 56, *schedule.finest, generator=generator)
    with torch.no_grad():
        return model(schedule, inputs, source_BChw=source, text_BTF=torch.randn(1, 4, 384, generator=generator))


def test_which_variants_are_the_same_computation():
    square, portrait = scale_schedule(128), scale_schedule(128, 1.5)
    variants = {name: arguments for name, (_, arguments) in ablation_tiny.VARIANTS.items()}
    finest = logits_of(variants["finest"], square)
    assert torch.equal(finest, logits_of({"conditioning": "sar", "num_aligned_blocks": 0}, square))
    assert torch.equal(logits_of(variants["offset"], square), logits_of(variants["fixed_offset"], square))
    assert torch.equal(logits_of(variants["sar-2"], square), logits_of(variants["sar-all"], square))  # of two blocks
    different = [finest, *(logits_of(variants[name], square) for name in ("sar-1", "sar-2", "full", "released"))]
    for index, one in enumerate(different):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in different[:index])
    assert not torch.allclose(logits_of(variants["offset"], portrait), logits_of(variants["fixed_offset"], portrait))


@needs_model
@pytest.mark.slow
def test_the_ablation_runs_resumes_and_reports(tmp_path):
    run, page = tmp_path / "run", tmp_path / "page.md"
    page.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    sizes = {name: value for name, value in vars(SETTINGS).items() if name != "edit_weight"}
    only = "finest,sar-1,offset,fixed_offset"
    ablation_tiny.main(run, only=only, seeds="0", report=page, **sizes)
    files = {path: path.stat().st_mtime_ns for path in run.glob("*.json")}
    assert len(files) == 4
    found = {path.stem: json.loads(path.read_text()) for path in files}
    assert all(len(one["rows"]) == 6 for one in found.values())
    assert found["finest-0"]["data"] == found["sar-1-0"]["data"] != found["offset-0"]["data"]
    assert [row["case"] for row in found["finest-0"]["rows"]] == [row["case"] for row in found["sar-1-0"]["rows"]]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| sar-1 |") == 2 and "| less sar-1 |" in text and "| less fixed_offset |" in text
    assert (tmp_path / "images" / "page.png").is_file()
    # Nothing is done twice, and another setting does not mix with what is there.
    ablation_tiny.main(run, only=only, seeds="0", report=None, **sizes)
    assert {path: path.stat().st_mtime_ns for path in run.glob("*.json")} == files
    with pytest.raises(ValueError, match="other settings"):
        ablation_tiny.main(run, only=only, seeds="0", report=None, **sizes | {"steps": 3})
    # A run made again is the same run.
    before = found["finest-0"]
    (run / "finest-0.json").unlink()
    ablation_tiny.main(run, only=only, seeds="0", report=None, **sizes)
    again = json.loads((run / "finest-0.json").read_text())
    assert again["rows"] == before["rows"] and again["train"]["losses"] == before["train"]["losses"]


def test_unknown_variants_are_refused(tmp_path):
    with pytest.raises(ablation_tiny.typer.BadParameter, match="'sar-9' is unknown"):
        ablation_tiny.main(tmp_path, only="sar-9")


# -- its report


def result(variant: str, seed: int, aspects: list[float], gain: float, data: str = "d") -> dict:
    rows = [
        {"case": str(case), "type": "tone", "loss": 0.5 - gain + 0.01 * (case % 3), "closer": case % 2 == 0,
         "half": case < 20 + 40 * gain, "success": case < 10, "completeness": 0.5, "balance": 5.0, "stray": 0.01,
         "outside": None if case % 4 == 0 else 25.0 + seed} for case in range(40)
    ]  # fmt: skip
    return {
        "variant": variant, "seed": seed, "data": data, "num_parameters": 1_000_000, "num_threads": 2,
        "settings": {"aspects": aspects, "steps": 10, "batch_size": 4, "guidance_scale": 2.0},
        "train": {"seconds_per_step": 0.5, "losses": []}, "edit_seconds": 0.1, "rows": rows,
    }  # fmt: skip


def write(folder: Path, results: list[dict]) -> list[Path]:
    paths = []
    for one in results:
        paths.append(folder / f"{one['variant']}-{one['seed']}.json")
        paths[-1].write_text(json.dumps(one))
    return paths


def test_intervals():
    rng = np.random.default_rng(3)
    values = rng.normal(5, 1, (2, 100))
    mean, low, high = ablation_report.interval(values)
    assert mean == pytest.approx(values.mean()) and low < mean < high
    assert 0.2 < high - low < 0.8  # about 4 standard errors of 200 values, a little more for the seeds
    assert ablation_report.interval(np.array([[1.0, np.nan, 3.0], [1.0, np.nan, 3.0]]))[0] == 2
    apart = np.stack([np.full(100, 1.0), np.full(100, 3.0)])
    assert ablation_report.interval(apart)[1:] == (1, 3)  # only the seeds vary


def test_report_of_known_results(tmp_path):
    paths = write(tmp_path, [result(name, seed, [1.0], gain) for name, gain in (("finest", 0.0), ("sar-1", 0.1))
                             for seed in (0, 1)])  # fmt: skip
    variants = ablation_report.load(paths)
    assert [one.name for one in variants] == ["finest", "sar-1"]
    (line,) = ablation_report.differences(variants)[2:]
    assert line.startswith("| finest | +0.1000 (+0.1000 to +0.1000) | +0.0 (+0.0 to +0.0) | -10.0 (")
    assert "| 25.0, 25.0 |" in ablation_report.by_seed(variants)[2]
    assert "25.50 (25.00 to 26.00)" in ablation_report.table(variants)[2]
    assert ablation_report.plot(variants).height > 100


def test_results_that_do_not_compare_are_refused(tmp_path):
    paths = write(tmp_path, [result("finest", 0, [1.0], 0, "a"), result("sar-1", 0, [1.0], 0, "b")])
    with pytest.raises(ValueError, match="different data or seeds"):
        ablation_report.load(paths)


def test_a_page_without_markers_is_refused(tmp_path):
    (tmp_path / "page.md").write_text("nothing here")
    with pytest.raises(ValueError, match="lacks the markers"):
        ablation_report.write_report(write(tmp_path, [result("sar-1", 0, [1.0], 0)]), tmp_path / "page.md")


def test_the_page_that_ships_has_the_markers_and_names_every_variant():
    text = (RECIPES.parent / "docs" / "ablation.md").read_text()
    assert ablation_report._BEGIN in text and ablation_report._END in text
    for name in ablation_tiny.VARIANTS:
        assert f"| `{name}` |" in text


def test_the_rates_of_a_last_call_fall_within_it(tmp_path):
    model = torch.nn.Linear(2, 2)
    chunk = small_gpu.Chunk(
        tmp_path, "any", 10, 1000, model, [torch.optim.SGD(model.parameters(), 1.0)], warm_up=1, last=True
    )
    for elapsed, rate in ((0, 1.0), (5, 0.51), (10, 0.02)):
        chunk.elapsed = elapsed * 60
        chunk.update(model(torch.ones(1, 2)).sum(), clip=1.0)
        assert chunk.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


def test_spoilt_weights_do_not_replace_a_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 2)
    progress = wall_clock.Progress(tmp_path, "any", 1, model, [torch.optim.SGD(model.parameters(), 1.0)])
    progress.save()
    good = progress.path.read_bytes()
    torch.nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(typer.BadParameter, match="still good"):
        progress.save()
    assert progress.path.read_bytes() == good
