"""Banks, axes and masks brought to one form before anything matches."""
