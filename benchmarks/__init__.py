"""Speed of the 2:4 operators, layers and training steps on this machine. Plain torch; runs from a checkout."""
