"""ONNX files, and ONNX Runtime on them."""
