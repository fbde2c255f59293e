"""The `torch.compile` backend and what users call."""
