"""A small, exact test-bed for mask quality: the sparsest networks for the Cubist Spiral, and what pruning finds."""
