"""The multi-scale network: policy, subnets, norms, building, checkpoints."""
