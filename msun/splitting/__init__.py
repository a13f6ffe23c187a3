"""Suggesting where to cut, from a report."""
