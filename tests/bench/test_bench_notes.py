"""What the notes say of given numbers."""

from __future__ import annotations

import pytest

from kdctl.bench.notes import explain, explain_size, explain_speed
from kdctl.export.base import Contents


def test_nothing_to_explain():
    assert explain_size(1_000_000, 270_000, weight_bytes=265_000, weights=250_000) == []
    assert explain_speed(0.6, 0.3, operators=40, float_operators={}, macs=40_000_000) == []


def test_description_outweighs_the_weights():
    (note,) = explain_size(20_000, 18_000, weight_bytes=6_000, weights=4_000)
    assert note.startswith("less saved than int8 could: 0.90x the bytes (18,000 for 20,000)")
    assert "description of the graph takes 12,000 bytes, more than the 4,000 int8 weights" in note


def test_description_beside_the_weights():
    (note,) = explain_size(100_000, 40_000, weight_bytes=27_000, weights=25_000)
    assert "beside 25,000 int8 weights there are 13,000 bytes of graph description" in note


def test_constants_that_are_not_int8():
    (note,) = explain_size(10_000, 10_500, weight_bytes=9_000, weights=3_000)
    assert note.startswith("not smaller than fp32: 1.05x")
    assert "6,000 of 9,000 bytes of constants are not int8 weights" in note


def test_operator_overhead():
    (note,) = explain_speed(0.020, 0.025, operators=10, float_operators={"Sub": 1}, macs=50_000)
    assert note.startswith("not faster than fp32 in the same runtime (0.80x)")
    assert "10 operators at 2.5 us each for 50,000 multiply-accumulates" in note
    assert "float" not in note


def test_operators_left_in_float():
    (note,) = explain_speed(10.5, 10.0, operators=50, float_operators={"Softmax": 4, "Erf": 12}, macs=10**9)
    assert note.startswith("hardly faster") and "16 of 50 operators still compute in float (12 Erf, 4 Softmax)" in note


@pytest.mark.parametrize("known, said", [(False, True), (True, False), (None, False)])
def test_processor_without_int8(known, said):
    (note,) = explain_speed(10.0, 12.0, operators=50, float_operators={}, macs=10**9, int8_instructions=known)
    assert ("no int8 dot-product instructions" in note) is said
    assert said or "no faster than float ones" in note


# ------------------------------------------------------------------------ what is not int8, and whole artefacts


@pytest.mark.parametrize(
    ("numbers", "after", "weight_bytes", "note"),
    [
        ("half", 2_100_000, 2_010_000, None),
        ("half", 3_000_000, 2_010_000, "less saved than 16 bits could: 0.75x the bytes"),
        ("int4", 800_000, 600_000, None),
        ("int4", 1_500_000, 600_000, "the description of the graph takes 900,000 bytes, more than the 1,000,000 int4"),
        ("fp32", 4_050_000, 4_010_000, None),
        ("fp32", 4_500_000, 4_010_000, "its 1,000,000 weights are 32-bit numbers, as before"),
    ],
)
def test_numbers_that_are_not_int8(numbers, after, weight_bytes, note):
    found = explain_size(4_000_000, after, weight_bytes=weight_bytes, weights=1_000_000)
    assert found == [] if note is None else note in found[0]


def test_a_pruned_file_is_held_to_what_is_left():
    known = {"weight_bytes": 1_310_000, "weights": 300_000}
    assert explain_size(4_000_000, 1_330_000, **known, parameters_before=1_000_000, parameters=310_000) == []
    (note,) = explain_size(4_000_000, 2_000_000, **known, parameters_before=1_000_000, parameters=310_000)
    assert note.startswith("less saved than the removed parameters could: 0.50x")


def column(bytes_, parameters, macs, cpu_ms):
    return {"bytes": bytes_, "parameters": parameters, "macs": macs, "cpu_ms": {"1": cpu_ms}}


def test_a_smaller_model():
    whole = column(1_000_000, 250_000, 40_000_000, 2.0)
    columns = {"before": whole, "same_runtime": whole}
    assert explain(columns | {"after": column(500_000, 125_000, 20_000_000, 1.4)}, None) == []
    size, speed = explain(columns | {"after": column(1_001_000, 250_000, 40_000_000, 2.1)}, None)
    assert size.startswith("not smaller than fp32: 1.00x the bytes (1,001,000 for 1,000,000): 100% of the parameters")
    assert (
        speed
        == "not faster than before (0.95x): it has 100% of the MACs; PyTorch computes zero or rounded ones like others"
    )
    (note,) = explain(columns | {"after": column(500_000, 125_000, 20_000_000, 1.9)}, None)
    assert note.startswith("hardly faster than before (1.05x), with 50% of the multiply-accumulates")


def test_weights_alone():
    """fp16 or int4 weights under float operators: smaller, and no faster by design."""
    columns = {
        "before": column(1_000_000, 250_000, 40_000_000, 2.0),
        "same_runtime": column(1_000_000, 250_000, 40_000_000, 10.0),
        "after": column(520_000, 250_000, 40_000_000, 10.2),
    }
    contents = Contents(520_000, 502_000, 249_000, 30, 0, {"Conv": 20})
    (note,) = explain(columns, contents)
    assert note.startswith("not faster than fp32 in the same runtime (0.98x): its operators compute in float: smaller")
    assert "int8" not in note


def test_a_runtime_that_does_not_tell():
    columns = {
        "before": column(1_000_000, 250_000, 40_000_000, 2.0),
        "same_runtime": column(1_000_000, 250_000, 40_000_000, 10.0),
        "after": column(300_000, 250_000, 40_000_000, 10.5),
    }
    (note,) = explain(columns, Contents(300_000, 260_000, 249_000, 40, None, {"Conv": 20}, delegated=0.5))
    assert "20 of 40 operators still compute in float (20 Conv)" in note
    assert "only 50% of operators are on the runtime's fast path" in note
