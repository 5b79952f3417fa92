"""What every room may use: checks, processes, torch's private names. It knows nothing of goals."""
