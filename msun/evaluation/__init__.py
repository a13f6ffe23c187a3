"""Evaluation by image size, and re-estimated batch norm statistics."""
