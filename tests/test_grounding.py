"""The auxiliary losses: what lies on which token, and which parts of the editor they teach."""

import pytest
import torch
import torch.nn.functional as F

from varedit.scales import scale_schedule
from varedit.testing import tiny_transformer
from varedit.training.grounding import (
    NOTHING,
    TEMPERATURE,
    Grounding,
    object_tokens,
    phrase_embeddings,
    phrase_rows,
)

SCHEDULE = scale_schedule(128)
SCENE = {
    "height": 128,
    "width": 128,
    "objects": [
        {"kind": "sprite", "name": "dog", "x": 0.25, "y": 0.25, "size": 0.4},
        {"kind": "shape", "name": "star", "colour": "red", "x": 0.75, "y": 0.75, "size": 0.3},
    ],
}


def forward(editor, batch_size: int = 2) -> None:
    """One pass over all scales with random inputs."""
    torch.manual_seed(1)
    (h, w), config = SCHEDULE.finest, editor.config
    editor(
        SCHEDULE,
        torch.randn(batch_size, SCHEDULE.offsets[-1] - 1, config.num_bits),
        source_BChw=torch.randn(batch_size, config.num_bits, h, w),
        text_BTF=torch.randn(batch_size, 5, config.text_features),
        text_mask_BT=torch.ones(batch_size, 5, dtype=torch.bool),
    )


def test_tokens_of_an_object_are_those_it_covers():
    owner = object_tokens(SCENE, (8, 8))
    # Centred on token corners: 0.4 of 128 pixels, less the rim, are three tokens of 16 pixels: two about the corner.
    assert owner[1:3, 1:3].eq(0).all() and owner[5:7, 5:7].eq(1).all()
    assert owner.eq(0).sum() == 4 and owner.eq(1).sum() == 4


def test_tokens_of_what_is_flat_are_fewer():
    sign = {"kind": "sign", "name": "sign", "x": 0.5, "y": 0.5, "size": 0.6}
    owner = object_tokens({**SCENE, "objects": [sign]}, (8, 8))
    assert owner[3:5, 2:6].eq(0).all() and owner.eq(0).sum() == 8
    stood = object_tokens({**SCENE, "objects": [{**sign, "name": "arrow", "kind": "shape", "angle": 90}]}, (8, 8))
    assert stood.eq(0).sum() == 16


def test_tokens_follow_a_picture_that_is_not_square():
    owner = object_tokens({**SCENE, "width": 256}, (8, 16))
    assert owner[1:3, 3:5].eq(0).all() and owner.eq(0).sum() == 4


def test_the_same_phrase_is_the_same_row():
    turned = {**SCENE, "objects": [{**SCENE["objects"][1], "x": 0.25, "y": 0.25}]}
    phrases, rows = phrase_rows([SCENE, turned], (8, 8))
    assert phrases == ["dog", "red star"]
    assert rows.shape == (2, 64) and rows[0, 9] == 0 and rows[1, 9] == 1 and rows[0, 0] == NOTHING


def test_an_embedding_is_the_mean_without_the_end_tokens():
    states = [torch.arange(8.0).view(4, 2), torch.ones(3, 2, dtype=torch.bfloat16)]
    assert phrase_embeddings(states).tolist() == [[3.0, 4.0], [1.0, 1.0]]


def test_losses_are_those_of_their_definition():
    editor = tiny_transformer()
    grounding = Grounding(editor, name_block=0, mask_block=0)
    seen = []
    editor.blocks[0].cross_norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    forward(editor)
    rows = phrase_rows([SCENE, SCENE], SCHEDULE.finest)[1]
    rows[1, rows[1] == 1] = 2  # a third phrase in the second picture
    names = torch.randn(3, editor.config.text_features)
    mask = torch.zeros(2, 128, 128, dtype=torch.bool)
    mask[0, :20, :20] = True
    name_loss, mask_loss = grounding(SCHEDULE, rows, names, mask)

    source = seen[0][:, : SCHEDULE.num_tokens[-1]].float()
    terms = []
    for row, token in rows.ne(NOTHING).nonzero().tolist():
        similar = F.cosine_similarity(grounding.to_name(source[row, token])[None], names)
        terms.append(F.cross_entropy(similar / TEMPERATURE, rows[row, token]))
    torch.testing.assert_close(name_loss, torch.stack(terms).mean())
    inside = torch.zeros(2, 8, 8)
    inside[0, :2, :2] = 1
    expected = F.binary_cross_entropy_with_logits(grounding.to_mask(source).view(2, 8, 8), inside)
    torch.testing.assert_close(mask_loss, expected)


def test_gradients_reach_what_is_read_and_nothing_after_it():
    editor = tiny_transformer(num_blocks=4)
    grounding = Grounding(editor, name_block=0, mask_block=1)
    forward(editor)
    rows = phrase_rows([SCENE, SCENE], SCHEDULE.finest)[1]
    names = torch.randn(2, editor.config.text_features)
    sum(grounding(SCHEDULE, rows, names, torch.ones(2, 128, 128, dtype=torch.bool))).backward()
    taught = [block.self_attention.to_qkv.weight.grad is not None for block in editor.blocks]
    assert taught == [True, True, False, False]
    assert editor.text_proj[0].weight.grad.abs().sum() > 0  # the mask was read after the words


def test_a_batch_without_objects_teaches_no_names():
    editor = tiny_transformer()
    grounding = Grounding(editor, name_block=0, mask_block=0)
    forward(editor)
    rows = torch.full((2, 64), NOTHING)
    name_loss, mask_loss = grounding(SCHEDULE, rows, torch.zeros(1, editor.config.text_features),
                                     torch.zeros(2, 128, 128, dtype=torch.bool))  # fmt: skip
    (name_loss + mask_loss).backward()
    assert name_loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in editor.parameters())


@pytest.mark.parametrize("blocks", [(-1, 0), (1, 0), (0, 9)])
def test_blocks_that_cannot_be_read_are_refused(blocks):
    with pytest.raises(ValueError, match="give two of 0 to"):
        Grounding(tiny_transformer(), *blocks)
