"""One-shot pruning of trained models: magnitude, Wanda, SparseGPT and OATS, block by block with calibration data."""
