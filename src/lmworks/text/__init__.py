"""Text: reading it from files, light cleaning, the split, and a language of our own to try everything on."""
