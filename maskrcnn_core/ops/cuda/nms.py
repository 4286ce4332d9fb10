"""Non-maximum suppression on GPUs; `maskrcnn_core.ops.nms` says what it computes.

The first kernel compares all pairs of candidates and packs 32 answers into a word. The second, one program a
group, walks through the candidates in order, 32 at a time: within these bit by bit, in registers, and then it
strikes out for all the later words at once what they suppress.
Letters: G groups, N candidates of a group, W words of 32 candidates.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

ROWS = 128  # candidates that a program compares with a word: one a thread
MAX_WORDS = 128  # that are struck out at once: N up to 4096 in one go
# Groups go through the kernels together as long as the answers, N * N bits a group, stay within 1 GiB; only
# tens of thousands of candidates pass that.
MAX_ANSWER_WORDS = 2**28


def suppress(boxes: Tensor, labels: Tensor, valid: Tensor, iou_threshold: float, max_keep: int) -> Tensor:
    num_groups, num_candidates = valid.shape
    keep = torch.zeros(valid.shape, dtype=torch.bool, device=valid.device)
    if keep.numel() == 0:
        return keep
    boxes, labels = boxes.contiguous(), labels.contiguous()
    valid, kept = valid.contiguous().view(torch.uint8), keep.view(torch.uint8)
    num_words = triton.cdiv(num_candidates, 32)
    groups_at_once = min(num_groups, max(1, MAX_ANSWER_WORDS // (num_words * num_candidates)))
    overlaps = valid.new_empty((groups_at_once, num_words, num_candidates), dtype=torch.int32)
    gone = valid.new_empty((groups_at_once, num_words), dtype=torch.int32)
    with torch.cuda.device_of(boxes):
        for first in range(0, num_groups, groups_at_once):
            own = slice(first, first + groups_at_once)
            groups = len(valid[own])
            _compare[(groups, num_words, triton.cdiv(num_candidates, ROWS))](
                boxes[own],
                labels[own],
                valid[own],
                overlaps,
                gone,
                iou_threshold,
                num_candidates,
                num_words,
                num_rows=ROWS,
                num_warps=ROWS // 32,
                enable_fp_fusion=False,
            )
            _scan[(groups,)](
                overlaps,
                gone,
                kept[own],
                num_candidates,
                num_words,
                max_keep,
                words_at_once=min(MAX_WORDS, triton.next_power_of_2(num_words)),
                num_warps=4,
                enable_fp_fusion=False,
            )
    return keep


@triton.jit(do_not_specialize=["num_candidates", "num_words"])
def _compare(
    boxes: tl.tensor,
    labels: tl.tensor,
    valid: tl.tensor,
    overlaps: tl.tensor,
    gone: tl.tensor,
    threshold: tl.tensor,
    num_candidates: tl.tensor,
    num_words: tl.tensor,
    num_rows: tl.constexpr,
) -> None:
    """Which later candidates a candidate would suppress.

    Writes overlaps (G, W, N): bit b of [g, w, i] says that i suppresses 32 w + b if it is kept. Only what
    `_scan` may read is written: rows with a valid candidate, words from the row's own on.
    Writes gone (G, W): the candidates that are not valid.
    """
    group = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    first_row = tl.program_id(2) * num_rows
    boxes += group * num_candidates * 4
    labels += group * num_candidates
    valid += group * num_candidates
    if first_row == 0:
        lane = tl.arange(0, 32)
        own = word * 32 + lane
        alive = tl.load(valid + own, mask=own < num_candidates, other=0) != 0
        tl.store(gone + group * num_words + word, ~tl.sum(alive.to(tl.int32) << lane, axis=0))
    rows = first_row + tl.arange(0, num_rows)
    is_row = rows < num_candidates
    any_valid = tl.max(tl.load(valid + rows, mask=is_row, other=0).to(tl.int32), axis=0)
    if (word * 32 >= first_row) & (any_valid > 0):
        row_x0 = tl.load(boxes + rows * 4, mask=is_row, other=0.0)[None, :]
        row_y0 = tl.load(boxes + rows * 4 + 1, mask=is_row, other=0.0)[None, :]
        row_x1 = tl.load(boxes + rows * 4 + 2, mask=is_row, other=0.0)[None, :]
        row_y1 = tl.load(boxes + rows * 4 + 3, mask=is_row, other=0.0)[None, :]
        row_label = tl.load(labels + rows, mask=is_row, other=0)[None, :]
        row_area = (row_x1 - row_x0) * (row_y1 - row_y0)
        answers = tl.zeros((num_rows,), tl.int32)
        for first_bit in range(0, 32, 8):  # a loop, not unrolled: 32 boxes would fill a thread's registers
            bit = first_bit + tl.arange(0, 8)
            column = word * 32 + bit
            is_column = column < num_candidates
            x0 = tl.load(boxes + column * 4, mask=is_column, other=0.0)[:, None]
            y0 = tl.load(boxes + column * 4 + 1, mask=is_column, other=0.0)[:, None]
            x1 = tl.load(boxes + column * 4 + 2, mask=is_column, other=0.0)[:, None]
            y1 = tl.load(boxes + column * 4 + 3, mask=is_column, other=0.0)[:, None]
            label = tl.load(labels + column, mask=is_column, other=0)[:, None]
            width = tl.maximum(tl.minimum(row_x1, x1) - tl.maximum(row_x0, x0), 0.0)
            height = tl.maximum(tl.minimum(row_y1, y1) - tl.maximum(row_y0, y0), 0.0)
            overlap = width * height
            # A box with a NaN has an area of NaN and then an IoU of NaN: it overlaps nothing.
            iou = tl.div_rn(overlap, row_area + (x1 - x0) * (y1 - y0) - overlap)
            suppressed = (iou > threshold) & (row_label == label) & (column[:, None] > rows[None, :])
            answers += tl.sum(suppressed.to(tl.int32) << bit[:, None], axis=0)
        tl.store(overlaps + (group * num_words + word) * num_candidates + rows, answers, mask=is_row)


@triton.jit(do_not_specialize=["num_candidates", "num_words", "max_keep"])
def _scan(
    overlaps: tl.tensor,
    gone: tl.tensor,
    keep: tl.tensor,
    num_candidates: tl.tensor,
    num_words: tl.tensor,
    max_keep: tl.tensor,
    words_at_once: tl.constexpr,
) -> None:
    """Walk through one group; `gone` loses its meaning on the way.

    `keep` is written only up to where the walk ends: the last valid candidate, or max_keep.
    """
    group = tl.program_id(0).to(tl.int64)
    overlaps += group * num_words * num_candidates
    gone += group * num_words
    keep += group * num_candidates
    lane = tl.arange(0, 32)
    none = num_words * 0  # a number of the type that the loops below carry
    end, first = none, none  # after the last word with a valid candidate
    while first < num_words:
        words = first + tl.arange(0, words_at_once)
        missing = tl.load(gone + words, mask=words < num_words, other=-1)
        end = tl.maximum(end, tl.max(tl.where(missing != -1, words + 1, 0), axis=0))
        first += words_at_once
    word, num_kept = none, none
    while (word < end) & (num_kept < max_keep):
        tl.debug_barrier()  # other threads wrote this word of `gone`
        alive = ~tl.load(gone + word)
        if alive != 0:
            own = word * 32 + lane
            answers = overlaps + word * num_candidates + word * 32
            for bit in tl.static_range(32):
                suppressed = tl.load(answers + bit, mask=word * 32 + bit < num_candidates, other=0)
                is_kept = (alive << (31 - bit)) >> 31  # all ones or all zeros: the shift keeps the sign
                alive = alive & ~(suppressed & is_kept)
            kept = (alive >> lane) & 1
            allowed = num_kept + tl.cumsum(kept, axis=0) <= max_keep
            tl.store(keep + own, (kept != 0) & allowed, mask=own < num_candidates)
            num_kept += tl.sum(kept, axis=0)
            first = word // words_at_once * words_at_once
            while first < end:
                words = first + tl.arange(0, words_at_once)
                is_later = (words > word) & (words < end)
                struck = tl.load(
                    overlaps + words[:, None] * num_candidates + own[None, :],
                    mask=is_later[:, None] & (kept != 0)[None, :],
                    other=0,
                )
                before = tl.load(gone + words, mask=is_later, other=0)
                tl.store(gone + words, before | tl.reduce_or(struck, axis=1), mask=is_later)
                first += words_at_once
        word += 1
