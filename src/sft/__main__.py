"""`python -m sft`, and with it `torchrun -m sft`."""

from sft.cli import main

main()
