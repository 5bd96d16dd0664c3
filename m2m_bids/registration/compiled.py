"""Loops that Numba compiles, where PyTorch's own on the CPU are slow or take several passes.

Every element of a result is the work of one thread, in one order: the number of threads does not
show in a single bit. Kernels take contiguous arrays and end with the range of items that is a
thread's share. They fill and copy arrays by loops: Numba compiles ``x[:] = y`` for a second.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from numba import njit

# It tells every instruction that it compiles to who asks for all messages.
logging.getLogger("numba").setLevel(logging.WARNING)

# Numbers that are not worth another thread.
_FEW = 2**16

compiled = njit(nogil=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})
"""Compile a kernel: products and sums may become one operation; NaN stays NaN."""


def share(kernel: Callable[..., None], n_items: int, n_numbers: int, *args: object) -> None:
    """
    Run a kernel for all items, shared among PyTorch's threads as far as there is enough to do.

    Parameters
    ----------
    kernel : callable
        Takes the arguments, and the first item and the end of a share.
    n_items : int
    n_numbers : int
        That all items compute.
    *args
    """
    n_threads = min(torch.get_num_threads(), n_items, n_numbers // _FEW)
    if n_threads < 2:
        kernel(*args, 0, n_items)
        return
    bounds = [n_items * i // n_threads for i in range(n_threads + 1)]
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(lambda *some: kernel(*args, *some), bounds[:-1], bounds[1:]))
