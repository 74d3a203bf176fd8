"""Models as blocks: layout from headers, blocks run one at a time by the model's own code."""
