"""What a run needs on a cluster, computed from its options: memory, communication, time."""
