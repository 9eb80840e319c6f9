"""What the user holds: weights, moving statistics, configuration."""
