"""The experiment: find a direction, choose it, measure what it does."""
