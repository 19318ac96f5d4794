"""What turns a model into a file that another runtime opens: a table, one file a target."""

EXPORTERS = {
    "onnx": ("onnx:Onnx", "ONNX, run by ONNX Runtime: fp32, any batch size, preprocessing inside"),
    "openvino": ("openvino:OpenVino", "OpenVINO, run by its CPU plug-in: any batch size, preprocessing inside"),
    "torchscript": ("torchscript:TorchScript", "TorchScript, run by PyTorch's own interpreter without Python code"),
    "pt2": ("pt2:Pt2", "PyTorch's exported program (.pt2), fp32, run by torch.export's loader"),
    "executorch": (
        "executorch:ExecuTorch",
        "ExecuTorch (.pte) for Android and iOS, with XNNPACK: PyTorch Mobile's successor",
    ),
    "litert": ("litert:LiteRt", "LiteRT (.tflite, the TensorFlow Lite format) with XNNPACK, for Android and iOS"),
}
