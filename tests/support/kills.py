"""A process that is killed while it writes, again and again."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable


def killed_while_it_writes(
    target: Callable, arguments: tuple, times: int, progress: Callable[[], int], check: Callable[[], None]
) -> None:
    """Start a process so many times; kill it, each time, once it has written more than the one before.

    Args:
        progress: how much has been written.
        check: is called after each kill.
    """
    draw, context, done = random.Random(0), multiprocessing.get_context("spawn"), 0
    for _ in range(times):
        process = context.Process(target=target, args=arguments)
        process.start()
        while process.is_alive() and progress() <= done:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        assert process.is_alive(), "it was interrupted while it wrote"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        before, done = done, progress()
        assert done > before, "it had written something"
        check()
