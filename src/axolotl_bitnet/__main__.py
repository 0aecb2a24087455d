"""`python -m axolotl_bitnet`: the command line without the `axolotl` executable."""

from .integration.cli import main

main(prog_name="python -m axolotl_bitnet")
