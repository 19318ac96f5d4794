"""What a net takes in ONNX Runtime on this machine, predicted from its operators, each measured once."""
