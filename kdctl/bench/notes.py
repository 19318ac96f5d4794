"""Why a compressed file is not smaller or not faster, in words, from measured numbers."""

from __future__ import annotations

SMALL_SHARE = 0.35
"""An int8 file within this share of the fp32 bytes is as small as int8 can be expected to make it."""
OVERHEAD_US = 12.0
"""Microseconds an operator: at or below this most of an operator's time is its call, not its arithmetic."""


def explain_size(before: int, after: int, *, weight_bytes: int, weights: int) -> list[str]:
    """Notes on the bytes of a file; none where it is as small as expected.

    before: bytes of the fp32 weights file. after: bytes of the compressed file. weight_bytes: its constants.
    weights: how many numbers are in weights of convolutions and linears.
    """
    ratio = after / before
    if ratio <= SMALL_SHARE:
        return []
    description = after - weight_bytes
    verdict = (
        "not smaller than fp32"
        if ratio >= 1
        else "hardly smaller than fp32"
        if ratio > 0.9
        else "less saved than int8 could"
    )
    start = f"{verdict}: {ratio:.2f}x the bytes ({after:,} for {before:,})"
    if description > weights:
        reason = f"the description of the graph takes {description:,} bytes, more than the {weights:,} int8 weights"
    elif weight_bytes - weights > description:
        rest = weight_bytes - weights
        reason = f"{rest:,} of {weight_bytes:,} bytes of constants are not int8 weights: scales, biases, float weights"
    else:
        reason = f"beside {weights:,} int8 weights there are {description:,} bytes of graph description"
    return [f"{start}: {reason}"]


def explain_speed(
    before_ms: float,
    after_ms: float,
    *,
    operators: int,
    float_operators: dict[str, int],
    macs: int,
    int8_instructions: bool | None = None,
) -> list[str]:
    """Notes on latency against fp32 in the same runtime; none where it is at least a tenth faster.

    before_ms, after_ms: process-CPU time of a call at batch 1. operators: how many the runtime executes.
    float_operators: those of them that compute in float, by name. macs: of one image.
    int8_instructions: whether the processor multiplies int8 directly, None when unknown.
    """
    speedup = before_ms / after_ms
    if speedup >= 1.1:
        return []
    start = f"{'not faster' if speedup < 1 else 'hardly faster'} than fp32 in the same runtime ({speedup:.2f}x)"
    reasons = []
    each = 1000 * after_ms / max(1, operators)
    if each <= OVERHEAD_US:
        reasons.append(
            f"{operators} operators at {each:.1f} us each for {macs:,} multiply-accumulates: "
            "the cost of calling operators outweighs their arithmetic"
        )
    if (count := sum(float_operators.values())) * 5 >= operators:
        names = ", ".join(f"{n} {name}" for name, n in sorted(float_operators.items(), key=lambda i: -i[1])[:3])
        reasons.append(f"{count} of {operators} operators still compute in float ({names})")
    if int8_instructions is False:
        reasons.append("this processor has no int8 dot-product instructions")
    return [f"{start}: {'; '.join(reasons) or 'its int8 kernels are no faster than float ones for these shapes'}"]


def has_int8_instructions() -> bool | None:
    """Whether the processor has int8 dot products (VNNI, AMX, ARM dotprod); None where it does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return None
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(words)) if words else None
