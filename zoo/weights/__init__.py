"""Weights: reading and saving them safely, official layouts, checkpoint cards and downloads."""
