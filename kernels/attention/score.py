"""What forward and backward share: where the rows of a sequence lie, what happens to a score
between the two products, and the dropout mask. Scores are in units of log2 after `scores`.

    S = scale q k;  S = softcap tanh(S / softcap);  S = S - slope |i + offset - j| + mask

Every function works on scores [BM, BN] with o_i [BM, 1], o_j [1, BN], and just so transposed.

Names: i_ index of a program or of one thing, o_ offsets, m_ mask, p_ pointers, b_ block of values.
"""

import triton
import triton.language as tl

from ..rng import BITS, multiple_of_8, noise_blocks, philox4x32_10, shown

LOG2E = tl.constexpr(1.44269504088896340736)
LN2 = tl.constexpr(0.69314718055994530942)
# Tensor cores cut off what a sum cannot hold, at every eight products: after 256 of them an fp32
# output was 1.9e-6 from fp64 on an H100, over twice PyTorch's error. With the sum of sums of 64 it
# is 4e-7, and the parts go to different warps: 96 instructions instead of 240, no spills (232 bytes
# before).
DEPTH = tl.constexpr(64)
NO_MASK, BOOLEAN, ADDITIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Arguments that never compile a kernel anew, whatever their value.
SCALARS = [
    *("Hq", "Sq", "Sk", "Tq", "Tk", "entries", "added", "page_size", "pages", "table_stride"),
    *("strides", "left", "right", "scale", "softcap", "alibi_step", "mask_strides", "seed"),
    *("stream", "noise_Sq", "noise_Sk", "threshold", "keep_scale"),
]


@triton.jit
def step(x, ALIGNED: tl.constexpr):
    """A stride of the argument tuples as int64, known to be a multiple of 8 if ALIGNED."""
    return multiple_of_8(shown(x), ALIGNED)


@triton.jit
def clamped(x, high):
    """x in [0, high], as int64: a wrong index on the device must not leave the tensors."""
    x = x.to(tl.int64)
    return tl.minimum(tl.maximum(x, 0), high.to(tl.int64))


@triton.jit
def sequence_of(
    i_b, cu_q, cu_k, seqlens, leftpad, batch_idx, added, Sq, Sk, Tq, Tk, entries,
    BOTTOM_RIGHT: tl.constexpr,
):  # fmt: skip
    """First rows of queries and keys, entry of the keys (int64); lengths and offset (int32)."""
    q_row = i_b.to(tl.int64) * 0
    k_row = q_row
    entry = i_b.to(tl.int64)
    n_q, n_k = Sq.to(tl.int64), Sk.to(tl.int64)
    if cu_q is not None:
        q_row = clamped(tl.load(cu_q + i_b), Tq)
        n_q = clamped(clamped(tl.load(cu_q + i_b + 1), Tq) - q_row, Sq)
        k_row = clamped(tl.load(cu_k + i_b), Tk)
        n_k = clamped(clamped(tl.load(cu_k + i_b + 1), Tk) - k_row, Sk)
    if seqlens is not None:
        n_k = clamped(tl.load(seqlens + i_b).to(tl.int64) + added, Sk)
    if leftpad is not None:
        k_row = clamped(tl.load(leftpad + i_b), n_k)
        n_k = n_k - k_row
    if batch_idx is not None:
        entry = clamped(tl.load(batch_idx + i_b), entries - 1)
    offset = n_k * 0
    if BOTTOM_RIGHT:
        offset = n_k - n_q
    return q_row, k_row, entry, n_q.to(tl.int32), n_k.to(tl.int32), offset.to(tl.int32)


@triton.jit
def key_offsets(first, o_k, Sk, k_row, b_stride, s_stride, p_table, page_size, pages):
    """Elements from the head's first row to key rows first + o_k (int64, the shape of o_k)."""
    if p_table is None:  # o_k s_stride never changes: a block adds one number to each address
        return (k_row + first) * s_stride + o_k * s_stride
    else:
        o_j = first + o_k
        o_at = k_row + o_j
        o_page = o_at.to(tl.int32) // page_size  # a 64-bit division is a call with a stack
        b_page = tl.load(p_table + o_page, mask=o_j < Sk, other=0)
        b_page = tl.minimum(tl.maximum(b_page.to(tl.int64), 0), pages.to(tl.int64) - 1)
        return b_page * b_stride + (o_at - o_page * page_size) * s_stride


@triton.jit
def load_rows(p, o_rows, m_rows, o_x, X: tl.constexpr, BX: tl.constexpr, MASKED: tl.constexpr):
    """Rows p + o_rows + o_x, 0 beyond dimension X (BX: its power of two), and beyond m_rows if
    MASKED; o_rows [B, 1] with o_x [1, BX], or transposed."""
    if MASKED:
        if X == BX:
            return tl.load(p + o_rows + o_x, mask=m_rows, other=0.0)
        else:
            return tl.load(p + o_rows + o_x, mask=m_rows & (o_x < X), other=0.0)
    else:
        if X == BX:
            return tl.load(p + o_rows + o_x)
        else:
            return tl.load(p + o_rows + o_x, mask=o_x < X, other=0.0)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """a b, [M, K] [K, N] -> [M, N]; in fp32 as the sum of products over DEPTH of K at a time."""
    K: tl.constexpr = b_a.shape[1]
    if b_a.dtype == tl.float32 and K > DEPTH:
        PARTS: tl.constexpr = K // DEPTH
        b_a = tl.trans(b_a.reshape([b_a.shape[0], PARTS, DEPTH]), 1, 0, 2)  # [PARTS, M, DEPTH]
        b_b = b_b.reshape([PARTS, DEPTH, b_b.shape[1]])  # [PARTS, DEPTH, N]
        return tl.sum(tl.dot(b_a, b_b, input_precision=PRECISION), axis=0)
    else:
        return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def tanh_of(x):
    """Relative error about 3e-7: the odd series below 0.625, where 1 - e^-2x cancels."""
    b_e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    b_big = (1.0 - b_e) / (1.0 + b_e)
    z = x * x
    b_p = z * -5.70498872745e-3 + 2.06390887954e-2
    b_p = b_p * z + -5.37397155531e-2
    b_p = b_p * z + 1.33314422036e-1
    b_p = b_p * z + -3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, b_p * z * x + x, tl.where(x < 0.0, -b_big, b_big))


@triton.jit
def seen(o_i, o_j, Sk, offset, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Keys that exist and that the rows' windows hold: one comparison a side and score."""
    b_last = Sk - 1
    if RIGHT:
        b_last = tl.minimum(o_i + (offset + right), b_last)
    m = o_j <= b_last
    if LEFT:
        m = m & (o_j >= o_i + (offset - left))
    return m


@triton.jit
def scores(
    b_s, o_i, o_j, b_head, i_b, Sq, Sk, offset, left, right, scale, softcap, alibi, alibi_step,
    mask, mask_strides,
    SOFTCAP: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """q k -> scores in units of log2, -inf where unseen; and tanh of the softcap (or b_s).

    b_head: the query head, int64 scalar or one per row. EDGE: some keys are unseen or do not exist.
    """
    b_t = b_s
    if SOFTCAP:
        b_t = tanh_of(b_s * (scale / softcap))
        b_s = b_t * (softcap * LOG2E)
    else:
        b_s = b_s * (scale * LOG2E)
    if alibi is not None:
        b_slope = tl.load(alibi + i_b * alibi_step + b_head) * LOG2E
        b_s -= b_slope * tl.abs((o_i + offset - o_j).to(tl.float32))
    if MASK != NO_MASK:
        p_mask = mask + i_b * shown(mask_strides[0]) + b_head * shown(mask_strides[1])
        p_mask = p_mask + o_i * shown(mask_strides[2]) + o_j * shown(mask_strides[3])
        m_there = (o_i < Sq) & (o_j < Sk)
        if MASK == BOOLEAN:
            m_bool = tl.load(p_mask, mask=m_there, other=0) != 0
            b_s = tl.where(m_bool, b_s, float("-inf"))
        else:
            b_s += tl.load(p_mask, mask=m_there, other=0.0).to(tl.float32) * LOG2E
    if EDGE:
        m_seen = seen(o_i, o_j, Sk, offset, left, right, LEFT, RIGHT)
        b_s = tl.where(m_seen, b_s, float("-inf"))
    return b_s, b_t


@triton.jit
def keeps(
    b_head, o_i, first, i_b, Hq, noise_Sq, noise_Sk, seeds, seed, stream, threshold,
    SEEDS: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Dropout's mask [BM, BN] of rows o_i [BM, 1] and keys first ... first + BN: word
    ((b Hq + head) Sq + i) Sk + j of the noise contract is at or above the threshold.

    WHOLE: rows start at a Philox block, so each block is made once; else once for each of its
    four words.
    """
    if SEEDS == 1:
        b_seed = tl.load(seeds)
    else:
        b_seed = seed.to(tl.int64)
    b_row = i_b.to(tl.int64) * Hq + b_head
    b_element = (b_row * noise_Sq + o_i) * noise_Sk + first  # [BM, 1]
    stream = stream.to(tl.int64)
    if WHOLE:
        b_block = (b_element >> 2) + tl.arange(0, BN // 4)[None, :]  # [BM, BN / 4]
        b_word = noise_blocks(b_block, b_seed, stream, BITS)
    else:
        b_element = b_element + tl.arange(0, BN)[None, :]  # [BM, BN]
        b_block = b_element >> 2
        c0, c1 = b_block.to(tl.uint32), (b_block >> 32).to(tl.uint32)
        c2 = tl.zeros_like(c0) + stream.to(tl.uint32)
        c3 = tl.zeros_like(c0) + (stream >> 32).to(tl.uint32)
        k0, k1 = b_seed.to(tl.uint32), (b_seed >> 32).to(tl.uint32)
        w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
        o_word = (b_element & 3).to(tl.int32)
        b_low = tl.where(o_word == 0, w0, w1)
        b_word = tl.where(o_word < 2, b_low, tl.where(o_word == 2, w2, w3))
    return b_word >= threshold.to(tl.uint32)
