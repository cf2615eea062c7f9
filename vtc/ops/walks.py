"""The kernels of `vtc.ops.kernels` in Triton's language; to be imported where Triton is installed."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def walk(cosines, mask, start, order, length, steps, slack, FARTHEST: tl.constexpr, BLOCK: tl.constexpr):
    """One program per item: [N, N] cosines, [N] mask, first token -> [steps] order."""
    item = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < length
    real = tl.load(mask + item * length + place, mask=inside, other=0) != 0
    rated = tl.where(real, float("-inf") if FARTHEST else 0.0, float("inf"))
    token = tl.load(start + item)
    for step in range(steps):
        if step > 0:
            near = tl.min(rated, 0) + (slack if FARTHEST else slack * step)
            token = tl.min(tl.where(rated <= near, place, BLOCK - 1), 0).to(tl.int64)
        tl.store(order + item * steps + step, token)
        cosine = tl.load(cosines + (item * length + token) * length + place, mask=inside, other=0.0)
        rated = tl.maximum(rated, cosine) if FARTHEST else rated + cosine
        rated = tl.where(place == token, float("inf"), rated)
