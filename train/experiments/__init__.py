"""Studies that start many runs and compare them."""
