"""From torch's FX graph to canonical words: each spelling of an operation is said in one way."""
