"""Which kernels torch computes with on a CPU, settled before anything is computed in several threads.

torch hands many functions of floats to MKL, which decides at the first call of each by which kernel it computes it.
When several threads make that call at once, one of them may compute its part with a kernel that is less accurate, and
nothing tells (torch issue 188792; seen with the MKL 2024.2 of the wheels). It befell one process in some hundreds on a
busy machine: half of its first batch had residual masses that were wrong in the fifth digit, and the digest was another
one. A call for one element stays in one thread, and every later one finds the decision made.
"""

import torch

FUNCTIONS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan"),
    *("tanh", "trunc"),
)
"""What torch lets MKL compute: what a selection needs, and what a teacher or a dataset may."""


def settle() -> None:
    """Call each function for one element, of each dtype that MKL computes."""
    for dtype in (torch.float32, torch.float64):
        for name in FUNCTIONS:
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))
