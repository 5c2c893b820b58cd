"""Which rank computes which expert, and how rows travel between ranks: values and what they cost."""
