"""Inserters for graphs from dynamo: they change the graph at the places that the plan names, and never search."""
