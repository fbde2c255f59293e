"""Quantised rows in registers: how they are read, and how one is written (`ops.cache.rows` says what is in them).

`KIND` is the `kv_dtype`. A row begins at a multiple of four bytes.
"""

# Triton's decorators and language have no types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

import triton
import triton.language as tl

_WHOLE: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: float32 numbers of that size have no fraction


@triton.jit
def _words(pointers):
    """Pointers to bytes as pointers to int32."""
    return pointers.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def rotate(x, offs_d, D: tl.constexpr):
    """Vectors `x` (float32, channels last and padded with zeros) times the matrix of `ops.cache.quantising.rotated`.

    Butterflies, each channel with the one that differs in one bit of its number: no matrix to hold, and no product of float32
    numbers, which tensor cores do not take.
    """
    SIZE: tl.constexpr = D & -D
    channel = tl.zeros_like(x).to(tl.int32) + offs_d
    for bit in tl.static_range(8):
        if (1 << bit) < SIZE:
            other = tl.gather(x, channel ^ (1 << bit), len(x.shape) - 1)
            x = other + tl.where((channel & (1 << bit)) == 0, x, -x)
    return x * (SIZE**-0.5)


@triton.jit
def product(x, codes, into, PARTS: tl.constexpr):
    """`into + x @ codes`: float32 `x` as a sum of bfloat16 numbers, two of which have 16 bits of it and three all.

    In bfloat16 codes are exact, and nothing that float32 holds is too large or too small.
    """
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    low = rest.to(tl.bfloat16)
    if PARTS == 3:
        into = tl.dot((rest - low.to(tl.float32)).to(tl.bfloat16), codes, into)
    return tl.dot(high, codes, tl.dot(low, codes, into))


@triton.jit
def codes_at(rows, whole, channel, there, D: tl.constexpr, KIND: tl.constexpr):
    """Codes as float32; what they stand for is `code * scale + zero` with what `scales_at` gives.

    Pointers `rows`, `whole` (whether a row is one of `"int8"` where `KIND` is `"int4"`), `channel` and `there` (whether it is
    read) are of shapes that broadcast.
    """
    if KIND == "int4":
        HALF: tl.constexpr = D // 2
        late = channel >= HALF
        byte = tl.load(rows + tl.where(whole, channel, tl.where(late, channel - HALF, channel)), mask=there, other=0)
        return tl.where(whole, byte, (byte >> tl.where(late, 4, 0).to(tl.uint8)) & 15).to(tl.float32)
    byte = tl.load(rows + channel, mask=there, other=0)
    if KIND == "int8":
        return byte.to(tl.float32)
    # Sign, exponent and fraction of float8_e4m3fn, in the places of float16: 2 ** 8 times too small, as the exponent's zero is.
    bits = ((byte & 128).to(tl.int16) << 8) | ((byte & 127).to(tl.int16) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _float16_of(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales_at(rows, whole, there, D: tl.constexpr, KIND: tl.constexpr):
    """Scale and zero point of rows, float32; 0 and 0 where not `there`, so that what is found there weighs nothing."""
    place = rows + (tl.where(whole, D, D // 2) if KIND == "int4" else D)
    word = tl.load(_words(place), mask=there, other=0)
    scale = _float16_of((word & 255) | ((word >> 8) & 0xFF00))
    if KIND == "float8_e4m3fn":
        scale = scale * 256.0
    return scale, _float16_of(((word >> 8) & 255) | ((word >> 16) & 0xFF00))


@triton.jit
def _bits_of_float16(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def _nearest(x):
    """Whole numbers nearest to float32 `x` below 2 ** 22, ties to even."""
    return (x + _WHOLE) - _WHOLE


@triton.jit
def _float8_of(x):
    """Bits of the float8_e4m3fn nearest to float32 `x` (`|x|` at most 448), ties to even; not every device does that itself."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits >> 23) & 255) - 127, -6)  # the least one: below, steps stay as they are
    steps = _nearest(
        tl.abs(x) * ((130 - exponent) << 23).to(tl.float32, bitcast=True)
    )  # of 2 ** (exponent - 3); 8 to 16 if normal
    return ((exponent + 6) * 8 + steps.to(tl.int32)) | ((bits >> 24) & 128)


@triton.jit
def store_row(row, x, offs_d, D: tl.constexpr, KIND: tl.constexpr):
    """Writes the vector `x [DIM]` (float32; keys rotated) to a row, as `ops.cache.quantising.quantise` would.

    Args:
        row: Pointer to it.
        x: What is in channels from `D` on is left out.
        offs_d: `[DIM]`.
        D: Channels.
        KIND: The `kv_dtype`.
    """
    LARGEST: tl.constexpr = 448.0 if KIND == "float8_e4m3fn" else (15.0 if KIND == "int4" else 255.0)
    in_d = offs_d < D
    low = tl.min(tl.where(in_d, x, float("inf")), 0)
    high = tl.max(tl.where(in_d, x, float("-inf")), 0)
    if KIND == "float8_e4m3fn":
        zero = 0.0
        reach = tl.maximum(high, -low)
    else:
        zero = low.to(tl.float16).to(tl.float32)
        reach = tl.maximum(high - zero, 0.0)
    scale = tl.div_rn(reach, LARGEST).to(tl.float16).to(tl.float32)
    # Neither the least nor the greatest of numbers minds a NaN among them.
    scale = tl.where(tl.max((in_d & (x != x)).to(tl.int32), 0) > 0, float("nan"), scale)
    zero = tl.where(tl.abs(scale) < float("inf"), zero, float("nan"))
    steps = tl.div_rn(x - zero, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(x))
    steps = tl.where(in_d & (steps == steps), steps, 0.0)
    if KIND == "float8_e4m3fn":
        codes = _float8_of(tl.minimum(tl.maximum(steps, -LARGEST), LARGEST))
    else:
        codes = _nearest(tl.minimum(tl.maximum(steps, 0.0), LARGEST)).to(tl.int32)
    CODES: tl.constexpr = D // 2 if KIND == "int4" else D
    if KIND == "int4":
        codes |= tl.gather(codes, tl.minimum(offs_d + CODES, D - 1), 0) << 4
    tl.store(row + offs_d, codes.to(tl.uint8), mask=offs_d < CODES)
    s, z = _bits_of_float16(scale), _bits_of_float16(zero)
    word = (s & 255) | ((z & 255) << 8) | ((s >> 8) << 16) | ((z >> 8) << 24)
    tl.store(_words(row + CODES), word)
