"""Models that embed images and text, and models that write captions."""
