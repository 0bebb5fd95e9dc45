"""ONNX graphs of checkpoints: traced without weights, tied to their files, checked."""
