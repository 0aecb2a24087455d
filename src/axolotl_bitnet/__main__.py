"""`python -m axolotl_bitnet`: the command line without the `axolotl` executable."""

from .cli.main import main

main(prog_name="python -m axolotl_bitnet")
