"""The lanes of a warp."""

import numpy as np

LANES = 32
LANE = np.arange(LANES)
GROUP, THREAD = LANE // 4, LANE % 4  # "groupID" and "threadID_in_group" of the PTX ISA
ALL = np.ones(LANES, bool)
