"""Row programs: what one row of an expert's work is, whichever way the layer was spelled, and its body."""
