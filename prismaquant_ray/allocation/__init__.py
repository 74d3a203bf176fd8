"""Choosing one format per fused group: an exact multiple-choice knapsack in integer bytes, numpy only."""
