"""Features to Gram matrices to HSIC to CKA: torch and numpy only."""
