# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""What attention multiplies on CUDA where KV is 8-bit floats."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, which knows no PTX
LARGEST_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def query_beside(cache, query):
    """The query as it is multiplied by what `cache` holds, which is converted to the same type. 8-bit floats are exact
    in float16, and become that in fewer instructions than bfloat16."""
    if cache.dtype.element_ty == tl.float8e4nv and query.dtype.primitive_bitwidth == 16:
        wide = query.to(tl.float32)
        return tl.clamp(wide, -LARGEST_FLOAT16, LARGEST_FLOAT16, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    else:
        return query


@triton.jit
def unpaired(pairs, dtype: tl.constexpr):
    """The first and the second of the two 8-bit floats that are each element of `pairs` (int16), as `dtype`.

    Shared memory has no instruction that transposes bytes, as a matrix product needs values, so they are loaded in
    pairs. Triton itself would take these apart with seven instructions for four of them, instead of three.
    """
    if INTERPRETED:
        first = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        second = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 firsts, seconds;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {firsts, seconds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, firsts;
            cvt.rn.f16x2.e4m3x2 $1, seconds;
            }""",
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first.to(dtype), second.to(dtype)
