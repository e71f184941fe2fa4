"""What goes on inside a trained model: attention sinks, outlier features, masks, and what pruning took away."""
