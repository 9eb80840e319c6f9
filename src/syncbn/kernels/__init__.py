"""One replica's arithmetic, fast. No replica talks to another in here, and nothing is differentiated."""
