"""TensorRT engines, and who runs them."""
