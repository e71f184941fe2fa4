"""Optimizers and learning-rate schedules. They know masks as tensors, and nothing of sparsity recipes."""
