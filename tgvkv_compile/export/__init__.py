"""Towards engines whose shapes are fixed for good: capacities per layer, and budgets fitted into them."""
