"""What keeps a run honest: heartbeats, watchdog, signals, health, traces, and how it ends badly."""
