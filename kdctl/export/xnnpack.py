"""What an ExecuTorch program hands to XNNPACK: its graphs, read back from the program's bytes."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

_MOVES = frozenset({
    "Convert", "StaticTranspose", "StaticReshape", "StaticSlice", "StaticConstantPad", "Concatenate2", "Concatenate3",
    "Concatenate4", "Concatenate5", "Copy", "MaxPooling2d",
})  # fmt: skip
"""Operators that move or convert numbers and compute nothing with them."""


class Graph:
    """One graph of XNNPACK.

    constant_bytes: held in the graph itself. nodes: names and attributes of its operators, in order.
    """

    def __init__(self, blob: bytes) -> None:
        from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

        header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
        start = header.flatbuffer_offset
        document = _decompile(blob[start : start + header.flatbuffer_size])
        self.constant_bytes = int(header.constant_data_size)
        self.nodes: list[tuple[str, dict[str, Any]]] = [
            (node["xnode_union_type"].removeprefix("XNN"), node["xnode_union"]) for node in document["xnodes"]
        ]
        values = [value["xvalue_union"] for value in document["xvalues"]]
        tensors = [value.get("tensor_value", value) for value in values]
        self._tensors = {tensor["id_out"]: tensor for tensor in tensors}

    def operators(self) -> Counter[str]:
        return Counter(name for name, _ in self.nodes)

    def int8_operators(self) -> Counter[str]:
        """Those whose input is int8, fixed (qint8) or found at each call (qdint8)."""
        return Counter(name for name, node in self.nodes if "int8" in self._input_type(node))

    def float_operators(self) -> Counter[str]:
        """Those that compute in float."""
        floats = self.operators() - self.int8_operators()
        return Counter({name: count for name, count in floats.items() if name not in _MOVES})

    def weights(self) -> int:
        """Numbers in filters of convolutions and linears."""
        total = 0
        for _, node in self.nodes:
            if "filter_id" in node:
                size = 1
                for length in self._tensors[node["filter_id"]]["dims"]:
                    size *= int(length)
                total += size
        return total

    def _input_type(self, node: dict[str, Any]) -> str:
        tensor = self._tensors.get(node.get("input1_id", node.get("input_id")), {})
        return str(tensor.get("datatype", ""))


def _decompile(flatbuffer: bytes) -> dict[str, Any]:
    """The graph as a JSON document, by ExecuTorch's own schema; infinite bounds become None."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import _get_schema_bytes
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory() as folder:
        schema, data = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
        schema.write_bytes(_get_schema_bytes())
        data.write_bytes(flatbuffer)
        _flatc_decompile(folder, str(schema), str(data), ["--raw-binary"])
        text = data.with_suffix(".json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(re.sub(r"(: )[-+]?(inf|nan)", r"\1null", text))
    return document
