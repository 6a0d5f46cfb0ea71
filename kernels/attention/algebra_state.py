"""What the fused algebra keeps of a sample between its launches and for the backward pass: one flat row of numbers.

Row of a sample, in the accumulator's dtype: the Grams as `algebra.split_grams` lays them out (C² + C·D + D² + C + D),
cross [C, D], attended [C, D], VECTORS rows of C, the two traces, and padding to a multiple of 16 (128-bit loads).
The rows that belong to the weights alone are kept a sample all the same: a launch then reads one row and nothing else.
Imports no triton: the fake of the operator asks for the size.
"""

from kernels.attention.algebra import gram_size

# Rows of C numbers, in this order.
LSE = 0  # log Σ exp of the attention's row
QUERY_INVERSE = 1  # 1/‖row‖ of W_q x̂, negative where the row took its floor
KEY_INVERSE = 2  # the same of W_k p
OFFSET = 3  # W_q β
QUERY_SQUARE = 4  # ‖w‖² of the rows of W_q
KEY_SQUARE = 5
# Bounds of magnitudes, for the units of fp16 coefficients (see algebra_forward.power_of_two).
GAIN_BOUND = 6  # |s γ| ‖row of W_g‖₁
SHIFT_BOUND = 7  # |s β| ‖row of W_g‖₁ + |s| ‖row of W_b‖₁
VALUE_BOUND = 8  # max |row of W_v|
PROJECTION_BOUND = 9  # max |row of W_q Γ|
KEY_BOUND = 10
VECTORS = 11


def state_size(channels: int, prior_channels: int) -> int:
    """Numbers of one sample's row, padded."""
    C, D = channels, prior_channels
    return -(-(gram_size(C, D) + 2 * C * D + VECTORS * C + 2) // 16) * 16
