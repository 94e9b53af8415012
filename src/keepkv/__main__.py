"""The command line as `python -m keepkv`."""

from keepkv.cli import main

main()
