"""Finders: they look for places in a graph, return frozen records, and change nothing."""
