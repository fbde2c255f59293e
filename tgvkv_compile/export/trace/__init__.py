"""A model's two calls as `torch.export` sees them, checked and rewritten."""
