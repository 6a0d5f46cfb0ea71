"""The Triton passes of semantic attention, under the names that reference.py gives them."""

from kernels.attention.triton_backward import gradient_pass, reduce_pass
from kernels.attention.triton_forward import apply_pass, gram_pass

__all__ = ["apply_pass", "gradient_pass", "gram_pass", "reduce_pass"]
