"""The Triton kernels of the base + LoRA linear. Importing this module imports Triton.

Launchers and the meaning of the shapes are in ``lora.py``. Scalars that depend on the step (``scaling``, the
dropout words, ``T``) are run-time arguments: a change of value never compiles again, but for a scaling of 1, which
has a kernel of its own on sm_90.
"""

import triton
import triton.language as tl

from .tiles import grouped, kept, outer_tile, project_tile, store_tile


@triton.jit(do_not_specialize=["T", "splits", "key0", "key1", "threshold"])
def project_kernel(
    x_ptr, a_ptr, out_ptr, T, K, R, splits, stride_xt, stride_an, stride_ak, scaling, key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out (splits, T, R) = scaling * drop(X) A^T`` over splits parts of K; several parts are fp32."""
    tiles_r = tl.cdiv(R, BLOCK_N)
    t0 = tl.program_id(0) // tiles_r * BLOCK_T
    n0 = tl.program_id(0) % tiles_r * BLOCK_N
    split = tl.program_id(1)
    chunk = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
    acc = project_tile(
        x_ptr, a_ptr, t0, n0, split * chunk, tl.minimum((split + 1) * chunk, K), T, R, K,
        stride_xt, stride_an, stride_ak, key0, key1, threshold,
        BLOCK_T, BLOCK_N, BLOCK_K, EVEN_K, DROPOUT, PRECISION,
    )  # fmt: skip
    slice_ptr = out_ptr + split.to(tl.int64) * T * R
    store_tile(slice_ptr, acc * tl.cast(scaling, tl.float32), t0, n0, T, R, R, 1, BLOCK_T, BLOCK_N)


@triton.jit(do_not_specialize=["T", "key0", "key1", "threshold"])
def linear_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, y_ptr, T, N, K, R,
    stride_xt, stride_wn, stride_wk, stride_st, stride_bn, stride_br, stride_yt,
    scaling, key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``Y (T, N) = X (T, K) W^T + scaling * drop'(S (T, R) B^T) + bias`` in one fp32 accumulator.

    Forward: W ``(m, d)`` and B ``(m, r)`` as they are, no dropout. dx: X is dy, S is dS, and W ``(m, d)``, A
    ``(r, d)`` are read with their strides swapped; drop' masks the rank-r product.
    """
    tile_t, tile_n = grouped(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N), GROUP)
    t0 = tile_t * BLOCK_T
    n0 = tile_n * BLOCK_N
    rows = tl.minimum(t0 + tl.arange(0, BLOCK_T), T - 1)
    columns = n0 + tl.arange(0, BLOCK_N)
    inside_n = (columns < N)[None, :]
    acc = low_rank_tile(
        s_ptr, b_ptr, t0, n0, rows, columns, N, R, stride_st, stride_bn, stride_br, scaling,
        key0, key1, threshold, BLOCK_T, BLOCK_N, BLOCK_R, DROPOUT, PRECISION,
    )  # fmt: skip
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + t0.to(tl.int64) * stride_xt + ((rows - t0)[:, None] * stride_xt + k[None, :])
    w_ptrs = w_ptr + n0.to(tl.int64) * stride_wn + (k[:, None] * stride_wk + (columns - n0)[None, :] * stride_wn)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(start + k < K)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            w = tl.load(w_ptrs)
        elif EVEN_K:
            w = tl.load(w_ptrs, mask=inside_n, other=0.0)
        else:
            w = tl.load(w_ptrs, mask=(start + k < K)[:, None] & inside_n, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=tl.float32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, acc, t0, n0, T, N, stride_yt, 1, BLOCK_T, BLOCK_N)


@triton.jit(do_not_specialize=["T", "key0", "key1", "threshold"])
def linear_tma_kernel(
    x_desc, w_desc, s_desc, b_desc, bias_ptr, y_ptr, T, N, K, R, stride_yt, scaling, key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """``linear_kernel`` through tensor descriptors, for 16-bit operands; persistent.

    Blocks: x_desc ``[BLOCK_T, BLOCK_K]`` and s_desc ``[BLOCK_T, BLOCK_R]``; of the weight and the factor
    ``[BLOCK_N, BLOCK_K]`` and ``[BLOCK_N, BLOCK_R]``, or with the sides swapped if they are stored TRANSPOSED.
    Outside their matrix they return zeros.

    With ONE_LOOP the low-rank product comes last and without a loop: scaling must be 1, nothing masked and R at most
    BLOCK_R. The loops over tiles and over K then become one, in which the first loads of a tile run while the tile
    before is written out; two inner loops, or one that may not run at all, would stay loops of their own.
    """
    if ONE_LOOP:
        # there is no descriptor of a matrix without columns; the other form spills registers if it is told so
        tl.assume(K > 0)
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=ONE_LOOP):
        tile_t, tile_n = grouped(tile, tiles_t, tiles_n, GROUP)
        t0 = tile_t * BLOCK_T
        n0 = tile_n * BLOCK_N
        columns = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        if not ONE_LOOP:
            acc = descriptor_product(s_desc, b_desc, acc, t0, n0, R, BLOCK_R, TRANSPOSED)
            acc = acc * tl.cast(scaling, tl.float32)
            if DROPOUT:
                acc = tl.where(kept(t0 + tl.arange(0, BLOCK_T), columns, key0, key1, threshold), acc, 0.0)
        acc = descriptor_product(x_desc, w_desc, acc, t0, n0, K, BLOCK_K, TRANSPOSED)
        if ONE_LOOP:
            acc = descriptor_step(s_desc, b_desc, acc, t0, n0, 0, TRANSPOSED)
        if BIAS:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        store_tile(y_ptr, acc, t0, n0, T, N, stride_yt, 1, BLOCK_T, BLOCK_N)


@triton.jit
def descriptor_product(left_desc, right_desc, acc, t0, n0, K, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return ``acc + L R^T`` of the tile at ``(t0, n0)``, or ``acc + L R`` if R is stored TRANSPOSED."""
    for start in range(0, K, BLOCK_K):
        acc = descriptor_step(left_desc, right_desc, acc, t0, n0, start, TRANSPOSED)
    return acc


@triton.jit
def descriptor_step(left_desc, right_desc, acc, t0, n0, start, TRANSPOSED: tl.constexpr):
    """Return what ``descriptor_product`` does, of the one block of columns that begins at ``start``."""
    left = left_desc.load([t0, start])
    if TRANSPOSED:
        right = right_desc.load([start, n0])
    else:
        right = right_desc.load([n0, start]).T
    return tl.dot(left, right, acc, out_dtype=tl.float32)


@triton.jit
def low_rank_tile(
    s_ptr, b_ptr, t0, n0, rows, columns, N, R, stride_st, stride_bn, stride_br, scaling,
    key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``scaling * drop'(S B^T)`` of one tile: the value that the base product is then added to.

    Coming first it needs no second accumulator for the scale.
    """
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    ranks = tl.arange(0, BLOCK_R)
    s_ptrs = s_ptr + t0.to(tl.int64) * stride_st + ((rows - t0)[:, None] * stride_st + ranks[None, :])
    b_ptrs = b_ptr + n0.to(tl.int64) * stride_bn
    b_ptrs += ranks[:, None] * stride_br + (columns - n0)[None, :] * stride_bn
    # one to four steps: a pipeline would take shared memory from the main loop and hide nothing
    for start in tl.range(0, R, BLOCK_R, num_stages=1):
        inside = start + ranks < R
        s = tl.load(s_ptrs, mask=inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=inside[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(s, b, acc, input_precision=PRECISION, out_dtype=tl.float32)
        s_ptrs += BLOCK_R
        b_ptrs += BLOCK_R * stride_br
    acc = acc * tl.cast(scaling, tl.float32)
    if DROPOUT:
        acc = tl.where(kept(rows, columns, key0, key1, threshold), acc, 0.0)
    return acc


@triton.jit(do_not_specialize=["T", "splits", "key0", "key1", "threshold"])
def outer_kernel(
    y_ptr, s_ptr, out_ptr, T, N, R, splits, stride_yt, stride_st, stride_on, stride_or, scaling,
    key0, key1, threshold,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    EVEN_N: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out (splits, N, R) = scaling * drop(Y)^T S`` over splits parts of the tokens, fp32."""
    tiles_r = tl.cdiv(R, BLOCK_R)
    n0 = tl.program_id(0) // tiles_r * BLOCK_N
    r0 = tl.program_id(0) % tiles_r * BLOCK_R
    split = tl.program_id(1)
    chunk = tl.cdiv(tl.cdiv(T, BLOCK_T), splits) * BLOCK_T
    begin = split * chunk
    end = tl.minimum(begin + chunk, T)
    # no part is empty (runtime.splits_for): a loop that may not run at all makes ptxas wait after every wgmma
    tl.assume(begin < end)
    acc = outer_tile(
        y_ptr, s_ptr, n0, r0, begin, end, N, R,
        stride_yt, stride_st, key0, key1, threshold,
        BLOCK_T, BLOCK_N, BLOCK_R, EVEN_N, DROPOUT, PRECISION,
    )  # fmt: skip
    acc = acc * tl.cast(scaling, tl.float32)
    slice_ptr = out_ptr + split.to(tl.int64) * N * R
    store_tile(slice_ptr, acc, n0, r0, N, R, stride_on, stride_or, BLOCK_N, BLOCK_R)


@triton.jit(do_not_specialize=["T", "slab", "splits_m", "splits_t"])
def dy_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr, T, M, R, stride_dyt, stride_st, stride_bm, stride_br, scaling,
    slab, splits_m, splits_t,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dS = scaling * dy B`` and ``dB = scaling * dy^T S`` while dy crosses the DRAM bus once.

    The two sums run along different axes of dy, so one program cannot finish both; writing one of them out in
    pieces from a common tile costs ``4 r / BLOCK_M`` passes over dy. Instead the programs of a slab of tokens,
    small enough for the L2 cache, are numbered one after the other: first those of dS, ``[ROWS, BLOCK_R]`` in
    steps of BLOCK_K, then those of dB, ``[BLOCK_M, BLOCK_R]`` in steps of BLOCK_T, which find dy in the cache.
    ds is ``(splits_m, T, R)``, db ``(slabs * splits_t, M, R)``; ``slab`` rows are a multiple of ROWS and of
    ``splits_t * BLOCK_T``.
    """
    tiles_r = tl.cdiv(R, BLOCK_R)
    programs_ds = slab // ROWS * tiles_r * splits_m
    programs_db = tl.cdiv(M, BLOCK_M) * tiles_r * splits_t
    which = tl.program_id(0) // (programs_ds + programs_db)
    index = tl.program_id(0) % (programs_ds + programs_db)
    scale = tl.cast(scaling, tl.float32)
    if index < programs_ds:
        r0 = index % tiles_r * BLOCK_R
        split = index // tiles_r % splits_m
        t0 = which * slab + index // (tiles_r * splits_m) * ROWS
        chunk = tl.cdiv(tl.cdiv(M, BLOCK_K), splits_m) * BLOCK_K
        if t0 < T:
            acc = project_tile(
                dy_ptr, b_ptr, t0, r0, split * chunk, tl.minimum((split + 1) * chunk, M), T, R, M,
                stride_dyt, stride_br, stride_bm, 0, 0, 0,
                ROWS, BLOCK_R, BLOCK_K, EVEN_M, False, PRECISION,
            )  # fmt: skip
            slice_ptr = ds_ptr + split.to(tl.int64) * T * R
            store_tile(slice_ptr, acc * scale, t0, r0, T, R, R, 1, ROWS, BLOCK_R)
    else:
        index -= programs_ds
        r0 = index % tiles_r * BLOCK_R
        split = index // tiles_r % splits_t
        m0 = index // (tiles_r * splits_t) * BLOCK_M
        begin = which * slab + split * (slab // splits_t)
        end = tl.minimum(begin + slab // splits_t, T)
        acc = outer_tile(
            dy_ptr, s_ptr, m0, r0, begin, end, M, R, stride_dyt, stride_st, 0, 0, 0,
            BLOCK_T, BLOCK_M, BLOCK_R, EVEN_M, False, PRECISION,
        )  # fmt: skip
        slice_ptr = db_ptr + (which * splits_t + split).to(tl.int64) * M * R
        store_tile(slice_ptr, acc * scale, m0, r0, M, R, R, 1, BLOCK_M, BLOCK_R)
