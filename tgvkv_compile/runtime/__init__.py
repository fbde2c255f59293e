"""What lives while a request runs: the compact cache and the logical handles that stand for it."""
