"""What an export measures of itself: errors, rounding, memory, receptive field."""
