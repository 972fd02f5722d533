"""Two models side by side: all that each call leaves behind, taken apart and compared."""
