"""Tools on `torch.fx` graphs that every pass shares; knows nothing of attention or eviction."""
