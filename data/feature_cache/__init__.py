"""The node's disk keeps a frozen teacher's features of planned crops."""
