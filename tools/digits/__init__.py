"""The training of the small model that `tgvkv_compile.digits` ships; `python -m tools.digits.train` makes it anew."""
