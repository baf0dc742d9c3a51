"""Where forge-ray runs: joining or starting Ray."""
