"""Operations of the semantic prior embedding: Triton kernels for GPUs, PyTorch references for everything else."""

from kernels.aggregation.api import aggregate_levels
from kernels.attention.api import semantic_attention

__all__ = ["aggregate_levels", "semantic_attention"]
