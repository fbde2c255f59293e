"""What makes parts of the package, and does not travel with it."""
