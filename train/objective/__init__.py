"""What is learned: the losses, the teacher's targets, and the task that puts them together."""
