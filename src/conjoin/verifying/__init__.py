"""Two models side by side: what each call leaves behind, taken apart and compared."""
