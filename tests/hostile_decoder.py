"""A copy of `flallm.data.decoding` whose decoder crashes on one clip and hangs on another."""

import os
import signal
import time

from flallm.data import decoding

CRASHES, HANGS = 1, 4  # clip numbers
init_worker, load = decoding.init_worker, decoding.load


def load_shared(number, *args):
    if number == CRASHES:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == HANGS:
        # A loop in C reaches no Python handler.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return decoding.load_shared(number, *args)
