"""Training of the editor: what a batch teaches, what comes out, and that it learns."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from training_runs import CPU, from_zero, rows

from varedit.data.features import FeatureEncoder
from varedit.data.packing import pack
from varedit.data.readers import read
from varedit.lora import load_lora, merge_lora, stack_lora, unload_lora
from varedit.pipeline import VAREditPipeline
from varedit.scales import scale_schedule
from varedit.testing import tiny_pipeline
from varedit.training.data import Example, HeldOut, MicroBatches, Plan, WorldPairs, stream_seed
from varedit.training.loop import Loop
from varedit.training.run import train
from varedit.training.trainer import EditorTraining

pytest_plugins = ["training_runs"]


@pytest.mark.parametrize("conditioning", ["sar", "finest", "full"])
def test_conditionings_start_from_the_same_folder(editor_config, tmp_path, conditioning):
    training = EditorTraining(editor_config(f"transformer.conditioning={conditioning}"), CPU, tmp_path)
    loss, _ = training.loss(MicroBatches(training.plan, 2)[0])
    loss.backward()
    assert training.transformer.config.conditioning == conditioning
    assert all(p.grad is not None and p.grad.isfinite().all() for p in training.transformer.parameters())


def test_a_run_from_zero_samples_validates_and_writes_a_model(editor_config, tmp_path, model_folder):
    settings = editor_config(
        "steps=2", "validate_every=2", "sample_every=2", "sample_count=2", "optimizer.warm_up=0",
        "data.validation_count=3", "ema_decay=0.5", "precision=bfloat16", "text_batch_size=8", "scale_weights=equal",
        *from_zero(model_folder),
    )  # fmt: skip
    train(settings, tmp_path / "run")
    assert len(rows(tmp_path / "run", "validation_accuracy")[0]) == 5
    assert 0 < rows(tmp_path / "run", "validation_accuracy_changed")[0] < 1
    sheet = Image.open(tmp_path / "run/samples/step_00000002.png")
    assert sheet.width > 3 * 96 and sheet.height > 2 * 96
    pipeline = VAREditPipeline.from_pretrained(tmp_path / "run/model")
    assert pipeline.config.size == 128 and len(pipeline(Image.new("RGB", (64, 64)), "sepia", seed=1).images) == 1
    for name in ("config.yaml", "environment.json", "data.json"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__ and environment["processes"] == 1


def test_a_model_keeps_the_sampling_of_its_start(editor_config, tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "start")
    index = tmp_path / "start" / "model_index.json"
    sampling = {"guidance_scale": 2.5, "temperature": 0.25, "top_p": 0.75}
    index.write_text(json.dumps(json.loads(index.read_text()) | sampling))
    train(editor_config(f"start={tmp_path / 'start'}", "steps=1", "optimizer.warm_up=0"), tmp_path / "run")
    written = json.loads((tmp_path / "run/model/model_index.json").read_text())
    assert {name: written[name] for name in sampling} == sampling


def test_flips_dropouts_and_phrasings_depend_on_the_position_not_on_the_batch(editor_config, tmp_path):
    settings = editor_config("max_flip=0.5", "drop_text=0.5", "data.source=world", "edit_weight=4")
    training = EditorTraining(settings, CPU, tmp_path)
    whole, halves = MicroBatches(training.plan, 4)[1], [MicroBatches(training.plan, 2)[n] for n in (2, 3)]
    with torch.no_grad():
        losses = [training.loss(half)[0] for half in halves]
        torch.testing.assert_close(training.loss(whole)[0], sum(losses) / 2, rtol=1e-6, atol=0)
    changes = ("max_flip=0.5", "drop_text=0.5", "data.source=world", "edit_weight=4", "seed=1")
    other = EditorTraining(editor_config(*changes), CPU, tmp_path / "other")
    with torch.no_grad():
        assert abs(other.loss(whole)[0] - training.loss(whole)[0]) > 1e-4


@torch.no_grad()
def test_the_edit_weight_counts_where_the_mask_is(editor_config, tmp_path):
    """No mask, a mask of everything and a weight of 1 are the paper's loss; otherwise the loss lies nearer to that of
    the tokens inside, the more they weigh. The validation does not know of it.
    """
    changes = ("data.source=world", "data.aspects={1.0: 1}", "max_flip=0", "drop_text=0")
    trainings = {w: EditorTraining(editor_config(*changes, f"edit_weight={w}"), CPU, tmp_path) for w in (1, 4, 1e6)}
    batch = MicroBatches(trainings[1].plan, 4)[0]
    losses = {weight: training.loss(batch)[0] for weight, training in trainings.items()}
    assert losses[4] != losses[1] and losses[1e6] != losses[1]
    assert (losses[1] - losses[4]).sign() == (losses[4] - losses[1e6]).sign()
    validation = [training.validate(batch)["loss"] for training in trainings.values()]
    assert validation[0] == validation[1] == validation[2]
    batch.mask_BHW = torch.ones_like(batch.mask_BHW)
    torch.testing.assert_close(trainings[4].loss(batch)[0], losses[1], rtol=1e-6, atol=0)


def test_stored_features_train_as_the_models_do(editor_config, tmp_path, model_folder, pairs_folder):
    """Stored in float32: the very losses, and the frozen models do not run."""
    encoder = FeatureEncoder(str(model_folder), sizes=(128,), dtype="float32", device="cpu")
    for name, features in (("online", None), ("stored", encoder)):
        shards = tmp_path / f"{name} shards"
        pack(read(pairs_folder), shards, size=128, features=features)
        settings = editor_config(f"data.source={shards}", "data.validation_count=2", "validate_every=3")
        train(settings, tmp_path / name)
    for key in ("loss", "validation_loss"):
        assert rows(tmp_path / "stored", key) == rows(tmp_path / "online", key)
    training = EditorTraining(settings, CPU, tmp_path / "again")
    training.image_tokenizer.encoder = training.text.encoder = None
    losses = [training.loss(MicroBatches(training.plan, 2)[number])[0].item() for number in (0, 1)]
    assert np.mean(losses) == pytest.approx(rows(tmp_path / "online")[0])


def test_model_folders_that_cannot_be_used_are_refused_in_one_line(editor_config, tmp_path, model_folder):
    """Without a look at the hub, and before anything is written."""
    (tmp_path / "empty").mkdir()
    cases = [([f"{name}={tmp_path / 'gone'}"], "gone.*no such folder") for name in ("start", "image_tokenizer")]
    cases += [([f"text_encoder={tmp_path / 'empty'}"], "no text encoder in .*empty.*holds no config.json")]
    for part in ("transformer", "image_tokenizer"):
        folder = tmp_path / f"cut {part}"
        shutil.copytree(model_folder, folder)
        (weights,) = (folder / part).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:1000])
        cases += [([f"start={folder}"], f"no {part.replace('_', ' ')} in .*cut {part}")]
    for changes, words in cases:
        with pytest.raises(ValueError, match=words) as error:
            train(editor_config(*changes), tmp_path / "run")
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# -- adapters --------------------------------------------------------------------------------------------------------


def edited(pipeline: VAREditPipeline) -> Tensor:
    """All bits of one edit, greedy."""
    picture = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    return torch.cat([part.flatten() for part in pipeline(picture, "invert it", seed=1, temperature=0.0).bits[0]])


def test_adapters_trained_saved_loaded_stacked_merged_and_taken_out(editor_config, tmp_path, model_folder):
    changes = ("lora.rank=4", "steps=3", "precision=bfloat16", "optimizer.lr=0.03", "lora.dropout=0.1")
    for seed in (0, 1):
        train(editor_config(*changes, f"seed={seed}"), tmp_path / f"run{seed}")
    assert not (tmp_path / "run0/model").exists()
    state = [path.stat().st_size for path in (tmp_path / "run0/checkpoints/step_00000003").iterdir()]
    assert sum(state) < 600_000  # adapters only

    pipeline = VAREditPipeline.from_pretrained(model_folder)
    pipeline.set_progress_bar_config(disable=True)
    before, base = edited(pipeline), {n: v.clone() for n, v in pipeline.transformer.state_dict().items()}
    bits = {}
    for name in ("run0", "run1"):
        pipeline.load_lora_weights(tmp_path / name / "lora", name=name)
        bits[name] = edited(pipeline)
    stack_lora(pipeline, {"run0": 1.0, "run1": 1.0})
    bits["both"] = edited(pipeline)
    found = [before, *bits.values()]
    assert all((a != b).any() for i, a in enumerate(found) for b in found[:i]), "each changes the edit"
    stack_lora(pipeline, {"run0": 1.0})
    assert torch.equal(edited(pipeline), bits["run0"])
    unload_lora(pipeline)
    assert torch.equal(edited(pipeline), before)
    assert all(torch.equal(base[name], value) for name, value in pipeline.transformer.state_dict().items())

    for names in (["run0"], ["run1", "run0"]):
        merged = VAREditPipeline.from_pretrained(model_folder)
        merged.set_progress_bar_config(disable=True)
        for name in names:
            load_lora(merged, tmp_path / name / "lora", name)
        stack_lora(merged, dict.fromkeys(names, 1.0))
        merge_lora(merged)
        assert torch.equal(edited(merged), bits["both" if len(names) > 1 else "run0"])


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A model whose layers are wide enough for blocks of 4 bits."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_pipeline(width=128).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_qlora_trains_adapters_on_four_bits_for_the_unquantized_model(editor_config, tmp_path, wide_folder, recompute):
    torchao = pytest.importorskip("torchao.quantization")
    settings = editor_config(
        f"start={wide_folder}", "lora.rank=4", "frozen_dtype=nf4", "precision=bfloat16", "steps=3", "max_flip=0",
        "optimizer.warm_up=0", "optimizer.lr=0.01", f"gradient_checkpointing={recompute}", "sample_every=3",
        "sample_count=1", "data.validation_count=1",
    )  # fmt: skip
    training = EditorTraining(settings, CPU, tmp_path / "once")
    layers = [m for n, m in training.transformer.named_modules() if n.endswith(".base_layer")]
    assert len(layers) == 2 * 7 and all(isinstance(layer.weight, torchao.NF4Tensor) for layer in layers)
    batch = MicroBatches(training.plan, 4)[0]
    loss, _ = training.loss(batch)
    loss.backward()
    gradients = {name for name, p in training.transformer.named_parameters() if p.grad is not None}
    assert gradients and all(".lora_" in name for name in gradients)
    assert all(p.grad.isfinite().all() for p in training.transformer.parameters() if p.grad is not None)
    unquantized = EditorTraining(editor_config(f"start={wide_folder}", "max_flip=0"), CPU, tmp_path / "whole")
    assert loss.item() == pytest.approx(unquantized.loss(batch)[0].item(), rel=0.05)

    train(settings, tmp_path / "run")
    losses = rows(tmp_path / "run")
    assert np.isfinite(losses).all() and (tmp_path / "run/samples/step_00000003.png").is_file()
    pipeline = VAREditPipeline.from_pretrained(wide_folder)
    pipeline.set_progress_bar_config(disable=True)
    before = edited(pipeline)
    pipeline.load_lora_weights(tmp_path / "run/lora")
    after = edited(pipeline)
    assert (before != after).any()
    merge_lora(pipeline)
    assert torch.equal(edited(pipeline), after)


def test_qlora_of_narrow_layers_is_refused(editor_config, tmp_path):
    pytest.importorskip("torchao.quantization")
    settings = editor_config("lora.rank=4", "frozen_dtype=nf4", "precision=bfloat16")
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attention\.to_qkv has 12288 weights, no multiple of 16384"):
        train(settings, tmp_path / "run")


# -- what it learns --------------------------------------------------------------------------------------------------


class Copies(WorldPairs):
    """The 81 pictures of four blocks in three colours, each its own target."""

    def load(self, schedule, number) -> Example:
        colours = torch.tensor([[-1.0, -1, -1], [1, 1, 1], [1, -1, -1]])
        index = stream_seed("copies", self.seed, number) % 81
        blocks = colours[[index // 3**place % 3 for place in range(4)]].T.view(3, 2, 2)
        picture = blocks.repeat_interleave(64, 1).repeat_interleave(64, 2).contiguous()
        return Example(picture, picture, ("leave it",))


@pytest.mark.slow
def test_the_identity_copy_is_learned(editor_config, tmp_path, model_folder):
    """From zero in 250 steps: bit accuracy above 99 % at every scale together, over the 81 pictures."""
    settings = editor_config(
        "data.source=world", "data.aspects={1.0: 1}", "steps=250", "batch_size=16", "micro_batch_size=16",
        "optimizer.name=muon", "optimizer.lr=3e-3", "optimizer.muon_lr=0.03", "optimizer.decay=linear", "max_flip=0",
        "save_every=0", "validate_every=250", "log_every=50",
        *from_zero(model_folder, width=128, num_blocks=2, num_heads=4),
    )  # fmt: skip
    training = EditorTraining(settings, CPU, tmp_path / "run")
    training.plan = Plan(Copies(settings.data, 0, "train"), settings.steps, settings.batch_size, 0)
    training.held_out = HeldOut(Copies(settings.data, 1, "test"), 64, 16, 0)
    Loop(settings, training, CPU, tmp_path / "run", resume=False).run()
    (accuracy,) = rows(tmp_path / "run", "validation_accuracy")
    assert np.average(accuracy, weights=scale_schedule(128).num_tokens) > 0.99, accuracy


@pytest.mark.slow
def test_compiled_blocks_have_the_same_losses(editor_config, tmp_path):
    """Also after a change of bucket."""
    for name in ("true", "false"):
        train(editor_config(f"compile={name}", "steps=4"), tmp_path / name)
    np.testing.assert_allclose(rows(tmp_path / "true"), rows(tmp_path / "false"), rtol=1e-5)
