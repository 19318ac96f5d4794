"""The YAML reader: values by the rules of YAML 1.2, the line of everything, and bounds."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdctl.config import yaml_io
from kdctl.config.dump import _Dumper
from kdctl.config.yaml_io import read_file, read_value
from kdctl.errors import ConfigError, MissingError


def value_of(text: str):
    return read_value(text, "override 1")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("5e-4", 5e-4), (".5", 0.5), ("1E5", 1e5), ("5.", 5.0), ("-1.5e+2", -150.0), ("0.0", 0.0),
        ("3", 3), ("-7", -7), ("+4", 4), ("010", 10), ("0x1f", 31), ("0o17", 15),
        ("true", True), ("false", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("True", "True"), ("NO", "NO"), ("y", "y"),
        ("2024-01-02", "2024-01-02"), ("1:30", "1:30"), ("1_000", "1_000"), ("1e", "1e"), ("e3", "e3"), (".", "."),
        ("nan", "nan"), ("inf", "inf"), ("'1e-3'", "1e-3"), ('"true"', "true"), ("'~'", "~"), ("=", "="),
        ("[1, a, 2.5]", [1, "a", 2.5]), ("{a: {b: 1}}", {"a": {"b": 1}}), ("{0: 0, 5: 1000}", {0: 0, 5: 1000}),
        ("runs/a=b c", "runs/a=b c"), ("Käse", "Käse"), ("[]", []), ("{}", {}), ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_scalars(text, value):
    got = value_of(text)
    assert got == value and type(got) is type(value)


def test_every_value_has_its_line(write):
    path = write("# a comment\na: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\ne:\n  f: >\n    folded\n")
    document = read_file(path)
    assert document.data == {"a": 1, "b": ["x", {"c": 2, "d": 3}], "e": {"f": "folded\n"}}
    lines = {key: origin.line for key, origin in document.origins.items()}
    assert lines[("a",)] == 2 and lines[("b",)] == 3 and lines[("b", 0)] == 4
    assert lines[("b", 1, "c")] == 5 and lines[("b", 1, "d")] == 6 and lines[("e", "f")] == 8
    assert {origin.file for origin in document.origins.values()} == {str(path)}
    assert document.origin(("b", 1, "nothing")) == document.origins[("b", 1)]


def test_key_and_value_on_different_lines(write):
    origin = read_file(write("a:\n\n  3\n")).origins[("a",)]
    assert (origin.key_line, origin.line) == (1, 3)


def test_anchors_are_copied_out(write):
    document = read_file(write("a: &x {k: [1]}\nb: *x\nc: [*x, *x]\n"))
    assert document.data["b"] == {"k": [1]} and document.data["c"] == [{"k": [1]}] * 2
    document.data["b"]["k"].append(2)
    assert document.data["a"] == {"k": [1]}


def test_a_byte_order_mark_is_no_part_of_the_text(write):
    assert read_file(write(b"\xef\xbb\xbfa: 1\n")).data == {"a": 1}


BAD = {
    "duplicate key": ("a: 1\nb: 2\na: 3\n", 3, "stands twice"),
    "duplicate in flow": ("x: {a: 1, a: 2}\n", 1, "stands twice"),
    "duplicate number key": ("w:\n  1: a\n  01: b\n", 3, "stands twice"),
    "tab": ("a:\n\tb: 1\n", 2, "tab"),
    "tab after spaces": ("a:\n  b: 1\n\tc: 1\n", 3, "tab"),
    "tag": ("a: 1\nb: !!python/object:os.system ls\n", 2, "not allowed"),
    "known tag": ("a: !!str 1\n", 1, "not allowed"),
    "bare tag": ("a: ! 1\n", 1, "not allowed"),
    "tag on a map": ("a: !x {b: 1}\n", 1, "not allowed"),
    "nan": ("a: 1\nb: .nan\n", 2, "finite"),
    "infinity": ("a: -.inf\n", 1, "finite"),
    "number over": ("a: 1e999\n", 1, "too large"),
    "5000 digits": ("a: " + "9" * 5000 + "\n", 1, "5000 digits"),
    "64 bits": ("a: 9223372036854775808\n", 1, "too large"),
    "unclosed list": ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
    "unclosed quote": ("a: 'x\n", 1, "not valid YAML"),
    "bad indentation": ("a: 1\n  b: 2\n", 2, "not valid YAML"),
    "at sign": ("a: @x\n", 1, "quotes"),
    "two documents": ("a: 1\n---\nb: 2\n", 2, "second document"),
    "list": ("- a\n- b\n", 1, "a list"),
    "text": ("hello\n", 1, "'hello'"),
    "recursive anchor": ("a: &x\n  b: *x\n", 2, "contains itself"),
    "recursive root": ("&x\na: *x\n", 2, "contains itself"),
    "unknown alias": ("a: &left 1\nb: *lefft\n", 2, "no anchor"),
    "merge key": ("a: &x {b: 1}\nc:\n  <<: *x\n", 3, "extends"),
    "key is a list": ("? [a, b]\n: 1\n", 1, "a key is text"),
    "key is true": ("true: 1\n", 1, "a key is text"),
    "key is a fraction": ("a:\n  0.5: 1\n", 2, "a key is text"),
    "key is null": ("~: 1\n", 1, "a key is text"),
    "deep lists": ("a: " + "[" * 5000, 1, "levels deep"),
    "deep maps": ("a: " + "{a: " * 5000, 1, "levels deep"),
    "many values": ("a: [" + "1," * 50_000 + "]", 1, "values"),
    "control character": ("a: 1\nb: \x07\n", 2, "control character"),
    "nul": (b"a: 1\nb: \x00\n", 2, "binary"),
    "latin-1": (b"a: 1\nb: caf\xe9\n", 2, "UTF-8"),
    "utf-16": ("a: 1\n".encode("utf-16"), 1, "UTF-8"),
    "image": (b"\x89PNG\r\n\x1a\n\x00\x00", 1, "UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_with_its_line(write, name):
    text, line, words = BAD[name]
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == (str(path), line) and words in problem.message + (problem.hint or "")
    assert len(str(problem)) < 1000


def test_an_alias_bomb_is_stopped(write):
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match="unfold"):
        read_file(write("\n".join(rows)))


def test_nesting_through_aliases_is_stopped(write):
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)]
    with pytest.raises(ConfigError, match="too deep"):
        read_file(write("\n".join(rows)))


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "~\n"])
def test_an_empty_file(write, text):
    with pytest.raises(ConfigError, match="empty"):
        read_file(write(text))


def test_a_file_that_is_too_large(write):
    with pytest.raises(ConfigError, match="larger than"):
        read_file(write("a: " + "x" * yaml_io.MAX_BYTES))


def test_a_missing_file_names_its_neighbour(write, tmp_path):
    write("a: 1", "quickstart.yaml")
    with pytest.raises(MissingError) as caught:
        read_file(tmp_path / "quikstart.yaml")
    assert caught.value.code == 4 and "quickstart.yaml" in (caught.value.problems[0].hint or "")


def test_a_folder_and_an_impossible_path(tmp_path):
    with pytest.raises(ConfigError, match="this is a folder"):
        read_file(tmp_path)
    with pytest.raises(MissingError):
        read_file(tmp_path / "a\0b")


def test_the_pure_python_parser_says_the_same(write, monkeypatch):
    monkeypatch.setattr(yaml_io, "_LOADER", yaml.SafeLoader)
    for text, line, _ in BAD.values():
        with pytest.raises(ConfigError) as caught:
            read_file(write(text))
        assert caught.value.problems[0].line in (line, line - 1, line + 1)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["1e-3", "yes", "no", "null", "~", "", "0x1f", "1:30", ".inf", "- a", "a: b", "#", "2001-01-01"]),
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc19.~-e: ", min_size=1, max_size=4).filter(lambda k: k != "<<"), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_what_is_dumped_reads_back(value):
    text = yaml.dump({"a": value}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    got = yaml_io._plain(yaml_io._Reader("x").read(yaml_io._decode(text.encode(), "x")), "x", "file")[0]
    assert got == {"a": value} and repr(got) == repr({"a": value})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text("ab:-[]{}&*!|>'\"#%@`\n\t ?,0.e", max_size=40).map(str.encode))
def test_no_input_raises_anything_else(raw):
    try:
        root = yaml_io._Reader("x").read(yaml_io._decode(raw, "x"))
        if root is not None:
            yaml_io._plain(root, "x", "file")
    except ConfigError as error:
        assert error.problems
