"""VAREditTransformer: predicts the edited image's bits scale by scale from the source image and the instruction.

One `forward` serves three uses: prefill (source into the cache), one scale with the cache, and all scales at once
under a mask (training). The first two together equal the third.

Dimensions: B batch, S source tokens, L all target tokens, l tokens of one scale, T text tokens, F text features,
C bits a token, D width, N heads, E head size, Q queries, K keys.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from varedit._diffusers import VAREditModel
from varedit.cache import KeyValueCache
from varedit.positions import POSITION_LAYOUTS, Rotary, rotary_table, rotate, source_grids, token_positions
from varedit.quantizer import resize_area
from varedit.runtime import computes_everything
from varedit.scales import ScaleSchedule

CONDITIONINGS = ("sar", "finest", "full")
NORM_EPS = 1e-6
_MAX_LOG_SCALE = math.log(100)
_SHORT_SEQUENCE = 2048


# -- attention -----------------------------------------------------------------------------------------------------


def scale_aligned_reference(source_BNSE: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
    """Scale-Aligned Reference (paper section 3.2): the source's keys or values pooled to the grid of every scale.

    As in the released code, area pooling happens per head after projection, normalisation and rotation, in float32;
    pooled keys are not normalised again. At the finest scale pooling is the identity.

    Args:
        source_BNSE: (B, N, S, E), S the finest grid.

    Returns:
        One (B, N, n_k, E) a scale, coarse to fine, in the input's dtype.
    """
    batch_size, num_heads, _, head_size = source_BNSE.shape
    features = source_BNSE.transpose(2, 3).reshape(batch_size, num_heads * head_size, *schedule.finest)
    pooled = []
    for grid in schedule.grids[:-1]:
        tokens = resize_area(features, grid).view(batch_size, num_heads, head_size, -1).transpose(2, 3)
        pooled.append(tokens.to(source_BNSE.dtype))
    return [*pooled, source_BNSE]


@lru_cache(maxsize=8)
def source_mask(schedule: ScaleSchedule, conditioning: str, device: torch.device) -> Tensor | None:
    """Which source tokens see which, bool (S, S); None where all see all.

    Under full conditioning a source scale sees the source scales up to its own.
    """
    if conditioning != "full":
        return None
    scale_S = torch.arange(schedule.num_scales).repeat_interleave(torch.tensor(schedule.num_tokens)).flip(0)
    return (scale_S[:, None] >= scale_S).to(device)


@lru_cache(maxsize=8)
def attention_mask(schedule: ScaleSchedule, conditioning: str, aligned: bool, device: torch.device) -> Tensor:
    """Who sees whom when all scales are computed at once, True = may see.

    Returns:
        bool (S + L, S + L); for a block with scale-aligned reference bool (S + L, S + pooled + L): its keys are
        [source | source pooled to all scales but the finest | targets].
    """
    counts, scales = torch.tensor(schedule.num_tokens), torch.arange(schedule.num_scales)
    target_L = scales.repeat_interleave(counts)
    if conditioning == "full":
        source_S = target_L.flip(0)
        source_sees, target_sees = source_S[:, None] >= source_S, target_L[:, None] >= source_S
    else:
        num_source = schedule.num_tokens[-1]
        source_sees = torch.ones(num_source, num_source, dtype=torch.bool)
        finest = (target_L == schedule.num_scales - 1)[:, None] if aligned else torch.ones(len(target_L), 1).bool()
        target_sees = finest.expand(-1, num_source)
    source_rows, target_rows = [source_sees], [target_sees]
    if aligned:
        pooled = scales[:-1].repeat_interleave(counts[:-1])
        source_rows.append(torch.zeros(len(source_sees), len(pooled), dtype=torch.bool))
        target_rows.append(target_L[:, None] == pooled)
    source_rows.append(torch.zeros(len(source_sees), len(target_L), dtype=torch.bool))
    target_rows.append(target_L[:, None] >= target_L)
    return torch.cat([torch.cat(source_rows, 1), torch.cat(target_rows, 1)]).to(device)


def attend(q_BNQE: Tensor, k_BNKE: Tensor, v_BNKE: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention, (B, N, Q, E). `mask` is bool, broadcastable to (B, N, Q, K), True = may see."""
    kind = q_BNQE.device.type
    short_training = kind == "cpu" and torch.is_grad_enabled() and k_BNKE.shape[2] < _SHORT_SEQUENCE
    if mask is not None and (short_training or not computes_everything(kind)):
        # On the CPU the backward pass of the fused kernel with a mask is slower than plain operations; elsewhere it
        # may be wrong under a broadcast mask. Float32: a logit scale of up to 100 leaves no digits in bfloat16.
        with torch.autocast(kind, enabled=False):
            logits = (q_BNQE.float() * scale) @ k_BNKE.float().transpose(2, 3)
        hidden = torch.zeros(mask.shape, device=mask.device)
        hidden.masked_fill_(~mask, -math.inf)  # adding it is cheaper than filling the logits
        return (logits + hidden).softmax(-1).to(v_BNKE.dtype) @ v_BNKE
    return F.scaled_dot_product_attention(q_BNQE, k_BNKE, v_BNKE, attn_mask=mask, scale=scale)


def _split_heads(x_BlD: Tensor, num_heads: int) -> Tensor:
    return x_BlD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge_heads(x_BNlE: Tensor) -> Tensor:
    return x_BNlE.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Cosine attention with a learned scale per head and 2D rotary positions. q and v have a bias, k has none."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(8.0)))
        self.proj = nn.Linear(width, width)

    @apply_forward_hook
    def project(self, x_BlD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, scaled and rotated q, normalised and rotated k, and v: (B, N, l, E) each."""
        q, k, v = self.to_qkv(x_BlD).chunk(3, dim=-1)
        q = _split_heads(q + self.q_bias.to(q.dtype), self.num_heads)
        k = _split_heads(k, self.num_heads)
        v = _split_heads(v + self.v_bias.to(v.dtype), self.num_heads)
        scale = self.log_scale.float().clamp(max=_MAX_LOG_SCALE).exp().view(1, -1, 1, 1)
        q = F.normalize(q.float(), dim=-1) * scale
        k = F.normalize(k.float(), dim=-1)
        return rotate(q, rotary).to(v.dtype), rotate(k, rotary).to(v.dtype), v

    def output(self, attended_BNlE: Tensor) -> Tensor:
        return self.proj(_merge_heads(attended_BNlE))


class CrossAttention(nn.Module):
    """From image tokens to the instruction, scaled by 1/sqrt(head size). No bias on k."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    @apply_forward_hook
    def keys_values(self, text_BTD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.to_kv(text_BTD).chunk(2, dim=-1)
        return _split_heads(k, self.num_heads), _split_heads(v + self.v_bias.to(v.dtype), self.num_heads)

    def forward(self, x_BlD: Tensor, keys_BNTE: Tensor, values_BNTE: Tensor, mask_BT: Tensor) -> Tensor:
        q = _split_heads(self.to_q(x_BlD), self.num_heads)
        attended = attend(q, keys_BNTE, values_BNTE, mask_BT[:, None, None, :], q.shape[-1] ** -0.5)
        return self.proj(_merge_heads(attended))


class TextPool(nn.Module):
    """Attention pooling of the instruction by one learned query (start token and modulation)."""

    def __init__(self, text_features: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_heads, width // num_heads) * (width // num_heads) ** -0.5)
        self.to_kv = nn.Linear(text_features, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_BTF: Tensor, mask_BT: Tensor) -> Tensor:
        """Text features (B, T, F) -> (B, D)."""
        num_heads, head_size = self.query.shape
        k, v = self.to_kv(text_BTF).chunk(2, dim=-1)
        k, v = _split_heads(k, num_heads), _split_heads(v + self.v_bias.to(v.dtype), num_heads)
        q = self.query.to(k.dtype)[None, :, None].expand(len(k), -1, -1, -1)
        return self.proj(_merge_heads(attend(q, k, v, mask_BT[:, None, None, :], head_size**-0.5)))[:, 0]


class MLP(nn.Module):
    """Two layers, four times as wide inside, tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BlD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BlD), approximate="tanh"))


def modulate(x_BlD: Tensor, scale_B1D: Tensor, shift_B1D: Tensor) -> Tensor:
    """LayerNorm without affine part, then the instruction's scale and shift; in float32, returned in x's dtype."""
    normed = F.layer_norm(x_BlD.float(), x_BlD.shape[-1:], eps=NORM_EPS)
    return (normed * (1 + scale_B1D) + shift_B1D).to(x_BlD.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention to the instruction, MLP; modulated by shared projections plus a block table."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.modulation_table = nn.Parameter(torch.zeros(6, width))
        self.self_attention = SelfAttention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.cross_attention = CrossAttention(width, num_heads)
        self.mlp = MLP(width)

    @apply_forward_hook
    def modulation(self, shared_B6D: Tensor) -> list[Tensor]:
        """gate1, gate2, scale1, scale2, shift1, shift2: float32 (B, 1, D) each."""
        return [part[:, None] for part in (shared_B6D + self.modulation_table.float()).unbind(1)]

    def finish(self, x_BlD: Tensor, attended_BNlE: Tensor, modulation: list[Tensor], text: tuple) -> Tensor:
        """What follows self-attention. `text` is (keys, values, mask) of the instruction."""
        gate1, gate2, _, scale2, _, shift2 = modulation
        x_BlD = (x_BlD + self.self_attention.output(attended_BNlE) * gate1).to(x_BlD.dtype)
        x_BlD = x_BlD + self.cross_attention(self.cross_norm(x_BlD), *text).to(x_BlD.dtype)
        return (x_BlD + self.mlp(modulate(x_BlD, scale2, shift2)) * gate2).to(x_BlD.dtype)


# -- the model -----------------------------------------------------------------------------------------------------


class VAREditTransformer(VAREditModel, ConfigMixin, PeftAdapterMixin):
    """The editing transformer (paper section 3).

    Args:
        num_bits: C, bits a token.
        width, num_blocks, num_heads: D, depth, N. The head size must be a multiple of 4 (two rotary axes of pairs).
        text_features: F, width of the text encoder's states.
        num_text_heads: heads of the text pooling.
        max_text_tokens: rows of the learned unguided text, the longest instruction.
        conditioning: "sar", "finest" or "full" (paper section 3.2).
        num_aligned_blocks: how many first blocks use the scale-aligned reference under "sar" (the paper: 1).
        position_layout: "offset" (paper), "fixed_offset" or "released"; see `positions.token_positions`.
        num_levels: rows of the level embedding, one a scale.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["head", "head_modulation", "shared_modulation", "modulation_table", "log_scale"]

    @register_to_config
    def __init__(
        self,
        num_bits: int = 32,
        width: int = 2048,
        num_blocks: int = 32,
        num_heads: int = 16,
        text_features: int = 2048,
        num_text_heads: int = 16,
        max_text_tokens: int = 512,
        conditioning: str = "sar",
        num_aligned_blocks: int = 1,
        position_layout: str = "offset",
        num_levels: int = 15,
    ) -> None:
        super().__init__()
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning {conditioning!r} is unknown; use one of {', '.join(CONDITIONINGS)}")
        if position_layout not in POSITION_LAYOUTS:
            raise ValueError(
                f"position_layout {position_layout!r} is unknown; use one of {', '.join(POSITION_LAYOUTS)}"
            )
        if width % (4 * num_heads) or width % num_text_heads:
            raise ValueError(
                f"width {width} must be a multiple of 4 * num_heads = {4 * num_heads} and of num_text_heads = "
                f"{num_text_heads}"
            )
        self.input_proj = nn.Linear(num_bits, width)
        self.level_embed = nn.Parameter(torch.randn(num_levels, width) * 0.02)
        self.start_position = nn.Parameter(torch.randn(width) * 0.02)
        self.null_text = nn.Parameter(torch.randn(max_text_tokens, text_features) * text_features**-0.5)
        self.text_norm = nn.RMSNorm(text_features, eps=NORM_EPS)
        self.text_pool = TextPool(text_features, width, num_text_heads)
        self.text_proj = nn.Sequential(nn.Linear(text_features, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.shared_modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList([Block(width, num_heads) for _ in range(num_blocks)])
        self.head_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 2 * num_bits)
        self.gradient_checkpointing = False

    @torch.no_grad()
    def initialize(self) -> None:
        """Weights for training from zero: small residual branches, gates near 1, a head near chance."""
        branch = (2 * len(self.blocks)) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            block.modulation_table[:2] = 1.0
            for layer in (block.self_attention.proj, block.cross_attention.proj, block.mlp.fc2):
                layer.weight.mul_(branch)
        for layer in (self.shared_modulation, self.head_modulation, self.head):
            layer.weight.mul_(0.02)

    def forward(
        self,
        schedule: ScaleSchedule,
        inputs: Tensor | None = None,
        *,
        source_BChw: Tensor | None = None,
        text_BTF: Tensor | None = None,
        text_mask_BT: Tensor | None = None,
        drop_text_B: Tensor | None = None,
        scale: int | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor | KeyValueCache:
        """Prefill, one scale, or all scales.

        - Prefill: source and text given, `inputs` and `scale` None. Returns a cache.
        - One scale: `scale` and `cache` given, `inputs` float (B, l, C), or None at scale 0 (start token).
          Returns logits float32 (B, l, C, 2) and extends the cache.
        - All scales: source, text and `inputs` (B, L - n_0, C) of the scales after the first. Returns logits float32
          (B, L, C, 2).

        Args:
            schedule: grids of this generation.
            source_BChw: patchified source features on the finest token grid, (B, C, h, w).
            text_BTF, text_mask_BT: encoder states, right-padded, and True where there is text.
            drop_text_B: bool (B,), replaces the instruction of these rows by the learned unguided text: condition
                dropout in training and the unguided branch of guidance. The source always stays.
        """
        if cache is not None:
            if scale is None or (inputs is None) != (scale == 0):
                raise ValueError(
                    f"scale {scale}: with a cache give the scale, and inputs for every scale but the first"
                )
            return self._one_scale(schedule, inputs, scale, cache)
        if schedule.num_scales > len(self.level_embed):
            raise ValueError(
                f"size {schedule.size} has {schedule.num_scales} scales; this model has {len(self.level_embed)}"
            )
        if source_BChw is None or text_BTF is None:
            raise ValueError("without a cache give source_BChw and text_BTF")
        text_mask_BT, text_BTD, pooled_BD = self._text(text_BTF, text_mask_BT, drop_text_B)
        source_BSD = self._embed_source(source_BChw, schedule)
        source_positions, target_positions = token_positions(
            schedule, self.config.conditioning, self.config.position_layout
        )
        if inputs is None:
            rotary = rotary_table(target_positions, self._head_size, source_BSD.device)
            shared_B6D = self._shared_modulation(pooled_BD)
            cache = KeyValueCache(source_BSD.shape[1], text_mask_BT, pooled_BD, shared_B6D, rotary)
            rotary = rotary_table(source_positions, self._head_size, source_BSD.device)
            return self._prefill(schedule, source_BSD, text_BTD, rotary, cache)
        x = torch.cat([source_BSD, self._embed_targets(inputs, pooled_BD, schedule, 0, schedule.num_scales)], dim=1)
        rotary = rotary_table(torch.cat([source_positions, target_positions]), self._head_size, x.device)
        shared_B6D, num_source = self._shared_modulation(pooled_BD), source_BSD.shape[1]
        x = self._all_scales(x, shared_B6D, text_BTD, text_mask_BT, rotary, schedule, num_source)
        return self._logits(x, pooled_BD)

    # -- the three uses --

    def _prefill(self, schedule, x, text_BTD, rotary, cache) -> KeyValueCache:
        mask = source_mask(schedule, self.config.conditioning, x.device)
        for index, block in enumerate(self.blocks):
            keys, values = block.cross_attention.keys_values(text_BTD)
            cache.text_keys.append(keys)
            cache.text_values.append(values)
            modulation = block.modulation(cache.shared_B6D)
            q, k, v = block.self_attention.project(modulate(x, modulation[2], modulation[4]), rotary)
            cache.add_block(k, v, schedule.offsets[-1])
            if self._aligned(index):
                cache.add_aligned_source(
                    index, scale_aligned_reference(k, schedule), scale_aligned_reference(v, schedule)
                )
            if index + 1 < len(self.blocks):  # nothing reads the source after the last block's keys and values
                x = block.finish(x, attend(q, k, v, mask, 1.0), modulation, (keys, values, cache.text_mask_BT))
        return cache

    def _one_scale(self, schedule: ScaleSchedule, inputs: Tensor | None, scale: int, cache: KeyValueCache) -> Tensor:
        start, end = schedule.offsets[scale], schedule.offsets[scale + 1]
        rotary = cache.rotary[0][start:end], cache.rotary[1][start:end]
        x = self._embed_targets(inputs, cache.pooled_text_BD, schedule, scale, scale + 1)
        for index, block in enumerate(self.blocks):
            modulation = block.modulation(cache.shared_B6D)
            q, k, v = block.self_attention.project(modulate(x, modulation[2], modulation[4]), rotary)
            if self._full:
                num_visible = end
            else:
                num_visible = end - start if self._aligned(index) else cache.num_source
            keys, values = cache.append(index, scale, k, v, start, num_visible)
            text = (cache.text_keys[index], cache.text_values[index], cache.text_mask_BT)
            x = block.finish(x, attend(q, keys, values, None, 1.0), modulation, text)
        return self._logits(x, cache.pooled_text_BD)

    def _all_scales(self, x, shared_B6D, text_BTD, text_mask_BT, rotary, schedule, num_source) -> Tensor:
        """Source and targets through all blocks under the masks; the targets come out."""
        common = (shared_B6D, text_BTD, text_mask_BT, rotary, schedule, num_source)
        for index, block in enumerate(self.blocks):
            # Nothing reads the source after the last block's keys and values.
            first_query = num_source if index + 1 == len(self.blocks) else 0
            arguments = (block, index, x, *common, first_query)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(self._masked_block, *arguments, use_reentrant=False)
            else:
                x = self._masked_block(*arguments)
        return x

    def _masked_block(
        self, block: nn.Module, index: int, x, shared, text_BTD, text_mask_BT, rotary, schedule, num_source, first_query
    ) -> Tensor:
        modulation = block.modulation(shared)
        q, k, v = block.self_attention.project(modulate(x, modulation[2], modulation[4]), rotary)
        if self._aligned(index):
            k, v = (
                torch.cat([part[:, :, :num_source], *pooled[:-1], part[:, :, num_source:]], dim=2)
                for part, pooled in ((p, scale_aligned_reference(p[:, :, :num_source], schedule)) for p in (k, v))
            )
        mask = attention_mask(schedule, self.config.conditioning, self._aligned(index), x.device)
        attended = attend(q[:, :, first_query:], k, v, mask[first_query:], 1.0)
        text = (*block.cross_attention.keys_values(text_BTD), text_mask_BT)
        return block.finish(x[:, first_query:], attended, modulation, text)

    # -- shared pieces --

    @property
    def _head_size(self) -> int:
        return self.config.width // self.config.num_heads

    @property
    def _full(self) -> bool:
        return self.config.conditioning == "full"

    def _aligned(self, index: int) -> bool:
        return self.config.conditioning == "sar" and index < self.config.num_aligned_blocks

    def _text(self, text_BTF, text_mask_BT, drop_text_B) -> tuple[Tensor, Tensor, Tensor]:
        """Mask (B, T), projected text (B, T, D) for cross-attention, pooled text float32 (B, D)."""
        num_tokens = text_BTF.shape[1]
        if num_tokens > len(self.null_text):
            raise ValueError(f"the instruction has {num_tokens} tokens; this model takes at most {len(self.null_text)}")
        text_BTF = text_BTF.to(self.null_text.dtype)
        if text_mask_BT is None:
            text_mask_BT = torch.ones(text_BTF.shape[:2], dtype=torch.bool, device=text_BTF.device)
        if drop_text_B is not None:
            text_BTF = torch.where(drop_text_B[:, None, None], self.null_text[:num_tokens], text_BTF)
        text_BTF = self.text_norm(text_BTF)
        return text_mask_BT, self.text_proj(text_BTF), self.text_pool(text_BTF, text_mask_BT).float()

    def _embed_source(self, source_BChw: Tensor, schedule: ScaleSchedule) -> Tensor:
        """Source tokens (B, S, D). A source token gets the level embedding of the scale whose grid it lies on."""
        if source_BChw.shape[-2:] != schedule.finest:
            found, wanted = (f"{h} x {w}" for h, w in (source_BChw.shape[-2:], schedule.finest))
            raise ValueError(f"source features on a {found} grid; this schedule needs {wanted}")
        grids = source_grids(schedule, self.config.conditioning)
        source_BSC = torch.cat([resize_area(source_BChw, grid).flatten(2) for grid in grids], dim=2).transpose(1, 2)
        levels = [self.level_embed[schedule.grids.index(grid)].expand(grid[0] * grid[1], -1) for grid in grids]
        return self.input_proj(source_BSC.to(self.level_embed.dtype)) + torch.cat(levels)

    def _embed_targets(self, inputs, pooled_BD, schedule, first: int, last: int) -> Tensor:
        """Tokens (B, l, D) of the scales first..last-1; the first scale's only token is the pooled instruction."""
        parts = []
        if first == 0:
            start = pooled_BD.to(self.level_embed.dtype) + self.start_position
            parts.append(start[:, None].expand(-1, schedule.num_tokens[0], -1))
        if inputs is not None:
            parts.append(self.input_proj(inputs.to(self.level_embed.dtype)))
        levels = [self.level_embed[k].expand(schedule.num_tokens[k], -1) for k in range(first, last)]
        return torch.cat([part.to(self.level_embed.dtype) for part in parts], dim=1) + torch.cat(levels)

    def _shared_modulation(self, pooled_BD: Tensor) -> Tensor:
        with torch.autocast(pooled_BD.device.type, enabled=False):
            return self.shared_modulation(F.silu(pooled_BD)).unflatten(-1, (6, -1))

    def _logits(self, x_BlD: Tensor, pooled_BD: Tensor) -> Tensor:
        with torch.autocast(x_BlD.device.type, enabled=False):
            scale, shift = self.head_modulation(F.silu(pooled_BD))[:, None].chunk(2, dim=-1)
            return self.head(modulate(x_BlD.float(), scale, shift)).unflatten(-1, (-1, 2))
