"""`python -m tgvkv_compile.cli`."""

from tgvkv_compile.cli import main

main()
