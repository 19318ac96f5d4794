"""Why what compression made is not smaller or not faster, in words, from measured numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

SMALL_SHARE = {"int4": 0.25, "int8": 0.35, "half": 0.6}
"""A file within this share of the fp32 bytes is as small as its numbers can be expected to make it."""
OVERHEAD_US = 12.0
"""Microseconds an operator: at or below this most of an operator's time is its call, not its arithmetic."""


class Holds(Protocol):
    """What a file holds (see kdctl.export.base.Contents)."""

    @property
    def bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def operators(self) -> int: ...
    @property
    def int8_operators(self) -> int | None: ...
    @property
    def float_operators(self) -> dict[str, int]: ...
    @property
    def delegated(self) -> float | None: ...


def explain(columns: Mapping[str, Mapping[str, Any]], contents: Holds | None) -> list[str]:
    """Notes on an artefact, from what was measured of it.

    columns: `before` (fp32 in PyTorch), `same_runtime` and `after`, each with bytes, parameters, macs and cpu_ms at
    batch 1 under "1". contents: of the artefact's file, None of a model in PyTorch.
    """
    before, same, after = (columns[name] for name in ("before", "same_runtime", "after"))
    milliseconds = same["cpu_ms"]["1"], after["cpu_ms"]["1"]
    if contents is not None and same == after:
        return [*_explain_fp32_size(before["bytes"], contents), *_explain_runtime(before, after)]
    if contents is None:
        return [
            *_explain_model_size(before["bytes"], after["bytes"], after["parameters"] / before["parameters"]),
            *explain_model_speed(*milliseconds, macs_before=before["macs"], macs=after["macs"]),
        ]
    return [
        *explain_size(
            before["bytes"], after["bytes"], weight_bytes=contents.weight_bytes, weights=contents.weights,
            parameters_before=before["parameters"], parameters=after["parameters"],
        ),
        *explain_speed(
            *milliseconds, operators=contents.operators, float_operators=contents.float_operators, macs=after["macs"],
            int8_operators=contents.int8_operators, int8_instructions=has_int8_instructions(),
            macs_before=same["macs"], delegated=contents.delegated,
        ),
    ]  # fmt: skip


def _explain_fp32_size(before: int, contents: Holds) -> list[str]:
    """A note on an fp32 file of the student itself, where it is a tenth larger than the weights."""
    if contents.bytes < 1.1 * before:
        return []
    ratio, rest = contents.bytes / before, contents.bytes - contents.weight_bytes
    return [f"{ratio:.2f}x the bytes of the weights: {rest:,} bytes describe the graph"]


def _explain_runtime(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A note on an fp32 file of the student itself, where its runtime is no faster than PyTorch."""
    speedup = before["cpu_ms"]["1"] / after["cpu_ms"]["1"]
    if speedup >= 1.1:
        return []
    word = "not faster" if speedup < 1 else "hardly faster"
    return [
        f"{word} than fp32 in PyTorch ({speedup:.2f}x): this runtime fuses or schedules nothing better for this net"
    ]


# --------------------------------------------------------------------------------------------------------------- bytes


def explain_size(
    before: int,
    after: int,
    *,
    weight_bytes: int,
    weights: int,
    parameters_before: int | None = None,
    parameters: int | None = None,
) -> list[str]:
    """Notes on the bytes of a file; none where it is as small as its kind of numbers lets expect.

    before: bytes of the fp32 weights file. after: bytes of the compressed file. weight_bytes: its constants.
    weights: how many numbers are in weights of convolutions and linears. parameters_before, parameters: of the two
    models, where the second was pruned or factorised: that alone makes a file smaller.
    """
    kept = parameters / parameters_before if parameters and parameters_before else 1.0
    kind = _numbers(weight_bytes, weights)
    ratio = after / before
    if ratio <= SMALL_SHARE.get(kind, 1.1) * kept:
        return []
    what = f"{kind} weights" if kind != "half" else "16-bit weights"
    expected = {"int4": "int4", "int8": "int8", "half": "16 bits"}.get(kind, "the removed parameters")
    verdict = _size_verdict(ratio, f"less saved than {expected} could")
    start = f"{verdict}: {ratio:.2f}x the bytes ({after:,} for {before:,})"
    own = weights * {"int4": 0.5, "int8": 1, "half": 2}.get(kind, 4)
    description, rest = after - weight_bytes, int(weight_bytes - own)
    if kind == "fp32":
        reason = f"its {weights:,} weights are 32-bit numbers, as before" + (
            f", and beside them there are {description:,} bytes of graph description" if description > own else ""
        )
    elif description > own:
        reason = f"the description of the graph takes {description:,} bytes, more than the {weights:,} {what}"
    elif rest > description:
        reason = f"{rest:,} of {weight_bytes:,} bytes of constants are not {what}: scales, biases, float weights"
    else:
        reason = f"beside {weights:,} {what} there are {description:,} bytes of graph description"
    return [f"{start}: {reason}"]


def _numbers(weight_bytes: int, weights: int) -> str:
    """Which numbers the weights are, by the bytes that each takes with all that belongs to it."""
    each = weight_bytes / max(1, weights)
    return "int4" if each < 0.95 else "half" if 1.9 <= each < 2.6 else "int8" if each < 3.5 else "fp32"


def _size_verdict(ratio: float, else_: str) -> str:
    return "not smaller than fp32" if ratio >= 1 else "hardly smaller than fp32" if ratio > 0.9 else else_


def _explain_model_size(before: int, after: int, kept: float) -> list[str]:
    ratio = after / before
    if ratio <= 0.9:
        return []
    start = f"{_size_verdict(ratio, '')}: {ratio:.2f}x the bytes ({after:,} for {before:,})"
    return [f"{start}: {kept:.0%} of the parameters are left, of 32 bits each, zero or rounded ones too"]


# --------------------------------------------------------------------------------------------------------------- speed


def explain_speed(
    before_ms: float,
    after_ms: float,
    *,
    operators: int,
    float_operators: dict[str, int],
    macs: int,
    int8_operators: int | None = None,
    int8_instructions: bool | None = None,
    macs_before: int | None = None,
    delegated: float | None = None,
) -> list[str]:
    """Notes on latency against fp32 in the same runtime; none where it is at least a tenth faster.

    before_ms, after_ms: process-CPU time of a call at batch 1. operators: how many the runtime executes.
    float_operators: those of them that compute in float, by name; int8_operators: in int8, None when unknown. macs: of
    one image, macs_before: of fp32. int8_instructions: whether the processor multiplies int8 directly, None when
    unknown. delegated: the share of operators on the runtime's fast path, None where there is only one.
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
    if int8_operators == 0 and float_operators:
        reasons.append(
            "its operators compute in float: "
            + (
                "smaller weights are converted before they are multiplied"
                if macs_before in (None, macs)
                else f"only the {1 - macs / macs_before:.0%} of multiply-accumulates that were removed can be gained"
            )
        )
    elif (count := sum(float_operators.values())) * 5 >= operators:
        names = ", ".join(f"{n} {name}" for name, n in sorted(float_operators.items(), key=lambda i: -i[1])[:3])
        reasons.append(f"{count} of {operators} operators still compute in float ({names})")
    if delegated is not None and delegated < 0.9:
        reasons.append(f"only {delegated:.0%} of operators are on the runtime's fast path")
    if int8_instructions is False and int8_operators != 0:
        reasons.append("this processor has no int8 dot-product instructions")
    return [f"{start}: {'; '.join(reasons) or 'its kernels are no faster than float ones for these shapes'}"]


def explain_model_speed(before_ms: float, after_ms: float, *, macs_before: int, macs: int) -> list[str]:
    """Notes on the latency of a smaller model in PyTorch against the whole one; none where it is a tenth faster."""
    speedup = before_ms / after_ms
    if speedup >= 1.1:
        return []
    start = f"{'not faster' if speedup < 1 else 'hardly faster'} than before ({speedup:.2f}x)"
    if macs >= 0.95 * macs_before:
        return [
            f"{start}: it has {macs / macs_before:.0%} of the MACs; PyTorch computes zero or rounded ones like others"
        ]
    return [
        f"{start}, with {macs / macs_before:.0%} of the multiply-accumulates: in PyTorch the cost of calling "
        "operators, and how well channels fill the registers, weigh more than they do"
    ]


def has_int8_instructions() -> bool | None:
    """Whether the processor has int8 dot products (VNNI, AMX, ARM dotprod); None where it does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            words = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return None
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"} & set(words)) if words else None
