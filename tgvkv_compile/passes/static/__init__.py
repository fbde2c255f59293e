"""Passes of exported graphs alone, whose shapes are static."""
