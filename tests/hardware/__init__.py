"""What needs an NVIDIA GPU; skipped where there is none."""
