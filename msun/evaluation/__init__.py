"""Accuracy, cost and batch norm statistics by image size."""
