"""The Triton kernels of ``C += X^T X`` on one triangle. Importing this module imports Triton.

A tile of C is BLOCK_M high and BLOCK_N wide, and the longer side a multiple of the shorter one. The triangle is
covered by squares of the longer side, row i by i + 1 of them, each of which holds its tiles side by side or one below
the other; the grid is exactly these, no square lies above the diagonal.
"""

import triton
import triton.language as tl


@triton.jit
def triangle(index):
    """Return row and column of entry ``index`` of a lower triangle that is walked row by row."""
    row = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the fp32 root is at most one off for any triangle of less than 2^21 entries
    row = tl.where(row * (row + 1) // 2 > index, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= index, row + 1, row)
    return row, index - row * (row + 1) // 2


@triton.jit
def triangle_tile(index, d, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first row and the first column of tile ``index`` of the triangle of a ``(d, d)`` matrix.

    Squares are taken in bands of GROUP rows of them, down the columns of a band: programs that run together then
    share GROUP left and few right operands in L2. A band is a rectangle and a small triangle at its end, and
    all squares before it number exactly ``band (band + 1) / 2``.
    """
    SIDE: tl.constexpr = max(BLOCK_M, BLOCK_N)
    TILES: tl.constexpr = SIDE // min(BLOCK_M, BLOCK_N)
    square = index // TILES
    part = index % TILES
    row, _ = triangle(square)
    band = row // GROUP * GROUP
    height = tl.minimum(tl.cdiv(d, SIDE) - band, GROUP)
    within = square - band * (band + 1) // 2
    corner_row, corner_column = triangle(tl.maximum(within - height * band, 0))
    in_corner = within >= height * band
    m0 = (band + tl.where(in_corner, corner_row, within % height)) * SIDE
    n0 = tl.where(in_corner, band + corner_column, within // height) * SIDE
    if BLOCK_M < BLOCK_N:
        m0 += part * BLOCK_M
    else:
        n0 += part * BLOCK_N
    return m0, n0


@triton.jit
def finish_tile(
    c_ptr, part_ptr, acc, m0, n0, index, split, tiles, d, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIRECT: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add a tile to C in C's type, or leave it in its slice of part ``(splits, tiles, BLOCK_M, BLOCK_N)``."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    if DIRECT:
        ptrs = c_ptr + m0.to(tl.int64) * stride_c + n0 + (rows * stride_c + columns)
        inside = (m0 + rows < d) & (n0 + columns < d)
        if ATOMIC:
            # one addition to each element, so nothing depends on an order. It happens in the L2 cache and needs
            # no copy of C's tile: 117 registers instead of 228 for 128 x 128 on sm_90, which has a vector form
            tl.atomic_add(ptrs, acc.to(c_ptr.dtype.element_ty), mask=inside, sem="relaxed")
        else:
            c = tl.load(ptrs, mask=inside, other=0.0)
            tl.store(ptrs, c + acc.to(c.dtype), mask=inside)
    else:
        slice_ptr = part_ptr + (split.to(tl.int64) * tiles + index) * (BLOCK_M * BLOCK_N)
        tl.store(slice_ptr + rows * BLOCK_N + columns, acc)


@triton.jit(do_not_specialize=["T", "splits"])
def syrk_kernel(
    x_ptr, mask_ptr, c_ptr, part_ptr, T, d, tiles, splits, stride_xt, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
    DIRECT: tl.constexpr, ATOMIC: tl.constexpr, EVEN_D: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``C += X^T X`` for X ``(T, d)`` with unit column stride, through pointers; one tile and split a program.

    Sums in fp32. Rows with mask 0 are not read. Program axis 1 cuts the tokens into splits whole parts.
    """
    index = tl.program_id(0)
    split = tl.program_id(1)
    m0, n0 = triangle_tile(index, d, GROUP, BLOCK_M, BLOCK_N)
    rows = m0 + tl.arange(0, BLOCK_M)[:, None]
    columns = n0 + tl.arange(0, BLOCK_N)[None, :]
    chunk = tl.cdiv(tl.cdiv(T, BLOCK_T), splits) * BLOCK_T
    begin = split * chunk
    end = tl.minimum(begin + chunk, T)
    # no part is empty (runtime.splits_for): a loop that may not run at all makes ptxas wait after every wgmma
    tl.assume(begin < end)
    t = tl.arange(0, BLOCK_T)
    # read transposed: a tl.trans between load and dot keeps the load out of the pipeline on sm_80
    left_ptrs = x_ptr + begin.to(tl.int64) * stride_xt + (t[None, :] * stride_xt + rows)
    right_ptrs = x_ptr + begin.to(tl.int64) * stride_xt + (t[:, None] * stride_xt + columns)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_T):
        counts = start + t < end
        if MASK:
            counts = counts & (tl.load(mask_ptr + start + t, mask=counts, other=0) != 0)
        if EVEN_D:
            left = tl.load(left_ptrs, mask=counts[None, :], other=0.0)
            right = tl.load(right_ptrs, mask=counts[:, None], other=0.0)
        else:
            left = tl.load(left_ptrs, mask=counts[None, :] & (rows < d), other=0.0)
            right = tl.load(right_ptrs, mask=counts[:, None] & (columns < d), other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=tl.float32)
        left_ptrs += BLOCK_T * stride_xt
        right_ptrs += BLOCK_T * stride_xt
    finish_tile(c_ptr, part_ptr, acc, m0, n0, index, split, tiles, d, stride_c, BLOCK_M, BLOCK_N, DIRECT, ATOMIC)


@triton.jit(do_not_specialize=["T", "splits"])
def syrk_tma_kernel(
    left_desc, right_desc, c_ptr, part_ptr, T, d, tiles, splits, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
    DIRECT: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """``syrk_kernel`` without a mask through tensor descriptors, for 16-bit X; persistent.

    Both descriptors address X ``(T, d)``, with blocks ``[BLOCK_T, BLOCK_M]`` and ``[BLOCK_T, BLOCK_N]``; they
    return zeros outside it.
    """
    chunk = tl.cdiv(tl.cdiv(T, BLOCK_T), splits) * BLOCK_T
    for work in tl.range(tl.program_id(0), tiles * splits, tl.num_programs(0)):
        index = work % tiles
        split = work // tiles
        m0, n0 = triangle_tile(index, d, GROUP, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, T), BLOCK_T):
            left = left_desc.load([start, m0])
            right = right_desc.load([start, n0])
            acc = tl.dot(left.T, right, acc, out_dtype=tl.float32)
        finish_tile(c_ptr, part_ptr, acc, m0, n0, index, split, tiles, d, stride_c, BLOCK_M, BLOCK_N, DIRECT, ATOMIC)


@triton.jit(do_not_specialize=["splits"])
def syrk_reduce_kernel(
    part_ptr, c_ptr, d, tiles, splits, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Second stage: add the slices of part in their order, then their sum to C, ROWS rows of a tile a program."""
    index = tl.program_id(0)
    m0, n0 = triangle_tile(index, d, GROUP, BLOCK_M, BLOCK_N)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    inside = (m0 + rows < d) & (n0 + columns < d)
    ptrs = c_ptr + m0.to(tl.int64) * stride_c + n0 + (rows * stride_c + columns)
    total = tl.zeros((ROWS, BLOCK_N), dtype=c_ptr.dtype.element_ty)
    for split in range(splits):
        slice_ptr = part_ptr + (split * tiles.to(tl.int64) + index) * (BLOCK_M * BLOCK_N)
        total += tl.load(slice_ptr + rows * BLOCK_N + columns).to(total.dtype)
    c = tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, c + total, mask=inside)
