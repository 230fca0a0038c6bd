"""Device functions that several kernels share. Importing this module imports Triton.

Shapes in comments use the names of the constants, ``[BLOCK_T, BLOCK_N]``. Offsets inside a tile are 32-bit;
the tile's own position is multiplied out in 64 bits, so that matrices may exceed 2^31 elements.
"""

import triton
import triton.language as tl


@triton.jit
def grouped(index, tiles_t, tiles_n, GROUP: tl.constexpr):
    """Walk the tiles in bands of GROUP rows, down the columns of a band: neighbours share operands in L2."""
    band = index // (GROUP * tiles_n)
    first = band * GROUP
    height = tl.minimum(tiles_t - first, GROUP)
    within = index % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def mix(x):
    """32-bit finaliser lowbias32; see ``dropout.py``."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(rows, columns, key0, key1, threshold):
    """Return the dropout mask of a tile, ``[rows, columns]``: the bits of ``dropout.keep_mask``."""
    t = rows.to(tl.uint32)
    a = mix(t ^ tl.cast(key0, tl.uint32))
    b = mix(t ^ tl.cast(key1, tl.uint32)) | 1
    return mix(a[:, None] + columns.to(tl.uint32)[None, :] * b[:, None]) >= tl.cast(threshold, tl.uint32)


@triton.jit
def project_tile(
    x_ptr, a_ptr, t0, n0, k_begin, k_end, T, N, K,
    stride_xt, stride_an, stride_ak, key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``[BLOCK_T, BLOCK_N]`` of ``drop(X)[:, k] A[:, k]^T`` for k in [k_begin, k_end), in fp32.

    X ``(T, K)`` has unit column stride. EVEN_K promises that k_begin, k_end and K are multiples of BLOCK_K.
    """
    # rows past the end repeat the last one: their results are never stored
    rows = tl.minimum(t0 + tl.arange(0, BLOCK_T), T - 1)
    columns = n0 + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + t0.to(tl.int64) * stride_xt + ((rows - t0)[:, None] * stride_xt + k[None, :] + k_begin)
    a_ptrs = a_ptr + k_begin.to(tl.int64) * stride_ak + (k[:, None] * stride_ak + columns[None, :] * stride_an)
    if DROPOUT:
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            a = tl.load(a_ptrs, mask=columns[None, :] < N, other=0.0)
        else:
            inside = start + k < k_end
            x = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=inside[:, None] & (columns[None, :] < N), other=0.0)
        if DROPOUT:
            # the masked operand on the right: a left one stays in registers, which Triton 3.6 and 3.8 overwrite
            # while the wgmma of the step before still reads them
            x = tl.where(kept(rows, start + k, key0, key1, threshold), x, 0.0)
            acc = tl.dot(a.T, x.T, acc, input_precision=PRECISION, out_dtype=tl.float32)
        else:
            acc = tl.dot(x, a, acc, input_precision=PRECISION, out_dtype=tl.float32)
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * stride_ak
    if DROPOUT:
        acc = acc.T
    return acc


@triton.jit
def outer_tile(
    y_ptr, s_ptr, n0, r0, t_begin, t_end, N, R,
    stride_yt, stride_st, key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``[BLOCK_N, BLOCK_R]`` of ``drop(Y)[t]^T S[t]`` summed over t in [t_begin, t_end), in fp32.

    Y ``(T, N)`` and S ``(T, R)`` have unit column stride.
    """
    t = tl.arange(0, BLOCK_T)
    columns = n0 + tl.arange(0, BLOCK_N)
    ranks = r0 + tl.arange(0, BLOCK_R)
    # Y is read transposed: a tl.trans between load and dot keeps the load out of the pipeline on sm_80
    y_ptrs = y_ptr + t_begin.to(tl.int64) * stride_yt + (t[None, :] * stride_yt + columns[:, None])
    s_ptrs = s_ptr + t_begin.to(tl.int64) * stride_st + (t[:, None] * stride_st + ranks[None, :])
    if DROPOUT:
        acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(t_begin, t_end, BLOCK_T):
        inside = start + t < t_end
        if EVEN_N:
            y = tl.load(y_ptrs, mask=inside[None, :], other=0.0)
        else:
            y = tl.load(y_ptrs, mask=inside[None, :] & (columns[:, None] < N), other=0.0)
        s = tl.load(s_ptrs, mask=inside[:, None] & (ranks[None, :] < R), other=0.0)
        if DROPOUT:
            # on the right, as in project_tile
            y = tl.where(tl.trans(kept(start + t, columns, key0, key1, threshold)), y, 0.0)
            acc = tl.dot(s.T, y.T, acc, input_precision=PRECISION, out_dtype=tl.float32)
        else:
            acc = tl.dot(y, s, acc, input_precision=PRECISION, out_dtype=tl.float32)
        y_ptrs += BLOCK_T * stride_yt
        s_ptrs += BLOCK_T * stride_st
    if DROPOUT:
        acc = acc.T
    return acc


@triton.jit
def store_tile(out_ptr, acc, t0, n0, T, N, stride_t, stride_n, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store ``[BLOCK_T, BLOCK_N]`` at ``(t0, n0)`` of an output ``(T, N)``, converted to its type."""
    rows = tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_N)
    ptrs = out_ptr + t0.to(tl.int64) * stride_t + n0.to(tl.int64) * stride_n
    inside = (t0 + rows < T)[:, None] & (n0 + columns < N)[None, :]
    offsets = rows[:, None] * stride_t + columns[None, :] * stride_n
    tl.store(ptrs + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "slices"])
def reduce_kernel(part_ptr, out_ptr, size, slices, BLOCK: tl.constexpr):
    """``out = part[0] + part[1] + ...`` in this order; part ``(slices, size)`` fp32, out ``(size,)``.

    The second stage of every split sum: no atomics, so the same call gives the same bits.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slice in range(slices):
        total += tl.load(part_ptr + slice * size.to(tl.int64) + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
