"""`python -m sft`, for launchers that start a module: torchrun -m sft train ..."""

from sft.cli import main

if __name__ == "__main__":
    main()
