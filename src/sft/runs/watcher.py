"""python watcher.py PID SECONDS: the process that `watchdog` starts beside a rank. Each byte of its standard input is a
sign of life; it ends with that input, and with the rank. Nothing of the project is imported: it starts in 20 ms."""

import os
import select
import signal
import sys
import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
PAUSE = 10  # of its ticks: whoever wakes so late was suspended or asleep, or the machine was


def watch(rank: int, hang_after: float) -> None:
    """Counts ticks without a sign of life in which both processes could run, and starts anew after any other."""
    tick = min(1.0, hang_after / 10)
    allowed = [hang_after, hang_after + min(60, hang_after / 4)]
    numbers = [signal.SIGUSR2, signal.SIGALRM]
    silent = 0.0
    while numbers:
        begun = now()
        readable, _, _ = select.select([0], [], [], tick)
        if readable:
            if not os.read(0, 1 << 16):
                return
            time.sleep(tick)  # it is well: no need to look at each of its signs
        paused = now() - begun > PAUSE * max(tick, 0.1)
        if os.getppid() != rank:
            return
        if readable or paused or is_stopped(rank):
            silent, numbers = 0.0, [signal.SIGUSR2, signal.SIGALRM]
            continue
        silent += tick
        if silent >= allowed[-len(numbers)]:
            os.kill(rank, numbers.pop(0))


def is_stopped(pid: int) -> bool:
    """Whether a process is suspended, or a debugger has stopped it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def now() -> float:
    """Seconds, those included in which the machine slept."""
    return time.clock_gettime(CLOCK)


if __name__ == "__main__":
    watch(int(sys.argv[1]), float(sys.argv[2]))
