"""The compact cache: how it is packed, and what a decode step and a later turn do to it."""
