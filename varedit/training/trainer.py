"""Training of the editor: teacher forcing over the residual pyramid of the target, with bitwise self-correction and
condition dropout (paper section 3; Infinity section 3.4), on a frozen image tokenizer and text encoder.
"""

import json
import logging
import random
from collections import OrderedDict
from pathlib import Path

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from varedit.data.features import load_image_tokenizer, load_text_encoder
from varedit.image_processor import to_pil
from varedit.image_tokenizer import VAREditImageTokenizer
from varedit.lora import add_lora, quantize_blocks, save_lora
from varedit.model_folder import in_its_place, sweep
from varedit.pipeline import VAREditPipeline
from varedit.presets import PRESETS
from varedit.quantizer import TeacherForcing, patchify, resize_area, teacher_forcing
from varedit.scales import NUM_SCALES, ScaleSchedule
from varedit.text import encode_prompts, pad_text
from varedit.training.config import EditorConfig, transformer_arguments
from varedit.training.data import HeldOut, MicroBatch, Plan, choose_phrasings, stream_seed
from varedit.training.journal import Journal
from varedit.training.objective import bit_accuracy, bit_losses, edit_weights, objective
from varedit.training.pictures import contact_sheet
from varedit.training.precision import autocast, in_bfloat16
from varedit.training.processes import Processes, is_sharded, shard_transformer, whole
from varedit.training.sources import open_pairs
from varedit.training.typed_yaml import construct
from varedit.transformer import VAREditTransformer

logger = logging.getLogger(__name__)

_REMEMBERED_TEXTS = 50_000
_CHANGED = 0.04
"""A token counts as changed when its pixels differ by this much of the range of [-1, 1] on average."""


class EditorTraining:
    """The transformer, its frozen companions, and what one micro-batch teaches.

    Args:
        config: of the run.
        processes: who we are.
        folder: of the run: the index of the data is kept there.

    Raises:
        ValueError: a model folder is missing or does not fit; the data cannot be used.
    """

    def __init__(self, config: EditorConfig, processes: Processes, folder: Path) -> None:
        self.config, self.processes = config, processes
        source = config.image_tokenizer or config.start
        assert source is not None, "checked with the config"
        self.image_tokenizer = load_image_tokenizer(source).to(processes.device)
        self.transformer = new_transformer(config, processes.device)
        self.sampling = _sampling(config)
        _check_sizes(config, self.transformer, self.image_tokenizer)
        self.text = TextStates(config, processes, self.transformer.config.max_text_tokens)
        if self.text.encoder.config.hidden_size != self.transformer.config.text_features:
            raise ValueError(
                f"the text encoder has width {self.text.encoder.config.hidden_size}, the transformer takes "
                f"{self.transformer.config.text_features}; give the encoder that it was made for as text_encoder"
            )
        frozen = {"image_tokenizer": self.image_tokenizer, "text_encoder": self.text.encoder}
        pairs, held_out = open_pairs(config, processes, folder, frozen)
        self.plan = Plan(pairs, config.steps, config.batch_size, config.seed)
        self.held_out = (
            HeldOut(held_out, config.data.validation_count, config.micro_batch_size, config.seed) if held_out else None
        )
        self.transformer.to(processes.device).train()
        self.transformer.gradient_checkpointing = config.gradient_checkpointing
        if config.compile:
            compile_blocks(self.transformer)
        if config.sharding == "fsdp":
            shard_transformer(self.transformer, processes, in_bfloat16(config, processes.device))
        self.modules: dict[str, nn.Module] = {"transformer": self.transformer}

    # -- one micro-batch --

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the micro-batch; metrics: bit accuracy of each scale."""
        config = self.config
        source_BChw, target_BChw = self._features(batch)
        forced = self._teacher_forcing(target_BChw, batch)
        text_BTF, text_mask_BT = self._text(batch, choose_phrasings(batch, config.seed))
        drop_text_B = torch.tensor(
            [
                random.Random(stream_seed("drop", config.seed, batch.step, position)).random() < config.drop_text
                for position in batch.positions
            ],
            device=source_BChw.device,
        )
        logits_BLC2 = self._logits(batch.schedule, forced, source_BChw, text_BTF, text_mask_BT, drop_text_B)
        loss = self._objective(logits_BLC2, forced.bits_BLC, batch.schedule, batch.mask_BHW)
        accuracy = bit_accuracy(logits_BLC2.detach(), forced.bits_BLC, batch.schedule)
        return loss, {"accuracy": accuracy}

    def validate(self, batch: MicroBatch) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """The paper's loss and bit accuracy, no flips; at the finest scale also apart for changed and unchanged tokens.

        Copying the source alone gives 80 to 90 % accuracy: the changed tokens tell whether anything is edited.
        """
        source_BChw, target_BChw = self._features(batch)
        patch_size, schedule = self.image_tokenizer.config.patch_size, batch.schedule
        forced = teacher_forcing(target_BChw, schedule, patch_size)
        text_BTF, text_mask_BT = self._text(batch, [0] * len(batch.positions))
        logits_BLC2 = self._logits(schedule, forced, source_BChw, text_BTF, text_mask_BT, None)
        difference = (batch.source_B3HW - batch.target_B3HW).abs().mean(1, keepdim=True) / 2
        changed_Bl = resize_area(difference, schedule.finest).flatten(1).to(logits_BLC2.device) > _CHANGED
        first = schedule.offsets[-2]
        right_BlC = (logits_BLC2[:, first:, :, 1] > logits_BLC2[:, first:, :, 0]) == forced.bits_BLC[:, first:]
        right_Bl = right_BlC.float().mean(-1)
        return {
            "loss": self._objective(logits_BLC2, forced.bits_BLC, schedule),
            "accuracy": bit_accuracy(logits_BLC2, forced.bits_BLC, schedule),
            "accuracy_changed": ((right_Bl * changed_Bl).sum(), changed_Bl.sum().float()),
            "accuracy_unchanged": ((right_Bl * ~changed_Bl).sum(), (~changed_Bl).sum().float()),
        }

    @torch.no_grad()
    def _features(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Source on the token grid (B, C, h, w), and target features (B, d, h', w'); float32.

        Always encoded in float32: rounding flips the bits of features near zero.
        """
        device = self.processes.device
        if batch.features:
            source = torch.stack([stored.source_dhw for stored in batch.features]).to(device)
            target = torch.stack([stored.target_dhw for stored in batch.features]).to(device)
        else:
            images = torch.cat([batch.source_B3HW, batch.target_B3HW]).to(device)
            source, target = self.image_tokenizer.encode(images).chunk(2)
        tokens_BSC = patchify(source, self.image_tokenizer.config.patch_size)
        return tokens_BSC.transpose(1, 2).unflatten(2, batch.schedule.finest), target

    def _text(self, batch: MicroBatch, phrasings: list[int]) -> tuple[Tensor, Tensor]:
        """States (B, T, F) of one phrasing of each pair, and their mask (B, T)."""
        if batch.features:
            return self.text.pad([stored.text_TF[number] for stored, number in zip(batch.features, phrasings)])
        return self.text([texts[number] for texts, number in zip(batch.instructions, phrasings)])

    def _teacher_forcing(self, target_BChw: Tensor, batch: MicroBatch) -> TeacherForcing:
        """Inputs and labels, each pair with flips of its own, a function of (seed, step, position)."""
        patch_size, max_flip = self.image_tokenizer.config.patch_size, self.config.max_flip
        if max_flip == 0:
            return teacher_forcing(target_BChw, batch.schedule, patch_size)
        return TeacherForcing.join([
            teacher_forcing(
                features, batch.schedule, patch_size, max_flip,
                torch.Generator().manual_seed(stream_seed("flips", self.config.seed, batch.step, position)),
            )
            for features, position in zip(target_BChw.split(1), batch.positions)
        ])  # fmt: skip

    def _logits(self, schedule, forced: TeacherForcing, source_BChw, text_BTF, text_mask_BT, drop_text_B) -> Tensor:
        with autocast(self.config, self.processes.device):
            return self.transformer(
                schedule,
                forced.inputs_BLC,
                source_BChw=source_BChw,
                text_BTF=text_BTF,
                text_mask_BT=text_mask_BT,
                drop_text_B=drop_text_B,
            )

    def _objective(
        self, logits_BLC2: Tensor, bits_BLC: Tensor, schedule: ScaleSchedule, mask_BHW: Tensor | None = None
    ) -> Tensor:
        if self.config.scale_weights == "equal":
            return bit_losses(logits_BLC2, bits_BLC).mean()
        if mask_BHW is None or self.config.edit_weight == 1:
            return objective(logits_BLC2, bits_BLC, schedule)
        weights_BL = edit_weights(mask_BHW.to(logits_BLC2.device), schedule, self.config.edit_weight)
        return objective(logits_BLC2, bits_BLC, schedule, weights_BL)

    # -- what comes out --

    def sample(self, step: int, folder: Path, journal: Journal | None) -> None:
        """Edit held-out pairs through the pipeline: a sheet of source | result | target with the instructions."""
        if self.held_out is None:
            return
        transformer = self._whole_transformer()
        if journal is None:
            return
        pipeline, rows = self._pipeline(transformer), []
        for index in range(len(self.held_out)):
            batch = self.held_out.batch(index)
            sources, targets = to_pil(batch.source_B3HW), to_pil(batch.target_B3HW)
            count = min(len(sources), self.config.sample_count - len(rows))
            prompts = [texts[0] for texts in batch.instructions[:count]]
            with autocast(self.config, self.processes.device):
                edited = pipeline(sources[:count], prompts, seed=list(range(count)), size=batch.schedule.size)
            rows += list(zip(prompts, zip(sources, edited.images, targets)))
            if len(rows) >= self.config.sample_count:
                break
        folder.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(rows, ("source", "result", "target"))
        sheet.save(folder / f"step_{step:08d}.png")
        journal.picture("edits", step, sheet)

    def export(self, folder: Path) -> None:
        """Write `lora/` or, without adapters, `model/`: a pipeline folder for `varedit edit --model`."""
        transformer = self._whole_transformer()
        if not self.processes.first:
            return
        lora = self.config.lora is not None
        output = folder / ("lora" if lora else "model")
        sweep(output)
        with in_its_place(output) as partial:
            if lora:
                save_lora(transformer, partial)
            else:
                self._pipeline(transformer).save_pretrained(partial)

    def _pipeline(self, transformer: VAREditTransformer) -> VAREditPipeline:
        data = self.config.data
        pipeline = VAREditPipeline(
            transformer,
            self.image_tokenizer,
            self.text.encoder,
            self.text.tokenizer,
            size=max(data.sizes),
            fit=data.fit,
            **self.sampling,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _whole_transformer(self) -> VAREditTransformer:
        """The transformer itself, or, where it is sharded, a copy gathered on the first process."""
        if not is_sharded(self.transformer):
            return self.transformer
        gathered = {}
        for name, value in self.transformer.state_dict().items():
            full = whole(value)
            if self.processes.first:
                gathered[name] = full
        if not self.processes.first:
            return self.transformer
        with torch.device("meta"):
            copy = VAREditTransformer.from_config(self.transformer.config)
        if self.config.lora is not None:
            adapt(copy, self.config)
        copy.load_state_dict(gathered, assign=True)
        return copy.eval()


class TextStates:
    """Instruction -> encoder states, as the pipeline computes them."""

    def __init__(self, config: EditorConfig, processes: Processes, max_tokens: int) -> None:
        source = config.text_encoder or config.start
        assert source is not None, "checked with the config"
        dtype = torch.float32 if processes.device.type == "cpu" else torch.bfloat16
        self.tokenizer, self.encoder = load_text_encoder(source, dtype)
        self.encoder.to(processes.device)
        self.max_tokens, self.batch_size, self.device = max_tokens, config.text_batch_size, processes.device
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()
        self._warned = False

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Right-padded states (B, T, F) and the mask (B, T). Instructions beyond the model's limit are cut."""
        # With other instructions in the batch an encoder rounds otherwise, so what is remembered is encoded alone:
        # a resumed run, which remembers nothing yet, gets the same bits.
        if self.batch_size > 1:
            states = encode_prompts(prompts, self.tokenizer, self.encoder, 1 << 30, self.batch_size)
        else:
            states = [self._alone(prompt) for prompt in prompts]
        return self.pad(states)

    def pad(self, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The same from states (T, F) of whole instructions."""
        if any(len(state) > self.max_tokens for state in states) and not self._warned:
            self._warned = True
            logger.warning("an instruction has more than %d tokens; such ones are cut off there", self.max_tokens)
        return pad_text([state[: self.max_tokens].to(self.device) for state in states])

    def _alone(self, prompt: str) -> Tensor:
        if prompt not in self._remembered:
            (states,) = encode_prompts([prompt], self.tokenizer, self.encoder, 1 << 30)
            self._remembered[prompt] = states.cpu()  # gigabytes, for a large encoder
            if len(self._remembered) > _REMEMBERED_TEXTS:
                self._remembered.popitem(last=False)
        return self._remembered[prompt]


# -- loading ---------------------------------------------------------------------------------------------------------


def new_transformer(config: EditorConfig, device: torch.device) -> VAREditTransformer:
    """The transformer that a run on `device` begins with, still on the CPU, with adapters if asked for.

    Raises:
        ValueError: the config names no usable model.
    """
    if config.start is None:
        torch.manual_seed(stream_seed("weights", config.seed))
        transformer = construct(VAREditTransformer, transformer_arguments(config), "transformer")
        transformer.initialize()
        return transformer
    rounded = config.lora and config.frozen_dtype != "float32" and in_bfloat16(config, device)
    dtype = torch.bfloat16 if rounded else torch.float32
    if not Path(config.start).is_dir():  # diffusers would look for it on the hub
        raise ValueError(f"no transformer in {config.start!r}: no such folder; convert or train a model first")
    diffusers.utils.logging.disable_progress_bar()
    try:
        transformer = VAREditTransformer.from_pretrained(config.start, subfolder="transformer", dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no transformer in {config.start!r}: {str(error).strip().splitlines()[0]}") from error
    _check_preset(config, transformer)
    if config.transformer:
        arguments = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            other = construct(VAREditTransformer, {**arguments, **config.transformer}, "transformer")
        other.load_state_dict(transformer.state_dict(), assign=True)
        transformer = other
    if config.lora is not None:
        if config.frozen_dtype == "nf4":
            quantize_blocks(transformer)
        adapt(transformer, config)
    return transformer


def compile_blocks(transformer: VAREditTransformer) -> None:
    """Compile the blocks for training; those with scale-aligned reference, one as a rule, stay as they are."""
    eager, compiled = transformer._masked_block, torch.compile(transformer._masked_block)

    def block_function(block: nn.Module, index: int, *arguments) -> Tensor:
        # One number for all compiled blocks: the compiler would make a program for each.
        last = transformer.config.num_blocks - 1
        return eager(block, index, *arguments) if transformer._aligned(index) else compiled(block, last, *arguments)

    transformer._masked_block = block_function


def adapt(transformer: VAREditTransformer, config: EditorConfig) -> None:
    lora = config.lora
    assert lora is not None
    torch.manual_seed(stream_seed("adapters", config.seed))
    add_lora(transformer, lora.rank, lora.alpha, lora.dropout, lora.targets)


def _check_preset(config: EditorConfig, transformer: VAREditTransformer) -> None:
    for name, value in transformer_arguments(config).items():
        if name not in config.transformer and name != "position_layout" and transformer.config[name] != value:
            raise ValueError(
                f"config field preset is {config.preset}, with {name} {value}, but the model in start has "
                f"{transformer.config[name]}; name its own preset, or none"
            )


def _sampling(config: EditorConfig) -> dict[str, float]:
    """Guidance scale, temperature and top-p of the model that the training starts from, or of its preset."""
    names = ("guidance_scale", "temperature", "top_p")
    index = Path(config.start or "", "model_index.json")
    if config.start and index.is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        return {name: values[name] for name in names if name in values}
    preset = PRESETS.get(config.preset or "")
    return {name: getattr(preset, name) for name in names} if preset else {}


def _check_sizes(config: EditorConfig, transformer: VAREditTransformer, tokenizer: VAREditImageTokenizer) -> None:
    if transformer.config.num_bits != tokenizer.num_token_bits:
        raise ValueError(
            f"the transformer predicts {transformer.config.num_bits} bits a token, the image tokenizer has "
            f"{tokenizer.num_token_bits}; set transformer.num_bits, or give its own image_tokenizer"
        )
    for size in config.data.sizes:
        if NUM_SCALES[size] > transformer.config.num_levels:
            raise ValueError(
                f"config field data.sizes has {size}, which takes {NUM_SCALES[size]} scales; the transformer has "
                f"num_levels {transformer.config.num_levels}"
            )
