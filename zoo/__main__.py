"""`python -m zoo` and `torchrun -m zoo`: the command line."""

from zoo.cli import main

main()
