"""What computes: launch, ranks, Accelerate and DeepSpeed, precision, averages, and how ZeRO keeps parameters."""
