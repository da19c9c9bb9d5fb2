"""The script `sft`, `python -m sft`, and with it `torchrun -m sft`."""

import signal

# Ctrl-C ends the process without a traceback while the first imports last, too.
by_hand = signal.getsignal(signal.SIGINT)
if by_hand is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from sft.cli import main  # noqa: E402

signal.signal(signal.SIGINT, by_hand)

if __name__ == "__main__":
    main()
