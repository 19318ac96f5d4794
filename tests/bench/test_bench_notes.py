"""What the notes say of given numbers."""

from __future__ import annotations

import pytest

from kdctl.bench.notes import explain_size, explain_speed


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
