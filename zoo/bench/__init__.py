"""Timing side by side with a peer: interleaved medians, peak memory, scaling curves, one report."""
