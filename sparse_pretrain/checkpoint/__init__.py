"""Checkpoints that are either whole or not there: writing, verifying, finding, resuming."""
