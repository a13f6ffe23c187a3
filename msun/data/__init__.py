"""Labelled images and training crops."""
