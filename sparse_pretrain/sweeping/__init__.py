"""Sweeps: searching the options of training runs for the lowest validation loss, on Optuna. See docs/sweeps.md."""
