"""What goes: budgets of layers, which tokens of a prompt they select, and which entry a decode step evicts."""
