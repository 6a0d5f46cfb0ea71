"""What is kept: checkpoints and their state, copies elsewhere, resuming, exported models."""
