"""Kernels of windowed attention: tokens gathered from the map by index arithmetic, scores that never leave the chip.

A window's token is row y, column x of the rolled and padded map; where it lies in the map itself is one addition and
one comparison per axis, so that rolling, padding, partitioning and their inverses cost an addition per token instead
of a trip through memory each. Offsets are 64 bits wide.

The relative position bias comes expanded, fp32 [heads, ROWS, COLUMNS], made once per call from the table: a load per
score from a small matrix that stays in the L1 and L2 caches (or, in windows of up to 64 tokens, in registers for all
windows of a program), where the table would take an index of some five instructions per score and a scattered load.
Its columns beyond the window hold -inf, which is how keys that only fill up a tile drop out, at no cost per score.

Only the last row and the last column of windows can hold pairs that rolling brought together, so a scalar branch
spares all other windows the mask.

Softmax: s = scale q k^T + bias; p = exp2(s log2(e) - max log2(e)), a fused multiply-add and one exponential per score.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Where running maxima start: finite, as the first tile of keys may hold none that a query may see.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _expanded_bias(table_ptr, head, table_strides, query, key, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """The bias [queries, keys] of a head; -inf for keys beyond the window, 0 for queries beyond it."""
    down = (query // WINDOW_W)[:, None] - (key // WINDOW_W)[None, :] + (WINDOW_H - 1)
    right = (query % WINDOW_W)[:, None] - (key % WINDOW_W)[None, :] + (WINDOW_W - 1)
    row = (down * (2 * WINDOW_W - 1) + right).to(tl.int64)
    key_ok = (key < WINDOW_H * WINDOW_W)[None, :]
    both_ok = (query < WINDOW_H * WINDOW_W)[:, None] & key_ok
    bias = tl.load(table_ptr + row * table_strides[0] + head * table_strides[1], mask=both_ok, other=0.0)
    return tl.where(key_ok, bias.to(tl.float32), float("-inf"))


# One program per head and BLOCK_Q rows: reads the table through the caches, writes [BLOCK_Q, COLUMNS] fp32.
@triton.jit
def _expand_bias_kernel(
    table_ptr,
    bias_ptr,
    table_strides,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bias_ptr += head * (ROWS * COLUMNS)
    for first in range(0, COLUMNS, BLOCK_K):
        key = first + tl.arange(0, BLOCK_K)
        bias = _expanded_bias(table_ptr, head, table_strides, query, key, WINDOW_H, WINDOW_W)
        tl.store(bias_ptr + query[:, None] * COLUMNS + key[None, :], bias)


# ---- places, loads and scores ------------------------------------------------------------------------------


@triton.jit
def _program_place(heads, windows_per_program, num_windows, TILES: tl.constexpr):
    """(head, tile, first window, window after the last, slice) of a program; neighbours share windows, not heads."""
    program = tl.program_id(0)
    head = program % heads
    tile = (program // heads) % TILES
    part = program // (heads * TILES)
    first = part * windows_per_program
    return head, tile, first, tl.minimum(first + windows_per_program, num_windows), part


@triton.jit
def _window_place(window, geometry):
    """(sample, window row, window column) of a window; rows and columns count windows."""
    down, across = geometry[2], geometry[3]
    sample = window // (down * across)
    inside = window - sample * (down * across)
    row = inside // across
    return sample.to(tl.int64), row, inside - row * across


@triton.jit
def _axis_place(position, length, padded, roll, PAD_FIRST: tl.constexpr):
    """Where a position of the rolled and padded axis lies in the map, and whether it does."""
    if PAD_FIRST:
        position += roll
        position = tl.where(position >= padded, position - padded, position)
        return position, position < length
    inside = position < length
    position += roll
    return tl.where(position >= length, position - length, position), inside


@triton.jit
def _token_place(place, token, geometry, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, PAD_FIRST: tl.constexpr):
    """(row, column, is it a pixel of the map) of tokens of a window."""
    height, width, down, across, roll_h, roll_w = geometry
    y = place[1] * WINDOW_H + token // WINDOW_W
    x = place[2] * WINDOW_W + token % WINDOW_W
    y, row_inside = _axis_place(y, height, down * WINDOW_H, roll_h, PAD_FIRST)
    x, column_inside = _axis_place(x, width, across * WINDOW_W, roll_w, PAD_FIRST)
    return y, x, row_inside & column_inside & (token < WINDOW_H * WINDOW_W)


@triton.jit
def _offsets(sample, pixel, strides):
    """Element offsets of pixels' first channels."""
    return sample * strides[0] + (pixel[0].to(tl.int64) * strides[1] + pixel[1].to(tl.int64) * strides[2])


@triton.jit
def _load_tokens(ptr, offsets, inside, channel, stride, fill_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] of one head from channel `channel` on; padding reads `fill_ptr` instead (None: zeros)."""
    dim = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + ((channel + dim).to(tl.int64) * stride)[None, :]
    mask = inside[:, None]
    if fill_ptr is not None:
        ptrs = tl.where(mask, ptrs, (fill_ptr + channel + dim)[None, :])
        mask = tl.full((1, BLOCK_D), True, tl.int1)
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dim < HEAD_DIM)[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store_tokens(ptr, x, offsets, inside, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dim < HEAD_DIM)[None, :]
    tl.store(ptr + offsets[:, None] + (channel + dim)[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _wrapped(token, SHIFT_H: tl.constexpr, SHIFT_W: tl.constexpr, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Bit 1: in the last row of windows, the token's row is one that rolling wrapped around; bit 0: so for columns."""
    row = token // WINDOW_W >= WINDOW_H - SHIFT_H
    column = token % WINDOW_W >= WINDOW_W - SHIFT_W
    return row.to(tl.int32) * 2 + column.to(tl.int32)


@triton.jit
def _scores(
    q,
    k,
    bias,
    scale,
    mask_value,
    place,
    query,
    key,
    geometry,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
):
    """scale q k^T + bias + mask, fp32 [queries, keys].

    What a token's place in its window says of its region does not change from window to window; which of the two bits
    count does. So a score's mask is one three-input logical operation and one predicated addition.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    if SHIFT_H + SHIFT_W > 0:
        last = (place[1] == geometry[2] - 1).to(tl.int32) * 2 + (place[2] == geometry[3] - 1).to(tl.int32)
        if last != 0:
            from_region = _wrapped(query, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W)
            to_region = _wrapped(key, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W)
            apart = ((from_region[:, None] ^ to_region[None, :]) & last) != 0
            scores += tl.where(apart, mask_value, 0.0)
    return scores


# ---- forward -----------------------------------------------------------------------------------------------


# Tile: BLOCK_Q queries of one head against all keys in KEY_TILES tiles of BLOCK_K, for `windows_per_program` windows
# one after the other. Reads q once, k and v once per query tile (several share them through the caches), the
# bias tile once per program (one key tile) or per window; writes y once. Registers: bias, scores and the fp32
# accumulator [BLOCK_Q, BLOCK_D]; with several key tiles the running maximum and sum of an online softmax.
@triton.jit
def _window_attention_forward_kernel(
    qkv_ptr,
    bias_ptr,
    fill_ptr,
    y_ptr,
    num_windows,
    windows_per_program,
    heads,
    geometry,
    qkv_strides,
    y_strides,
    scale,
    mask_value,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
):
    head, tile, first, end, _ = _program_place(heads, windows_per_program, num_windows, QUERY_TILES)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    query = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    bias_ptrs = bias_ptr + (head * (QUERY_TILES * BLOCK_Q) + query)[:, None] * (KEY_TILES * BLOCK_K) + key[None, :]
    if KEY_TILES == 1:
        bias = tl.load(bias_ptrs)
    for window in range(first, end):
        place = _window_place(window, geometry)
        y, x, inside = _token_place(place, query, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = _offsets(place[0], (y, x), qkv_strides)
        q = _load_tokens(qkv_ptr, offsets, inside, channel, qkv_strides[3], None, HEAD_DIM, BLOCK_D)
        if KEY_TILES == 1:
            k = _load_tokens(qkv_ptr, offsets, inside, channels + channel, qkv_strides[3], fill_ptr, HEAD_DIM, BLOCK_D)
            v = _load_tokens(
                qkv_ptr, offsets, inside, 2 * channels + channel, qkv_strides[3], fill_ptr, HEAD_DIM, BLOCK_D
            )
            scores = _scores(
                q, k, bias, scale, mask_value, place, query, key, geometry, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W
            )
            top = tl.max(scores, 1) * LOG2_E
            p = tl.exp2(scores * LOG2_E - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision="ieee")
        else:
            top = tl.full((BLOCK_Q,), LOWEST, tl.float32)
            total = tl.zeros((BLOCK_Q,), tl.float32)
            out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
            for key_tile in range(KEY_TILES):
                keys = key_tile * BLOCK_K + key
                ky, kx, key_inside = _token_place(place, keys, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
                offs = _offsets(place[0], (ky, kx), qkv_strides)
                k = _load_tokens(
                    qkv_ptr, offs, key_inside, channels + channel, qkv_strides[3], fill_ptr, HEAD_DIM, BLOCK_D
                )
                v = _load_tokens(
                    qkv_ptr, offs, key_inside, 2 * channels + channel, qkv_strides[3], fill_ptr, HEAD_DIM, BLOCK_D
                )
                bias = tl.load(bias_ptrs + key_tile * BLOCK_K)
                scores = _scores(
                    q, k, bias, scale, mask_value, place, query, keys, geometry, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W
                )
                new_top = tl.maximum(top, tl.max(scores, 1) * LOG2_E)
                shrink = tl.exp2(top - new_top)
                p = tl.exp2(scores * LOG2_E - new_top[:, None])
                total = total * shrink + tl.sum(p, 1)
                out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
                top = new_top
        out = out / total[:, None]
        _store_tokens(y_ptr, out, _offsets(place[0], (y, x), y_strides), inside, channel, HEAD_DIM, BLOCK_D)


# ---- backward ----------------------------------------------------------------------------------------------


@triton.jit
def _axis_has_padding(first, size, length, padded, roll, PAD_FIRST: tl.constexpr):
    """Whether any of `size` positions of the rolled and padded axis from `first` on is padding."""
    if PAD_FIRST:
        first += roll
        return ((first + size > length) & (first < padded)) | (first + size > padded + length)
    return first + size > length


@triton.jit
def _padding_sum(
    sum_so_far, grad, place, inside, geometry, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, PAD_FIRST: tl.constexpr
):
    """Adds the gradients [tokens, BLOCK_D] of a window's padding to [BLOCK_D].

    Tokens beyond the window have gradients of exactly zero, since their probabilities are.
    """
    height, width, down, across, roll_h, roll_w = geometry
    rows = _axis_has_padding(place[1] * WINDOW_H, WINDOW_H, height, down * WINDOW_H, roll_h, PAD_FIRST)
    columns = _axis_has_padding(place[2] * WINDOW_W, WINDOW_W, width, across * WINDOW_W, roll_w, PAD_FIRST)
    if rows | columns:
        sum_so_far += tl.sum(tl.where(inside[:, None], 0.0, grad), 0)
    return sum_so_far


@triton.jit
def _store_padding_sums(ptr, row, k_sum, v_sum, channels, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row `row` of the partials [rows, 2 C] of k's and v's part of the qkv bias."""
    dim = tl.arange(0, BLOCK_D)
    ptrs = ptr + row.to(tl.int64) * (2 * channels) + channel + dim
    tl.store(ptrs, k_sum, mask=dim < HEAD_DIM)
    tl.store(ptrs + channels, v_sum, mask=dim < HEAD_DIM)


# Windows that fit one tile. Tile: a whole window of one head, for `windows_per_program` windows one after the other.
# Reads q, k, v and dy once, writes dq, dk and dv once; the bias comes through the caches. Softmax is computed anew, and
# with a row's probabilities P and dP = dy v^T at hand so is sum(P dP), for which others read y. Registers: scores and
# dP, and the bias gradient's sum over the program's windows, fp32 [BLOCK_Q, BLOCK_Q] each; the last is written once, at
# the end, as are the sums over padding: partials for a second stage, so that no result depends on who comes first.
@triton.jit
def _window_attention_backward_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    fill_ptr,
    grad_qkv_ptr,
    bias_partials_ptr,
    padding_partials_ptr,
    num_windows,
    windows_per_program,
    heads,
    geometry,
    grad_strides,
    qkv_strides,
    grad_qkv_strides,
    scale,
    mask_value,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
):
    head, _, first, end, part = _program_place(heads, windows_per_program, num_windows, 1)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    token = tl.arange(0, BLOCK_Q)
    bias_offsets = token[:, None] * BLOCK_Q + token[None, :]
    bias_ptr += head * (BLOCK_Q * BLOCK_Q)
    bias_sum = tl.zeros((BLOCK_Q, BLOCK_Q), tl.float32)
    k_sum = tl.zeros((BLOCK_D,), tl.float32)
    v_sum = tl.zeros((BLOCK_D,), tl.float32)
    for window in range(first, end):
        place = _window_place(window, geometry)
        y, x, inside = _token_place(place, token, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = _offsets(place[0], (y, x), qkv_strides)
        stride = qkv_strides[3]
        q = _load_tokens(qkv_ptr, offsets, inside, channel, stride, None, HEAD_DIM, BLOCK_D)
        k = _load_tokens(qkv_ptr, offsets, inside, channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
        v = _load_tokens(qkv_ptr, offsets, inside, 2 * channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
        offsets = _offsets(place[0], (y, x), grad_strides)
        # Rows of padding and beyond the window are zeros, and so are their dP and dS.
        grad = _load_tokens(grad_ptr, offsets, inside, channel, grad_strides[3], None, HEAD_DIM, BLOCK_D)

        bias = tl.load(bias_ptr + bias_offsets)
        scores = _scores(
            q, k, bias, scale, mask_value, place, token, token, geometry, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W
        )
        p = tl.exp2(scores * LOG2_E - (tl.max(scores, 1) * LOG2_E)[:, None])
        p = p * (1.0 / tl.sum(p, 1))[:, None]
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = p * (grad_p - tl.sum(p * grad_p, 1)[:, None])
        if bias_partials_ptr is not None:
            bias_sum += grad_scores
        offsets = _offsets(place[0], (y, x), grad_qkv_strides)
        grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, input_precision="ieee")
        _store_tokens(grad_qkv_ptr, grad_v, offsets, inside, 2 * channels + channel, HEAD_DIM, BLOCK_D)
        if padding_partials_ptr is not None:
            v_sum = _padding_sum(v_sum, grad_v, place, inside, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        ds = grad_scores.to(q.dtype)
        grad_q = tl.dot(ds, k, input_precision="ieee") * scale
        _store_tokens(grad_qkv_ptr, grad_q, offsets, inside, channel, HEAD_DIM, BLOCK_D)
        grad_k = tl.dot(tl.trans(ds), q, input_precision="ieee") * scale
        _store_tokens(grad_qkv_ptr, grad_k, offsets, inside, channels + channel, HEAD_DIM, BLOCK_D)
        if padding_partials_ptr is not None:
            k_sum = _padding_sum(k_sum, grad_k, place, inside, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
    if bias_partials_ptr is not None:
        partial = (part * heads + head).to(tl.int64) * (BLOCK_Q * BLOCK_Q)
        tl.store(bias_partials_ptr + partial + bias_offsets, bias_sum)
    if padding_partials_ptr is not None:
        _store_padding_sums(padding_partials_ptr, part, k_sum, v_sum, channels, channel, HEAD_DIM, BLOCK_D)


# Windows of several tiles, first of three kernels. Tile: BLOCK_Q queries of one head against KEY_TILES tiles of
# BLOCK_K keys, in one sweep. Reads q and dy once, k and v through the caches; writes dq, and 8 bytes per token and head
# of row sums for the other two: the log-sum-exp and m = sum(P dP). Registers: one tile of scores and of dP, and two
# accumulators [BLOCK_Q, BLOCK_D].
#
# dq = sum P (dP - m) k needs m, which is known only at the end. So m runs along as the softmax's maximum does: it is
# the mean of dP over the keys so far, and where it changes, sum P (dP - m) k is set right by means of sum P k. Leaving
# m out until the end would cancel digits, above all where one key takes all of the probability.
@triton.jit
def _window_attention_query_grad_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    fill_ptr,
    grad_qkv_ptr,
    row_sums_ptr,
    num_windows,
    windows_per_program,
    heads,
    geometry,
    grad_strides,
    qkv_strides,
    grad_qkv_strides,
    scale,
    mask_value,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
):
    head, tile, first, end, _ = _program_place(heads, windows_per_program, num_windows, QUERY_TILES)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    ROWS: tl.constexpr = QUERY_TILES * BLOCK_Q
    COLUMNS: tl.constexpr = KEY_TILES * BLOCK_K
    query = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.arange(0, BLOCK_K)
    bias_ptrs = bias_ptr + head * (ROWS * COLUMNS) + query[:, None] * COLUMNS + key[None, :]
    for window in range(first, end):
        place = _window_place(window, geometry)
        y, x, inside = _token_place(place, query, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        stride = qkv_strides[3]
        offsets = _offsets(place[0], (y, x), qkv_strides)
        q = _load_tokens(qkv_ptr, offsets, inside, channel, stride, None, HEAD_DIM, BLOCK_D)
        offsets = _offsets(place[0], (y, x), grad_strides)
        grad = _load_tokens(grad_ptr, offsets, inside, channel, grad_strides[3], None, HEAD_DIM, BLOCK_D)

        top = tl.full((BLOCK_Q,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        row_sum = tl.zeros((BLOCK_Q,), tl.float32)
        k_sum = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        grad_q = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        for key_tile in range(KEY_TILES):
            keys = key_tile * BLOCK_K + key
            ky, kx, key_inside = _token_place(place, keys, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
            offs = _offsets(place[0], (ky, kx), qkv_strides)
            k = _load_tokens(qkv_ptr, offs, key_inside, channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
            v = _load_tokens(qkv_ptr, offs, key_inside, 2 * channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
            bias = tl.load(bias_ptrs + key_tile * BLOCK_K)
            scores = _scores(
                q, k, bias, scale, mask_value, place, query, keys, geometry, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W
            )
            new_top = tl.maximum(top, tl.max(scores, 1) * LOG2_E)
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(scores * LOG2_E - new_top[:, None])
            grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
            new_total = total * shrink + tl.sum(p, 1)
            # A total of visible keys is at least 1, that of the largest of them.
            new_row_sum = (row_sum * (total * shrink) + tl.sum(p * grad_p, 1)) / tl.maximum(new_total, 1.0)
            k_sum *= shrink[:, None]
            grad_q = grad_q * shrink[:, None] + (row_sum - new_row_sum)[:, None] * k_sum
            grad_scores = p * (grad_p - new_row_sum[:, None])
            k_sum = tl.dot(p.to(k.dtype), k, k_sum, input_precision="ieee")
            grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
            top, total, row_sum = new_top, new_total, new_row_sum
        row_sums_ptrs = row_sums_ptr + (tl.cast(window, tl.int64) * heads + head) * (2 * ROWS) + query
        tl.store(row_sums_ptrs, top + tl.log2(total))
        tl.store(row_sums_ptrs + ROWS, row_sum)
        grad_q = grad_q / total[:, None]
        offsets = _offsets(place[0], (y, x), grad_qkv_strides)
        _store_tokens(grad_qkv_ptr, grad_q * scale, offsets, inside, channel, HEAD_DIM, BLOCK_D)


# Windows of several tiles, second kernel. Tile: BLOCK_K keys of one head against QUERY_TILES tiles of BLOCK_Q
# queries. Reads k and v once, q, dy and the row sums through the caches; writes dk and dv. Registers: one tile of
# scores and of dP, the accumulators of dk and dv [BLOCK_K, BLOCK_D], and the sums over padding.
@triton.jit
def _window_attention_key_grad_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    fill_ptr,
    grad_qkv_ptr,
    padding_partials_ptr,
    row_sums_ptr,
    num_windows,
    windows_per_program,
    heads,
    geometry,
    grad_strides,
    qkv_strides,
    grad_qkv_strides,
    scale,
    mask_value,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
):
    head, tile, first, end, part = _program_place(heads, windows_per_program, num_windows, KEY_TILES)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    ROWS: tl.constexpr = QUERY_TILES * BLOCK_Q
    COLUMNS: tl.constexpr = KEY_TILES * BLOCK_K
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    bias_ptrs = bias_ptr + head * (ROWS * COLUMNS) + tl.arange(0, BLOCK_Q)[:, None] * COLUMNS + key[None, :]
    k_sum = tl.zeros((BLOCK_D,), tl.float32)
    v_sum = tl.zeros((BLOCK_D,), tl.float32)
    for window in range(first, end):
        place = _window_place(window, geometry)
        y, x, inside = _token_place(place, key, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        stride = qkv_strides[3]
        offsets = _offsets(place[0], (y, x), qkv_strides)
        k = _load_tokens(qkv_ptr, offsets, inside, channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
        v = _load_tokens(qkv_ptr, offsets, inside, 2 * channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
        row_sums_ptrs = row_sums_ptr + (tl.cast(window, tl.int64) * heads + head) * (2 * ROWS)

        grad_k = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        grad_v = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for query_tile in range(QUERY_TILES):
            query = query_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            qy, qx, query_inside = _token_place(place, query, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
            offs = _offsets(place[0], (qy, qx), qkv_strides)
            q = _load_tokens(qkv_ptr, offs, query_inside, channel, stride, None, HEAD_DIM, BLOCK_D)
            offs = _offsets(place[0], (qy, qx), grad_strides)
            grad = _load_tokens(grad_ptr, offs, query_inside, channel, grad_strides[3], None, HEAD_DIM, BLOCK_D)
            log_sum = tl.load(row_sums_ptrs + query)
            row_sum = tl.load(row_sums_ptrs + ROWS + query)
            bias = tl.load(bias_ptrs + query_tile * (BLOCK_Q * COLUMNS))
            scores = _scores(
                q, k, bias, scale, mask_value, place, query, key, geometry, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W
            )
            p = tl.exp2(scores * LOG2_E - log_sum[:, None])
            grad_scores = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - row_sum[:, None])
            grad_v = tl.dot(tl.trans(p.to(grad.dtype)), grad, grad_v, input_precision="ieee")
            grad_k = tl.dot(tl.trans(grad_scores.to(q.dtype)), q, grad_k, input_precision="ieee")
        grad_k *= scale
        offsets = _offsets(place[0], (y, x), grad_qkv_strides)
        _store_tokens(grad_qkv_ptr, grad_k, offsets, inside, channels + channel, HEAD_DIM, BLOCK_D)
        _store_tokens(grad_qkv_ptr, grad_v, offsets, inside, 2 * channels + channel, HEAD_DIM, BLOCK_D)
        if padding_partials_ptr is not None:
            k_sum = _padding_sum(k_sum, grad_k, place, inside, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
            v_sum = _padding_sum(v_sum, grad_v, place, inside, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
    if padding_partials_ptr is not None:
        row = part * KEY_TILES + tile
        _store_padding_sums(padding_partials_ptr, row, k_sum, v_sum, channels, channel, HEAD_DIM, BLOCK_D)


# Windows of several tiles, third kernel, for the bias gradient. Tile: BLOCK_Q queries of one head against BLOCK_K
# keys, for `windows_per_program` windows one after the other. Reads everything through the caches: each query as often
# as there are key tiles and vice versa. Registers: one tile of scores and of dP, and the sum over the program's
# windows, which is written once, at the end. (Summing in the first kernel would take KEY_TILES such tiles: at 144
# tokens the compiler spills them.)
@triton.jit
def _window_attention_bias_grad_kernel(
    grad_ptr,
    qkv_ptr,
    bias_ptr,
    fill_ptr,
    bias_partials_ptr,
    row_sums_ptr,
    num_windows,
    windows_per_program,
    heads,
    geometry,
    grad_strides,
    qkv_strides,
    scale,
    mask_value,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    PAD_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
):
    head, tile, first, end, part = _program_place(heads, windows_per_program, num_windows, QUERY_TILES * KEY_TILES)
    channels = heads * HEAD_DIM
    channel = head * HEAD_DIM
    ROWS: tl.constexpr = QUERY_TILES * BLOCK_Q
    COLUMNS: tl.constexpr = KEY_TILES * BLOCK_K
    query = (tile // KEY_TILES) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = (tile % KEY_TILES) * BLOCK_K + tl.arange(0, BLOCK_K)
    bias_offsets = query[:, None] * COLUMNS + key[None, :]
    bias = tl.load(bias_ptr + head * (ROWS * COLUMNS) + bias_offsets)
    bias_sum = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for window in range(first, end):
        place = _window_place(window, geometry)
        y, x, inside = _token_place(place, query, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        stride = qkv_strides[3]
        offsets = _offsets(place[0], (y, x), qkv_strides)
        q = _load_tokens(qkv_ptr, offsets, inside, channel, stride, None, HEAD_DIM, BLOCK_D)
        offsets = _offsets(place[0], (y, x), grad_strides)
        grad = _load_tokens(grad_ptr, offsets, inside, channel, grad_strides[3], None, HEAD_DIM, BLOCK_D)
        y, x, inside = _token_place(place, key, geometry, WINDOW_H, WINDOW_W, PAD_FIRST)
        offsets = _offsets(place[0], (y, x), qkv_strides)
        k = _load_tokens(qkv_ptr, offsets, inside, channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
        v = _load_tokens(qkv_ptr, offsets, inside, 2 * channels + channel, stride, fill_ptr, HEAD_DIM, BLOCK_D)
        row_sums_ptrs = row_sums_ptr + (tl.cast(window, tl.int64) * heads + head) * (2 * ROWS) + query
        scores = _scores(
            q, k, bias, scale, mask_value, place, query, key, geometry, SHIFT_H, SHIFT_W, WINDOW_H, WINDOW_W
        )
        p = tl.exp2(scores * LOG2_E - tl.load(row_sums_ptrs)[:, None])
        grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
        bias_sum += p * (grad_p - tl.load(row_sums_ptrs + ROWS)[:, None])
    partial = (part * heads + head).to(tl.int64) * (ROWS * COLUMNS)
    tl.store(bias_partials_ptr + partial + bias_offsets, bias_sum)


# One program per head and BLOCK_R rows of the table, that is, relative positions: for each of them and each query of
# the window the key is known, so that gradients [heads, ROWS, COLUMNS] are gathered, each once in all, and added up in
# a fixed order.
@triton.jit
def _table_grad_kernel(
    grad_bias_ptr,
    grad_table_ptr,
    heads,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW_H: tl.constexpr,
    WINDOW_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1)
    query = tl.arange(0, BLOCK)
    key_y = (query // WINDOW_W)[None, :] - (row // (2 * WINDOW_W - 1) - (WINDOW_H - 1))[:, None]
    key_x = (query % WINDOW_W)[None, :] - (row % (2 * WINDOW_W - 1) - (WINDOW_W - 1))[:, None]
    exists = (key_y >= 0) & (key_y < WINDOW_H) & (key_x >= 0) & (key_x < WINDOW_W)
    exists = exists & (query < WINDOW_H * WINDOW_W)[None, :]
    offsets = (head * ROWS + query)[None, :] * COLUMNS + key_y * WINDOW_W + key_x
    total = tl.sum(tl.load(grad_bias_ptr + offsets, mask=exists, other=0.0), 1)
    row_ok = row < (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    tl.store(grad_table_ptr + row * heads + head, total.to(grad_table_ptr.dtype.element_ty), mask=row_ok)
