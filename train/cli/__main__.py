"""`python -m train.cli`: the command where the console script is not installed."""

from train.cli import main

main()
