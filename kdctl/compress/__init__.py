"""What makes a trained model smaller or faster: a table, one file a stage."""

COMPRESSORS = {
    "quantize": ("quantize:Quantize", "post-training static int8 of convolutions and linears, to ONNX"),
}
