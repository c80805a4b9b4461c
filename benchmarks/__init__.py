"""Speed and memory, as ratios within one run; no test depends on these measurements."""
