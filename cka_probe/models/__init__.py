"""Names and files to networks with their weights and preprocessing."""
