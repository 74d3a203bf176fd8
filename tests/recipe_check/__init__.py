"""Programs for the environments of other quantizers: what they make of an exported recipe."""
