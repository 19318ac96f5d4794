"""What turns a model into a file that another runtime opens: a table, one file a target."""

EXPORTERS = {
    "onnx": ("onnx:Onnx", "ONNX, run by ONNX Runtime: fp32, any batch size, preprocessing inside"),
}
